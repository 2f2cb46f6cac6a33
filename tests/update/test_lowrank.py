"""Factors of 16 bits on a wider base: the update is theirs to float32's last bits in every layer,
whichever way it is computed and whatever its scale."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import paramlora
from paramlora.model.attach import updates

SCALE = 0.37  # which no type of 16 bits holds


def convolved(x, weight, layer):
    return layer._conv_forward(x, weight, layer.bias.double())


LAYERS = {
    "linear": (lambda: nn.Linear(64, 48), (600, 64)),
    "few rows": (lambda: nn.Linear(64, 48), (2, 64)),
    "large": (lambda: nn.Linear(512, 640), (300, 512)),
    "convolution": (lambda: nn.Conv2d(8, 6, 3, padding=1), (2, 8, 9, 9)),
    "strided": (lambda: nn.Conv1d(16, 64, 5, stride=2), (32, 16, 300)),
    "groups": (lambda: nn.Conv2d(8, 8, 3, groups=2), (2, 8, 9, 9)),
    "embedding": (lambda: nn.Embedding(30, 16), None),
}


def adapted(kind, dtype, names=("default",), **options):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = make().to(dtype).eval()
    entry = {"r": 4, "scale": SCALE, "adapter_dtype": "bfloat16", **options}
    for name in names:
        paramlora.attach(layer, {"weight": dict(entry)}, name)
    for *_, update in updates(layer):
        nn.init.normal_(update.lora_B)
    return layer, torch.randint(30, (5, 7)) if shape is None else torch.randn(shape).to(dtype)


def dense(layer, x, names, own=False):
    """What the layer gives by its weights in float64; of a batch whose rows choose, each its."""
    plist = getattr(layer, "parametrizations", None)
    base = layer.weight if plist is None else plist.weight.original
    found = []
    for i in range(len(x)) if own else [slice(None)]:
        weight = base.detach().double()
        for *_, update in updates(layer):
            if not own or update.adapter == names[i % len(names)]:
                total = update.lora_B.double() @ update.lora_A.double().flatten(1)
                total = total.t() if isinstance(layer, nn.Embedding) else total
                weight = weight + SCALE * total.view_as(weight)
        given = x[i : i + 1] if own else x
        if isinstance(layer, nn.Embedding):
            found.append(weight[given])
        elif isinstance(layer, nn.Linear):
            found.append(F.linear(given.double(), weight, layer.bias.double()))
        else:
            found.append(convolved(given.double(), weight, layer))
    return torch.cat(found)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("way", ("one", "two", "rows", "soft"))
def test_the_update_of_narrow_factors_is_not_rounded(way, kind, dtype):
    if way == "soft" and kind in ("groups", "embedding"):
        pytest.skip("a branch of other factors, or none")
    names = ("a", "b") if way in ("two", "rows") else ("a",)
    layer, x = adapted(kind, dtype, names, **({"hard": False} if way == "soft" else {}))
    if way == "rows":
        with paramlora.route(layer, [names[i % 2] for i in range(len(x))]):
            got = layer(x)
    else:
        got = layer(x)
    want = dense(layer, x, names, way == "rows")
    # float32 also in float64, for the scale of narrow factors is of that type
    assert (got.double() - want).norm() <= 1e-6 * want.norm()
