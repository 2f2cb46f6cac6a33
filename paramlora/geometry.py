"""Where the matrices of a tensor lie, and the type in which an update of it is held."""

import math
from typing import Literal

import torch

Layout = Literal["matrix", "transposed", "stack"]
LAYOUTS: tuple[Layout, ...] = ("matrix", "transposed", "stack")


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
