"""The size of an update against its weight, by dense sums in float64."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import paramlora
from paramlora.model.attach import updates
from paramlora.model.norms import relative_size


def attached(layer, entry, name="weight"):
    torch.manual_seed(0)
    model = nn.Sequential(layer)
    paramlora.attach(model, {f"0.{name}" if name != "weight" else "0": entry})
    ((module, _, update),) = updates(model)
    for parameter in paramlora.trainable_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return model, module if isinstance(module, nn.Module) else model[0], update


@pytest.mark.parametrize("entry", [{"r": 2, "scale": 0.7}, {"r": 2, "kind": "dora"}, {"rows": [1]}])
def test_it_is_that_of_the_dense_weights(entry):
    layer = nn.Embedding(6, 5) if "rows" in entry else nn.Linear(6, 5)
    before = layer.weight.detach().double().clone()
    model, _, update = attached(layer, entry)
    after = model[0].weight.detach().double()
    want = float((after - before).norm() / before.norm())
    assert want > 0.1 and relative_size(model[0], update) == pytest.approx(want, rel=1e-5)
    paramlora.set_adapters(model, {"default": 0.5})
    if "r" in entry and "kind" not in entry:  # a sum is half as far at half its strength
        assert relative_size(model[0], update) == pytest.approx(want / 2, rel=1e-5)
    paramlora.set_adapters(model, {"default": 0.0})
    assert relative_size(model[0], update) == 0.0


def test_a_weight_of_zeros_and_what_changes_no_weight():
    layer = nn.Linear(6, 5)
    nn.init.zeros_(layer.weight)
    model, _, update = attached(layer, {"r": 2})
    assert relative_size(model[0], update) == math.inf
    kernels = {"r": 2, "hard": 0, "up_kernel": "same"}
    model, _, update = attached(nn.Conv2d(3, 3, 3), kernels)
    assert relative_size(model[0], update) is None  # two kernels in a row are no kernel


def test_under_a_weight_norm_it_is_against_what_that_computes():
    layer = weight_norm(nn.Linear(6, 5))
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(3)
    before = layer.weight.detach().double().clone()
    model, _, update = attached(layer, {"r": 2})
    after = model[0].weight.detach().double()
    want = float((after - before).norm() / before.norm())
    assert relative_size(model[0], update) == pytest.approx(want, rel=1e-5)
