"""The sum of a base and its updates, formed block by block: the arithmetic of every merge."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Optional

import torch
from torch import Tensor

from paramlora.update.contexts import in_own_types
from paramlora.update.geometry import Layout, factor_dtype, matrix_shape
from paramlora.update.rounding import Rounding

# elements of a weight that are in a wide type at one time: fit a core's own cache, and on a device
# are few launches in little memory
_BLOCK, _BLOCK_OF_A_DEVICE = 1 << 18, 1 << 24


@dataclass(frozen=True)
class Block:
    """Some of a weight's elements.

    Args:
        run: which, as they lie in memory and in a file.
        which: of the matrices of a stack.
        rows, columns: of that matrix; all of its columns where a term asked for them.
    """

    run: slice
    which: int
    rows: slice
    columns: slice


class Term:
    """What one update does to a weight: the one thing that a merge asks of it.

    A kind of update gives its own; what a kind does not say is what this class says.
    """

    layout: Layout = "matrix"  # "stack" where the weight is a stack of matrices
    whole_rows: bool = False  # whether `applied` needs all columns of a row at once, as a norm does

    def prepared(self, wide: torch.dtype) -> "Term":
        """The same, ready for blocks in a wide type."""
        return self

    def applied(self, total: Tensor, block: Block) -> Tensor:
        """What the update makes of the sum so far; it may write into `total`.

        Args:
            total: ``[rows, columns]`` of `block`, in the wide type of `prepared`.
        """
        raise NotImplementedError

    def bound(self) -> float:
        """What no element is changed by more than; infinite where that is not known."""
        return float("inf")


@dataclass(frozen=True)
class LowRankTerm(Term):
    """Adds ``factor·B·A``: the factors, and the number before them."""

    lora_A: Tensor
    lora_B: Tensor
    factor: Tensor
    layout: Layout = "matrix"

    def prepared(self, wide: torch.dtype) -> "LowRankTerm":
        a, b = (_stacked(factor.detach().to(wide)) for factor in (self.lora_A, self.lora_B))
        return replace(self, lora_A=a, lora_B=b * self.factor.detach().to(wide))

    def applied(self, total: Tensor, block: Block) -> Tensor:
        a, b = self.lora_A[block.which], self.lora_B[block.which]
        if self.layout == "transposed":  # the weight's rows are the input side
            return total.add_((b[block.columns] @ a[:, block.rows]).t())
        return total.add_(b[block.rows] @ a[:, block.columns])

    def bound(self) -> float:
        """By the norms of B's rows and A's columns (Cauchy and Schwarz)."""
        with in_own_types(self.lora_A):
            a = torch.linalg.vector_norm(self.lora_A.double(), dim=-2).max()
            b = torch.linalg.vector_norm(self.lora_B.double(), dim=-1).max()
            return float(a * b * self.factor.abs().double())


@dataclass(frozen=True)
class WholeTerm(Term):
    """Has a tensor instead, or goes some of the way there: 1 is all of it."""

    value: Tensor
    strength: Tensor

    def prepared(self, wide: torch.dtype) -> "WholeTerm":
        return replace(self, value=self.value.detach().reshape(-1))

    def applied(self, total: Tensor, block: Block) -> Tensor:
        own = self.value[block.run].view(total.shape)
        if self.strength != 1 and own.is_floating_point():
            own = torch.lerp(total.to(own.dtype), own, self.strength.to(own.dtype))
        return own.to(total.dtype)

    def bound(self) -> float:
        return 2 * float(self.value.abs().max()) * abs(float(self.strength))


class Fold:
    """The sum for one weight, a block of it at a time.

    A block is a run of the weight's elements, as they lie in memory and in a file; the same blocks
    for a live model and for a file give the same bits. The sum is in float32, or in float64 for a
    float64 weight, and on a device that is allowed to round float32 products to TF32.

    Args:
        shape, dtype: of the weight.
        terms: in the order of summing.
        device: where the blocks will lie.
        rounding: how the sum comes into the weight's type; to the nearest number where None.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        terms: Sequence[Term],
        device: "torch.device | str" = "cpu",
        rounding: Optional[Rounding] = None,
    ) -> None:
        self._rounding = rounding
        stacked = any(term.layout == "stack" for term in terms)
        self._shape = matrix_shape(tuple(shape) or (1,), "stack" if stacked else "matrix")
        on_device = torch.device(device).type != "cpu"
        self._wide = factor_dtype(dtype)
        if on_device and self._wide == torch.float32 and _rounds_products():
            self._wide = torch.float64
        self._size = _BLOCK_OF_A_DEVICE if on_device else _BLOCK
        self._whole_rows = any(term.whole_rows for term in terms)
        self._terms = [term.prepared(self._wide) for term in terms]

    def blocks(self) -> Iterator[tuple[slice, Callable[[Tensor], Tensor]]]:
        """(a run of elements, function from their old values to the new ones), in order."""
        stack, rows, columns = self._shape
        wide = max(1, columns if self._whole_rows else min(columns, self._size))
        high = max(1, self._size // wide)
        for which in range(stack):
            for top in range(0, rows, high):
                for left in range(0, columns, wide):
                    down = slice(top, min(top + high, rows))
                    start = (which * rows + top) * columns + left
                    count = (down.stop - top) * min(wide, columns - left)
                    run = slice(start, start + count)
                    block = Block(run, which, down, slice(left, left + wide))
                    yield run, partial(self._sum, block)

    @torch.no_grad()
    def _sum(self, block: Block, before: Tensor) -> Tensor:
        rows = before.view(block.rows.stop - block.rows.start, -1)
        total = rows.to(self._wide, copy=bool(self._terms))
        with in_own_types(before):
            for term in self._terms:
                total = term.applied(total, block)
        if self._rounding is not None:
            return self._rounding(total, rows).reshape(-1)
        return total.to(before.dtype).reshape(-1)


def _rounds_products() -> bool:
    return torch.get_float32_matmul_precision() != "highest"


@torch.no_grad()
def folded(base: Tensor, terms: Sequence[Term], rounding: Optional[Rounding] = None) -> Tensor:
    """A new tensor: what the terms make of `base`, in a wide type and rounded once.

    Args:
        base: of any shape that the terms' layouts fit.
        terms: in the order of summing; none gives a copy.
        rounding: see `Fold`.
    """
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    before, after = base.reshape(-1), out.view(-1)
    for run, summed in Fold(base.shape, base.dtype, terms, base.device, rounding).blocks():
        after[run] = summed(before[run])
    return out


@torch.no_grad()
def overflows(base: Tensor, terms: Sequence[Term]) -> bool:
    """Whether a sum of finite numbers is beyond the largest of the base's type.

    The terms' bounds answer where they can, without the sum.
    """
    if base.is_meta or not base.is_floating_point() or not terms:
        return False
    most, added = torch.finfo(base.dtype).max, sum(term.bound() for term in terms)
    if base.dtype != torch.float16 and added < most * 2**-10:
        return False  # a weight that near to the end of a float32's range is no weight
    wide = base.float() if base.dtype.itemsize == 1 else base  # torch takes no norm of 8 bits
    if base.numel() and wide.abs().max().double() + added <= most:
        return False
    before = base.reshape(-1)
    for run, summed in Fold(base.shape, base.dtype, terms, base.device).blocks():
        old, new = before[run], summed(before[run])
        if old.dtype.itemsize == 1:
            old, new = old.float(), new.float()
        if (torch.isfinite(old) & ~torch.isfinite(new)).any():
            return True
    return False


def _stacked(factor: Tensor) -> Tensor:
    """``[stack, ...]``, also where there is no stack."""
    return factor.reshape(-1, *factor.shape[-2:])
