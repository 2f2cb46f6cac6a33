"""Adapters of several ranks and strengths, and each row of a batch by itself in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import paramlora
from paramlora.model.attach import updates

ROWS = ["a", None, "c", "b", "a", "c"]
STRENGTHS = {"a": 1.0, "b": 0.5, "c": -2.0}
RANKS = {"a": 2, "b": 3, "c": 1}


def adapted(model, layers, hard=True, **more):
    """Adapters of unequal ranks, scales and strengths; the third leaves the first layer alone."""
    for at, (name, r) in enumerate(RANKS.items()):
        entry = {"r": r, "scale": 0.5 + at, "hard": hard, "trainable_scale": True, **more}
        chosen = layers[1:] if name == "c" and len(layers) > 1 else layers
        paramlora.attach(model, {layer: entry for layer in chosen}, name)
    for p in model.parameters():
        if p.requires_grad:
            p.data.uniform_(-1, 1)
    paramlora.set_adapters(model, STRENGTHS)
    return model


def dense(update, weight, strength):
    """``W + strength·scale·B·A`` by the definition, written out."""
    a, b = update.lora_A, update.lora_B
    if getattr(update, "kernel", ()):
        pytest.fail("two kernels in a row have no dense sum")
    delta = b @ a
    delta = delta.t() if update.layout == "transposed" else delta
    return weight + strength * update.lora_scale * delta.reshape(weight.shape)


def one_row(plain, model, name, *inputs, **kwargs):
    """A row by itself: the untouched model, whose weights are the dense sums of one adapter."""
    own = {}
    for path, _, update in updates(model):
        if update.adapter == name:
            names = dict(plain.named_parameters())
            key = f"{path}.weight" if f"{path}.weight" in names else path
            key = "weight" if path == "" else key
            own[key] = dense(update, names[key], STRENGTHS[name])
    return torch.func.functional_call(plain, own, inputs, kwargs)


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def gradients(model, loss):
    found = torch.autograd.grad(loss, trained(model).values(), allow_unused=True)
    return {
        name: torch.zeros_like(p) if grad is None else grad
        for (name, p), grad in zip(trained(model).items(), found)
    }


def first(y):
    return y if isinstance(y, torch.Tensor) else y[0]


def check(make, layers, x, hard=True, rows=ROWS, **more):
    """A routed batch and its gradients are those of its rows one by one."""
    torch.manual_seed(0)
    plain = make().double()
    model = adapted(copy.deepcopy(plain), layers, hard, **more)
    x = x.clone().requires_grad_(x.is_floating_point())
    with paramlora.route(model, rows):
        y = first(model(x))
    apart = torch.cat(
        [first(one_row(plain, model, name, x[i : i + 1])) for i, name in enumerate(rows)]
    )
    torch.testing.assert_close(y, apart, rtol=1e-10, atol=1e-10)
    moved = (y - first(plain(x))).abs().amax(dim=tuple(range(1, y.dim())))
    assert moved[[name is not None for name in rows]].max() > 1e-2
    weights = torch.randn_like(y)
    ours, theirs = (gradients(model, (v * weights).sum()) for v in (y, apart))
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-9, atol=1e-9, msg=name)
    if x.requires_grad:
        (ours_x,), (theirs_x,) = (
            torch.autograd.grad(first(v).sum(), x)
            for v in (
                _again(model, x, rows),
                torch.cat(
                    [first(one_row(plain, model, n, x[i : i + 1])) for i, n in enumerate(rows)]
                ),
            )
        )
        torch.testing.assert_close(ours_x, theirs_x, rtol=1e-9, atol=1e-9)


def _again(model, x, rows):
    with paramlora.route(model, rows):
        return first(model(x))


def linears():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4, bias=False))


def images(*shape):
    return torch.randn(len(ROWS), *shape, dtype=torch.float64)


class Attends(nn.Module):
    def __init__(self, **more):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **more)
        self.first = more.get("batch_first", False)

    def forward(self, x):
        x = x if self.first else x.transpose(0, 1)
        value = x if self.attention.vdim == 8 else F.pad(x, (0, 1))
        y, _ = self.attention(x, x, value)
        return y if self.first else y.transpose(0, 1)
