"""What is published: one version, metadata, a core that needs no extra, and all tests inside."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import paramlora

ROOT = Path(__file__).parents[1]
# what no extra is allowed to be needed for: a process in which they cannot be imported
ALONE = """
import sys, pkgutil, importlib, importlib.abc
blocked = {blocked!r}
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"no extra here: {{name}}", name=name)
sys.meta_path.insert(0, Refuse())
import torch, paramlora
from torch import nn
for name in paramlora.__all__:
    assert getattr(paramlora, name) is not None
from paramlora import checkpoint, files, formats
for module in pkgutil.iter_modules(formats.__path__, "paramlora.formats."):
    importlib.import_module(module.name)
base = {folder!r} + "/base.safetensors"
adapter = {folder!r} + "/adapter.safetensors"
model = nn.Sequential(nn.Linear(4, 3))
paramlora.save_adapter(paramlora.attach(model, {{"0": {{"r": 2}}}}), adapter)
paramlora.load_adapter(paramlora.detach(model), adapter)
torch.save(paramlora.merge(model).state_dict(), {folder!r} + "/base.pt")
files.merge({folder!r} + "/base.pt", [adapter], base)
print("done", len(paramlora.__all__))
"""


def pyproject():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_the_core_needs_no_extra(tmp_path):
    extras = pyproject()["project"]["optional-dependencies"]
    names = {re.split(r"[\s;<>=\[]", one)[0] for group in extras.values() for one in group}
    blocked = {name.replace("-", "_") for name in names} | {"sklearn", "lycoris", "numpy", "click"}
    assert {"typer", "rich", "transformers", "diffusers", "peft", "lightning", "triton"} <= blocked
    code = ALONE.format(blocked=blocked, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["done", str(len(paramlora.__all__))], done.stderr


def test_there_is_one_version(capsys):
    pytest.importorskip("typer")
    from paramlora.cli import main

    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"paramlora {paramlora.__version__}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+", paramlora.__version__)
    assert pyproject()["tool"]["setuptools"]["dynamic"]["version"]["attr"].startswith("paramlora.")
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {paramlora.__version__}\n" in citation


def test_the_metadata_is_todays():
    project = pyproject()["project"]
    assert project["license"] == "MIT" and (ROOT / "LICENSE").read_text().startswith("MIT License")
    assert project["requires-python"] == ">=3.10"
    assert not any(one.startswith("License ::") for one in project["classifiers"])
    assert "Typing :: Typed" in project["classifiers"] and len(project["keywords"]) > 3


def test_every_file_of_the_package_is_shipped():
    shipped = pyproject()["tool"]["setuptools"]["package-data"]["paramlora"]
    package = ROOT / "paramlora"
    files = [p.relative_to(package) for p in package.rglob("*") if p.is_file()]
    others = {str(p) for p in files if p.suffix not in (".py", ".pyc")}
    assert others == set(shipped)


def for_an_index(*addresses):
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.for_an_index((ROOT / "README.md").read_text("utf-8"), *addresses)


def test_the_readme_on_an_index_has_no_link_that_leads_nowhere():
    link = re.compile(r"\]\(([^)\s]*)\)")
    text = for_an_index()
    assert not link.findall(text) and "![" not in text
    assert "First fine-tune (`docs/first_fine_tune.md`)" in text and "(Speed, with" in text
    linked = link.findall(for_an_index("https://forge.example/b/", "https://forge.example/raw/"))
    assert len(linked) > 20 and all(one.startswith("https://forge.example/") for one in linked)
    assert "https://forge.example/raw/docs/demo.png" in linked


def test_the_source_distribution_is_told_of_everything_that_tests_read():
    told = (ROOT / "MANIFEST.in").read_text("utf-8")
    grafted = set(re.findall(r"^graft (\S+)", told, re.M))
    assert grafted == {"tests", "docs", "examples", "benchmarks", ".ci"}
    included = [n for line in re.findall(r"^include (.*)", told, re.M) for n in line.split()]
    found = {path.name for pattern in included for path in ROOT.glob(pattern)}
    assert {
        "conftest.py",
        "example_config.json",
        "constraints.txt",
        "CITATION.cff",
        "mkdocs.yml",
    } <= found
