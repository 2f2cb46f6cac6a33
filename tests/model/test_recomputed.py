"""Tensors that are read outside of reentrant segments and handed in by keyword, as queries are."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import paramlora
from paramlora.model.attach import updates
from paramlora.model.recomputed import AGAIN


class Segment(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, queries):
        return torch.tanh(self.layer(x) * queries)


class Net(nn.Module):
    """Each segment gets the queries' weight, which the model reads once."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Embedding(3, 4)
        self.segments = nn.ModuleList(Segment() for _ in range(3))

    def forward(self, x, how=None):
        queries = self.queries.weight.unsqueeze(0).repeat(2, 1, 1)
        for segment in self.segments:
            run = partial(segment, queries=queries)
            x = run(x) if how is None else checkpoint(run, x, use_reentrant=how)
        return x


CONFIGS = {
    "hard": {"queries": {"r": 2}, "layer": {"r": 2}},
    "scale": {"queries": {"r": 2, "trainable_scale": 1}, "layer": {"r": 2}},
    "whole": {"queries": {"whole": True}, "layer": {"r": 2}},
    "pissa": {"queries": {"r": 1, "init": "pissa"}, "layer": {"r": 2}},
    "backbone": {"trainable_model": 1, "queries": {"r": 2}, "layer": {"r": 2}},
    "alone": {"queries": {"r": 2}},
}


def net(config, second=False):
    torch.manual_seed(0)
    model = paramlora.attach(Net().double(), config)
    if second:
        whole = "whole" in config["queries"]  # which has others of its kind beside it
        paramlora.attach(model, {"queries": {"whole": True} if whole else {"r": 1}}, "second")
        paramlora.set_adapters(model, {"default": 0.5, "second": 2})
    for _, _, update in updates(model):
        if hasattr(update, "lora_B"):
            nn.init.normal_(update.lora_B)
    return paramlora.enable_input_grads(model)


def gradients(model, how):
    model = copy.deepcopy(model)
    x = torch.linspace(-1, 1, 24).reshape(2, 3, 4).double()
    model(x, how).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("second", (False, True))
@pytest.mark.parametrize("name", CONFIGS)
def test_each_segment_gives_its_gradient(name, second):
    model = net(CONFIGS[name], second)
    want = gradients(model, None)
    for how in (False, True):
        got = gradients(model, how)
        assert want.keys() == got.keys() and all(g is not None for g in want.values())
        for key, value in want.items():
            torch.testing.assert_close(got[key], value, rtol=1e-10, atol=1e-12)


def test_attached_after_the_call_too_and_taken_off_with_the_last_update():
    torch.manual_seed(0)
    model = paramlora.enable_input_grads(Net().double())
    paramlora.attach(model, CONFIGS["hard"])
    assert gradients(model, True).keys() == gradients(model, None).keys()
    model(torch.zeros(2, 3, 4).double())
    layer = model.queries
    before = set(nn.Embedding(3, 4).__dict__)
    paramlora.detach(model)
    assert set(layer.__dict__) == before


def test_a_step_between_forward_and_backward_is_one_sentence():
    model = net(CONFIGS["hard"])
    loss = model(torch.ones(2, 3, 4).double(), True).sum()
    with torch.no_grad():
        next(updates(model))[2].lora_A.mul_(2)
    with pytest.raises(paramlora.AdapterError, match="changed between forward and backward"):
        loss.backward()


def test_a_strength_that_changes_before_the_backward_does_not_reach_it():
    found = []
    for change in (False, True):
        model = net(CONFIGS["hard"])
        loss = model(torch.ones(2, 3, 4).double(), True).sum()
        if change:
            paramlora.set_adapters(model, {"default": 0.5})
        loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert found[0] and all(map(torch.equal, *found))


def test_numbers_without_gradients_are_the_same():
    model = net(CONFIGS["hard"])
    x = torch.ones(2, 3, 4).double()
    with torch.no_grad():
        assert torch.equal(model(x), model(x, True))


def test_gradients_of_gradients_and_transforms():
    model = net(CONFIGS["alone"])
    model(torch.ones(2, 3, 4).double())  # which marks the layers

    def second(model):
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        weights = [dict(model.named_parameters())[n] for n in names]
        value = model.queries.weight.pow(3).sum()
        first = torch.autograd.grad(value, weights, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), weights)

    plain = copy.deepcopy(model)
    paramlora.disable_input_grads(plain)
    for got, want in zip(second(model), second(plain)):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    x = torch.randn(5, 4).double()
    got, want = (torch.func.vmap(lambda v, m=m: m.queries.weight @ v)(x) for m in (model, plain))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


class Reads(nn.Module):
    """A layer that nobody knows, whose dense weight is read twice in a call."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return (x @ self.weight).tanh() @ self.weight


@pytest.mark.parametrize("again", (False, True))
@pytest.mark.parametrize("written", (False, True))
@pytest.mark.parametrize("kind", ("lora", "dora", "loha", "lokr"))
def test_tensors_that_a_call_was_given_are_those_of_its_gradient(kind, written, again):
    """`functional_call` puts them in their places for the forward alone. What is in those places
    later has as many versions as they have, or others."""
    torch.manual_seed(0)
    model = paramlora.attach(nn.Sequential(Reads()).double(), {"re:.*": {"r": 2, "kind": kind}})
    if again:
        paramlora.enable_input_grads(model)
        model[0].__dict__[AGAIN] = True
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if written:
        with torch.no_grad():
            for p in own.values():
                p.add_(0.0)
    given = {name: (p + 0.3 * torch.randn_like(p)).detach() for name, p in own.items()}
    leaves = {name: p.clone().requires_grad_() for name, p in given.items()}
    x = torch.randn(3, 4).double()
    y = torch.func.functional_call(model, leaves, (x,))
    got = torch.autograd.grad(y.square().sum(), list(leaves.values()))
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(given[name])
    want = numerically(model, x, own)
    for name, value in zip(own, got):
        if kind != "dora" or not name.endswith(("A", "B")):  # whose norm gets no gradient
            torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-6)
    y = model(x)
    for value, straight in zip(got, torch.autograd.grad(y.square().sum(), list(own.values()))):
        torch.testing.assert_close(value, straight, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def numerically(model, x, own, step=1e-6):
    """Central differences of the loss in each number of some parameters."""
    out = {}
    for name, p in own.items():
        grad, flat = torch.zeros_like(p), p.view(-1)
        for i in range(flat.numel()):
            ends = []
            for sign in (1, -1):
                flat[i] += sign * step
                ends.append(model(x).square().sum())
                flat[i] -= sign * step
            grad.view(-1)[i] = (ends[0] - ends[1]) / (2 * step)
        out[name] = grad
    return out
