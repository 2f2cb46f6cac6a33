"""The sum ``W + Σ factor·B·A``, formed block by block: the arithmetic of every merge."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Union

import torch
from einops import rearrange
from torch import Tensor

from paramlora.contexts import in_own_types
from paramlora.lowrank import Layout, factor_dtype, matrix_shape

_BLOCK = 1 << 18  # elements of a weight that are in float32 at one time: fit a core's own cache
_At = tuple[int, slice, slice]  # of a stack, its rows and its columns


@dataclass(frozen=True)
class LowRankTerm:
    """One update to add: its factors, and the number before them."""

    lora_A: Tensor
    lora_B: Tensor
    factor: Tensor
    layout: Layout = "matrix"


@dataclass(frozen=True)
class WholeTerm:
    """A tensor to have instead, and how far to go there: 1 is all the way."""

    value: Tensor
    strength: Tensor


Term = Union[LowRankTerm, WholeTerm]


class Fold:
    """The sum for one weight, a block of it at a time.

    A block is a run of the weight's elements, as they lie in memory and in a file; the same blocks
    for a live model and for a file give the same bits. The sum is in float32, or in float64 for a
    float64 weight.

    Args:
        shape, dtype: of the weight.
        terms: in the order of summing.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, terms: Sequence[Term]) -> None:
        stacked = any(isinstance(term, LowRankTerm) and term.layout == "stack" for term in terms)
        self._shape = matrix_shape(tuple(shape) or (1,), "stack" if stacked else "matrix")
        self._wide = factor_dtype(dtype)
        self._terms = [self._prepared(term) for term in terms]

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
                    run = slice(start, start + count)
                    yield run, partial(self._sum, at, run)

    def _prepared(self, term: Term) -> Term:
        if isinstance(term, WholeTerm):
            return WholeTerm(term.value.detach().reshape(-1), term.strength)
        a, b = (_flat(factor.detach().to(self._wide)) for factor in (term.lora_A, term.lora_B))
        return LowRankTerm(a, b * term.factor.detach().to(self._wide), term.factor, term.layout)

    @torch.no_grad()
    def _sum(self, at: _At, run: slice, before: Tensor) -> Tensor:
        total = before.view(at[1].stop - at[1].start, -1)
        with in_own_types(before):
            for term in self._terms:
                if isinstance(term, WholeTerm):
                    total = _instead(term, run, total.to(self._wide))
                else:
                    total = _delta(term, at).add_(total.to(self._wide))
        return total.to(before.dtype).reshape(-1)


@torch.no_grad()
def folded(base: Tensor, terms: Sequence[Term]) -> Tensor:
    """A new tensor ``base + Σ factor·B·A``, summed in a wide type and rounded once.

    Args:
        base: of any shape that the terms' layouts fit.
        terms: in the order of summing; none gives a copy.
    """
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    before, after = base.reshape(-1), out.view(-1)
    for run, summed in Fold(base.shape, base.dtype, terms).blocks():
        after[run] = summed(before[run])
    return out


@torch.no_grad()
def overflows(base: Tensor, terms: Sequence[Term]) -> bool:
    """Whether a sum of finite numbers is beyond the largest of the base's type.

    A bound by the factors' norms (Cauchy and Schwarz) answers where it can, without the sum.
    """
    if base.is_meta or not base.is_floating_point() or not terms:
        return False
    most, added = torch.finfo(base.dtype).max, sum(map(_bound, terms))
    if base.dtype != torch.float16 and added < most * 2**-10:
        return False  # a weight that near to the end of a float32's range is no weight
    if base.numel() and base.abs().max().double() + added <= most:
        return False
    before = base.reshape(-1)
    for run, summed in Fold(base.shape, base.dtype, terms).blocks():
        if (torch.isfinite(before[run]) & ~torch.isfinite(summed(before[run]))).any():
            return True
    return False


def _bound(term: Term) -> float:
    """What no element of a term's change is larger than."""
    if isinstance(term, WholeTerm):
        return 2 * float(term.value.abs().max()) * abs(float(term.strength))
    with in_own_types(term.lora_A):
        longest = [
            torch.linalg.vector_norm(factor.double(), dim=dim).max()
            for factor, dim in ((term.lora_A, -2), (term.lora_B, -1))
        ]
        return float(longest[0] * longest[1] * term.factor.abs().double())


def _flat(factor: Tensor) -> Tensor:
    """``[stack, ...]``, also where there is no stack."""
    return factor.reshape(-1, *factor.shape[-2:])


def _delta(term: LowRankTerm, at: _At) -> Tensor:
    """The block of ``factor·B·A`` that stands at `at` of the weight, ``[rows, columns]``."""
    (which, rows, columns), a, b = at, term.lora_A, term.lora_B
    if term.layout == "transposed":  # the weight's rows are the input side
        return rearrange(b[which, columns] @ a[which, :, rows], "out fan_in -> fan_in out")
    return b[which, rows] @ a[which, :, columns]


def _instead(term: WholeTerm, run: slice, total: Tensor) -> Tensor:
    own = term.value[run].view(total.shape)
    if term.strength != 1 and own.is_floating_point():
        own = torch.lerp(total.to(own.dtype), own, term.strength)
    return own.to(total.dtype)
