"""A sweep of kinds and memory formats: what a convolution gives lies in memory as the plain
layer's: the output, and what is given back for its input and weight, for channels first and last in
either."""

import copy
import itertools

import pytest
import torch
from torch import nn

import paramlora

LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
        ],
    ),
]
NARROW = {  # types of 16 bits, and whether this processor has products of theirs
    torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}
TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ENTRIES = (
    *({}, {"hard": 0}, {"dropout": 0.5}, {"rows": [0, 2]}),
    *({"kind": kind} for kind in ("dora", "loha", "lokr")),
)
SHAPES = {  # channels in, out, and each size: tiny, and beyond what autograd is left with
    2: ((8, 8, 9), (32, 36, 24)),
    3: ((8, 8, 5), (16, 20, 8)),
}


def lies(t):
    """Whether channels are the last, by torch's own judgement."""
    return torch._prims_common.suggest_memory_format(t)


def adapted(layer, entry, whole):
    model = nn.Sequential(copy.deepcopy(layer))
    ranked = {} if {"rows", "whole"} & entry.keys() else {"r": 1}
    return paramlora.attach(model, {"0": {**ranked, **entry}} | whole)


def outcome(model, x):
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    inside = leaf * 1  # whose gradient nobody lays out anew
    given = []
    inside.register_hook(given.append)
    y = model(inside)
    y.backward(torch.ones_like(y))
    return lies(y), lies(given[0]), lies(leaf.grad)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("n", (2, 3))
@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_it_lies_as_the_plain_layers(entry, n, dtype, device):
    wide = "dropout" in entry or entry.get("kind") == "dora"  # which compute in float32 there
    if device == "cpu" and n == 3 and wide and not NARROW.get(dtype, True):
        pytest.skip(f"this processor has no products of {dtype}, so torch lays volumes otherwise")
    kind, differ = {2: nn.Conv2d, 3: nn.Conv3d}[n], []
    shapes = SHAPES[n] if dtype == torch.float32 else SHAPES[n][:1]  # which alone divides by size
    cases = itertools.product(
        shapes, (1, 3), (1, 2, "each"), (False, True), (False, True), (False, True)
    )
    for (inner, out, size), kernel, groups, weight_last, x_last, trained in cases:
        groups, out = (inner, inner) if groups == "each" else (groups, out)
        inside = kernel // 2 if trained else 0  # or where the middle meets not every position
        layer = kind(inner, out, kernel, padding=inside, groups=groups).to(device, dtype)
        x = torch.randn(2, inner, *[size] * n).to(device, dtype)
        layer = layer.to(memory_format=LAST[n]) if weight_last else layer
        x = x.to(memory_format=LAST[n]) if x_last else x
        layer.requires_grad_(trained)
        model = adapted(layer, entry, {"trainable_model": 1} if trained else {})
        want, got = outcome(layer, x), outcome(model, x)
        if got != want:
            differ.append((inner, kernel, groups, weight_last, x_last, trained, got, want))
    assert not differ, differ


KINDS = {
    "lora": ({"r": 1}, {"r": 1}),
    "dora": ({"r": 1, "kind": "dora"},),
    "loha": ({"r": 1, "kind": "loha"},),
    "lokr": ({"r": 1, "kind": "lokr"},),
    "loha and lora": ({"r": 1, "kind": "loha"}, {"r": 1}),
    "whole": ({"whole": 1},),
    "two whole": ({"whole": 1}, {"whole": 1}),
}


@pytest.mark.parametrize("strength", (1.0, 0.5))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", (2, 3))
def test_every_kind_lies_as_the_plain_layers(n, kind, strength):
    makes = {2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}[n]
    differ = []
    for make, kernel, groups, weight_last, x_last in itertools.product(
        makes, (1, 3), (1, 2, 8), (False, True), (False, True)
    ):
        layer = make(8, 8, kernel, groups=groups)
        layer = layer.to(memory_format=LAST[n]) if weight_last else layer
        x = torch.randn(2, 8, *[5] * n)
        x = x.to(memory_format=LAST[n]) if x_last else x
        model = nn.Sequential(copy.deepcopy(layer))
        for i, entry in enumerate(KINDS[kind]):
            paramlora.attach(model, {"0": entry}, f"a{i}")
        paramlora.set_adapters(model, {f"a{i}": strength for i in range(len(KINDS[kind]))})
        want, got = outcome(layer.requires_grad_(False), x), outcome(model, x)
        if got != want or model[0].weight.stride() != layer.weight.stride():
            differ.append((make.__name__, kernel, groups, weight_last, x_last, got, want))
    assert not differ, differ


@pytest.mark.parametrize("kernel", (1, 3))
def test_the_numbers_are_those_of_channels_first(kernel):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(8, 6, kernel, padding=kernel // 2).double(), torch.randn(2, 8, 5, 6)
    first = paramlora.attach(nn.Sequential(copy.deepcopy(layer)), {"0": {"r": 2}})
    layer = layer.to(memory_format=torch.channels_last)
    last = paramlora.attach(nn.Sequential(layer), {"0": {"r": 2}})
    a, b = torch.randn(2, 8 * kernel**2).double(), torch.randn(6, 2).double()
    for model in (first, last):
        update = model[0].parametrizations.weight[0]
        update.lora_A.data.copy_(a), update.lora_B.data.copy_(b)
    x = x.double()
    want = nn.functional.conv2d(
        x, layer.parametrizations.weight.original + (b @ a).view(6, 8, kernel, kernel),
        layer.bias, padding=kernel // 2,
    )  # fmt: skip
    for model in (first, last):
        torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)
