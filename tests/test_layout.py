"""A file imports only files before it, and knows only what it may."""

import ast
from pathlib import Path

import pytest

ORDER = (
    "errors config sharded switch lowrank fold whole adapter targets init placement inputs kernels "
    "launch operators functional convolution forwards layers soft attach merge state keys plan "
    "checkpoint disk stream pickles native stored files optim summary demo cli"
).split()
FOLDER = Path(__file__).parents[1] / "paramlora"


CLI = "app checkpoints training".split()


def tree(name):
    path = FOLDER / f"{name}.py"
    path = path if path.exists() else FOLDER / name / "__init__.py"
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(name):
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_the_list_is_whole():
    packages = {p.parent.name for p in FOLDER.glob("*/__init__.py")}
    assert {p.stem for p in FOLDER.glob("*.py")} | packages == {*ORDER, "__init__", "__main__"}
    assert {p.stem for p in (FOLDER / "cli").glob("*.py")} == {*CLI, "__init__"}


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_backwards(name):
    used = {m.split(".")[1] for m in imported(name) if m.startswith("paramlora.")} - {name}
    assert all(ORDER.index(u) < ORDER.index(name) for u in used), used


@pytest.mark.parametrize("name", ["errors", "config"])
def test_the_configuration_knows_no_torch(name):
    assert not any(m.split(".")[0] == "torch" for m in imported(name))


@pytest.mark.parametrize("name", [n for n in ORDER if n != "cli"])
def test_only_the_command_line_prints_or_exits(name):
    nodes = ast.walk(tree(name))
    calls = {n.func.id for n in nodes if isinstance(n, ast.Call) and hasattr(n.func, "id")}
    assert not calls & {"print", "exit"}


def test_only_the_command_line_needs_typer_and_rich():
    for name in [n for n in ORDER if n != "cli"]:
        assert not {m.split(".")[0] for m in imported(name)} & {"typer", "rich", "click"}, name
