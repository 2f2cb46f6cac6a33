"""What type checkers and `help` are told of the public names."""

import subprocess
import sys
from pathlib import Path

import pytest

import paramlora
from paramlora.config import ALLOWED

ROOT = Path(__file__).parents[1]
# torch is Any here: reading it takes longer than the rest
SETTINGS = """
[mypy]
strict = true
disallow_subclassing_any = false
[mypy-torch.*]
follow_imports = skip
[mypy-paramlora.*]
ignore_errors = true
"""
SNIPPET = """
from typing_extensions import assert_type
from torch import nn
import paramlora


class Net(nn.Module):
    def own(self) -> int:
        return 1


config: dict[str, paramlora.Entry] = {"a": {"r": 2, "alpha": 4}, "b": {"whole": True}}
model = paramlora.attach(Net(), config)
assert_type(model, Net)
assert_type(paramlora.detach(model, "default"), Net)
assert_type(paramlora.merge(model), Net)
assert_type(paramlora.merge(model, report=True), paramlora.KeptReport)
assert_type(paramlora.load_adapter(model, "adapter.safetensors"), Net)
assert_type(paramlora.load_adapter(model, "adapter.safetensors", into="default"), Net)
assert_type(paramlora.attach_adapter(model, paramlora.adapter_of(model)), Net)
assert_type(paramlora.rounding(model, "once"), Net)
assert_type(paramlora.enable_input_grads(model), Net)
with paramlora.disable_adapters(model) as base:
    assert_type(base, Net)
    base.own()
paramlora.attach(Net(), {"a": {"r": 2}, "exclude": ["b"], "trainable_model": 1})
paramlora.files.merge, paramlora.checkpoint.merge
"""
WRONG = {
    "paramlora.atach(Net(), {})": 'Module has no attribute "atach"',
    'wrong: paramlora.Entry = {"rnk": 2}': 'Extra key "rnk" for TypedDict "Entry"',
    'other: paramlora.Entry = {"r": "2"}': 'expression has type "str", TypedDict item "r" has type',
    'third: paramlora.Entry = {"r": 2, "init": "pisa"}': 'TypedDict item "init" has type',
}


def checked(text, folder):
    """The lines and texts of what mypy finds."""
    (folder / "mypy.ini").write_text(SETTINGS)
    (folder / "snippet.py").write_text(text)
    mypy = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "snippet.py"]
    env = {"MYPYPATH": str(ROOT), "MYPY_CACHE_DIR": str(folder / "cache"), "PATH": ""}
    done = subprocess.run(mypy, cwd=folder, env=env, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    lines = [line.split(":", 2) for line in done.stdout.splitlines() if line.startswith("snippet")]
    return {int(number): told for _, number, told in lines if "error:" in told}


def test_a_type_checker_knows_what_is_given_back_and_what_is_wrong(tmp_path):
    pytest.importorskip("mypy")
    start = len(SNIPPET.splitlines())
    found = checked(SNIPPET + "\n".join(WRONG), tmp_path)
    assert {number for number in found} == {start + 1 + i for i in range(len(WRONG))}, found
    for number, told in enumerate(WRONG.values(), start + 1):
        assert told in found[number]


def test_help_says_what_an_entry_holds():
    text = paramlora.attach.__doc__
    assert all(f"``{key}``" in text for key in (*ALLOWED, "rows"))
    assert all(
        f'"{name}' in text for name in ("re:", "type:", "attention", "all-linear", "exclude")
    )
