"""A linear layer's step in C++: its numbers are Python's, whatever it is given."""

import re
import shutil
import sys

import pytest
import torch

from paramlora.cuda.native import library
from paramlora.evaluate import functional
from tests.cuda.started import printed

native = pytest.importorskip("paramlora.cuda.linear.native", reason="needs Triton")
compiled = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
# the interpreter cuts off what bfloat16 would round: of the factors, of the thin product, of y
CUT = 2**-6


@pytest.fixture(scope="module")
def results():
    library.build()
    return printed("interpreted_native", TRITON_INTERPRET="1", PARAMLORA_NATIVE="1")


@compiled
def test_every_layer_has_pythons_numbers_and_float64s(results):
    layers = results["layers"]
    assert len(layers) == 27
    for name, told in layers.items():
        assert told["same"] and told["launches"] == ["forward", "backward"], name
        assert told["left to Python"] == 0 and max(told["errors"]) < CUT, (name, told)


@compiled
def test_whatever_comes_between_gives_pythons_numbers(results):
    """Hooks, threads, checkpoints, gradients of gradients, contexts: served, or left to Python, as
    each is told beside it."""
    assert len(results["events"]) == 2 * 20
    for name, told in results["events"].items():
        launches, left = told["as planned"]
        assert told["same"], name
        assert (sorted(told["launches"]), told["left to Python"]) == (sorted(launches), left), name


@compiled
def test_what_is_wrong_is_said_as_python_says_it(results):
    linear, image = (results["errors"][name] for name in ("layer", "pointwise"))
    kinds = ["RuntimeError", "ValueError", "RuntimeError", "RuntimeError"]
    for told in (linear, image):
        assert [text.split(":")[0] for text in told["cpp"]] == kinds
    # of an image Python saves a view of the weight, which is then not what was replaced
    assert image["python"][1] == "nothing"
    image["python"][1] = image["cpp"][1]
    assert (linear["cpp"], image["cpp"]) == (linear["python"], image["python"])


@compiled
def test_any_launch_has_what_triton_would_hand_over(results):
    alone = results["alone"]
    assert len(alone) > 20 and all(alone.values()), alone
    assert {name.split(", ")[1] for name in alone} == {"0", "3"}  # matrices that are described


def test_both_sides_number_what_changes_alike():
    source = library._SOURCES[0].read_text(encoding="utf-8")
    told = re.search(r"enum Slot \{(.*?)\};", source, re.DOTALL)[1]
    names = re.findall(r"\w+", told)
    assert names == [*(slot.name for slot in native.Slot), "SLOTS"]
    assert [s.value for s in native.Slot] == list(range(len(native.Slot)))


def test_it_is_not_even_looked_for_without_a_kernel():
    assert "paramlora.cuda.linear.native" in sys.modules  # by this file alone
    if not torch.cuda.is_available():
        assert functional._native is None and not functional._started
