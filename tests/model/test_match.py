"""Patterns out of files match what Python's do, in a time that grows with their length."""

import re

import pytest
import torch

import paramlora
from paramlora import ConfigError
from paramlora.model.match import Names, Unbounded


def test_two_thousand_patterns_on_as_many_names_are_what_python_matches():
    names = [f"model.layers.{i}.self_attn.{x}_proj" for i in range(500) for x in "qkvo"]
    plain = {re.escape(name): i for i, name in enumerate(names)}
    assert Names(names).first(plain) == {name: i for i, name in enumerate(names)}
    assert Names(names).first([f"^{name}" for name in plain]) == plain_numbers(names)
    assert Names(names).first(names) == plain_numbers(names)
    mixed = [rf".*\.{i}\.(self_attn|mlp)\.[qk]_proj" for i in range(500)]
    found = Names(names).first(mixed)
    assert found == {f"model.layers.{i}.self_attn.{x}_proj": i for i in range(500) for x in "qk"}


def plain_numbers(names):
    return {name: number for number, name in enumerate(names)}


ATOMS = r"a b . \. [ab] [^a] \d \w (a|b) (?:ab|a) (?=a) (?!b) \b ^ $ (a*) (ab)* \Z \W".split()
OFTEN = ["", "", "", "*", "+", "?", "{2}", "{1,2}", "*?", "{0,3}", "{2,}", "+?"]


def test_any_pattern_matches_what_python_matches():
    draw = torch.Generator().manual_seed(0)

    def one(of):
        return of[int(torch.randint(len(of), (), generator=draw))]

    letters = ["", *"ab.1_", "\n"]
    names = ["".join(one(letters) for _ in range(5)) for _ in range(80)]
    for _ in range(800):
        pattern = "".join(one(ATOMS) + one(OFTEN) for _ in range(one(range(1, 6))))
        pattern = one([pattern, f"{pattern}|{one(ATOMS)}b", f"({pattern})*"])
        if re.search(r"[*+?}]\+", pattern):
            continue  # a part that gives nothing back, since Python 3.11
        try:
            whole, end = re.compile(pattern), re.compile(rf"(.*\.)?({pattern})$")
        except re.error:
            continue
        some = [name for name in names if "\n" not in name]
        assert Names(names).matching(pattern) == {n for n in some if whole.fullmatch(n)}, pattern
        assert set(Names(names).first([pattern])) == {n for n in some if end.match(n)}, pattern


@pytest.mark.parametrize(
    "pattern", ["(a+)+", "(a|aa)*", "(.*a){20}", "((a?){100}){100}", "(a*b?)*"]
)
def test_a_pattern_that_would_take_for_ever_is_matched(pattern):
    names = Names(["a" * 9_000, "a" * 9_000 + "c"])
    assert names.matching(pattern) == {"a" * 9_000}


@pytest.mark.parametrize(
    "pattern, why",
    [
        (r"(a)\1", "groupref"),
        ("(?<=a)b", "assert"),
        ("(?i)a", "flags"),
        ("(" * 3_000 + ")" * 3_000, "nested too deeply"),
        ("a" * 20_001, "20,001 characters"),
    ],
    ids=["back", "behind", "flags", "deep", "long"],
)
def test_a_pattern_that_needs_more_is_refused(pattern, why):
    with pytest.raises(Unbounded, match=why):
        Names(["a"]).matching(pattern)


def test_a_pattern_of_the_users_own_may_be_any():
    model = torch.nn.ModuleDict({"aa": torch.nn.Linear(4, 3)})
    paramlora.attach(model, {r"re:(a)\1": {"r": 1}})
    with pytest.raises(ConfigError, match="nested or repeated too deeply"):
        paramlora.attach(model, {"re:" + "(" * 3_000 + ")" * 3_000: {"r": 1}})
