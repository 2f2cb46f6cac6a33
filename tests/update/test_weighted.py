"""What takes several adapters with weights: lists that mean what they say, all others refused."""

from fractions import Fraction

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import paramlora
from paramlora import AdapterError, arithmetic, checkpoint, files
from tests.arithmetic.sums import exact, one

BASE = {"q.weight": torch.zeros(12, 9)}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(BASE, "base.safetensors")
    files.write_adapter(one(2, 1), "style.safetensors")


def merged(adapters):
    files.merge("base.safetensors", adapters, "out.safetensors", force=True)
    return load_file("out.safetensors")["q.weight"].double()


def kept(adapters):
    files.kept("base.safetensors", adapters)


TAKERS = {
    "combine": lambda adapters: exact(paramlora.combine(adapters).updates["q"]),
    "values": lambda adapters: exact(arithmetic.combine(adapters).adapter.updates["q"]),
    "merge": merged,
    "kept": kept,
    "checkpoint": lambda adapters: checkpoint.merge(BASE, *adapters)["q.weight"].double(),
}
WRONG = {
    # without a word each would be had in full, whatever its weight
    "a mapping": ({"style.safetensors": 0.5}, "expected a list of adapters, got {'style"),
    "a number": (3, "expected a list of adapters, got 3"),
    "nothing": (None, "expected a list of adapters, got None"),
    "a model": (nn.Sequential(nn.Linear(2, 2)), "expected a list of adapters, got Sequential"),
    "a path": ("style.safetensors", "expected a list of adapters, got one alone"),
    "an adapter": (one(2, 1), "expected a list of adapters, got one alone"),
    "of numbers": ([3], "expected an adapter.*, got 3"),
    "of models": ([nn.Linear(2, 2)], "expected an adapter.*, got Linear.* adapter_of"),
    "of updates": ([one(2, 1).updates["q"]], "expected an adapter.*, got Update"),
    "turned pairs": ([(0.5, one(2, 1))], "expected an adapter.*, got 0.5. Give .adapter, weight"),
    "of three": ([(one(2, 1), 0.5, 1)], "expected an adapter and its weight, got 3 values"),
    "words": ([(one(2, 1), "0.5")], "its weight '0.5' is no finite number"),
    "no weight": ([(one(2, 1), None)], "its weight None is no finite number"),
    "no number": ([(one(2, 1), float("nan"))], "its weight nan is no finite number"),
    "no float": ([(one(2, 1), 10**400)], "its weight .* is no finite number"),
    "no real number": ([(one(2, 1), 1j)], "its weight 1j is no finite number"),
}


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_list_of_weighted_adapters_is_told(taker, wrong, here):
    given, told = WRONG[wrong]
    if taker == "checkpoint" and not isinstance(given, list):
        given = [given]  # it takes them one by one
        told = "expected an adapter" if wrong != "an adapter" else None
    if told is None:
        return
    with pytest.raises(AdapterError, match=told):
        TAKERS[taker](given)


@pytest.mark.parametrize("taker", ("combine", "values", "merge", "checkpoint"))
@pytest.mark.parametrize(
    "weight", (0.5, numpy.float32(0.5), numpy.float64(0.5), Fraction(1, 2), numpy.int64(-2))
)
def test_every_real_number_is_a_weight(taker, weight, here):
    adapter = one(2, 1)
    expected = float(weight) * exact(adapter.updates["q"])
    for pair in ((adapter, weight), [adapter, weight]):
        found = TAKERS[taker]([pair])
        assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("taker", ("combine", "merge"))
def test_a_path_stands_for_its_adapter(taker, here):
    expected = 1.5 * exact(one(2, 1).updates["q"])
    found = TAKERS[taker]([("style.safetensors", 0.5), "style.safetensors"])
    assert (found - expected).norm() <= 1e-6 * expected.norm()
