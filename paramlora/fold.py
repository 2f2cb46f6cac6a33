"""The sum ``W + Σ factor·B·A``, formed block by block: the arithmetic of every merge."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from paramlora.lowrank import Layout, matrix_shape

_BLOCK = 1 << 20  # elements of a weight that are in float32 at one time


@dataclass(frozen=True)
class Term:
    """One update to fold: its factors, of one floating type, and the number before them."""

    lora_A: Tensor
    lora_B: Tensor
    factor: Tensor
    layout: Layout = "matrix"


@torch.no_grad()
def folded(base: Tensor, terms: Sequence[Term]) -> Tensor:
    """A new tensor ``base + Σ factor·B·A``, summed in the factors' type and rounded once.

    A block of the weight at a time, so that beside the result nothing large is held; the same
    blocks for a live model and for a file give the same bits.

    Args:
        base: of any shape that the terms' layouts fit.
        terms: in the order of summing; none gives a copy.
    """
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    stacked = any(term.layout == "stack" for term in terms)
    stack, rows, columns = matrix_shape(base.shape, "stack" if stacked else "matrix")
    before, after = base.reshape(stack, rows, columns), out.view(stack, rows, columns)
    scaled = [(_sides(term), term) for term in terms]
    for at in _blocks(stack, rows, columns):
        total = before[at]
        for (left, right), term in scaled:
            total = total.to(term.lora_A.dtype) + _product(left, right, term.layout, at)
        after[at] = total
    return out


_At = tuple[int, slice, slice]


def _sides(term: Term) -> tuple[Tensor, Tensor]:
    """``factor·B`` and ``A``, each ``[stack, ...]``."""
    b, a = term.lora_B * term.factor, term.lora_A
    return b.reshape(-1, *b.shape[-2:]), a.reshape(-1, *a.shape[-2:])


def _blocks(stack: int, rows: int, columns: int) -> Iterator[_At]:
    wide = max(1, min(columns, _BLOCK))
    high = max(1, _BLOCK // wide)
    for which in range(stack):
        for top in range(0, rows, high):
            for left in range(0, columns, wide):
                yield which, slice(top, top + high), slice(left, left + wide)


def _product(b: Tensor, a: Tensor, layout: Layout, at: _At) -> Tensor:
    """The block of ``B·A`` that stands at `at` of the weight, ``[rows, columns]``."""
    which, rows, columns = at
    if layout == "transposed":  # the weight's rows are the input side
        return rearrange(b[which, columns] @ a[which, :, rows], "out fan_in -> fan_in out")
    return b[which, rows] @ a[which, :, columns]
