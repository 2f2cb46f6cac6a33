"""How strongly an update acts: one value, whenever it is changed and whoever reads it."""

import copy
import gc
import os
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import paramlora
from paramlora.model.attach import updates

ENTRIES = {
    "hard": {"r": 2},
    "soft": {"r": 2, "hard": 0},
    "trained scale": {"r": 2, "trainable_scale": 1},
    "soft, trained scale": {"r": 2, "hard": 0, "trainable_scale": 1},
    "dropout": {"r": 2, "dropout": 1e-15},
    "whole": {"whole": 1},
}


class Read(nn.Module):
    """A layer that nobody knows: it reads its weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return x @ self.weight.T


LAYERS = {
    "linear": lambda: nn.Linear(4, 4),
    "convolution": lambda: nn.Conv1d(4, 4, 3, padding=1),
    "read": Read,
}


def made(layer, entry, adapters=("default",)):
    torch.manual_seed(0)
    plain = LAYERS[layer]().double()
    model = copy.deepcopy(plain)
    for adapter in adapters:
        paramlora.attach(model, {"re:.*weight": entry}, adapter)
    with torch.no_grad():
        for _, _, update in updates(model):
            for p in update.parameters():
                p.normal_()
    return model, plain


def allowed(layer, name):
    soft, dropped = ENTRIES[name].get("hard", 1) == 0, "dropout" in ENTRIES[name]
    return layer != "read" or not (soft or dropped)


CASES = [(lay, name) for lay in LAYERS for name in ENTRIES if allowed(lay, name)]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def dense(model, plain, x, strengths):
    """The output by a dense float64 weight, a function of the updates' own parameters."""
    weight = plain.weight.detach()
    for _, _, update in updates(model):
        strength = strengths.get(update.adapter, 0.0)
        if hasattr(update, "lora_whole"):
            weight = weight + strength * (update.lora_whole - plain.weight.detach())
        else:
            delta = (update.lora_B @ update.lora_A).reshape(weight.shape)
            weight = weight + strength * update.lora_scale * delta
    if isinstance(plain, nn.Conv1d):
        return F.conv1d(x, weight, plain.bias.detach(), padding=1)
    return F.linear(x, weight, getattr(plain, "bias", None))


def same(got, want):
    assert got.keys() == want.keys() and any(g.abs().max() > 0 for g in got.values())
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("way", ("eager", "aot_eager", "aot_eager_decomp_partition"))
@pytest.mark.parametrize("adapters", (("default",), ("default", "other")))
@pytest.mark.parametrize("layer, name", CASES)
def test_a_strength_that_changes_before_the_backward(layer, name, adapters, way):
    if way != "eager" and (layer == "convolution" or len(adapters) > 1):
        pytest.skip("compiling is slow: one of each")
    model, plain = made(layer, ENTRIES[name], adapters)
    call = model if way == "eager" else torch.compile(model, backend=way)
    x = torch.randn(3, 4, 4).double()
    act = {adapter: 0.5 + i for i, adapter in enumerate(adapters)}
    paramlora.set_adapters(model, act)
    out = call(x)
    with paramlora.disable_adapters(model):  # as preference training does
        reference = call(x)
    paramlora.set_adapters(model, {adapters[0]: -3.0})
    weights = torch.randn_like(out)
    got = gradients(model, ((out - reference) * weights).sum())
    torch.testing.assert_close(reference, dense(model, plain, x, {}), rtol=1e-12, atol=1e-12)
    wanted = (dense(model, plain, x, act) * weights).sum()
    same(got, {n: g for n, g in gradients(model, wanted).items() if n in got})


@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("layer, name", CASES)
def test_a_strength_that_changes_before_a_recomputation(layer, name, reentrant):
    model, plain = made(layer, ENTRIES[name])
    x = torch.randn(3, 4, 4).double().requires_grad_()
    total, wanted = 0.0, 0.0
    for strength in (1.0, 0.0, 0.25, -2.0, 1.0):
        paramlora.set_adapters(model, {"default": strength})
        weights = torch.randn(3, 4, 4).double()
        out = checkpoint(lambda x: model(x).tanh(), x, use_reentrant=reentrant)
        total = total + (out * weights).sum()
        wanted = wanted + (dense(model, plain, x, {"default": strength}).tanh() * weights).sum()
    paramlora.set_adapters(model, {"default": 7.0})
    with paramlora.disable_adapters(model):
        got = gradients(model, total)
    same(got, {n: g for n, g in gradients(model, wanted).items() if n in got})


def test_a_recomputation_too_late_is_refused():
    model, _ = made("linear", ENTRIES["hard"])
    out = checkpoint(lambda x: model(x).tanh(), torch.randn(3, 4).double(), use_reentrant=False)
    for step in range(65):
        paramlora.set_adapters(model, {"default": step + 2})
    with pytest.raises(paramlora.AdapterError, match="more than 63 times between a checkpointed"):
        out.sum().backward()


