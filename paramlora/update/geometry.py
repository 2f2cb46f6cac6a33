"""Where the matrices of a tensor lie, and the type in which an update of it is held."""

import math
from collections.abc import Sequence
from typing import Literal, Union

import torch
from torch import nn

Layout = Literal["matrix", "transposed", "stack"]
LAYOUTS: tuple[Layout, ...] = ("matrix", "transposed", "stack")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NARROW = (torch.float8_e4m3fn, torch.float8_e5m2)  # stored, and not computed in
# subclasses, such as DTensors and quantised weights, have operations of their own
PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer)
# only of 2 and 3 axes does torch have such a format, by a tensor's dimensions
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
MOST_SIDE, MOST_SIDES = 2**63 - 1, 64  # what a torch tensor can have


def matrix_shape(shape: "tuple[int, ...] | torch.Size", layout: Layout) -> tuple[int, int, int]:
    """(stack, out, in): the matrices that a weight of `shape` holds.

    ``matrix`` flattens all but the first dimension into the input side, ``transposed``
    stores the input side first, ``stack`` holds one ``[out, in]`` for each leading index.
    """
    if layout == "stack":
        return math.prod(shape[:-2]), shape[-2], shape[-1]
    first, rest = shape[0], math.prod(shape[1:])
    # a kernel behind the first dimension belongs to the inputs, or of a transposed weight to the
    # outputs
    return (1, rest, first) if layout == "transposed" else (1, first, rest)


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of an update's factors: a 16-bit one would lose their small steps."""
    return torch.float32 if dtype.itemsize <= 2 else dtype


def summed_in(dtype: torch.dtype, own: torch.Tensor) -> torch.dtype:
    """The type of a sum of a weight of a type and of what its update makes of a tensor of its own:
    it rounds neither of them."""
    return torch.promote_types(factor_dtype(dtype), own.dtype)


def laid_as(total: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A sum with the strides of its weight, where both are in the order of channels first.

    Of a kernel of 1 they are so in channels last too, where the strides alone tell a convolution
    its format.
    """
    if total.stride() != weight.stride() and total.is_contiguous() and weight.is_contiguous():
        # both are contiguous, and strides of dimensions of size 1 may be anything
        return total.as_strided(weight.shape, weight.stride())
    return total


def in_format_of(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """x with its channels last in memory where a convolution's weight or output has them so, as
    torch would lay it: what comes of x, and its gradient, then lies as the plain layer's."""
    last = CHANNELS_LAST.get(other.dim())
    if last is None or x.dim() != other.dim():
        return x
    return x.contiguous(memory_format=last) if _has_channels_last(other) else x


def _has_channels_last(t: torch.Tensor) -> bool:
    """Whether channels come last, as torch judges by strides alone: a kernel of 1×1 lies the same
    in either format."""
    # torch's own `is_channels_last_strides`, which has no public name: C, then the rest, then N
    least, shape, stride = 0, t.shape, t.stride()
    for axis in (1, *range(t.dim() - 1, 1, -1), 0):
        # the last: [N, 1, 1, 1] fits every format, and counts as the usual one
        if shape[axis] == 0 or stride[axis] < max(least, 1) or axis == 0 and least == stride[1]:
            return False
        least = stride[axis] * shape[axis]
    return True


def ambiguous(shape: "tuple[int, ...] | torch.Size", layout: Layout) -> bool:
    """Whether the factors' shapes do not tell which side of the weight is the input."""
    return layout != "stack" and shape[0] ** 2 == math.prod(shape)


def possible(shape: Sequence[int]) -> bool:
    """Whether a tensor can have a shape: an empty one, too, has strides that must be numbers."""
    # strides are counted in elements, and an element takes up to 16 bytes
    return len(shape) <= MOST_SIDES and math.prod(max(n, 1) for n in shape) <= MOST_SIDE // 16


def fits_shape(
    a: tuple[int, ...],
    b: tuple[int, ...],
    r: int,
    up_kernel: Union[int, str],
    shape: tuple[int, ...],
    layout: Layout,
) -> bool:
    """Whether factors of shapes `a` and `b` are those of an update of a weight of `shape`."""
    if len(shape) < 2:
        return False
    stack, out, fan_in = matrix_shape(shape, layout)
    lead = (stack,) if layout == "stack" else ()
    if up_kernel != "same":
        return a == (*lead, r, fan_in) and b == (*lead, out, r)
    size = math.prod(b[2:])
    if layout == "transposed":
        return a == (r * size, fan_in) and b[0] * size == out
    return a == (r, fan_in) and b[0] == out
