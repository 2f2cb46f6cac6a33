"""A sweep of layers of unusual classes, and other people's parametrizations beside ours."""

import abc
import copy
import gc
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import paramlora
from paramlora.model.attach import updates

attach_module = sys.modules["paramlora.model.attach"]  # the package's own name is the function


def fill(model):
    for _, _, low in updates(model):
        nn.init.normal_(low.lora_B)


def dense(plain, low):
    return (plain.weight + low.lora_scale * low.lora_B @ low.lora_A).detach()


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x

    def right_inverse(self, x):
        return x / 2


def test_somebodys_parametrization_of_another_tensor_stays_with_its_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    plain, x = copy.deepcopy(model), torch.randn(3, 4).double()
    paramlora.attach(model, {"re:[01]": {"r": 2}})
    fill(model)
    wants = [dense(p, low) for p, (_, _, low) in zip(plain, updates(model))]
    parametrize.register_parametrization(model[0], "bias", Twice())
    model[0].parametrizations.bias.original.data.mul_(3)
    want = F.linear(F.linear(x, wants[0], 3 * plain[0].bias), wants[1], plain[1].bias)
    for found in (model, copy.deepcopy(model)):
        torch.testing.assert_close(found(x), want, rtol=1e-12, atol=1e-12)
    model[1].bias = nn.Parameter(torch.zeros(4).double())
    model[1].bias = None
    want = F.linear(F.linear(x, wants[0], 3 * plain[0].bias), wants[1])
    torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)
    paramlora.merge(model)
    torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)
    assert type(model[1]) is nn.Linear and parametrize.is_parametrized(model[0], "bias")
    parametrize.remove_parametrizations(model[0], "bias")
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", ("torch", "merge", "detach"))
@pytest.mark.parametrize(
    "layer, shape",
    ((nn.Linear(4, 4), (4,)), (nn.Conv2d(4, 4, 1), (4, 2, 2)), (nn.LSTM(4, 4), (4,))),
)
def test_somebodys_parametrization_outlives_ours(how, layer, shape):
    model, x = copy.deepcopy(layer).double(), torch.randn(3, *shape).double()
    weight, bias = (
        ("weight_ih_l0", "bias_ih_l0") if isinstance(model, nn.LSTM) else ("weight", "bias")
    )
    paramlora.attach(model, {weight: {"r": 2}})
    fill(model)
    parametrize.register_parametrization(model, bias, Twice())
    ((_, _, low),) = updates(model)
    plain = copy.deepcopy(layer).double()
    if how != "detach":
        known = getattr(plain, weight)
        known.data += (low.lora_B @ low.lora_A).detach().reshape(known.shape)
    if how == "torch":
        parametrize.remove_parametrizations(model, weight, leave_parametrized=True)
    else:
        getattr(paramlora, how)(model)
    for found in (model, copy.deepcopy(model)):
        got, want = found(x), plain(x)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).T

    def right_inverse(self, x):
        return x.triu()


def test_somebodys_parametrization_over_the_adapted_tensor_acts_on_the_sum():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    plain = copy.deepcopy(model)
    paramlora.attach(model, {"re:[01]": {"r": 2}})
    fill(model)
    first, second = [dense(p, low) for p, (_, _, low) in zip(plain, updates(model))]
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    want = first.triu() + first.triu(1).T
    torch.testing.assert_close(model[0].weight, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model[1].weight, second, rtol=1e-12, atol=1e-12)
    paramlora.merge(model)
    torch.testing.assert_close(model[0].weight, want, rtol=1e-12, atol=1e-12)
    assert [type(p) for p in model[0].parametrizations.weight] == [Symmetric]


class Abstract(nn.Linear, abc.ABC):
    pass


class Slotted(nn.Linear):
    __slots__ = ("gain",)

    def __init__(self, *args):
        super().__init__(*args)
        self.gain = 3

    def forward(self, x):
        return self.gain * super().forward(x)


class Wrapper(nn.Module):
    """Answers for the layer inside it, as many wrappers do."""

    def __init__(self, *args):
        super().__init__()
        self.inner, self.mix = nn.Linear(*args), nn.Parameter(torch.randn(4, 4))

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x):
        return self.inner(x) @ self.mix