@pytest.mark.parametrize("value", (1e39, -1e39, 10**400, float("inf"), float("nan"), True, "1"))
def test_a_strength_beyond_the_type_changes_nothing(value):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).half())
    paramlora.attach(model, {"*": {"r": 2}})
    paramlora.set_adapters(model, {"default": 0.5})
    with pytest.raises(paramlora.AdapterError, match="finite number of at most 3.4"):
        paramlora.set_adapters(model, {"default": value})
    assert [(u.strength, u.gain.item()) for _, _, u in updates(model)] == [(0.5, 0.5)] * 2


def test_a_strength_survives_a_narrower_type():
    model = paramlora.attach(nn.Sequential(nn.Linear(4, 4)), {"*": {"r": 2}})
    paramlora.set_adapters(model, {"default": 1e-9})
    model.half().float()
    ((_, _, update),) = updates(model)
    assert update.strength == 1e-9 and abs(update.gain.item() - 1e-9) < 1e-15


def test_overlapping_blocks_end_with_the_last_in_any_order():
    model, plain = made("linear", ENTRIES["hard"])
    x = torch.randn(3, 4).double()
    on, off = model(x), plain(x)
    first, second = paramlora.disable_adapters(model), paramlora.disable_adapters(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(model(x), off)
    second.__exit__(None, None, None)
    assert torch.equal(model(x), on)
    with paramlora.disable_adapters(model):
        paramlora.set_adapters(model, {"default": 2.0})
        assert torch.equal(model(x), off)
        with paramlora.disable_adapters(model):
            pass
        assert torch.equal(model(x), off)
        copied = copy.deepcopy(model)
    torch.testing.assert_close(model(x), off + 2 * (on - off), rtol=1e-12, atol=1e-12)
    assert torch.equal(copied(x), model(x))


def test_threads_that_disable_at_once_leave_nothing_behind():
    model, plain = made("linear", ENTRIES["hard"])
    x, on = torch.randn(3, 4).double(), None
    on = model(x)
    gate = threading.Barrier(4)

    def work():
        gate.wait()
        for _ in range(50):
            with paramlora.disable_adapters(model):
                assert torch.equal(model(x), plain(x))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(model(x), on)


def _switch_in_child(model):
    paramlora.set_adapters(model, {"default": 3.0})


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_a_child_process_that_switches_a_shared_model():
    model, _ = made("linear", ENTRIES["hard"])
    model.share_memory()
    x = torch.randn(3, 4).double()
    want, weight = model(x), model.weight
    context = torch.multiprocessing.get_context("fork")  # an attached model is not pickled
    child = context.Process(target=_switch_in_child, args=(model,))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert torch.equal(model(x), want) and torch.equal(model.weight, weight)
    torch.testing.assert_close(F.linear(x, weight, model.bias), want, rtol=1e-12, atol=1e-12)


def test_a_model_moved_under_inference_mode_is_switched():
    model, _ = made("linear", ENTRIES["hard"])
    with torch.inference_mode():
        model.to(torch.float32)
    paramlora.set_adapters(model, {"default": 0.5})
    assert model.parametrizations.weight[0].strength == 0.5
    model, _ = made("linear", ENTRIES["hard"])
    with torch.inference_mode():
        model.to("cpu")  # which leaves its tensors as they are
    x = torch.randn(3, 4, requires_grad=True).double()
    F.linear(x, model.weight).sum().backward()  # which saves the strength
    assert model.parametrizations.weight[0].lora_B.grad is not None


@pytest.mark.parametrize("name", ("hard", "soft", "whole"))
def test_a_model_goes_through_the_meta_device(name):
    model, plain = made("linear", ENTRIES[name])
    paramlora.set_adapters(model, {"default": 0.5})
    model.to("meta").to_empty(device="cpu")
    model.load_state_dict({f"{k}": v for k, v in plain.state_dict().items()}, strict=False)
    x = torch.randn(3, 4).double()
    paramlora.set_adapters(model, {"default": 1.0})
    assert torch.equal(model(x), plain(x))  # the update starts anew, and changes nothing
    if name == "whole":
        model.load_state_dict({"parametrizations.weight.0.lora_whole": plain.weight * 2}, False)
        assert torch.equal(model.weight, plain.weight * 2)


def test_two_threads_that_attach_leave_the_collector_on():
    assert gc.isenabled()

    def work():
        for _ in range(20):
            paramlora.attach(nn.Sequential(*[nn.Linear(2, 2) for _ in range(5)]), {"*": {"r": 1}})

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gc.isenabled()
