"""Merging where memory, devices, other holders or Ctrl-C stand in the way."""

import copy
from importlib import import_module

import pytest
import torch
from torch import nn

import paramlora
from paramlora.model.attach import updates

merge_module = import_module("paramlora.model.merge")  # the function of that name hides it


def fill(model):
    for _, _, low in updates(model):
        nn.init.normal_(low.lora_B)


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)).double()


def test_a_merge_that_is_stopped_after_its_first_weight_goes_to_its_end(monkeypatch):
    model, x = net(), torch.randn(3, 4).double()
    paramlora.attach(model, {"*": {"r": 2}})
    fill(model)
    want, write, calls = model(x).detach(), merge_module._write, []

    def stop(*args):
        calls.append(1)
        write(*args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(merge_module, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        paramlora.merge(model)
    monkeypatch.undo()
    assert [type(m) is nn.Linear for m in model] == [True, True, True]
    torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)
    paramlora.merge(model)
    torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)


def test_some_of_several_adapters_fold_in_as_strongly_as_they_act():
    model = net()
    plain = copy.deepcopy(model)
    paramlora.attach(model, {"0": {"r": 2, "scale": 3}}, "a")
    paramlora.attach(model, {"0": {"r": 1}, "1": {"r": 1, "hard": 0}}, "b")
    paramlora.attach(model, {"0": {"r": 1}}, "off")
    fill(model)
    paramlora.set_adapters(model, {"a": 0.5, "b": 2})
    a, b, off = model[0].parametrizations.weight
    first = plain[0].weight + 1.5 * a.lora_B @ a.lora_A
    whole = first + 2 * b.lora_B @ b.lora_A
    paramlora.merge(model, ["a", "off"])
    assert paramlora.summary(model).rows[0].adapter == "b" and len(list(updates(model))) == 2
    original = model[0].parametrizations.weight.original
    torch.testing.assert_close(original, first, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model[0].weight, whole, rtol=1e-12, atol=1e-12)
    paramlora.merge(model)
    torch.testing.assert_close(model[0].weight, whole, rtol=1e-12, atol=1e-12)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_detaching_some_leaves_the_others_and_detaching_all_the_base_bit_for_bit():
    model = net()
    model[1].bias.requires_grad_(False)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    kept = {name: p for name, p in model.named_parameters()}
    paramlora.attach(model, {"0": {"r": 2}}, "a")
    paramlora.attach(model, {"0": {"r": 1}, "1": {"r": 1, "hard": 0}}, "b")
    fill(model)
    a = model[0].parametrizations.weight[0]
    paramlora.detach(model, "b")
    want = base["0.weight"] + a.lora_B @ a.lora_A
    torch.testing.assert_close(model[0].weight, want, rtol=1e-12, atol=1e-12)
    paramlora.detach(model)
    assert list(model.state_dict()) == list(base)
    assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items())
    assert all(p is kept[name] for name, p in model.named_parameters())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["1.bias"]


def test_without_adapters_there_is_nothing_to_do():
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert paramlora.merge(model) is model and paramlora.detach(model) is model
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_merging_twice_adds_once():
    model = net()
    base = model[0].weight.detach().clone()
    paramlora.attach(model, {"0": {"r": 2}})
    fill(model)
    ((_, _, low),) = updates(model)
    want = base + low.lora_B @ low.lora_A
    for _ in range(2):
        paramlora.merge(model)
        torch.testing.assert_close(model[0].weight, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("hard", (0, 1))
def test_the_base_is_bit_identical_after_two_thousand_steps_and_switches(dtype, hard):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(dtype)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = torch.randn(4, 8, dtype=dtype), torch.randn(4, 8, dtype=dtype)
    plain = model(x).detach()
    paramlora.attach(model, {"*": {"r": 2, "hard": hard}}, "a")
    paramlora.attach(model, {"*": {"r": 1, "hard": hard}}, "b")
    optimizer = torch.optim.SGD(paramlora.trainable_parameters(model), lr=0.05)
    losses = []
    for step in range(2000):
        if step % 100 == 0:
            paramlora.set_adapters(model, {"a": 1, "b": 0.5 if step % 200 else 0})
            with paramlora.disable_adapters(model):
                assert torch.equal(model(x), plain)
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(paramlora.detach(model)(x), plain)
    assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items())


def test_an_average_of_a_model_is_a_copy_of_its_own():
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model, x = net(), torch.randn(3, 4).double()
    paramlora.attach(model, {"*": {"r": 2}})
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)  # the first one copies
    first, start = model(x).detach(), [low.lora_B.clone() for _, _, low in updates(model)]
    fill(model)
    trained = model(x).detach()
    assert torch.equal(average(x), first) and not torch.equal(trained, first)
    average.update_parameters(model)
    for (_, _, mine), (_, _, its), before in zip(updates(model), updates(average), start):
        want = (before + mine.lora_B) / 2
        torch.testing.assert_close(its.lora_B, want, rtol=1e-12, atol=1e-12)
    assert torch.equal(model(x), trained)


