"""Weights that others share or parametrize too, and attaching that is stopped half-way."""

import copy
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import paramlora
from paramlora.model.attach import updates

attach_module = sys.modules["paramlora.model.attach"]  # the function of that name hides it


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
    ((path, _, low),) = updates(model)
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


KINDS = {
    "lora": {"r": 2},
    "dora": {"r": 2, "kind": "dora"},
    "loha": {"r": 2, "kind": "loha"},
    "lokr": {"r": 1, "kind": "lokr"},
    "lokr whole": {"r": 1, "kind": "lokr", "full_matrix": True},
    "difference": {"kind": "difference"},
    "rows": {"rows": [2, 5]},
    "whole": {"whole": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_extracted_of_a_tied_model_acts_in_one(kind):
    torch.manual_seed(0)
    plain = Tied().double()
    model = paramlora.attach(copy.deepcopy(plain), {"re:(embedding|head).*": KINDS[kind]})
    for parameter in paramlora.trainable_parameters(model):
        nn.init.normal_(parameter)
    adapter = paramlora.checkpoint.extract(model.state_dict())
    other = paramlora.attach_adapter(copy.deepcopy(plain), adapter)
    x = torch.arange(8)
    torch.testing.assert_close(other(x), model(x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(other(x), plain(x))
    paramlora.merge(other)
    assert other.head.weight is other.embedding.weight


def test_sizes_that_do_not_fit_the_first_holder_or_one_alone_are_refused():
    entry = {"r": 1, "kind": "lokr", "sizes": [[2, 4], [2, 2]]}  # of 8 outputs and 4 inputs
    for config in ({"re:embedding|head": entry}, {"embedding": entry}):
        model = Tied()
        with pytest.raises(paramlora.TargetError, match="matches embedding, which has 4 outputs"):
            paramlora.attach(model, config)
        assert not list(updates(model))


def test_one_of_two_holders_warns_and_the_other_never_moves():
    model = Tied().double()
    plain = copy.deepcopy(model)
    with pytest.warns(paramlora.ParamloraWarning, match="held as embedding.weight, head.weight"):
        paramlora.attach(model, {"head": {"r": 2}})
    ((_, _, low),) = updates(model)
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
    ((_, _, low),) = updates(model)
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
    ((_, _, low),) = updates(model)
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
    assert not list(updates(model))


def test_spectral_norm_cannot_hold_the_sum_so_merging_is_refused():
    model = nn.ModuleDict({"layer": parametrizations.spectral_norm(nn.Linear(4, 6))}).double()
    model.eval()
    plain = copy.deepcopy(model)
    paramlora.attach(model, {"layer": {"r": 2}})
    ((_, _, low),) = updates(model)
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
    ((_, _, low),) = updates(model)
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


@pytest.mark.parametrize("take_off", (paramlora.detach, paramlora.merge))
def test_each_holder_of_a_tied_tensor_gets_its_own_class_and_order_back(take_off):
    class Scaled(nn.Embedding):
        pass

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = Scaled(8, 4), nn.Linear(4, 8)
            self.bilinear = nn.Bilinear(2, 2, 3)
            self.head.weight = self.table.weight

    model = Model()
    kept = {n: p for n, p in model.named_parameters(remove_duplicate=False)}
    order, types = list(model.state_dict()), [type(m) for m in model.modules()]
    for _ in range(2):
        paramlora.attach(model, {"re:table|head|bilinear": {"r": 1}})
        take_off(model)
        assert list(model.state_dict()) == order
        assert [type(m) for m in model.modules()] == types
        for name, parameter in model.named_parameters(remove_duplicate=False):
            assert parameter is kept[name]


def aliased(how):
    """(model, the layer whose memory another one shares)"""
    a, b = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
    if how == "data":
        b.weight.data = a.weight.data
    elif how == "view":
        store = torch.randn(6, 4).double()
        a.weight, b.weight = nn.Parameter(store[:4]), nn.Parameter(store[2:])
    elif how == "transposed":
        b.weight.data = a.weight.data.t()
    elif how == "buffer":
        b.register_buffer("copy", a.weight.data.view(-1)[3:9])
    return nn.ModuleDict({"a": a, "b": b})


@pytest.mark.parametrize("how", ("data", "view", "transposed", "buffer"))
def test_a_tensor_that_shares_memory_is_told_of_and_the_other_never_moves(how):
    model = aliased(how)
    plain = copy.deepcopy(model)
    with pytest.warns(paramlora.ParamloraWarning, match=r"a: it shares its memory with b\."):
        paramlora.attach(model, {"a": {"r": 2}})
    ((_, _, low),) = updates(model)
    nn.init.normal_(low.lora_B)
    kept, others = model.a.parametrizations.weight.original, dict(model.b.state_dict())
    want = plain.a.weight + low.lora_B @ low.lora_A
    paramlora.merge(model)
    assert model.a.weight is kept
    torch.testing.assert_close(model.a.weight, want, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(v, plain.b.state_dict()[k]) for k, v in others.items())


def test_neighbours_in_one_memory_are_no_tie():
    store = torch.randn(8, 4)
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model.a.weight, model.b.weight = nn.Parameter(store[:4]), nn.Parameter(store[4:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paramlora.attach(model, {"a": {"r": 2}})
    paramlora.merge(model)
    assert model.a.weight.data_ptr() == store.data_ptr()


class Clamp(nn.Module):
    def forward(self, weight):
        return weight.clamp(-0.5, 0.5)

    def right_inverse(self, value):
        return value


class Double(nn.Module):
    def forward(self, weight):
        return weight * 2

    def right_inverse(self, value):
        return value / 2


ULPS = {torch.float64: 16, torch.float32: 16, torch.bfloat16: 4, torch.float16: 4}


def under_a_rule(rule, dtype, size=16):
    torch.manual_seed(0)
    layer = nn.Linear(size, size)
    if rule == "spectral norm":
        layer = parametrizations.spectral_norm(layer)
    elif rule == "weight norm":
        layer = parametrizations.weight_norm(layer)
    elif rule == "orthogonal":
        layer = parametrizations.orthogonal(layer)
    else:
        parametrize.register_parametrization(layer, "weight", rule(), unsafe=True)
    return nn.ModuleDict({"layer": layer}).to(dtype).eval()


@pytest.mark.parametrize("dtype", ULPS)
@pytest.mark.parametrize("rule", ("spectral norm", "orthogonal", Clamp), ids=str)
def test_a_rule_that_cannot_hold_the_sum_is_refused_in_every_type(rule, dtype):
    if rule == "orthogonal" and dtype.itemsize == 2:
        pytest.skip("torch has no matrix_exp nor householder product in 16 bits on a CPU")
    model = under_a_rule(rule, dtype)
    paramlora.attach(model, {"layer": {"r": 2}})
    ((_, _, low),) = updates(model)
    nn.init.normal_(low.lora_B, std=0.02 if rule is not Clamp else 2.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(paramlora.AdapterError, match="cannot hold the sum exactly"):
        paramlora.merge(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("dtype", ULPS)
@pytest.mark.parametrize("rule", ("weight norm", Double), ids=str)
def test_a_rule_that_can_hold_the_sum_merges_in_every_type(rule, dtype):
    model = under_a_rule(rule, dtype)
    base = copy.deepcopy(model).layer.weight.detach()
    paramlora.attach(model, {"layer": {"r": 2}})
    ((_, _, low),) = updates(model)
    nn.init.normal_(low.lora_B, std=0.02)
    want = base.double() + low.lora_B.detach().double() @ low.lora_A.detach().double()
    paramlora.merge(model)
    error = (model.layer.weight.double() - want).abs()
    # what the layer showed before was rounded, and so are the norm's factors: some units of each
    near = ULPS[dtype] * torch.finfo(dtype).eps * (want.abs() + base.double().abs())
    assert (error <= near + 1e-12).all()


@pytest.mark.parametrize("hard", (1, 0))
def test_a_sum_beyond_its_type_is_refused_before_the_first_write(hard):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half()
    paramlora.attach(model, {"*": {"r": 1, "hard": hard}})
    with torch.no_grad():
        for _, _, low in updates(model):
            low.lora_A.fill_(1.0)
            low.lora_B.fill_(0.5)
        stored = [m.weight if hard == 0 else m.parametrizations.weight.original for m in model]
        stored[1][2, 3] = 6e4
        list(updates(model))[1][2].lora_B.fill_(1e4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(
        paramlora.AdapterError, match=r"1\.weight: the sum is beyond 65504.*float16"
    ):
        paramlora.merge(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    paramlora.set_adapters(model, {"default": 0.5})
    paramlora.merge(model)
    assert model[1].weight[2, 3] == 65000 or model[1].weight[2, 3].isfinite()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_a_sum_beyond_a_wide_type_is_refused_too(dtype):
    model = nn.Linear(2, 2, bias=False).to(dtype)
    nn.init.constant_(model.weight, torch.finfo(dtype).max / 2)
    paramlora.attach(model, {"weight": {"r": 1, "scale": 1e38}})
    with torch.no_grad():
        low = model.parametrizations.weight[0]
        low.lora_A.fill_(1.0)
        low.lora_B.fill_(3.0 if dtype != torch.float64 else 3e270)
    with pytest.raises(paramlora.AdapterError, match="the sum is beyond"):
        paramlora.merge(model)
