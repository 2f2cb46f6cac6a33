"""A sweep of adapters detached or merged between a checkpointed forward and its backward, which
computes the forward again: the gradients are those of the forward, or torch refuses, for every
kind of layer and of update; never some of one state and some of the other.
"""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import paramlora
from paramlora.model.attach import updates
from tests.model.test_contexts import CASES, dense_of, input_of, made, model_of

KINDS = {
    "dora": {"r": 2, "kind": "dora"},
    "loha": {"r": 2, "kind": "loha"},
    "lokr": {"r": 2, "kind": "lokr"},
    "rows": {"rows": [1, 2]},
    "whole": {"whole": True},
}
WAYS = {"checkpointed": False, "reentrant": True}
LEAVE = {"merged": paramlora.merge, "detached": paramlora.detach}


def gradients(model, x, reentrant, change):
    """Of the input and the updates; or torch's error."""
    x = x.clone().requires_grad_(x.is_floating_point())
    leaves = [x] * x.requires_grad + paramlora.trainable_parameters(model)
    anchor = torch.zeros((), dtype=torch.float64, requires_grad=True)  # reentrant ones need it

    def call(x, anchor):
        return model(x) + 0 * anchor

    plain = reentrant is None
    y = call(x, anchor) if plain else checkpoint(call, x, anchor, use_reentrant=reentrant)
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    change(model)
    try:
        y.backward(dy)
    except (RuntimeError, paramlora.AdapterError) as error:
        return error
    return [leaf.grad for leaf in leaves]


def alike(got, want):
    zero = torch.zeros((), dtype=torch.float64)
    pairs = [[zero if g is None else g for g in pair] for pair in zip(got, want)]
    return all(torch.allclose(mine, true, rtol=1e-9, atol=1e-11) for mine, true in pairs)


def check(model, x, want, way, leave):
    got = gradients(model, x, WAYS[way], LEAVE[leave])
    if not isinstance(got, Exception):
        base = gradients_of_base(model, x, want)
        assert alike(got, want) or (WAYS[way] and alike(got, base))


@pytest.mark.parametrize("leave", LEAVE)
@pytest.mark.parametrize("way", WAYS)
def test_of_every_layer(way, leave):
    for case in CASES:
        model, x = made(case, torch.float64), input_of(case, torch.float64)
        check(model, x, dense_of(model, case, x)[1:], way, leave)


@pytest.mark.parametrize("leave", LEAVE)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_of_every_kind(kind, way, leave):
    for case in ("linear", "convolution", "transposed", "embedding"):
        if kind == "rows" and case not in ("linear", "embedding"):
            continue
        model, x = of_kind(kind, case), input_of(case, torch.float64)
        want = gradients(of_kind(kind, case), x, None, lambda model: None)
        check(model, x, want, way, leave)


def of_kind(kind, case):
    model = paramlora.attach(model_of(case, torch.float64), {"0": KINDS[kind]})
    torch.manual_seed(1)
    for _, _, update in updates(model):
        for parameter in update.parameters():
            parameter.data.normal_(std=0.4)
    return model


def gradients_of_base(model, x, want):
    """What a reentrant checkpoint, which knows nothing of its forward, gives of the model as it is
    now: the input's, and none of what is gone."""
    x = x.clone().requires_grad_(x.is_floating_point())
    if not x.requires_grad:
        return [None] * len(want)
    y = model(x)
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    return [*torch.autograd.grad(y, x, dy), *[None] * (len(want) - 1)]


def test_what_its_reader_writes_to_is_still_written_to_in_a_checkpoint():
    model = torch.nn.Sequential(torch.nn.Embedding(9, 6, max_norm=1.0)).double()
    paramlora.attach(model, {"0": {"r": 2}})
    ids = torch.tensor([[0, 3], [8, 3]])
    torch.manual_seed(1)
    ((_, _, update),) = updates(model)
    torch.nn.init.normal_(update.lora_B)
    a, b = (p.detach().clone().requires_grad_() for p in (update.lora_A, update.lora_B))
    rows = (model[0].parametrizations.weight.original + (b @ a).t())[ids]
    # torch rescales what it looks up, outside of the graph
    short = (1 / (rows.detach().norm(dim=-1, keepdim=True) + 1e-7)).clamp(max=1)
    want = torch.autograd.grad(rows.sum(), (a, b))
    y = checkpoint(model, ids, use_reentrant=False)
    torch.testing.assert_close(y, rows * short, rtol=1e-9, atol=1e-9)
    got = torch.autograd.grad(y.sum(), (update.lora_A, update.lora_B))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
