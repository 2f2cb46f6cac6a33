"""Buffers that a training forward moves: told of, put back by detach, and held by a whole entry."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import paramlora
from paramlora.model.attach import updates

NORMS = {
    "batch": (lambda: nn.BatchNorm1d(4), (6, 4)),
    "batch, cumulative": (lambda: nn.BatchNorm1d(4, momentum=None), (6, 4)),
    "batch, not affine": (lambda: nn.BatchNorm1d(4, affine=False), (6, 4)),
    "batch, 2 dimensions": (lambda: nn.BatchNorm2d(4), (6, 4, 3, 3)),
    "instance": (lambda: nn.InstanceNorm1d(4, track_running_stats=True), (6, 4, 5)),
}


def net(kind):
    torch.manual_seed(0)
    norm, shape = NORMS[kind]
    head = nn.Conv2d(4, 4, 1) if len(shape) == 4 else nn.Conv1d(4, 4, 1)
    head = nn.Linear(4, 4) if len(shape) == 2 else head
    return nn.ModuleDict({"head": head, "bn": norm()}), torch.randn(shape)


def call(model, x):
    return model["bn"](model["head"](x))


def quietly(act):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", paramlora.ParamloraWarning)
        return act()


def train(model, x, steps=3):
    optimizer = torch.optim.SGD(paramlora.trainable_parameters(model), lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        (call(model, x + step) * torch.linspace(0, 1, x.numel()).view(x.shape)).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", NORMS)
def test_statistics_that_move_are_told_of_and_put_back(kind, tmp_path):
    model, x = net(kind)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.warns(paramlora.ParamloraWarning, match=r"bn: keep running .*eval\(\).*\"whole\""):
        paramlora.attach(model, {"head": {"r": 2}})
    train(model, x)
    assert not torch.equal(model["bn"].running_mean, base["bn.running_mean"])
    with pytest.warns(paramlora.ParamloraWarning, match="bn: hold buffers that moved"):
        paramlora.save_adapter(model, tmp_path / "a.safetensors")
    paramlora.detach(model)
    assert list(model.state_dict()) == list(base)
    assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("kind", NORMS)
def test_statistics_at_rest_warn_nobody(kind, tmp_path):
    model, x = net(kind)
    model["bn"].eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paramlora.attach(model, {"head": {"r": 2}})
        train(model, x)
        paramlora.save_adapter(model, tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", NORMS)
def test_a_whole_entry_holds_the_statistics_too(kind, tmp_path):
    model, x = net(kind)
    plain, base = copy.deepcopy(model), {k: v.clone() for k, v in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paramlora.attach(model, {"head": {"r": 2}, "bn": {"whole": 1}})
    twin = copy.deepcopy(plain)  # a layer that trains as torch has it, on the same inputs
    for step in range(3):
        twin["bn"](twin["head"](x + step))
    with torch.no_grad():
        for step in range(3):
            call(model, x + step)
    for name, value in twin["bn"].named_buffers():
        assert torch.equal(getattr(model["bn"], name), value)
    with paramlora.disable_adapters(model):
        quietly(lambda: call(model, x))  # in training, and yet the base does not move
    train(model, x)
    trained = model.eval()
    out = call(trained, x).detach()
    for name, value in base.items():
        module, tensor = name.split(".")
        plists = (
            trained[module].parametrizations if tensor in trained[module].parametrizations else {}
        )
        held = plists[tensor].original if tensor in plists else getattr(trained[module], tensor)
        assert torch.equal(held, value), name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paramlora.save_adapter(model, tmp_path / "a.safetensors")
    again = paramlora.load_adapter(copy.deepcopy(plain).eval(), tmp_path / "a.safetensors")
    assert torch.equal(call(again, x), out)
    with paramlora.disable_adapters(again):
        assert torch.equal(call(again, x), call(plain.eval(), x))
    merged = paramlora.merge(copy.deepcopy(again))
    torch.testing.assert_close(call(merged, x), out, rtol=1e-5, atol=1e-5)
    assert list(merged.state_dict()) == list(base) and type(merged["bn"]) is type(plain["bn"])
    state = paramlora.checkpoint.merge(base, paramlora.adapter_of(again))
    assert all(torch.equal(v, merged.state_dict()[k]) for k, v in state.items())
    paramlora.detach(again)
    assert list(again.state_dict()) == list(base)
    assert all(torch.equal(v, base[k]) for k, v in again.state_dict().items())
    fresh = paramlora.attach(copy.deepcopy(plain), {"bn": {"whole": 1}})
    assert [k for k in fresh.state_dict()] and fresh.load_state_dict(base)


def test_buffers_of_every_kind_are_put_back(tmp_path):
    class Codebook(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.register_buffer("average", torch.zeros(3))

        def forward(self, x):
            y = self.linear(x)
            self.average.lerp_(y.detach().mean(0), 0.5)
            return y + self.average

    model = nn.Sequential(Codebook(), parametrizations.spectral_norm(nn.Linear(3, 3)))
    base = {k: v.clone() for k, v in model.state_dict().items()}
    paramlora.attach(model, {"0.linear": {"r": 1}})
    model(torch.randn(4, 3))
    with pytest.warns(paramlora.ParamloraWarning, match="hold buffers that moved"):
        paramlora.save_adapter(model, tmp_path / "a.safetensors")
    paramlora.detach(model)
    assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items())


def test_two_adapters_and_a_part_of_them():
    model, x = net("batch")
    base = {k: v.clone() for k, v in model.state_dict().items()}
    quietly(lambda: paramlora.attach(model, {"head": {"r": 2}}, "a"))
    quietly(lambda: paramlora.attach(model, {"head": {"r": 2}}, "b"))
    train(model, x)
    moved = model["bn"].running_mean.clone()
    paramlora.detach(model, "a")
    assert torch.equal(model["bn"].running_mean, moved)  # b was trained with them
    paramlora.detach(model)
    assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items())


def test_a_file_tells_another_base(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Embedding(9, 8), nn.Conv2d(8, 4, 3, bias=False))
    plain, other = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        other[2].weight.add_(0.1)
    paramlora.attach(model, {"re:[012]": {"r": 2}})
    with torch.no_grad():
        for _, _, update in updates(model):
            update.lora_B.normal_()
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    for same in (plain, plain.bfloat16(), plain.float().half(), plain.double()):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            paramlora.load_adapter(copy.deepcopy(same), tmp_path / "a.safetensors")
    with pytest.warns(paramlora.ParamloraWarning, match="1 of 3 tensors, such as 2, hold other"):
        paramlora.load_adapter(other, tmp_path / "a.safetensors")
    paramlora.merge(model)
    with pytest.warns(paramlora.ParamloraWarning, match="3 of 3 .* not merged into it already"):
        paramlora.load_adapter(model, tmp_path / "a.safetensors")


class Assigns(nn.Module):
    """A norm that puts another tensor in its statistics' place, in whose graph it then is."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x):
        if self.training:
            self.mean = 0.5 * self.mean.detach() + 0.5 * x.mean(0)
            self.count = self.count + 1
        return (x - self.mean) * self.weight / (1 + self.count)


