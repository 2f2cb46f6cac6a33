"""Layers of which only a weight is known: called once for each adapter, with its rows alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import paramlora
from tests.model.rows import ROWS, Attends, adapted, check, images, linears, trained


@pytest.mark.parametrize(
    ("make", "layers", "x"),
    [
        (lambda: nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True), ["weight_ih_l0"], (5, 4)),
        (lambda: nn.GRU(4, 3, batch_first=True), ["weight_hh_l0", "weight_ih_l0"], (5, 4)),
        (lambda: nn.LSTMCell(4, 3), ["weight_ih"], (4,)),
        (lambda: nn.ConvTranspose1d(4, 3, 2), ["weight"], (4, 5)),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), ["0"], (4,)),
    ],
)
def test_layers_of_which_only_a_weight_is_known(make, layers, x):
    check(make, layers, images(*x))


def test_whole_tensors_split_their_layer():
    torch.manual_seed(0)
    model = linears().double()
    paramlora.attach(model, {"0": {"r": 2}, "re:0.bias": {"whole": True}}, "a")
    paramlora.attach(model, {"0": {"r": 3}}, "b")
    own = {n: p.data.uniform_(-1, 1) for n, p in trained(model).items()}
    x = images(3, 6)[:3]
    with paramlora.route(model, ["a", None, "b"]):
        y = model[0](x)
    a, b = list(model[0].parametrizations.weight)
    weight, lists = model[0].parametrizations.weight.original, model[0].parametrizations
    whole = lists.bias[0].lora_whole
    assert own
    torch.testing.assert_close(y[0], F.linear(x[0], weight + a.lora_B @ a.lora_A, whole))
    torch.testing.assert_close(y[1], F.linear(x[1], weight, lists.bias.original))
    torch.testing.assert_close(
        y[2], F.linear(x[2], weight + b.lora_B @ b.lora_A, lists.bias.original)
    )


def test_other_kinds_split_their_layer_too():
    torch.manual_seed(0)
    layer = nn.Linear(6, 8).double()
    paramlora.attach(layer, {"weight": {"r": 2}}, "a")
    paramlora.attach(layer, {"weight": {"r": 2, "kind": "dora"}}, "b")
    for p in paramlora.trainable_parameters(layer):
        p.data.uniform_(-1, 1)
    weight = layer.parametrizations.weight.original
    a, b = list(layer.parametrizations.weight)
    x = images(3, 6)[:3]
    with paramlora.route(layer, ["a", None, "b"]):
        y = layer(x)
        (grads,) = torch.autograd.grad(y[2].sum(), [a.lora_B], allow_unused=True)
    assert grads is None or not grads.any()
    torch.testing.assert_close(y[0], F.linear(x[0], weight + a.lora_B @ a.lora_A, layer.bias))
    torch.testing.assert_close(y[1], F.linear(x[1], weight, layer.bias))
    moved = weight + b.lora_B @ b.lora_A  # Liu et al. 2024, equation 5
    moved = b.lora_magnitude.view(-1, 1) * moved / moved.norm(dim=1, keepdim=True)
    torch.testing.assert_close(y[2], F.linear(x[2], moved, layer.bias))


def test_a_layer_called_once_for_each_adapter_compiles():
    torch.manual_seed(0)
    model = adapted(Attends(batch_first=True).double(), ["in_proj_weight", "out_proj"])
    x = images(5, 8)
    compiled = torch.compile(model, backend="eager")
    for rows in (ROWS, ["a", "b"] * 3):
        with paramlora.route(model, rows):
            torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("layers", [["in_proj_weight", "out_proj"], ["out_proj"]])
def test_a_copy_of_a_layer_called_once_for_each_adapter_is_one_of_its_own(layers):
    torch.manual_seed(0)
    model, x = adapted(Attends(batch_first=True).double(), layers), images(5, 8)
    before = model(x)
    with paramlora.route(model, ROWS):
        other = copy.deepcopy(model)
    assert torch.equal(other(x), before)
    other.attention.out_proj.bias.data += 1
    assert torch.equal(model(x), before)
    torch.testing.assert_close(other(x), before + 1)
    with paramlora.route(other, ROWS):
        routed = other(x)
    with paramlora.route(model, ROWS):
        torch.testing.assert_close(routed, model(x) + 1)
    paramlora.detach(other)
    assert torch.isfinite(other(x)).all()
