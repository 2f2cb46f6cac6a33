"""The documents' recipes run, with the output that stands there."""

import doctest
import re
from pathlib import Path

import pytest
import torch

import paramlora

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize(
    "name", ("configuration.md", "training.md", "from_peft.md", "kinds.md", "many.md")
)
def test_the_recipes_print_what_they_say(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.compiler.reset()
    if name == "training.md":
        pytest.importorskip("torchao")
    text = (DOCS / name).read_text(encoding="utf-8").replace("```", "")
    example = doctest.DocTestParser().get_doctest(text, {}, name, name, 0)
    assert len(example.examples) > 10
    printed = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=printed.append)
    assert result.failed == 0, "".join(printed)


def test_our_calls_in_the_table_exist():
    text = (DOCS / "from_peft.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| `")]
    names = {name for row in rows for name in re.findall(r"(\w+)\((?:model|lr)", row)}
    assert len(names) > 10
    assert all(hasattr(paramlora, name) for name in names - {"print"}), names


def test_the_scripts_in_the_table_exist():
    text = (DOCS / "training.md").read_text(encoding="utf-8")
    scripts = re.findall(r"examples/\w+\.py", text)
    assert len(set(scripts)) == 6
    assert all((DOCS.parent / script).exists() for script in scripts)
