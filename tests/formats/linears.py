"""Three linear layers, a random adapter of them, and reading one back."""

import warnings

import torch

from paramlora import formats
from paramlora.errors import ParamloraWarning
from paramlora.formats import Options, Slot
from paramlora.update.value import Adapter, Update

LINEAR = {"block.a": (4, 6), "block.b": (5, 4), "head": (3, 5)}
BASE = {path: Slot(shape, "matrix", "linear", 1) for path, shape in LINEAR.items()}


def adapter(ranks=(2, 2, 2), scales=(0.7, 0.7, 0.7), seed=0):
    torch.manual_seed(seed)
    return Adapter(
        {
            path: Update(torch.randn(r, fan_in), torch.randn(out, r), scale, (out, fan_in))
            for (path, (out, fan_in)), r, scale in zip(LINEAR.items(), ranks, scales)
        }
    )


def same(a, b):
    assert a.updates.keys() == b.updates.keys()
    for path, update in a.updates.items():
        other = b.updates[path]
        assert torch.equal(update.lora_A, other.lora_A) and torch.equal(update.lora_B, other.lora_B)
        assert update.scale == other.scale and update.r == other.r


def read(content, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ParamloraWarning)
        return formats.read(content, BASE, Options(**options))
