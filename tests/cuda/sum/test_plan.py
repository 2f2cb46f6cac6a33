"""A weight with a low-rank update, formed in one launch: in Triton's interpreter, and on CUDA,
against float64."""

import pytest
import torch
from torch import nn

import paramlora
from paramlora.cuda import operators
from paramlora.model import merge
from tests.cuda.started import printed
from tests.update.test_sum import off, precision

pytest.importorskip("triton")
ONCE = 0.5 + 1e-5  # units in the last place that one rounding is off by at most


@pytest.fixture(scope="module")
def results():
    return printed("interpreted_sum", TRITON_INTERPRET="1")


def test_a_sum_is_rounded_once_in_one_launch(results):
    assert len(results["units"]) == 8
    for name, (half, low) in results["units"].items():
        assert half <= ONCE and low <= 1, name  # the interpreter cuts bfloat16 off
    assert results["launched"] == ["add"] * 16


def test_what_is_not_one_low_rank_update_of_a_matrix_is_left(results):
    assert len(results["left"]) == 9 and all(results["left"].values()), results["left"]


def test_a_merge_takes_one_launch_for_each_layer_that_is_served(results):
    assert len(results["layers"]) == 5 and max(results["layers"]) <= ONCE
    # the fourth has two updates, and the last is in float32
    assert results["of layers"] == ["add"] * 3


def test_a_merge_that_is_refused_forms_no_sum(results):
    assert results["refused"]


def model_of(shapes, dtype):
    """Adapted layers on the device; and what their sums are in float64, each with the sizes of what
    is added up."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(*s[1::-1], False, "cuda", dtype) for s in shapes)
    paramlora.attach(layers, {str(i): {"r": s[2], "scale": 0.75} for i, s in enumerate(shapes)})
    want, sizes = [], []
    for layer in layers:
        (update,) = layer.parametrizations.weight
        update.lora_B.data.normal_(std=0.3)
        weight = layer.parametrizations.weight.original.detach().double()
        up, down = 0.75 * update.lora_B.detach().double(), update.lora_A.detach().double()
        want.append(weight + up @ down)
        sizes.append(weight.abs() + up.abs() @ down.abs())
    return layers, want, sizes


SHAPES = [(1024, 4096, 16), (64, 48, 4), (1, 8, 1), (4096, 1, 1), (300, 700, 64), (37, 131, 17)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ("ieee", "tf32"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_a_model_on_cuda_is_merged_with_one_rounding(dtype, name, monkeypatch):
    served, summed = [], operators.summed
    monkeypatch.setattr(merge, "summed", lambda *of: served.append(summed(*of)) or served[-1])
    layers, want, sizes = model_of(SHAPES, dtype)
    with precision(torch.backends.cuda.matmul, name):
        paramlora.merge(layers)
    assert len(served) == len(SHAPES) and None not in served
    for layer, shape, w, size in zip(layers, SHAPES, want, sizes):
        assert off(layer.weight.detach(), w, (shape[2] + 2) * 2**-24 * size) <= ONCE, shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_a_merge_on_cuda_is_the_same_whatever_torch_may_do_to_products(dtype):
    merged = []
    for name in ("ieee", "tf32"):
        layers, *_ = model_of(SHAPES, dtype)
        with precision(torch.backends.cuda.matmul, name):
            paramlora.merge(layers)
        merged.append([layer.weight for layer in layers])
    assert all(map(torch.equal, *merged))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("value, told", [(float("nan"), "not finite"), (1e20, "the sum is beyond")])
def test_a_merge_on_cuda_that_is_refused_changes_nothing(value, told):
    layers, *_ = model_of(SHAPES, torch.float16)
    layers[-1].parametrizations.weight[0].lora_B.data[3, 2] = value
    before = {name: t.clone() for name, t in layers.state_dict().items()}
    with pytest.raises(paramlora.AdapterError, match=told):
        paramlora.merge(layers)
    after = layers.state_dict()
    for name, t in before.items():
        torch.testing.assert_close(after[name], t, rtol=0, atol=0, equal_nan=True)
