"""Many tensors as few: looked at without a copy, checked at once, moved by a few copies."""

import math

import pytest
import torch
from torch.overrides import TorchFunctionMode

from paramlora.update import memory
from paramlora.update.memory import all_finite, moved, runs_of
from tests.files import resident
from tests.update.test_outline import COLUMNS, MOST, ROWS


class Moves(TorchFunctionMode):
    """How often a tensor is asked to be on a device."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.Tensor.to
        return func(*args, **(kwargs or {}))


def of_a_file(count):
    """Tensors one behind the other, two types of them, and some with memory of their own."""
    wide, low = torch.randn(count * 6), torch.randn(count * 4).bfloat16()
    parts = [wide[6 * i : 6 * i + 6].view(2, 3) for i in range(count)]
    parts += [low[4 * i : 4 * i + 4] for i in range(count)]
    parts += [torch.tensor(float(i)) for i in range(count)]
    return parts + [torch.randn(4, 2).t(), torch.zeros(0, 3), parts[1]]


def test_what_lies_together_is_one_run():
    parts = of_a_file(5)
    places = runs_of(parts)
    for part in parts:
        run, at = places[id(part)]
        assert torch.equal(run[at : at + part.numel()].view(part.shape), part)
    assert len({id(run) for run, _ in places.values() if run.numel() in (30, 20)}) == 2
    a, b = torch.randn(40).split([20, 20])  # with a number between them that is neither's
    assert runs_of([b[1:], a])[id(a)][0].numel() == 40
    # no copy
    assert parts[0].untyped_storage().data_ptr() == places[id(parts[0])][0].data_ptr()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_that_is_not_finite_is_found_wherever_it_lies(bad):
    for which in (0, 4, 7, 12, 15):
        parts = of_a_file(5)
        assert all_finite(parts)
        parts[which][..., -1:].fill_(bad) if parts[which].dim() else parts[which].fill_(bad)
        assert not all_finite(parts)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for at in (0, 1, 500, 996, 999):  # in a vector of the processor, and behind the last
            long = torch.randn(1000).to(dtype)
            long[at] = bad
            assert not all_finite([long])
    assert all_finite([torch.full((9,), torch.finfo(torch.float16).max).half()] * 2)
    beside = torch.randn(9)
    beside[4] = bad  # between two parts, and of none
    assert all_finite([beside[:4], beside[5:]]) and not all_finite([beside[:4], beside[4:]])


def test_copies_to_a_device_are_as_many_for_any_number_of_tensors():
    counts = []
    for count in (3, 30):
        parts = of_a_file(count)
        with Moves() as moves:
            found = moved(parts, torch.device("cpu"))
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, parts))
        counts.append(moves.count)
    assert counts == [3, 3]  # of two types, and of what lies alone


@pytest.mark.skipif(not resident.COUNTED, reason="counts memory as Linux does")
@pytest.mark.parametrize("bad", [1.0, math.nan, math.inf])
def test_one_number_shown_everywhere_is_looked_at_without_a_copy(bad):
    wide = torch.full((), bad).expand(ROWS, COLUMNS)
    resident.restart()
    before = resident.peak()
    assert all_finite([wide, torch.ones(2)]) == math.isfinite(bad)
    assert resident.peak() - before < MOST


def test_the_largest_of_many_tensors():
    held = [torch.tensor([1.0, -5.0]), torch.tensor([2.0]).bfloat16(), torch.empty(0)]
    assert memory.largest([*held, torch.tensor([9])]) == 5.0
    assert memory.largest([]) == 0.0
    assert memory.largest([*held, torch.tensor([float("nan")])]) is None
    assert memory.largest([torch.ones(2, dtype=torch.complex64)]) == float("inf")
