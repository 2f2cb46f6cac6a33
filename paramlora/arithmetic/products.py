"""Products of two thin factors and of their dense sums: singular values, and the nearest of a rank.

Everything is computed in float64, or in float32 where a dense matrix of that type is given.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Optional

import torch
from torch import Tensor

from paramlora.errors import AdapterError, spelled
from paramlora.formats.factors import held
from paramlora.update.value import Adapter, KindUpdate, Update

_PIECE = 1 << 20  # elements that are in double precision at one time
_OVER, _FIRST, _POWERS = 10, 32, 2  # more columns than asked for; the first try; powers of D·Dᵀ


@dataclass(frozen=True)
class Approximation:
    """An adapter that stands for another sum, and how near it is.

    Args:
        adapter: the value.
        errors: by path ``‖Δ - Δ'‖ / ‖Δ‖`` of what was to be had (Δ) and what is there (Δ'), in the
            Frobenius norm and before the factors are rounded to their type; 0 of an exact one.
    """

    adapter: Adapter
    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """The largest of the errors."""
        return max(self.errors.values(), default=0.0)


@dataclass(frozen=True)
class Decomposed:
    """``left · diag(values) · right``, a matrix or a stack of them by singular values.

    Args:
        left: ``[*stack, out, k]``, of orthonormal columns.
        values: ``[*stack, k]``, falling.
        right: ``[*stack, k, in]``, of orthonormal rows.
        total: ``‖·‖²`` of the whole matrix or stack, of which these may be the largest values.
        rest: ``‖·‖²`` of what these leave, if they are not all.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    total: float
    rest: float = 0.0

    def rank_of(self, energy: float) -> int:
        """The smallest rank whose share of ``‖·‖²`` is at least `energy`; all there are, at most.

        A stack has one rank: that of its sum over all matrices.
        """
        left = self._lost() <= (1 - energy + 1e-12) * self.total  # energy 1 is met by all values
        enough = left.nonzero()
        return 1 + (int(enough[0]) if enough.numel() else len(left) - 1)

    def _lost(self) -> Tensor:
        """``[k]``: ``‖·‖²`` of what a cut to each rank from 1 on leaves away."""
        # what is left, not what is kept: in float32 the values' sum is off by more than small
        # shares of it are large
        squares = self.values.double().square()
        each = squares.reshape(-1, squares.shape[-1]).sum(0)
        return each.flip(0).cumsum(0).flip(0) - each + self.rest

    def share(self) -> float:
        """The share of ``‖·‖²`` that all values together have."""
        return 1 - self.rest / self.total if self.total else 1.0

    def error(self, rank: int) -> float:
        """What a cut to `rank` leaves away, relatively."""
        lost = float(self.values[..., rank:].double().square().sum()) + self.rest
        return (lost / self.total) ** 0.5 if self.total else 0.0

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """A and B of the nearest of `rank`, the values shared by both (Eckart and Young 1936)."""
        root = self.values[..., :rank].sqrt()
        return root[..., None] * self.right[..., :rank, :], self.left[..., :rank] * root[
            ..., None, :
        ]


def decomposed(a: Tensor, b: Tensor) -> Decomposed:
    """The singular values of ``B·A`` by QR of the factors: the dense matrix is never formed.

    Args:
        a: ``[*stack, r, in]``.
        b: ``[*stack, out, r]``.

    Example:
        >>> a, b = torch.randn(2, 9, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
        >>> assert torch.allclose(decomposed(a, b).values, torch.linalg.svdvals(b @ a)[:2])
    """
    # B A = Q (R_b R_a^T) P^T: the singular values are those of a matrix [r, r]
    left, upper = torch.linalg.qr(b)
    right, lower = torch.linalg.qr(a.mT)
    u, s, v = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    return Decomposed(left @ u, s, v @ right.mT, float(s.double().square().sum()))


def nearest(
    matrix: Tensor, rank: Optional[int] = None, energy: Optional[float] = None
) -> Decomposed:
    """The largest singular values of a dense matrix: `rank` of them, or enough for `energy`.

    By a randomised range finder with power iterations (Halko, Martinsson and Tropp 2011,
    arXiv:0909.4061, algorithms 4.4 and 5.1); exactly where that is no more work. The random
    numbers are the same for each shape, so the result is reproducible.

    Args:
        matrix: ``[*stack, out, in]``, in float32 or float64.
    """
    total = (
        float(matrix.double().square().sum()) if matrix.dtype == torch.float64 else _squared(matrix)
    )
    size = _FIRST if rank is None else rank + _OVER
    # beyond a third of the matrix a plain decomposition is no more work
    while 3 * size < min(matrix.shape[-2:]):
        found = replace(_sketched(matrix, size), total=total)
        if energy is None:
            return found
        rest = matrix - found.left @ (found.values[..., None] * found.right)
        found = replace(found, rest=_squared(rest))
        if found.share() >= energy:
            return found
        size *= 2
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return Decomposed(u, s, v, total)


