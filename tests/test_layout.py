"""Imports run one way, by folder, a folder knows only what it may, and tests mirror the folders."""

import ast
import importlib
from pathlib import Path

import pytest

# a folder or file imports only those before it; inside of a folder there are no circles
ORDER = [
    *("errors", "config", "update", "cuda", "evaluate", "model", "checkpoint", "formats"),
    *("arithmetic", "files", "integrations", "cli"),
]
TESTS = Path(__file__).parent
FOLDER = TESTS.parent / "paramlora"
FILES = sorted(path.relative_to(FOLDER) for path in FOLDER.rglob("*.py"))
INNER = [path for path in FILES if path.parts[0] not in ("__init__.py", "__main__.py")]
NOT_FORMATS = {
    "__init__",
    "base",
    "content",
    "detect",
    "factors",
    "format",
    "loaders",
    "fused",
    "metadata",
    "originals",
    "parts",
    "pieces",
    "pipeline",
    "places",
    "scale",
}


def name_of(path):
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def place(name):
    return ORDER.index(name.split(".")[0])


MODULES = {name_of(path): path for path in INNER}


def imported(path, also_later=True):
    """The dotted names that a file imports; without `also_later`, only when it is imported."""
    tree = ast.parse((FOLDER / path).read_text(encoding="utf-8"))
    for node in ast.walk(tree) if also_later else at_import(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def at_import(tree):
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, (ast.FunctionDef, ast.If)):
            yield node
            yield from at_import(node)


def ours(path, **kwargs):
    names = {m.removeprefix("paramlora.") for m in imported(path, **kwargs)}
    return {m for m in names & set(MODULES) if m != name_of(path)}


def test_every_entry_has_its_place():
    entries = {path.parts[0].removesuffix(".py") for path in FILES}
    assert entries == {*ORDER, "__init__", "__main__"}
    assert len(ORDER) <= 12


@pytest.mark.parametrize("path", INNER, ids=str)
def test_imports_go_one_way_between_folders(path):
    own = place(name_of(path))
    assert not {used for used in ours(path) if place(used) > own}


def test_no_circle_inside_of_a_folder():
    left = {
        name: {u for u in ours(path, also_later=False) if place(u) == place(name)}
        for name, path in MODULES.items()
        if path.name != "__init__.py"
    }
    while free := [name for name, used in left.items() if not used & left.keys()]:
        for name in free:
            del left[name]
    assert not left


# who may ask which kind an update is: the known forwards, which fall back to the definition; the
# formats, each of which holds some kinds; and sums of adapters, which add products and differences
_ASKS = ("model/forwards.py", "arithmetic/products.py", "formats/")


def kinds():
    from paramlora.update import sum, value
    from paramlora.update.attached import AttachedUpdate
    from paramlora.update.kinds import KINDS

    values = [c for c in vars(value).values() if isinstance(c, type) and issubclass(c, value.Value)]
    known = {c for kind in KINDS.values() for c in kind.__mro__ if issubclass(c, AttachedUpdate)}
    terms = [c for c in vars(sum).values() if isinstance(c, type) and issubclass(c, sum.Term)]
    return {c.__name__ for c in [*values, *known, *terms]} - {"AttachedUpdate", "Value", "Term"}


@pytest.mark.parametrize("path", [p for p in INNER if p.parts[0] != "update"], ids=str)
def test_nobody_asks_which_kind_an_update_is(path):
    if path.as_posix().startswith(_ASKS):
        return
    for node in ast.walk(ast.parse((FOLDER / path).read_text(encoding="utf-8"))):
        asked = []
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "isinstance",
            "issubclass",
        ):
            asked = [n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)]
        elif isinstance(node, ast.Compare):
            asked = [n.id for n in node.comparators if isinstance(n, ast.Name)]
        assert not kinds() & {*asked}, f"{path}:{node.lineno}"


def names_of_kinds():
    from paramlora.update.kinds import KINDS

    return {*KINDS, "low-rank", "hard"}


def asked_by_name(tree, names):
    """The lines that compare with the name of a kind, choose by it, or ask an entry for its key."""
    for node in ast.walk(tree):
        held = []
        if isinstance(node, ast.Compare):
            held = [node.left, *node.comparators]
        elif isinstance(node, ast.Dict):
            held = [key for key in node.keys if key is not None]
        elif isinstance(node, ast.Attribute) and node.attr == "whole":
            if "entry" in (getattr(node.value, "id", ""), getattr(node.value, "attr", "")):
                yield node.lineno
        inner = [n for one in held for n in (one, *getattr(one, "elts", ()))]
        if any(isinstance(n, ast.Constant) and n.value in names for n in inner):
            yield node.lineno


# what a file or a command's output is counted by is a word of theirs, and no question
_COUNTS = {"cli/adapters.py": {"whole"}, "cli/arithmetic.py": {"whole"}}


@pytest.mark.parametrize(
    "path", [p for p in INNER if p.parts[0] not in ("update", "config")], ids=str
)
def test_nobody_asks_for_a_kind_by_its_name(path):
    if path.as_posix().startswith(_ASKS):
        return
    names = names_of_kinds() - _COUNTS.get(path.as_posix(), set())
    assert [*asked_by_name(ast.parse((FOLDER / path).read_text("utf-8")), names)] == []


def test_a_question_by_name_is_seen():
    names = names_of_kinds()
    assert [*asked_by_name(ast.parse('x = kind == "dora"'), names)] == [1]
    assert [*asked_by_name(ast.parse('x = kind in ("a", "rows")'), names)] == [1]
    assert [*asked_by_name(ast.parse('x = {"lora": 1}.get(kind)'), names)] == [1]
    assert [*asked_by_name(ast.parse("x = target.entry.whole or entry.whole"), names)] == [1, 1]
    assert not [*asked_by_name(ast.parse('x = {"rank": 1}; y = adapter.whole == "a"'), names)]


