"""How a sum comes into a weight's own type, and how much of its update that keeps."""

import hashlib
import html
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from paramlora.errors import ParamloraError, spelled


@dataclass(frozen=True)
class KeptRow:
    """One tensor of a merge.

    Args:
        path: of the tensor.
        dtype: in which it is stored.
        size: of its update beside the weight, ``‖Δ‖ / ‖W‖``.
        kept: the share of the update that its type keeps, ``⟨W' - W, Δ⟩ / ⟨Δ, Δ⟩``; 1 is all.
        off: what the rounding put off, ``‖W' - W - Δ‖ / ‖Δ‖``.
    """

    path: str
    dtype: str
    size: float
    kept: float
    off: float


@dataclass(frozen=True)
class KeptReport:
    """What a merge kept of its updates, for each tensor and of all; ``str()`` is a table."""

    rows: tuple[KeptRow, ...]
    total: KeptRow

    def __str__(self) -> str:
        head = ("tensor", "dtype", "update / weight", "kept", "off by")
        body = [
            (row.path, row.dtype, f"{row.size:.1e}", f"{row.kept:.1%}", f"{row.off:.1%}")
            for row in (*self.rows, self.total)
        ]
        widths = [max(map(len, column)) for column in zip(head, *body)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
            for line in (head, *body)
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """What ``str()`` gives, as a notebook shows it."""
        return f"<pre>{html.escape(str(self))}</pre>"


def check_seed(seed: object) -> None:
    """Refuse a seed of random numbers that is no whole number: 1 and 1.0 would draw others."""
    if seed is not None and type(seed) is not int:
        raise ParamloraError(f"seed must be a whole number, got {spelled(seed)}.")


class Rounding:
    """Rounds sums into a narrow type, to the nearest number or at random, and counts what is kept.

    Args:
        seed: round up or down at random, so that the mean of what is written is the sum; to the
            nearest number where None. One seed gives one result, each tensor by numbers of its own.
        path: of the tensor whose blocks come first (see `start`).
        counts: whether a `report` is wanted, which takes some passes over each block.

    Raises:
        ParamloraError: the seed is no whole number.
    """

    def __init__(self, seed: Optional[int] = None, path: str = "", counts: bool = True) -> None:
        check_seed(seed)
        self.seed, self.path, self.counts = seed, path, counts
        self._generators: dict[torch.device, torch.Generator] = {}
        self._sums: dict[tuple[str, str], Tensor] = {}

    def start(self, path: str) -> None:
        """Say whose blocks come now, from the first one on: also where they came half before."""
        # the same numbers when a merge takes a tensor again
        self.path = path
        self._generators.clear()
        # what was counted of its blocks is of a try that was stopped
        self._sums = {key: sums for key, sums in self._sums.items() if key[0] != path}

    def __call__(self, total: Tensor, before: Tensor) -> Tensor:
        """A block of the sum in the type that it had before."""
        if self.seed is None or total.dtype == before.dtype or not before.is_floating_point():
            after = total.to(before.dtype)
        else:
            after = stochastic(total, before.dtype, self._generator(total.device))
        if self.counts:
            self._count(total, before, after)
        return after

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            generator = torch.Generator(device)
            # by the tensor's name, so that the order of tensors does not matter
            digits = hashlib.sha256(f"{self.seed}\0{self.path}".encode()).digest()
            # seven bytes fit what `manual_seed` takes
            self._generators[device] = generator.manual_seed(int.from_bytes(digits[:7], "little"))
        return self._generators[device]

    def _count(self, total: Tensor, before: Tensor, after: Tensor) -> None:
        """Add the four sums of a block that make the report, in double precision."""
        old = before.to(total.dtype).double()
        update, got = total.double() - old, after.to(total.dtype).double() - old
        values = [(got * update).sum(), (update * update).sum(), ((got - update) ** 2).sum()]
        sums = torch.stack([*values, (old * old).sum()]).cpu()
        key = self.path, str(before.dtype).removeprefix("torch.")
        self._sums[key] = self._sums.get(key, torch.zeros(4, dtype=torch.float64)) + sums

    def report(self) -> KeptReport:
        """What was counted."""
        rows = tuple(_row(*key, sums) for key, sums in self._sums.items())
        every: Iterator[Tensor] = iter(self._sums.values())
        total = sum(every, torch.zeros(4, dtype=torch.float64))
        kinds = "/".join(dict.fromkeys(dtype for _, dtype in self._sums))
        return KeptReport(rows, _row("total", kinds, total))


def _row(path: str, dtype: str, sums: Tensor) -> KeptRow:
    dot, update, off, weight = sums.tolist()
    if update == 0:
        return KeptRow(path, dtype, 0.0, 1.0, 0.0)
    size = (update / weight) ** 0.5 if weight else float("inf")
    return KeptRow(path, dtype, size, dot / update, (off / update) ** 0.5)


_BITS = {1: torch.int8, 2: torch.int16}  # in whose order a float's neighbours are


def stochastic(total: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Each number as one of its two neighbours in a type of 8 or 16 bits, at random, with the
    chances that make their mean the number; beyond the largest one as `to` has it.

    Example:
        >>> x = torch.full((100_000,), 1 + 2.0**-10)  # an eighth of the way to bfloat16's next
        >>> y = stochastic(x, torch.bfloat16, torch.Generator().manual_seed(0)).float()
        >>> assert set(y.tolist()) == {1.0, 1 + 2.0**-7} and abs((y - 1).mean() * 2**10 - 1) < 0.05
    """
    near = total.to(dtype)
    if dtype.itemsize not in _BITS:
        return near
    wide = near.to(total.dtype)
    # exact: both are near each other (Sterbenz)
    error = total - wide
    # of floats of one sign the order is that of their bits; from zero it goes on by a sign
    # away from zero: the size grows
    away = (error > 0) == (wide > 0)
    bits = near.view(_BITS[dtype.itemsize])
    # the next number of a sign is the next whole number of its bits
    other = torch.where(away, bits + 1, bits - 1).view(dtype)
    least = torch.ones_like(bits).view(dtype).to(total.dtype)
    # from zero the other neighbour has the error's sign
    beyond = torch.where(wide == 0, torch.copysign(least, error), other.to(total.dtype))
    # the bits of a negative zero are NaN in the types of AMD's cards
    beyond = torch.where((wide.abs() == least) & ~away, torch.zeros_like(wide), beyond)
    step = (beyond - wide).abs()
    chance = torch.rand(total.shape, generator=generator, device=total.device, dtype=total.dtype)
    # with the chance error / step it moves to the other one
    moves = (error != 0) & torch.isfinite(beyond) & (chance * step < error.abs())
    return torch.where(moves, beyond, wide).to(dtype)
