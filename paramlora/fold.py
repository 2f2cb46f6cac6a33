"""The sum ``W + Σ factor·B·A``, formed block by block: the arithmetic of every merge."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from torch import Tensor

from paramlora.lowrank import Layout, matrix_shape

_BLOCK = 1 << 18  # elements of a weight that are in float32 at one time: fit a core's own cache
_At = tuple[int, slice, slice]  # of a stack, its rows and its columns


@dataclass(frozen=True)
class Term:
    """One update to fold: its factors, of one floating type, and the number before them."""

    lora_A: Tensor
    lora_B: Tensor
    factor: Tensor
    layout: Layout = "matrix"


class Fold:
    """The sum for one weight, a block of it at a time.

    A block is a run of the weight's elements, as they lie in memory and in a file; the same blocks
    for a live model and for a file give the same bits.

    Args:
        shape: of the weight.
        terms: in the order of summing.
    """

    def __init__(self, shape: "tuple[int, ...] | torch.Size", terms: Sequence[Term]) -> None:
        stacked = any(term.layout == "stack" for term in terms)
        self._shape = matrix_shape(shape, "stack" if stacked else "matrix")
        self._sides = [(_flat(term.lora_B * term.factor), _flat(term.lora_A)) for term in terms]
        self._layouts = [term.layout for term in terms]

    def blocks(self) -> Iterator[tuple[slice, Callable[[Tensor], Tensor]]]:
        """(a run of elements, function from their old values to the new ones), in order."""
        stack, rows, columns = self._shape
        wide = max(1, min(columns, _BLOCK))
        high = _BLOCK // wide
        for which in range(stack):
            for top in range(0, rows, high):
                for left in range(0, columns, wide):
                    at = (which, slice(top, min(top + high, rows)), slice(left, left + wide))
                    start = (which * rows + top) * columns + left
                    count = (at[1].stop - top) * min(wide, columns - left)
                    yield slice(start, start + count), partial(self._sum, at)

    @torch.no_grad()
    def _sum(self, at: _At, before: Tensor) -> Tensor:
        total = before.view(at[1].stop - at[1].start, -1)
        for (b, a), layout in zip(self._sides, self._layouts):
            delta = _product(b, a, layout, at)
            total = delta.add_(total.to(delta.dtype))
        return total.to(before.dtype).reshape(-1)


@torch.no_grad()
def folded(base: Tensor, terms: Sequence[Term]) -> Tensor:
    """A new tensor ``base + Σ factor·B·A``, summed in the factors' type and rounded once.

    Args:
        base: of any shape that the terms' layouts fit.
        terms: in the order of summing; none gives a copy.
    """
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    before, after = base.reshape(-1), out.view(-1)
    for elements, summed in Fold(base.shape, terms).blocks():
        after[elements] = summed(before[elements])
    return out


def _flat(factor: Tensor) -> Tensor:
    """``[stack, ...]``, also where there is no stack."""
    return factor.reshape(-1, *factor.shape[-2:])


def _product(b: Tensor, a: Tensor, layout: Layout, at: _At) -> Tensor:
    """The block of ``B·A`` that stands at `at` of the weight, ``[rows, columns]``."""
    which, rows, columns = at
    if layout == "transposed":  # the weight's rows are the input side
        return rearrange(b[which, columns] @ a[which, :, rows], "out fan_in -> fan_in out")
    return b[which, rows] @ a[which, :, columns]
