"""A layer's step in C++: its numbers are Python's, whatever it is given."""

import shutil
import subprocess
import sys

import pytest

from paramlora.cuda.native import library
from tests.cuda.started import printed

steps = pytest.importorskip("paramlora.cuda.native.steps", reason="needs Triton")
compiled = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
# the interpreter cuts off what bfloat16 would round: of the factors, of the thin product, of y
CUT = 2**-6
LAUNCHES = {  # of a forward and its backward
    "fused": ["forward", "backward"],
    "first": ["prepare", "put", "back", "spread", "back"],  # whose result has its channels first
    "last": ["prepare", "put", "spread", "back"],
    "single": ["add", "forward", "backward", "divide"],
    "rescaled": ["lengths", "forward", "rescale", "rescale_backward", "backward"],
    "rescaled inside": ["lengths", "forward", "rescale_backward", "backward"],
}


@pytest.fixture(scope="module")
def results():
    library.build()
    return printed("interpreted_native", TRITON_INTERPRET="1", PARAMLORA_NATIVE="1")


@compiled
def test_every_layer_has_pythons_numbers_and_float64s(results):
    layers, kinds = results["layers"], []
    for name, told in layers.items():
        assert told["same"] and told["launches"] in LAUNCHES.values(), name
        kinds += [kind for kind, of in LAUNCHES.items() if of == told["launches"]]
        assert told["left to Python"] == 0 and max(told["errors"]) < CUT, (name, told)
    counts = {kind: kinds.count(kind) for kind in kinds}
    assert counts.pop("rescaled inside") == 1
    assert counts == dict(fused=27, first=11, last=3, single=7, rescaled=8)


@compiled
def test_whatever_comes_between_gives_pythons_numbers(results):
    """Hooks, threads, checkpoints, gradients of gradients, contexts: served, or left to Python, as
    each is told beside it."""
    assert len(results["events"]) == 5 * 21 + 1
    for name, told in results["events"].items():
        launches, left = told["as planned"]
        assert told["same"], name
        assert (sorted(told["launches"]), told["left to Python"]) == (sorted(launches), left), name


@compiled
def test_what_is_wrong_is_said_as_python_says_it(results):
    kinds = ["RuntimeError", "ValueError", "RuntimeError", "RuntimeError"]
    for kind, told in results["errors"].items():
        assert [text.split(":")[0] for text in told["cpp"]] == kinds, kind
        own = list(told["python"])
        if kind == "pointwise":  # Python saves a view of the weight, which is not what was replaced
            assert own.pop(1) == "nothing"
            own.insert(1, told["cpp"][1])
        assert told["cpp"] == own, kind


@compiled
def test_any_launch_has_what_triton_would_hand_over(results):
    alone = results["alone"]
    assert len(alone) > 20 and all(alone.values()), alone
    assert {name.split(", ")[1] for name in alone} == {"0", "3", "4"}  # matrices that are described


@pytest.mark.parametrize("axes", (1, 2, 3))
def test_a_window_is_put_together_again(axes):
    window = (*(tuple(range(i, i + axes)) for i in (1, 5, 9)), 4)
    numbers = (*(n for one in window[:3] for n in one), 4)
    assert steps.window_of(numbers) == window and steps.window_of(()) is None


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_it_is_not_even_looked_for_without_a_kernel(dtype):
    script = f"""
import sys, torch, paramlora
from paramlora.evaluate import functional
layer = torch.nn.Sequential(torch.nn.Conv1d(4, 4, 3), torch.nn.Linear(6, 3)).to(torch.{dtype})
paramlora.attach(layer, {{"re:.*weight": {{"r": 2}}}})
layer(torch.ones(2, 4, 8, dtype=torch.{dtype})).sum().backward()
assert functional._native is None and not functional._started
assert "paramlora.cuda.native.steps" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