@pytest.mark.parametrize("path", [p for p in INNER if p.parts[0] == "checkpoint"], ids=str)
def test_checkpoints_know_no_model(path):
    assert not {used for used in ours(path) if used.split(".")[0] not in ("errors", "update")} - {
        "checkpoint.keys",
        "checkpoint.recipes",
        "checkpoint.scales",
    }


def test_each_file_among_the_formats_is_one():
    for path in [p for p in INNER if p.parts[:-1] == ("formats",) and p.stem not in NOT_FORMATS]:
        assert importlib.import_module(f"paramlora.{name_of(path)}").FORMAT, path


@pytest.mark.parametrize("path", [p for p in INNER if p.parts[0] == "formats"], ids=str)
def test_a_format_is_pure(path):
    """Values in, values out: no model but its names, and no file."""
    assert not {"paramlora.model.attach", "pathlib.Path", "os", "io"} & set(imported(path))


@pytest.mark.parametrize("name", ["errors", "config", "config.reading", "model.match"])
def test_the_configuration_knows_no_torch(name):
    assert not any(m.split(".")[0] == "torch" for m in imported(MODULES[name]))


@pytest.mark.parametrize("path", [p for p in INNER if p.parts[0] != "cli"], ids=str)
def test_only_the_command_line_prints_or_exits(path):
    nodes = ast.walk(ast.parse((FOLDER / path).read_text(encoding="utf-8")))
    calls = {n.func.id for n in nodes if isinstance(n, ast.Call) and hasattr(n.func, "id")}
    assert not calls & {"print", "exit"}


def test_only_the_command_line_needs_typer_and_rich():
    for path in [p for p in FILES if p.parts[0] not in ("cli", "__main__.py")]:
        assert not {m.split(".")[0] for m in imported(path)} & {"typer", "rich", "click"}, path


def test_tests_stand_where_the_package_has_its_folders():
    folders = {path.name for path in TESTS.iterdir() if path.is_dir() and path.name[0] not in "._"}
    assert folders <= set(ORDER)


def has_code(path):
    """Whether a file of the package defines a function or class; others only name or list."""
    body = ast.parse((FOLDER / path).read_text(encoding="utf-8")).body
    return any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in body)


def file_of_tests(path):
    """The file among the tests that is about a file of the package."""
    if path.name == "kernels.py":  # a kernel is launched by plans alone, and compiled by this
        return Path("cuda/test_compiled.py")
    if path.parts[:2] == ("formats", "names"):  # a folder of tables is tested as one
        return Path("formats/test_names.py")
    if path.name == "__init__.py":  # a folder's own code stands under the folder's name
        return path.with_name(f"test_{(path.parent.name or FOLDER.name)}.py")
    return path.with_name(f"test_{path.name}")


@pytest.mark.parametrize("path", [p for p in FILES if has_code(p)], ids=str)
def test_a_modules_tests_are_where_its_name_says(path):
    where = TESTS / file_of_tests(path)
    assert where.is_file(), f"paramlora/{path} has no tests/{file_of_tests(path)}"
    assert "def test_" in where.read_text(encoding="utf-8")


def test_other_tests_in_folders_are_sweeps_and_say_so():
    own = {TESTS / file_of_tests(path) for path in FILES if has_code(path)}
    for path in set(TESTS.glob("*/**/test_*.py")) - own:
        told = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert told.startswith("A sweep "), f"{path.name}: of which module? Else say what it sweeps"


def test_the_tests_that_begin_first_are_there():
    tree = ast.parse((TESTS.parent / "conftest.py").read_text(encoding="utf-8"))
    lists = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    (names,) = (ast.literal_eval(n.value) for n in lists if ast.unparse(n.targets[0]) == "LONG")
    assert names and [name for name in names if not (TESTS / f"{name}.py").is_file()] == []


# an argument in the wrong place compiles, and a kernel has some forty of them
KERNELS = {
    path: ast.parse((FOLDER / path).read_text("utf-8"))
    for path in FILES
    if path.match("cuda/*/kernels.py")
}
TRITON = {
    node.name
    for tree in KERNELS.values()
    for node in tree.body
    if isinstance(node, (ast.FunctionDef, ast.ClassDef))
}
BY_PLACE = 5  # arguments of a call between kernels' functions at most


def on_one_line(tree):
    """The functions whose parameters take several lines, of which one holds two."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            lines = [arg.lineno for arg in (*node.args.args, *node.args.kwonlyargs)]
            if {*lines} - {node.lineno} and len({*lines}) < len(lines):
                yield node.name


def by_place(tree):
    """The calls of kernels' functions that pass many arguments by their place."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in TRITON:
            if len(node.args) > BY_PLACE or any(isinstance(one, ast.Starred) for one in node.args):
                yield f"{node.func.id}, line {node.lineno}"


@pytest.mark.parametrize("path", KERNELS, ids=str)
def test_arguments_of_kernels_are_passed_by_name_one_a_line(path):
    assert [*on_one_line(KERNELS[path])] == []
    assert [*by_place(KERNELS[path])] == []


def test_many_arguments_on_a_line_are_seen():
    assert [*on_one_line(ast.parse("def f(\n    x, y,\n    n,\n):\n    pass"))] == ["f"]
    assert not [*on_one_line(ast.parse("def f(x, y, n):\n    return n"))]
    assert [*by_place(ast.parse("_rows(1, 2, 3, 4, 5, EVEN_P=6)"))] == []
    assert [*by_place(ast.parse("_rows(1, 2, 3, 4, 5, 6)"))] == ["_rows, line 1"]
