"""Where the matrices of a tensor lie, and the type in which an update of it is held."""

import math
from collections.abc import Sequence
from typing import Literal

import torch

Layout = Literal["matrix", "transposed", "stack"]
LAYOUTS: tuple[Layout, ...] = ("matrix", "transposed", "stack")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MOST_SIDE, MOST_SIDES = 2**63 - 1, 64  # what a torch tensor can have


def matrix_shape(shape: "tuple[int, ...] | torch.Size", layout: Layout) -> tuple[int, int, int]:
    """(stack, out, in): the matrices that a weight of `shape` holds.

    ``matrix`` flattens all but the first dimension into the input side, ``transposed``
    stores the input side first, ``stack`` holds one ``[out, in]`` for each leading index.
    """
    if layout == "stack":
        return math.prod(shape[:-2]), shape[-2], shape[-1]
    first, rest = shape[0], math.prod(shape[1:])
    return (1, rest, first) if layout == "transposed" else (1, first, rest)


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of an update's factors: a 16-bit one would lose their small steps."""
    return torch.float32 if dtype.itemsize <= 2 else dtype


def ambiguous(shape: "tuple[int, ...] | torch.Size", layout: Layout) -> bool:
    """Whether the factors' shapes do not tell which side of the weight is the input."""
    return layout != "stack" and shape[0] ** 2 == math.prod(shape)


def possible(shape: Sequence[int]) -> bool:
    """Whether a tensor can have a shape: an empty one, too, has strides that must be numbers."""
    return len(shape) <= MOST_SIDES and math.prod(max(n, 1) for n in shape) <= MOST_SIDE // 16
