"""A step told for C++: both sides number alike, and what cannot be told yet or ever is known."""

import re
from types import SimpleNamespace

import pytest
import torch

from paramlora.cuda.native import library
from paramlora.cuda.native.program import Kind, Program, Slot, Untold


@pytest.mark.parametrize("kind", (Slot, Kind), ids=lambda kind: kind.__name__)
def test_both_sides_number_alike(kind):
    source = library._SOURCES[0].read_text(encoding="utf-8")
    (most,) = re.findall(r"constexpr int TENSORS = (\d+);", source)
    told = re.search(rf"enum {kind.__name__} \{{(.*?)\}};", source, re.DOTALL)[1]
    numbers, at = {}, 0
    for name, value in re.findall(r"(\w+)(?: = (\w+))?,?", told.replace("= TENSORS", f"= {most}")):
        at = int(value) if value else at
        numbers[name] = at
        at += 1
    if kind is Slot:
        assert numbers.pop("SLOTS") == max(Slot) + 1
    assert numbers == {one.name: one.value for one in kind}


def test_what_is_made_has_slots_of_its_own():
    program = Program()
    first = program.reserve((2, 3), (3, 1), torch.float32)
    second = program.sum(first)
    assert Slot.Z < first < second < Slot.STRENGTH
    assert [one.kind for one in program.operations] == [Kind.RESERVE, Kind.SUM]
    assert program.cast(second, torch.float32, torch.float32) == second
    assert program.cast(second, torch.float32, torch.bfloat16) > second


def test_more_than_there_are_slots_for_is_never_told():
    program = Program()
    with pytest.raises(Untold) as found:
        for _ in range(Slot.STRENGTH):
            program.reserve((1,), (1,), torch.float32)
    assert not found.value.yet


def test_a_kernel_that_was_not_compiled_is_told_later():
    with pytest.raises(Untold) as found:
        Program().launch(SimpleNamespace(compiled=None), ())
    assert found.value.yet