@pytest.mark.parametrize("kind", ("expanded", "transposed", "channels last", "shared memory"))
def test_merging_into_memory_of_any_kind(kind):
    layer = nn.Conv2d(4, 6, 3).double()
    if kind == "expanded":
        layer.weight = nn.Parameter(torch.randn(1, 4, 3, 3).double().expand(6, 4, 3, 3))
    elif kind == "transposed":
        layer.weight = nn.Parameter(torch.randn(4, 6, 3, 3).double().transpose(0, 1))
    elif kind == "channels last":
        layer.to(memory_format=torch.channels_last)
    else:
        layer.share_memory()
    weight, pointer = layer.weight.detach(), layer.weight.data_ptr()
    base, strides = weight.clone(), layer.weight.stride()
    model = paramlora.attach(nn.Sequential(layer), {"0": {"r": 2}})
    fill(model)
    ((_, _, low),) = updates(model)
    want = base + (low.lora_B @ low.lora_A).detach().reshape(base.shape)
    torch.testing.assert_close(model[0].weight, want, rtol=1e-12, atol=1e-12)
    paramlora.merge(model)
    torch.testing.assert_close(model[0].weight.detach(), want, rtol=1e-12, atol=1e-12)
    if kind != "expanded":
        assert model[0].weight.stride() == strides and model[0].weight.data_ptr() == pointer


def test_a_model_on_the_meta_device_merges_in_structure():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3), nn.Conv2d(3, 3, 3))
    state = {k: v.shape for k, v in model.state_dict().items()}
    paramlora.attach(model, {"0": {"r": 2}, "1": {"r": 1, "hard": 0}})
    assert all(p.is_meta for p in model.parameters())
    paramlora.merge(model)
    assert {k: v.shape for k, v in model.state_dict().items()} == state
    assert [type(m) for m in model] == [nn.Linear, nn.Conv2d]


def test_merging_in_inference_mode_leaves_weights_that_train():
    layers = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    layers.b.weight = layers.a.weight
    with pytest.warns(paramlora.ParamloraWarning):
        paramlora.attach(layers, {"a": {"r": 2}})
    with torch.inference_mode():
        paramlora.merge(layers)
    layers.requires_grad_(True).a(torch.ones(1, 4)).sum().backward()
    assert layers.a.weight is not layers.b.weight and layers.a.weight.grad is not None


KINDS = {
    "lora": {"r": 2},
    "soft": {"r": 2, "hard": 0},
    "pissa": {"r": 2, "init": "pissa"},
    "loha": {"r": 2, "kind": "loha"},
    "lokr": {"r": 1, "kind": "lokr"},
    "difference": {"kind": "difference"},
    "dora": {"r": 2, "kind": "dora"},
    "rows": {"rows": [1, 3]},
}
ADD = {"lora", "soft", "pissa", "loha", "lokr", "difference"}


@pytest.mark.parametrize("last", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_merging_one_of_two_changes_no_output_or_nothing_at_all(first, last):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4)).double(), torch.randn(3, 4).double()
    for name, kind in (("a", first), ("b", last)):
        paramlora.attach(model, {"0": KINDS[kind]}, name)
        for parameter in paramlora.trainable_parameters(model, name):
            nn.init.normal_(parameter)
    want = model(x).detach()
    # a branch acts behind every parametrization, whichever was attached first
    behind = ("a", "b") if first == "soft" else ("b", "a")
    before = copy.deepcopy(model.state_dict())
    for name, other in (("a", "b"), ("b", "a")):
        tried = copy.deepcopy(model)
        if name == behind[0] and not {first, last} <= ADD:
            told = f'adapter "{name}" acts on what adapter "{other}" makes of it.*do not add up'
            with pytest.raises(paramlora.AdapterError, match=told):
                paramlora.merge(tried, name)
            assert all(torch.equal(before[key], v) for key, v in tried.state_dict().items())
            paramlora.set_adapters(tried, {name: 1.0, other: 0.0})
            now = tried(x).detach()
            torch.testing.assert_close(paramlora.merge(tried, name)(x), now)
        else:
            torch.testing.assert_close(paramlora.merge(tried, name)(x), want)
            torch.testing.assert_close(paramlora.merge(tried)(x), want)


def test_of_tensors_trained_whole_one_alone_is_not_merged_while_another_acts():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4)).double(), torch.randn(3, 4).double()
    for name in ("a", "b"):
        paramlora.attach(model, {"0": {"whole": True}}, name)
        for parameter in paramlora.trainable_parameters(model, name):
            nn.init.normal_(parameter)
    for name in ("a", "b"):
        with pytest.raises(paramlora.AdapterError, match='"whole" and "whole" do not add up'):
            paramlora.merge(model, name)
    paramlora.set_adapters(model, {"a": 1.0})
    want = model(x).detach()
    torch.testing.assert_close(paramlora.merge(copy.deepcopy(model), "a")(x), want)
    paramlora.set_adapters(model, {"a": 0.5, "b": 0.5})
    want = model(x).detach()
    torch.testing.assert_close(paramlora.merge(model)(x), want)