@pytest.mark.parametrize("cls", (Abstract, Slotted, Wrapper))
@pytest.mark.parametrize("entries", (("0",), ("0.inner",), ("mix",), ("mix", "inner")))
def test_classes_with_a_metaclass_slots_or_attributes_of_their_own(cls, entries):
    if (cls is Wrapper) is (entries == ("0",)):
        pytest.skip("names of another class")
    torch.manual_seed(0)
    # built anew, because a plain module's copy loses its slots
    model, plain, reference = (nn.Sequential(cls(4, 4)).double() for _ in range(3))
    for other in (plain, reference):
        other.load_state_dict(model.state_dict())
    x = torch.randn(3, 4).double()
    paramlora.attach(model, {entry: {"r": 2} for entry in entries})
    assert torch.equal(model(x), plain(x)) and isinstance(model[0], cls)
    fill(model)
    for path, _, low in updates(model):
        parameters = dict(reference.named_parameters())
        target = parameters[path] if path in parameters else parameters[f"{path}.weight"]
        target.data += (low.lora_B @ low.lora_A).detach()
    torch.testing.assert_close(model(x), reference(x), rtol=1e-12, atol=1e-12)
    if entries != ("0.inner",):  # there `deepcopy` asks the wrapper, which answers for its layer
        copied = copy.deepcopy(model)
        torch.testing.assert_close(copied(x), reference(x), rtol=1e-12, atol=1e-12)
    paramlora.merge(model)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-12, atol=1e-12)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_attaching_in_inference_mode_gives_factors_that_train():
    model = nn.Sequential(nn.Linear(4, 3))
    with torch.inference_mode():
        paramlora.attach(model, {"0": {"r": 2}})
    model(torch.ones(1, 4)).sum().backward()
    assert model[0].parametrizations.weight[0].lora_B.grad.abs().max() > 0


def test_a_sweeping_pattern_passes_over_the_updates_that_are_there():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    paramlora.attach(model, {"0": {"r": 1}, "1": {"r": 1, "hard": 0}}, "first")
    for pattern in ("re:.*", "*"):
        found = paramlora.targets(model, {pattern: {"r": 1}})
        assert [t.path for t in found] == ["0", "1"]
    with pytest.raises(paramlora.TargetError, match=r"for example top\.0\.weight\.$"):
        paramlora.targets(nn.ModuleDict({"top": model}), {"top": {"r": 1}})


def test_a_layer_called_weight_and_a_parameter_of_two_names_are_one_target_each():
    layer = nn.Linear(4, 4)
    layer.also = layer.weight
    model = nn.ModuleDict({"weight": layer})
    for entry in ("weight", "weight.weight"):
        found = paramlora.targets(model, {entry: {"r": 1}})
        assert [(t.module, t.tensor) for t in found] == [("weight", "weight")]
    assert len(paramlora.targets(model, {"re:.*": {"r": 1}})) == 1


NORMS = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "on the bias": lambda layer: parametrize.register_parametrization(layer, "bias", Twice()),
}


@pytest.mark.parametrize("norm", NORMS)
def test_a_layer_that_somebody_parametrized_loads_copies_and_returns_to_its_class(norm):
    model = nn.ModuleDict({"layer": NORMS[norm](nn.Linear(4, 4)), "other": nn.Linear(4, 4)})
    model.eval()
    former = type(model.layer)
    properties = dict(vars(former))
    base = {k: v + 0.25 for k, v in model.state_dict().items()}
    paramlora.attach(model, {"layer": {"r": 2}, "other": {"r": 2}}, "a")
    fill(model)
    x, updates = torch.randn(3, 4), paramlora.adapter_state_dict(model, "a")
    kept = {k: v.clone() for k, v in updates.items()}
    model.load_state_dict(base, strict=True)
    assert all(torch.equal(updates[k], v) for k, v in kept.items())
    whole = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(whole, strict=True)
    with pytest.raises(RuntimeError, match="lora_B"):
        model.load_state_dict({k: v for k, v in whole.items() if "lora_B" not in k})
    twin, before = copy.deepcopy(model), model.layer(x)
    fill(twin)
    assert torch.equal(model.layer(x), before) and not torch.equal(twin.layer(x), before)
    paramlora.detach(model)
    assert type(model.layer) is former and dict(vars(former)) == properties
    assert type(model.other) is nn.Linear
    state = model.state_dict()
    assert list(state) == list(base) and all(torch.equal(state[k], base[k]) for k in base)


@pytest.mark.parametrize("collecting", (True, False))
@pytest.mark.parametrize("stopped", (True, False))
def test_attaching_leaves_the_garbage_collector_as_it_was(collecting, stopped, monkeypatch):
    def looked(*_):
        assert not gc.isenabled()
        if stopped:
            raise KeyboardInterrupt

    monkeypatch.setattr(attach_module, "_register", looked)
    before = gc.isenabled()
    (gc.enable if collecting else gc.disable)()
    try:
        with pytest.raises(KeyboardInterrupt) if stopped else nullcontext():
            paramlora.attach(nn.Linear(4, 3), {"weight": {"r": 2}})
        assert gc.isenabled() is collecting
    finally:
        (gc.enable if before else gc.disable)()
