"""A sweep of all messages: every option that one names is one of the command that prints it."""

import ast
import re
from pathlib import Path

import pytest

pytest.importorskip("typer")

import typer

import paramlora
from paramlora.cli.commands import app

PACKAGE = Path(paramlora.__file__).parent
READ = {"convert", "inspect", "combine", "resize", "embed", "merge"}  # an adapter's file
WRITE = {"convert", "combine", "resize", "extract", "difference"}
OUT = WRITE | {"embed", "merge"}
SHARED = {"--component", "--alpha", "--loose", "--model", "--base"}
# what reads and fits an adapter names these, whichever command it runs in; what writes it those
OF_READING = dict.fromkeys(SHARED, READ | {"extract"}) | {"--key": READ | WRITE}
OF_WRITING = {"--prefix": WRITE, "--fold-scale": WRITE, "--force": OUT, "--model": WRITE | READ}
# messages of one command's own, and what only some commands do
OWN = {
    "arithmetic/combine": {"combine"},
    "arithmetic/difference": {"difference"},
    "arithmetic/products": {"resize", "difference"},
    "files/arithmetic": {"combine", "resize"},
    "files/adapters": {"convert"},
    "formats/native": {"convert"},  # which it says to use
}


def options_of(command):
    return {name for param in command.params for name in param.opts if name.startswith("--")}


COMMANDS = {n: options_of(c) for n, c in typer.main.get_command(app).commands.items()}


def spelled(node):
    """The text of an expression, with braces where a value is put in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(spelled(v) or "{}" for v in node.values)
    return ""


def messages():
    """(file, function, options) of what the package says outside of its command line."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE).with_suffix(""))
        if name.startswith("cli"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                texts = (spelled(inner) for part in body for inner in ast.walk(part))
                found = {o for text in texts for o in re.findall(r"\B--[a-z][a-z-]+", text)}
                if found:
                    yield name, node.name, found


MESSAGES = list(messages())


def printing(name, option, with_others):
    """The commands that can print a message of a file that names this option."""
    own = next((commands for start, commands in OWN.items() if name.startswith(start)), None)
    if own is not None:
        return own
    table = OF_WRITING if with_others & {"--prefix", "--fold-scale", "--force"} else OF_READING
    return table.get(option, set())


@pytest.mark.parametrize("name, function, options", MESSAGES)
def test_a_way_out_is_an_option_of_every_command_that_prints_it(name, function, options):
    for option in options:
        assert any(option in own for own in COMMANDS.values()), f"no command has {option}"
        lacking = {c for c in printing(name, option, options) if option not in COMMANDS[c]}
        assert not lacking, f"{name}.{function} names {option}"


def test_messages_are_found():
    assert len(MESSAGES) > 25
    assert {"--component", "--alpha", "--prefix", "--force"} <= {o for *_, n in MESSAGES for o in n}


def test_merge_embed_extract_convert_and_inspect_share_how_an_adapter_is_read():
    for command in ("merge", "embed", "extract", "convert", "inspect"):
        assert SHARED <= COMMANDS[command], command


RAISED = ("FileError", "ConfigError", "TargetError", "AdapterError", "ParamloraError", "fail")
WAY_OUT = re.compile(
    r"(?:^|[.;:,)\"}] |\bor |\band |\bso )"
    r"(?:Add|Adapt|Ask|Attach|Build|Call|Cast|Change|Choose|Convert|Copy|Detach|Download|Exclude|"
    r"Export|Fold|Gather|Give|Have|Import|Keep|Leave|Load|Make|Mark|Mend|Merge|Move|Name|Pass|Put|"
    r"Read|Register|Remove|Rename|Report|Resize|Run|Save|Set|Shard|Switch|Take|Train|Unpack|"
    r"Unregister|Untie|Upgrade|Use|Wrap|Write)\b"
    # what is right is said, what there is, or what is asked
    r"|must be|Where you trust it|Are both of one model"
    r"|such as|expected|Known:|Allowed|Prefixes:|Parts:|There are:|Attached:|pip install|\?$",
    re.IGNORECASE,
)
# sentences whose end is another one, which the place that makes it says
MADE_ELSEWHERE = {
    ("errors", "{}: cannot be read: {}. {}."),
    ("errors", "{}: cannot be written: {}. {}. Nothing was written."),
    ("files/inspection", "{}: {}."),
    ("files/mistaken", "{}: {}."),
    ("files/served", 'adapter "{}" for {}: {}'),
    ("files/torch_save", "{}: no state dict {}. {}."),
    ("formats/__init__", "{}: {}."),
    ("formats/detect", "{}: {}."),
    ("model/targets", "the adapter does not fit {}: {}"),
    ("model/targets", '"{}" matches {}, {}'),
    ("model/targets", "nothing to adapt in {}: {}"),
    ("model/targets", '"{}" matches {}, a {} with no weight of its own to adapt{}'),
}


def raised():
    """(file, text) of every error that says something of its own."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE).with_suffix(""))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else node
            if isinstance(call, ast.Call) and call.args:
                text = spelled(call.args[0])
                if ast.unparse(call.func).rpartition(".")[2] in RAISED and text.strip("{}"):
                    yield name, text


def test_every_error_says_the_way_out():
    found = set(raised())
    assert len(found) > 300
    assert MADE_ELSEWHERE <= found
    assert {one for one in found - MADE_ELSEWHERE if not WAY_OUT.search(one[1])} == set()
