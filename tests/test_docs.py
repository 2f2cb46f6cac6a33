"""The blocks of the documents run, in order, each document in a folder of its own."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")

import paramlora
from paramlora.cli import main

DOCS = Path(__file__).parents[1] / "docs"
NEEDS = {
    "arithmetic.md": ["torch"],
    "checkpoints.md": ["torch"],
    "first_fine_tune.md": ["transformers"],
    "recipes.md": ["transformers", "diffusers", "peft"],
    "trainers.md": ["trl"],
    "from_kohya.md": ["diffusers"],
}
NUMBER = re.compile(r"-?\d+\.\d+")


@pytest.mark.filterwarnings("ignore:::transformers")
@pytest.mark.parametrize("name", NEEDS)
def test_the_blocks_run(name, tmp_path, monkeypatch, capsys):
    for module in NEEDS[name]:
        pytest.importorskip(module)
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(DOCS.parent / "examples")
    blocks = re.findall(r"```(python|sh|text)\n(.*?)```", (DOCS / name).read_text("utf-8"), re.S)
    assert len(blocks) > 3
    names = {}
    for kind, text in blocks:
        if kind == "python":
            capsys.readouterr()
            exec(compile(text, name, "exec"), names)
        elif kind == "sh":
            run(text)
        else:  # what the block before it prints
            same(capsys.readouterr().out, text)


def run(text):
    for line in text.strip().splitlines():
        program, *arguments = shlex.split(line)
        assert program == "paramlora"
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0, line


def same(printed, written):
    """The same words, and the same numbers but for another machine's roundings."""
    assert NUMBER.sub("#", printed).strip() == NUMBER.sub("#", written).strip()
    numbers = [float(one) for one in NUMBER.findall(printed)]
    wanted = [float(one) for one in NUMBER.findall(written)]
    assert numbers == pytest.approx(wanted, rel=0.05, abs=0.03), printed


def test_the_notebook_is_the_first_recipe_and_runs(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    notebook = DOCS.parent / "examples" / "first_fine_tune.ipynb"
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    text = (DOCS / "recipes.md").read_text("utf-8")
    recipe = text[text.index("## A language model") : text.index("## Stable Diffusion")]
    blocks = re.findall(r"```(python|sh)\n(.*?)```", recipe, re.S)
    told = [("!" if kind == "sh" else "") + block.strip() for kind, block in blocks]
    assert [cell for cell in code if cell != "paramlora.summary(model)"] == told
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(DOCS.parent / "examples")
    names = {}
    for cell in code:
        run(cell[1:]) if cell.startswith("!") else exec(compile(cell, "cell", "exec"), names)
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_the_api_names_everything_public():
    text = (DOCS / "api.md").read_text("utf-8")
    named = set(re.findall(r"^::: paramlora\.(\w+)$", text, re.M))
    assert named == set(paramlora.__all__) and not named & {"__version__"}
    glance = set(re.findall(r"`(\w+)`", text[: text.index("## ")]))
    functions = {name for name in paramlora.__all__ if name.islower()}
    assert functions - {"disable_input_grads"} <= glance


def test_every_page_is_in_the_site_and_every_section_in_the_readme():
    pages = {path.name for path in DOCS.glob("*.md")}
    told = (DOCS.parent / "mkdocs.yml").read_text("utf-8")
    assert set(re.findall(r"(\w+\.md)$", told, re.M)) == pages
    headings = set(re.findall(r"^## (.+)$", (DOCS.parent / "README.md").read_text("utf-8"), re.M))
    shown = {one for page in pages for one in re.findall(r"^README: (.+)$", read(page), re.M)}
    assert shown - {"opening"} <= headings and len(shown) > 3


def test_pages_link_only_what_exists():
    """As mkdocs checks it, where that is not installed."""
    for page in DOCS.glob("*.md"):
        text = re.sub(r"```.*?```", "", read(page.name), flags=re.S)
        for target, anchor in re.findall(r"\]\(([\w.]*)(?:#([\w-]+))?\)", text):
            other = read(target or page.name) if target.endswith(".md") or not target else ""
            assert (DOCS / (target or page.name)).exists(), (page.name, target)
            assert not anchor or anchor in anchors(other), (page.name, target, anchor)


def read(name):
    return (DOCS / name).read_text("utf-8")


def anchors(text):
    """The anchors of a page's headings, as mkdocs makes them."""
    words = [re.sub(r"[^\w\s-]", "", one).lower() for one in re.findall(r"^#+ (.+)$", text, re.M)]
    return {re.sub(r"[\s-]+", "-", one.strip()) for one in words}
