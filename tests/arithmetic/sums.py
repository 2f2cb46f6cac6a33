"""Random updates, their dense sums in float64, and how far another is from one."""

import torch

from paramlora.update.value import Adapter, Update


def update(r, seed, scale=0.7, shape=(12, 9), dtype=torch.float32, **more):
    generator = torch.Generator().manual_seed(seed)
    out, fan_in = shape[0], torch.Size(shape[1:]).numel()
    a = torch.randn(r, fan_in, generator=generator).to(dtype)
    b = torch.randn(out, r, generator=generator).to(dtype)
    return Update(a, b, scale, shape, **more)


def one(*args, path="q", **kwargs):
    return Adapter({path: update(*args, **kwargs)})


def exact(update):
    """scale·B·A in float64, flat."""
    return update.scale * (update.lora_B.double() @ update.lora_A.double())


def total(*pairs, path="q"):
    return sum(weight * exact(adapter.updates[path]) for adapter, weight in pairs)


def far(found, expected):
    return float((exact(found) - expected).norm() / expected.norm())
