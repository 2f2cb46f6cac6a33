"""The product of a layer's factors in float64, and how close another must come to it."""

import torch

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def product(update):
    return update.scale * (update.lora_B.double() @ update.lora_A.double())


def close(got, want):
    """Equal to the rounding of float32 in each element, relative to the sum of sizes there."""
    assert (got - want).abs().max() <= 1e-6 * want.abs().max() and want.abs().max() > 0


def halves(*shape, size):
    return (size * torch.randn(*shape)).half()
