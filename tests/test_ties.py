"""Weights that others share or parametrize too, and attaching that is stopped half-way."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import paramlora
from paramlora.attach import lowranks

attach_module = sys.modules["paramlora.attach"]  # the function of that name hides it


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(x))


def test_all_holders_in_one_entry_share_one_update_and_stay_tied():
    model = Tied().double()
    plain = copy.deepcopy(model)
    paramlora.attach(model, {"re:embedding|head": {"r": 2}})
    ((path, _, low),) = lowranks(model)
    assert path == "embedding" and set(paramlora.adapter_state_dict(model)) == {
        f"embedding.lora_{name}" for name in ("A", "B", "scale")
    }
    nn.init.normal_(low.lora_B)
    weight = (plain.head.weight + (low.lora_B @ low.lora_A).T).detach()
    x = torch.arange(8)
    weight.requires_grad_()
    want = F.linear(F.embedding(x, weight), weight)
    torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)
    want.square().sum().backward()
    model(x).square().sum().backward()
    torch.testing.assert_close(low.lora_A.grad, low.lora_B.detach().T @ weight.grad.T)
    torch.testing.assert_close(low.lora_B.grad, weight.grad.T @ low.lora_A.detach().T)
    paramlora.merge(model)
    torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)
    assert model.head.weight is model.embedding.weight


def test_one_of_two_holders_warns_and_the_other_never_moves():
    model = Tied().double()
    plain = copy.deepcopy(model)
    with pytest.warns(paramlora.ParamloraWarning, match="held as embedding.weight, head.weight"):
        paramlora.attach(model, {"head": {"r": 2}})
    ((_, _, low),) = lowranks(model)
    nn.init.normal_(low.lora_B)
    x = torch.arange(8)
    want = model(x)
    paramlora.merge(model)
    torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)
    assert torch.equal(model.embedding.weight, plain.embedding.weight)


def test_a_module_under_two_names_is_adapted_once():
    layer = nn.Linear(4, 4).double()
    model = nn.ModuleDict({"a": layer, "b": layer})
    plain = copy.deepcopy(layer)
    paramlora.attach(model, {"a": {"r": 2}})
    ((_, _, low),) = lowranks(model)
    nn.init.normal_(low.lora_B)
    want = plain.weight + low.lora_B @ low.lora_A
    torch.testing.assert_close(model["b"].weight, want)
    paramlora.merge(model)
    torch.testing.assert_close(model["b"].weight, want)
    assert model["a"] is model["b"]


@pytest.mark.parametrize("dim", [0, 1, None])
def test_under_weight_norm_the_sum_is_exact_and_merges_into_g_and_v(dim):
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": parametrizations.weight_norm(nn.Linear(4, 6), dim=dim)})
    model.double()
    plain = copy.deepcopy(model)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    paramlora.attach(model, {"layer": {"r": 2, "scale": 1.5}})
    ((_, _, low),) = lowranks(model)
    nn.init.normal_(low.lora_B)
    want = plain.layer.weight.detach() + 1.5 * (low.lora_B @ low.lora_A).detach()
    x = torch.randn(3, 4, dtype=torch.float64)
    want.requires_grad_()
    y = F.linear(x, want, plain.layer.bias)
    torch.testing.assert_close(model.layer(x), y, rtol=1e-12, atol=1e-12)
    y.square().sum().backward()
    model.layer(x).square().sum().backward()
    torch.testing.assert_close(low.lora_A.grad, 1.5 * low.lora_B.detach().T @ want.grad)
    torch.testing.assert_close(low.lora_B.grad, 1.5 * want.grad @ low.lora_A.detach().T)
    want = want.detach()
    detached = paramlora.detach(copy.deepcopy(model))
    assert all(torch.equal(v, base[k]) for k, v in detached.state_dict().items())
    paramlora.merge(model)
    torch.testing.assert_close(model.layer.weight, want, rtol=1e-12, atol=1e-12)
    assert list(model.state_dict()) == list(base)
    assert not list(lowranks(model))


def test_spectral_norm_cannot_hold_the_sum_so_merging_is_refused():
    model = nn.ModuleDict({"layer": parametrizations.spectral_norm(nn.Linear(4, 6))}).double()
    model.eval()
    plain = copy.deepcopy(model)
    paramlora.attach(model, {"layer": {"r": 2}})
    ((_, _, low),) = lowranks(model)
    nn.init.normal_(low.lora_B)
    want = plain.layer.weight.detach() + (low.lora_B @ low.lora_A).detach()
    torch.testing.assert_close(model.layer.weight, want, rtol=1e-12, atol=1e-12)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(paramlora.AdapterError, match="under SpectralNorm, which cannot hold"):
        paramlora.merge(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    parametrize.remove_parametrizations(model.layer, "weight", leave_parametrized=True)
    torch.testing.assert_close(model.layer.weight, want, rtol=1e-12, atol=1e-12)


def test_spectral_norm_over_an_adapter_merges_below_it():
    model = nn.ModuleDict({"layer": nn.Linear(4, 6)}).double()
    paramlora.attach(model, {"layer": {"r": 2}})
    ((_, _, low),) = lowranks(model)
    nn.init.normal_(low.lora_B)
    parametrizations.spectral_norm(model.layer)
    model.eval()
    want = model.layer.weight.detach()
    paramlora.merge(model)
    torch.testing.assert_close(model.layer.weight.detach(), want, rtol=1e-12, atol=1e-12)


def test_matching_does_not_step_spectral_norm():
    model = nn.ModuleDict({"layer": parametrizations.spectral_norm(nn.Linear(4, 6))}).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    paramlora.targets(model, {"layer": {"r": 2}})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_attaching_that_is_stopped_leaves_the_model_as_it_was(monkeypatch, at, error):
    model = nn.ModuleDict(
        {"a": nn.Linear(4, 4), "b": nn.LSTM(4, 4), "c": nn.Conv2d(4, 4, 1), "d": nn.Linear(4, 4)}
    )
    paramlora.attach(model, {"a": {"r": 1}}, "first")
    model.b.weight_hh_l0.requires_grad_(True)

    def picture():
        return [
            (
                type(m),
                [(n, id(p), p.requires_grad) for n, p in m._parameters.items() if p is not None],
                {n: id(child) for n, child in m._modules.items()},
                list(m._forward_hooks.values()),
                [id(w) for w in getattr(m, "_flat_weights", [])],
            )
            for m in model.modules()
        ]

    before, calls = picture(), []

    def stop(*_):
        calls.append(1)
        if len(calls) == at:
            raise error

    def wrapped(original):
        def run(*args):
            original(*args)
            stop()

        return run

    monkeypatch.setattr(attach_module, "_register", wrapped(attach_module._register))
    monkeypatch.setattr(attach_module, "add_branch", wrapped(attach_module.add_branch))
    config = {"a": {"r": 2}, "b.weight_ih_l0": {"r": 2}, "c": {"r": 2, "hard": 0}, "d": {"r": 1}}
    with pytest.raises(error):
        paramlora.attach(model, config, "second")
    assert picture() == before
    monkeypatch.undo()
    paramlora.attach(model, config, "second")
    model.a(torch.randn(2, 4)), model.b(torch.randn(2, 3, 4))


def test_a_second_tensor_of_one_layer_leaves_the_class_of_other_layers_alone():
    layers = [nn.LSTM(4, 4) for _ in range(2)]
    for layer in layers:
        paramlora.attach(nn.ModuleDict({"b": layer}), {"b.weight_ih_l0": {"r": 1}})
    shared = type(layers[0])
    names = set(vars(shared))
    assert type(layers[1]) is shared
    paramlora.attach(nn.ModuleDict({"b": layers[0]}), {"b.weight_hh_l0": {"r": 1}}, "second")
    assert set(vars(shared)) == names
    layers[1](torch.randn(2, 3, 4)), layers[0](torch.randn(2, 3, 4))
