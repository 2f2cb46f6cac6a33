"""DoRA's kernels: in Triton's interpreter, and on CUDA against float64."""

import pytest
import torch
from torch import nn

import paramlora
from tests.cuda.started import printed

pytest.importorskip("triton")
EPS = 2**-10  # of float16


@pytest.fixture(scope="module")
def results():
    return printed("interpreted_rescaled", TRITON_INTERPRET="1")


def test_norms_are_right_in_one_launch(results):
    norms = {name: result for name, result in results.items() if name.startswith("norms")}
    assert len(norms) == 5
    assert all(errors["norm"] < 1e-3 and ran == ["lengths"] for errors, ran in norms.values())


def test_outputs_and_gradients_are_right_to_one_rounding(results):
    layers = {name: result for name, result in results.items() if name.startswith("layer")}
    assert len(layers) == 8
    wrong = {name: errors for name, (errors, _) in layers.items() if max(errors.values()) > EPS}
    assert not wrong
    assert all(errors["m"] < 1e-5 for errors, _ in layers.values())
    assert all(ran == ["rescale", "rescale_backward"] for _, ran in layers.values())


def test_a_whole_layer_is_right_and_starts_what_it_needs(results):
    layers = {name: result for name, result in results.items() if name.startswith("whole")}
    assert len(layers) == 20
    for name, (errors, ran) in layers.items():
        assert errors.pop("scale") < 4 * EPS, name  # a sum of all, whose terms cancel
        assert max(errors.values()) < 2 * EPS, name  # four roundings, of one number at worst
        ahead = ran[: ran.index("rescale_backward")]
        assert ahead.count("forward") + ahead.count("product") == 1, name
        # the product rescales what it sums, where the tensor memory engine stores it or the launch
        # is its own, as in a CUDA graph
        inside = "product" in ahead or "aligned" in name
        assert ahead.count("rescale") == (not inside), name
        assert ran.count("rescale_backward") == 1, name
        assert ran.count("lengths") == ("a high rank" not in name), name


def test_a_magnitude_that_is_not_trained_keeps_no_output(results):
    layers = {name: result for name, result in results.items() if name.startswith("frozen")}
    assert len(layers) == 6
    for name, (errors, ran) in layers.items():
        assert max(errors.values()) < 2 * EPS and errors.pop("kept") == 0, name
        assert "rescale_backward" not in ran, name


def test_any_gradients_alone(results):
    layers = {name: result for name, result in results.items() if name.startswith("alone")}
    assert len(layers) == 2**6 - 2
    for name, (errors, ran) in layers.items():
        errors["scale"] = errors.get("scale", 0) / 2  # a sum of all, whose terms cancel
        assert max(errors.values()) < 2 * EPS and ran, name


def test_a_kronecker_product_of_low_rank_is_a_low_rank_layers(results):
    layers = {name: result for name, result in results.items() if name.startswith("product")}
    assert len(layers) == 2
    for name, (errors, ran) in layers.items():
        assert max(errors.values()) < EPS and ran, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(512, 1024, 768), (64, 317, 211), (3, 33, 320, 320)])
def test_a_layer_on_cuda(shape, dtype):
    torch.manual_seed(0)
    *rows, fan_in, out = shape
    layer = nn.Linear(fan_in, out, device="cuda", dtype=dtype)
    weight, bias = layer.weight.double(), layer.bias.double()
    paramlora.attach(layer, {"weight": {"r": 8, "scale": 0.5, "kind": "dora"}})
    update = layer.parametrizations.weight[0]
    update.lora_B.data.normal_(std=0.05)
    update.lora_magnitude.data.mul_(1.25)
    x = torch.randn(*rows, fan_in, device="cuda", dtype=dtype, requires_grad=True)
    dy = torch.randn(*rows, out, device="cuda", dtype=dtype)
    named = {"x": x, "A": update.lora_A, "B": update.lora_B, "m": update.lora_magnitude}
    y = layer(x)
    got = torch.autograd.grad(y, named.values(), dy)
    leaves = [t.detach().double().requires_grad_() for t in named.values()]
    total = weight + 0.5 * leaves[2] @ leaves[1]
    total = leaves[3] * total / total.detach().norm(dim=1, keepdim=True)
    true = leaves[0] @ total.T + bias
    want = torch.autograd.grad(true, leaves, dy.double())
    eps = torch.finfo(dtype).eps
    for name, mine, real in zip(("y", *named), (y, *got), (true, *want)):
        assert (mine.double() - real).norm() < 4 * eps * real.norm(), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("shape", [(2048, 2048, 4096), (700, 1024, 320)])
def test_a_layer_in_a_graph(shape):
    """Whose product rescales its own sum: the same numbers as in eager mode to a rounding."""
    torch.manual_seed(0)
    rows, fan_in, out = shape
    layer = nn.Linear(fan_in, out, device="cuda", dtype=torch.bfloat16)
    paramlora.attach(layer, {"weight": {"r": 8, "scale": 0.5, "kind": "dora"}})
    update = layer.parametrizations.weight[0]
    update.lora_B.data.normal_(std=0.05)
    update.lora_magnitude.data.mul_(1.25)
    x = torch.randn(rows, fan_in, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(rows, out, device="cuda", dtype=torch.bfloat16)
    leaves = [x, update.lora_A, update.lora_B, update.lora_magnitude]

    def step():
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    want, stream = step(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    for mine, real in zip(got, want):
        assert (mine - real).norm() < 2**-7 * real.norm()
