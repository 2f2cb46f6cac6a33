"""The sum of a base and its updates, formed block by block: the arithmetic of every merge."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor

from paramlora.update.contexts import in_own_types
from paramlora.update.geometry import Layout, factor_dtype, matrix_shape
from paramlora.update.kinds import not_said
from paramlora.update.rounding import Rounding
from paramlora.update.sharded import gathered

Number = Union[float, Tensor]  # one of a device is a tensor without dimensions

# a weight's elements in a wide type at one time fit a core's own cache; on a device, where Python
# takes longer than the sum, their bytes are most layers' whole weight
_BLOCK, _BYTES_OF_A_DEVICE = 1 << 18, 1 << 28


class Block(NamedTuple):
    """Some of a weight's elements.

    Args:
        run: which, as they lie in memory and in a file.
        which: of the matrices of a stack.
        rows, columns: of that matrix; all of them where a term asked for that.
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
    whole_matrix: bool = False  # whether it needs all rows too

    def prepared(self, wide: torch.dtype) -> "Term":
        """The term made ready for blocks in a wide type."""
        return self

    def applied(self, total: Tensor, block: Block) -> Tensor:
        """What the update makes of the sum so far; it may write into `total`.

        Args:
            total: ``[rows, columns]`` of `block`, in the wide type of `prepared`.

        Raises:
            AdapterError: a kind of update gives a term that does not say it.
        """
        raise not_said(type(self), "applied")

    def bound(self) -> Number:
        """What no element is changed by more than; infinite where that is not known. A tensor
        where a device would have to be waited for."""
        return float("inf")

    def product(self) -> Optional[tuple[Tensor, Tensor, Tensor]]:
        """The ``A``, ``B`` and number of a term that does nothing but add their product to the
        weight as a matrix ``[rows, columns]``, which a kernel can; None of any other."""
        return None

    def norm(self) -> Optional[Tensor]:
        """The Frobenius norm of what is added, of whole tensors that may be sharded, where it is
        known without the sum; None elsewhere."""
        return None


@dataclass(frozen=True)
class LowRankTerm(Term):
    """Adds ``factor·B·A``: the factors, and the number before them."""

    lora_A: Tensor
    lora_B: Tensor
    factor: Tensor
    layout: Layout = "matrix"

    def prepared(self, wide: torch.dtype) -> "LowRankTerm":
        a, b = (_stacked(factor.detach().to(wide)) for factor in (self.lora_A, self.lora_B))
        # the number goes into B, which is smaller than the product
        return LowRankTerm(a, b * self.factor.detach().to(wide), self.factor, self.layout)

    def applied(self, total: Tensor, block: Block) -> Tensor:
        a, b = self.lora_A[block.which], self.lora_B[block.which]
        if self.layout == "transposed":  # the weight's rows are the input side
            return total.addmm_(a[:, block.rows].t(), b[block.columns].t())
        return total.addmm_(b[block.rows], a[:, block.columns])

    def bound(self) -> Number:
        """By the largest number of each factor, and a little more than their product's roundings:
        in few launches, as a model has hundreds of updates."""
        factors = self.lora_A.detach(), self.lora_B.detach()
        # `vector_norm` of nothing raises
        if not all(f.numel() for f in factors):
            return 0.0
        wide = torch.promote_types(factors[0].dtype, torch.float32)
        a, b = (torch.linalg.vector_norm(f, float("inf"), dtype=wide) for f in factors)
        # at most rank times the product of the largest; the last factor is for roundings
        most: Tensor = a * b * self.factor.detach().abs() * (factors[0].shape[-2] * (1 + 2**-20))
        return most

    def product(self) -> Optional[tuple[Tensor, Tensor, Tensor]]:
        # a class of its own may apply its factors otherwise
        if type(self) is not LowRankTerm or self.layout == "stack":
            return None
        a, b, factor = self.lora_A.detach(), self.lora_B.detach(), self.factor.detach()
        # of a transposed weight the rows are the input side
        return (b.t(), a.t(), factor) if self.layout == "transposed" else (a, b, factor)

    def norm(self) -> Tensor:
        """By ``‖B·A‖² = trace(BᵀB · AAᵀ)``, which needs no product of the weight's size."""
        a, b = (gathered(factor).to(torch.float64) for factor in (self.lora_A, self.lora_B))
        square = ((b.mT @ b) * (a @ a.mT)).sum().clamp(min=0)
        return square.sqrt() * gathered(self.factor).abs()


