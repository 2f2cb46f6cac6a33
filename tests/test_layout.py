"""A file imports only files before it, and knows only what it may."""

import ast
import importlib
from pathlib import Path

import pytest

ORDER = (
    "errors reading patterns config compat contexts undo ties sharded quantised casts "
    "geometry fold switch again digest adapter lowrank whole targets statistics init "
    "placement inputs served narrow linear_kernels conv_kernels depthwise_kernels launch "
    "tiles fused joined depthwise lookup operators functional convolution forwards layers "
    "methods soft attach merge state keys disk mistaken stream plan checkpoint opcodes "
    "pickles native stored formats interchange files inspection optim summary integrations "
    "demo cli "
).split()
CLI = "app checkpoints training adapters".split()
FOLDER = Path(__file__).parents[1] / "paramlora"
FORMATS = (
    "content scale merged factors places pieces base format detect peft diffusers kohya original "
    "loralib torchtune litgpt cloneofsimo native"
).split()
# a new format needs no place here: it comes last
NEW = sorted({p.stem for p in (FOLDER / "formats").glob("*.py")} - {*FORMATS, "__init__"})
FORMATS += NEW
EVERY = [name for name in ORDER if name != "cli"] + [f"formats/{name}" for name in FORMATS]


def tree(name):
    path = FOLDER / f"{name}.py"
    path = path if path.exists() else FOLDER / name / "__init__.py"
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(name):
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_the_list_is_whole():
    packages = {p.parent.name for p in FOLDER.glob("*/__init__.py")}
    assert {p.stem for p in FOLDER.glob("*.py")} | packages == {*ORDER, "__init__", "__main__"}
    assert {p.stem for p in (FOLDER / "formats").glob("*.py")} == {*FORMATS, "__init__"}
    assert all(importlib.import_module(f"paramlora.formats.{name}").FORMAT for name in NEW)
    assert {p.stem for p in (FOLDER / "cli").glob("*.py")} == {*CLI, "__init__"}


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_backwards(name):
    used = {m.split(".")[1] for m in imported(name) if m.startswith("paramlora.")}
    used = {u for u in used & set(ORDER) if u != name}
    assert all(ORDER.index(u) < ORDER.index(name) for u in used), used


@pytest.mark.parametrize("name", FORMATS)
def test_formats_import_backwards_too(name):
    used = [m.split(".") for m in imported(f"formats/{name}") if m.startswith("paramlora.")]
    inside = {u[2] for u in used if u[1] == "formats" and len(u) > 2} & set(FORMATS)
    outside = {u[1] for u in used} & set(ORDER)
    assert all(FORMATS.index(u) < FORMATS.index(name) for u in inside), inside
    assert all(ORDER.index(u) <= ORDER.index("formats") for u in outside), outside


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_pure(name):
    """Values in, values out: no model but its names, and no file."""
    forbidden = {"paramlora.attach", "paramlora.disk", "paramlora.native", "pathlib", "os"}
    if name == "native":  # of which it takes what turns values into values
        taken = {m.rpartition(".")[2] for m in imported(f"formats/{name}") if "a.native." in m}
        assert taken == {"NATIVE", "checked_entries", "described", "native_of"}
        forbidden.remove("paramlora.native")
    assert not forbidden & set(imported(f"formats/{name}"))


@pytest.mark.parametrize("name", ["errors", "reading", "patterns", "config"])
def test_the_configuration_knows_no_torch(name):
    assert not any(m.split(".")[0] == "torch" for m in imported(name))


@pytest.mark.parametrize("name", EVERY)
def test_only_the_command_line_prints_or_exits(name):
    nodes = ast.walk(tree(name))
    calls = {n.func.id for n in nodes if isinstance(n, ast.Call) and hasattr(n.func, "id")}
    assert not calls & {"print", "exit"}


def test_only_the_command_line_needs_typer_and_rich():
    for name in [n for n in ORDER if n != "cli"]:
        assert not {m.split(".")[0] for m in imported(name)} & {"typer", "rich", "click"}, name
