"""A sweep of all messages of the package: one of a thing is told in the singular."""

import ast
import re
from pathlib import Path

import pytest

import paramlora

PACKAGE = Path(paramlora.__file__).parent
# where there are always several, or "s" ends a verb: (file, the words behind a number)
SEVERAL = {
    ("config/reading", "bytes"),
    ("config/reading", "characters"),
    ("model/match", "characters"),
    ("files/torch_save", "bytes"),
    ("files/zipped", "bytes"),
    ("arithmetic/combine", "bytes"),
    ("files/safetensors", "bytes"),
    ("files/conversions", "bytes"),
    ("files/adapters", "bytes"),
    ("model/targets", "tensors"),
    ("formats/fused", "rows"),
    ("formats/scale", "alphas"),
    ("formats/peft/experts", "experts"),
    ("update/lokr", "outputs"),
    ("update/lokr", "inputs"),
    ("model/summary", "parameters"),
    ("checkpoint/__init__", "updates"),
}
NUMBER = re.compile(r"len\(|sum\(|count|size|number|total|rows|out\b|inner|nbytes|\bn\b|:,")
THINGS = (
    "updates layers tensors files adapters blocks modules parts bytes rows keys names processes "
    "axes shards entries factors parameters experts matrices numbers dimensions places characters "
    "levels ranks holders times groups alphas outputs inputs sequences columns steps"
).split()


def plurals():
    """(file, word) of each f-string in which a number stands before a word in the plural."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE).with_suffix(""))
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            for value, after in zip(*(getattr(node, "values", [])[at:] for at in (0, 1))):
                if not isinstance(node, ast.JoinedStr) or not isinstance(after, ast.Constant):
                    continue
                word = re.match(r" ([a-z]+)\b", after.value)
                if isinstance(value, ast.FormattedValue) and word and word[1] in THINGS:
                    if NUMBER.search(ast.unparse(value)):
                        yield name, word[1]


FOUND = sorted(set(plurals()))


@pytest.mark.parametrize("name, word", FOUND)
def test_a_number_before_a_plural_is_never_one(name, word):
    assert (name, word) in SEVERAL, f"{name}: use counted(..., {word.removesuffix('s')!r})"


def test_the_sweep_finds_what_is_always_several():
    assert SEVERAL <= set(FOUND)