@dataclass(frozen=True)
class WholeTerm(Term):
    """Has a tensor instead, or goes some of the way there: 1 is all of it."""

    value: Tensor
    strength: Tensor

    def prepared(self, wide: torch.dtype) -> "WholeTerm":
        return replace(self, value=self.value.detach().reshape(-1))

    def applied(self, total: Tensor, block: Block) -> Tensor:
        own = self.value[block.run].view(total.shape)
        # 1 copies to the last bit; a count goes all the way
        if self.strength != 1 and own.is_floating_point():
            wide = torch.promote_types(own.dtype, total.dtype)  # a narrow one would round the base
            own = torch.lerp(total.to(wide), own.to(wide), self.strength.to(wide))
        return own.to(total.dtype)

    def bound(self) -> Number:
        """The bound of a part of the way; beyond it the weight grows, which no term knows."""
        strength = self.strength.detach().double()
        most = self.value.detach().abs().max().double() * strength
        return torch.where((strength >= 0) & (strength <= 1), most, torch.inf)


@dataclass(frozen=True)
class WholesTerm(Term):
    """Adds what each of several tensors to have instead differs from the weight by."""

    terms: tuple[WholeTerm, ...]

    def prepared(self, wide: torch.dtype) -> "WholesTerm":
        return WholesTerm(tuple(term.prepared(wide) for term in self.terms))

    def applied(self, total: Tensor, block: Block) -> Tensor:
        # the sum of two counts of batches is none
        if not self.terms[-1].value.is_floating_point():  # a count
            return self.terms[-1].applied(total, block)
        out = total
        for term in self.terms:
            own = term.value[block.run].view(total.shape).to(total.dtype)
            # each against the base, which stands before all of them
            out = out + term.strength.to(total.dtype) * (own - total)
        return out


@dataclass(frozen=True)
class ScaledTerm(Term):
    """Multiplies: before the updates, by what a weight of 8 bits is stored divided by; or after
    them, by its reciprocal, no further than the type goes.

    Args:
        factor: one number, or one for each row ``[rows]``.
        limit: of the size of an element.
    """

    factor: Tensor
    limit: float = float("inf")

    def prepared(self, wide: torch.dtype) -> "ScaledTerm":
        return replace(self, factor=self.factor.detach().to(wide))

    def applied(self, total: Tensor, block: Block) -> Tensor:
        factor = self.factor if self.factor.dim() == 0 else self.factor[block.rows, None]
        # float8_e4m3fn has no infinity: beyond its end a cast gives NaN
        return total.mul_(factor).clamp_(-self.limit, self.limit)


