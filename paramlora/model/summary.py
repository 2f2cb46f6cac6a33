"""What is attached, as values and as a printed table."""

import html
import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from paramlora.errors import counted
from paramlora.model.attach import base_of, placed, updates_of
from paramlora.model.norms import relative_size
from paramlora.update.attached import AttachedUpdate, answer
from paramlora.update.sharded import check_not_flat, is_sharded

_HEAD = ("tensor", "adapter", "r", "scale", "kind", "parameters", "update/weight")


@dataclass(frozen=True)
class Row:
    """One update.

    Args:
        path: the tensor's.
        adapter: the name that it is switched by.
        r: its rank, 0 if it has none.
        scale: its factor.
        strength: as `set_adapters` gave it.
        kind: what it makes of the weight.
        parameters: how many elements it trains.
        norm: ``‖W' - W‖ / ‖W‖`` now (Frobenius norms); no number where that is not measured: on
            the meta device, of a weight that lies on several processes, of soft convolutions of two
            kernels, and inside of `route`.
        state: ``"not finite"`` where one of its numbers is not, ``"off"`` where its strength is 0,
            ``"idle"`` where it changes nothing, as before its first step; else empty.
    """

    path: str
    adapter: str
    r: int
    scale: float
    strength: float
    kind: str
    parameters: int
    norm: float = math.nan
    state: str = ""

    def cells(self) -> tuple[str, ...]:
        """What the table says of it."""
        size = "-" if math.isnan(self.norm) else f"{self.norm:.2g}"
        scale = f"{self.scale * self.strength:g}"
        count = f"{self.parameters:,}"
        named = (self.path or "(model)", self.adapter, str(self.r or "-"))
        return (*named, scale, self.kind, count, self.state or size)


@dataclass(frozen=True, repr=False)
class Summary:
    """Totals in numbers of elements; ``str()`` is a table."""

    rows: tuple[Row, ...]
    adapter: int
    trainable: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total if self.total else 0.0
        trains = f"{self.trainable:,} of {self.total:,} parameters train ({share:.2f} %)"
        if not self.rows:
            return f"no adapter is attached; {trains}"
        return "\n".join(
            [*_table([_HEAD, *(row.cells() for row in self.rows)]), trains, *self._told()]
        )

    __repr__ = __str__

    def _told(self) -> list[str]:
        """How many updates do nothing, or harm."""
        count = Counter(row.state for row in self.rows)
        return [
            f"{state}: {count[state]} of {counted(len(self.rows), 'update')}, {why}"
            for state, why in _STATES.items()
            if count[state]
        ]

    def _repr_html_(self) -> str:
        """What ``str()`` gives, as a notebook shows it."""
        return f"<pre>{html.escape(str(self))}</pre>"


_STATES = {
    "idle": "which change nothing, as before the first step",
    "off": "by set_adapters or disable_adapters",
    "not finite": "so detach that adapter, or load a sound one",
}


def _table(lines: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines
    ]


@torch.no_grad()
def summary(model: nn.Module) -> Summary:
    """What is attached to `model`: a row per update, and totals; prints as a table.

    Each adapted weight is read once, for its norm.

    Raises:
        AdapterError: something is attached under FSDP1, outside of ``summon_full_params``.

    Example:
        >>> import paramlora
        >>> print(summary(paramlora.attach(nn.Sequential(nn.Linear(4, 3)), {"0": {"r": 2}})))
        tensor  adapter  r  scale  kind  parameters  update/weight
        0       default  2  1      hard  14          idle
        14 of 29 parameters train (48.28 %)
        idle: 1 of 1 update, which change nothing, as before the first step
        >>> print(summary(nn.Linear(4, 3)))
        no adapter is attached; 15 of 15 parameters train (100.00 %)
    """
    found: dict[int, tuple[str, nn.Module, AttachedUpdate]] = {}
    for place in placed(model):
        found.setdefault(id(place[-1]), place)  # one that tied tensors share, once
    if found:
        # flat parts would be counted as other numbers
        check_not_flat(model, "summary", gathers=True)
    rows = tuple(_row(*place) for place in found.values())
    parameters = list(model.parameters())
    return Summary(
        rows,
        sum(row.parameters for row in rows),
        sum(p.numel() for p in parameters if p.requires_grad),
        sum(p.numel() for p in parameters),
    )


def _row(path: str, module: nn.Module, update: AttachedUpdate) -> Row:
    size = sum(p.numel() for p in update.parameters())
    r, scale, kind = answer(update, "described")
    norm = _norm(module, update)
    state = _state(update, norm)
    return Row(path, update.adapter, r, scale, update.strength, kind, size, norm, state)


def _norm(module: nn.Module, update: AttachedUpdate) -> float:
    held = {name for name, of in updates_of(module) for one in of if one is update}
    bases = [base_of(module, name) for name in held]
    if any(one.is_meta or is_sharded(one) for one in bases):
        return math.nan
    norm = relative_size(module, update)
    return math.nan if norm is None else norm


def _state(update: AttachedUpdate, norm: float) -> str:
    held = [t for t in (*update.parameters(), *update.buffers()) if not t.is_meta]
    if not all(torch.isfinite(tensor).all() for tensor in held):
        return "not finite"
    if update.strength == 0:
        return "off"
    return "idle" if norm == 0 else ""