def _squared(matrix: Tensor) -> float:
    """``‖·‖²`` in double precision, without a double copy of it all."""
    pieces = torch.split(matrix.reshape(-1), _PIECE)
    return sum(float(torch.linalg.vector_norm(piece.double())) ** 2 for piece in pieces)


def _sketched(matrix: Tensor, size: int) -> Decomposed:
    random = torch.Generator().manual_seed(size)
    # in float64 whatever the matrix is: the same numbers for both types
    start = torch.randn(matrix.shape[-1], size, generator=random, dtype=torch.float64)
    basis = torch.linalg.qr(matrix @ start.to(matrix.dtype))[0]
    # QR in between: powers alone would lose all but the largest direction to rounding
    for _ in range(_POWERS):
        other = torch.linalg.qr(matrix.mT @ basis)[0]
        basis = torch.linalg.qr(matrix @ other)[0]
    u, s, v = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return Decomposed(basis @ u, s, v, 0.0)


def distance(matrix: Tensor, a: Tensor, b: Tensor) -> float:
    """``‖matrix - B·A‖ / ‖matrix‖``, of a matrix that may be overwritten."""
    total = _squared(matrix)
    # baddbmm takes stacks only, and subtracts without a product of its own in memory
    rest = matrix.view(-1, *matrix.shape[-2:])
    rest.baddbmm_(b.reshape(-1, *b.shape[-2:]), a.reshape(-1, *a.shape[-2:]), alpha=-1)
    return (_squared(matrix) / total) ** 0.5 if total else 0.0


def with_factors(like: Update, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Update:
    """`like` with other factors, in `dtype`, or in a wider type where that would lose more than a
    rounding to float32 does."""
    small, other = held(a.double(), dtype), held(b.double(), dtype)
    both = torch.promote_types(small.dtype, other.dtype)
    return replace(
        like, lora_A=small.to(both).contiguous(), lora_B=other.to(both).contiguous(), scale=scale
    )


def check_choice(rank: object, energy: Optional[float]) -> None:
    """Refuse neither or both of a rank and a share, and what is none.

    Raises:
        AdapterError: says which.
    """
    if (rank is None) == (energy is None):
        raise AdapterError(
            "how much to keep: give a rank or an energy, and one of them only (--rank, --energy)."
        )
    if energy is not None and not is_share(energy):
        raise AdapterError(
            "energy (--energy) is a share of the squared norm, above 0 and up to 1, such as 0.95; "
            f"got {spelled(energy)}."
        )
    if rank is not None and (type(rank) is not int or rank < 1):
        raise AdapterError(
            f"rank (--rank) must be a whole number and at least 1, got {spelled(rank)}."
        )


def is_share(value: object) -> bool:
    """Whether a value is a number above 0 and up to 1."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) <= 1


def is_difference(value: object) -> bool:
    """Whether an update is a whole tensor that is added to the weight."""
    return type(value) is KindUpdate and value.method == "difference"


def check_adds(path: str, update: object, name: str) -> None:
    """Refuse an update that is no product of two matrices and no whole difference, and one that is
    not finite.

    Raises:
        AdapterError: names it.
    """
    if is_difference(update):
        _check_sound(path, update, name)
        return
    if type(update) is not Update or update.up_kernel == "same":
        kind = (
            '"up_kernel": "same"'
            if isinstance(update, Update)
            else getattr(update, "method", "unknown")
        )
        raise AdapterError(
            f'{path}: in "{name}" it is of a kind ({kind}) that is no product of two matrices, so '
            "it does not add. Merge it into a checkpoint instead."
        )
    _check_sound(path, update, name)


def check_all_add(adapter: Adapter, name: str) -> None:
    """Refuse an adapter of which something does not add (see `check_adds`) or is not finite.

    Raises:
        AdapterError: names it.
    """
    for path, value in {**adapter.updates, **adapter.others}.items():
        check_adds(path, value, name)
    for path, tensor in adapter.whole.items():
        _check_numbers(path, is_finite(tensor), name)


def is_finite(tensor: Tensor) -> bool:
    """Whether all its numbers are finite; of 8 bits too, which torch does not look at."""
    return bool(torch.isfinite(tensor if tensor.dtype.itemsize > 1 else tensor.float()).all())


def _check_sound(path: str, update: Any, name: str) -> None:
    sound = all(map(is_finite, update.tensors().values()))
    _check_numbers(path, sound and abs(update.scale) < float("inf"), name)


def _check_numbers(path: str, finite: bool, name: str) -> None:
    if not finite:
        raise AdapterError(
            f'{path}: in "{name}" it is not finite. Give the adapter from before training diverged.'
        )