def test_a_layer_under_a_whole_entry_that_assigns_its_buffers():
    torch.manual_seed(0)
    plain = nn.ModuleDict({"head": nn.Linear(4, 4), "bn": Assigns()}).double()
    model, twin = copy.deepcopy(plain), copy.deepcopy(plain)
    paramlora.attach(model, {"head": {"r": 2}, "bn": {"whole": 1}})
    for step in range(3):
        x, y = (torch.full((6, 4), step + 1.0).double().requires_grad_() for _ in range(2))
        got, want = call(model, x + torch.eye(6, 4)), call(twin, y + torch.eye(6, 4))
        grads = [torch.autograd.grad(o.square().sum(), i)[0] for o, i in ((got, x), (want, y))]
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
        for name, value in twin["bn"].named_buffers():
            assert torch.equal(getattr(model["bn"], name), value)
    with paramlora.disable_adapters(model):
        call(model, x)
    for name, value in plain["bn"].named_buffers():
        assert torch.equal(model["bn"].parametrizations[name].original, value)
    model["bn"].mean = model["bn"].mean.detach()
    merged = paramlora.merge(copy.deepcopy(model))
    assert torch.equal(merged["bn"].mean, twin["bn"].mean) and merged["bn"].count == 4
    with pytest.raises(paramlora.AdapterError, match="mean of Assigns cannot be assigned"):
        model["bn"].mean = torch.zeros(5).double()
    paramlora.detach(model)
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
