"""Every option that a message names is one of the command that prints it."""

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