class Fold:
    """The sum for one weight, a block of it at a time.

    A block is a run of the weight's elements, as they lie in memory and in a file; the same blocks
    for a live model and for a file give the same bits. The sum is in float32, or in float64 for a
    float64 weight and where a product of float32 may be rounded to TF32 or bfloat16.

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
        device = torch.device(device)
        self._wide = factor_dtype(dtype)
        if self._wide == torch.float32 and rounds_products(device):
            self._wide = torch.float64
        self._terms = [term.prepared(self._wide) for term in _joined(terms)]
        # elements that are in a wide type at one time, bytes of a device
        self._size = _BYTES_OF_A_DEVICE // self._wide.itemsize if device.type != "cpu" else _BLOCK
        self._whole_matrix = any(term.whole_matrix for term in terms)
        # what needs all rows needs their columns too
        self._whole_rows = self._whole_matrix or any(term.whole_rows for term in terms)

    def blocks(self) -> Iterator[tuple[slice, Callable[..., Tensor]]]:
        """(a run of elements, function from their old values to the new ones), in order; the new
        ones are written into what the function gets besides, if anything."""
        stack, rows, columns = self._shape
        # few columns of all rows are no run of memory: blocks are rows, or parts of one
        wide = max(1, columns if self._whole_rows else min(columns, self._size))
        high = rows if self._whole_matrix else max(1, self._size // wide)
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
    def _sum(self, block: Block, before: Tensor, into: Optional[Tensor] = None) -> Tensor:
        rows = before.view(block.rows.stop - block.rows.start, -1)
        total = self._wide_sum(block, rows)
        if self._rounding is not None:
            total = self._rounding(total, rows)
        total = total.reshape(-1)
        # `copy_` rounds to the type of `into`
        return total.to(before.dtype) if into is None else into.copy_(total)

    def _wide_sum(self, block: Block, rows: Tensor) -> Tensor:
        # a copy where terms will write: the base must stay
        total = rows.to(self._wide, copy=bool(self._terms))
        # autocast would round each product
        with in_own_types(rows):
            for term in self._terms:
                total = term.applied(total, block)
        return total

    @torch.no_grad()
    def of(self, base: Tensor) -> Tensor:
        """A new tensor with what the terms make of all of a weight."""
        out = torch.empty_like(base, memory_format=torch.contiguous_format)
        before, after = base.reshape(-1), out.view(-1)
        for run, summed in self.blocks():
            summed(before[run], after[run])
        return out

    def to_copy(self, base: Tensor) -> Tensor:
        """A new tensor that is `of` a weight once it is copied into that: in the wide type, which
        the copy rounds, where one block is all of it, as on a device that of most layers is."""
        stack, rows, columns = self._shape
        # a rounding draws and counts block by block
        if self._rounding is not None or stack > 1 or rows * columns > self._size:
            return self.of(base)
        block = Block(slice(0, rows * columns), 0, slice(0, rows), slice(0, columns))
        return self._wide_sum(block, base.reshape(-1).view(rows, columns)).view(base.shape)


def _joined(terms: Sequence[Term]) -> list[Term]:
    """The terms, with all tensors to have instead as one term: they do not build on each other."""
    wholes = tuple(term for term in terms if isinstance(term, WholeTerm))
    if len(wholes) < 2:
        return list(terms)
    return [
        WholesTerm(wholes) if term is wholes[0] else term
        for term in terms
        if term is wholes[0] or not isinstance(term, WholeTerm)
    ]


def rounds_products(device: torch.device) -> bool:
    """Whether torch may round the factors of a float32 product on a device: to TF32, or to bfloat16
    on a CPU. It is asked of the device's own library, as the question for all of them raises once
    one of them was set alone."""
    # other devices have no such setting
    if device.type not in ("cuda", "cpu", "xpu"):
        return False
    library: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return library.matmul.fp32_precision not in ("none", "ieee")


@torch.no_grad()
def folded(base: Tensor, terms: Sequence[Term], rounding: Optional[Rounding] = None) -> Tensor:
    """A new tensor: what the terms make of `base`, in a wide type and rounded once.

    Args:
        base: of any shape that the terms' layouts fit.
        terms: in the order of summing; none gives a copy.
        rounding: see `Fold`.
    """
    return Fold(base.shape, base.dtype, terms, base.device, rounding).of(base)


def bound_of(terms: Sequence[Term]) -> Number:
    """What no element is changed by more than by terms together, see `Term.bound`."""
    first, *others = [term.bound() for term in _joined(terms)] or [0.0]
    return sum(others, first)


def waited_for(numbers: Sequence[Number]) -> list[float]:
    """Numbers of devices, each of which is waited for once."""
    out = [number if isinstance(number, (int, float)) else 0.0 for number in numbers]
    alike: dict[tuple[torch.device, torch.dtype], dict[int, Tensor]] = {}
    for i, number in enumerate(numbers):
        if isinstance(number, Tensor) and type(number) is Tensor:
            alike.setdefault((number.device, number.dtype), {})[i] = number.detach()
        elif isinstance(number, Tensor):
            out[i] = float(number)
    for some in alike.values():
        for i, value in zip(some, torch.stack(list(some.values())).tolist()):
            out[i] = value
    return out


def near_overflow(dtype: torch.dtype, added: float, held: float = float("inf")) -> bool:
    """Whether a weight of a type may be beyond its largest number with what is added to it: one
    that is near to the end of a float32's range by itself is no weight.

    Args:
        held: what no number of the weight is above, which counts in float16.
    """
    if not dtype.is_floating_point:
        return False
    most = torch.finfo(dtype).max
    return not (held + added <= most if dtype == torch.float16 else added < most * 2**-10)


@torch.no_grad()
def overflows(base: Tensor, terms: Sequence[Term], added: float) -> bool:
    """Whether a sum of finite numbers is beyond the largest of the base's type.

    Args:
        base: of any shape that the terms' layouts fit.
        terms: in the order of summing.
        added: `bound_of` the terms, which answers where it can, without the sum.
    """
    if base.is_meta or not terms or not near_overflow(base.dtype, added):
        return False
    most = torch.finfo(base.dtype).max
    wide = base.float() if base.dtype.itemsize == 1 else base  # torch takes no norm of 8 bits
    # the sum of both largest numbers is in range, so is each sum
    if base.numel() and wide.abs().max().double() + added <= most:
        return False
    before = base.reshape(-1)
    for run, summed in Fold(base.shape, base.dtype, terms, base.device).blocks():
        # only now the sum itself is formed, block by block
        old, new = before[run], summed(before[run])
        if old.dtype.itemsize == 1:
            old, new = old.float(), new.float()
        # what was infinite before is not the sum's doing
        if (torch.isfinite(old) & ~torch.isfinite(new)).any():
            return True
    return False


def _stacked(factor: Tensor) -> Tensor:
    """A factor with the dimension of a stack in front, of size 1 where there is no stack."""
    return factor[None] if factor.dim() == 2 else factor
