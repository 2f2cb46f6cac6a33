"""What is attached, as values and as a printed table."""

import html
from dataclasses import dataclass

from torch import nn

from paramlora.model.attach import updates
from paramlora.update.attached import AttachedUpdate, answer


@dataclass(frozen=True)
class Row:
    """One update: the tensor's path, the adapter, its rank (0 if whole), factor, kind and size."""

    path: str
    adapter: str
    r: int
    scale: float
    strength: float
    kind: str
    parameters: int


@dataclass(frozen=True)
class Summary:
    """Totals in numbers of elements; ``str()`` is a table."""

    rows: tuple[Row, ...]
    adapter: int
    trainable: int
    total: int

    def __str__(self) -> str:
        head = ("tensor", "adapter", "r", "scale", "kind", "parameters")
        body = [
            (row.path or "(model)", row.adapter, str(row.r or "-"), f"{row.scale * row.strength:g}")
            + (row.kind, f"{row.parameters:,}")
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(head, *body)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
            for line in (head, *body)
        ]
        share = 100 * self.trainable / self.total if self.total else 0.0
        lines.append(f"{self.trainable:,} of {self.total:,} parameters train ({share:.2f} %)")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The same table, as a notebook shows it."""
        return f"<pre>{html.escape(str(self))}</pre>"


def summary(model: nn.Module) -> Summary:
    """What is attached to `model`: a row per update, and totals; prints as a table.

    Example:
        >>> import paramlora
        >>> print(summary(paramlora.attach(nn.Sequential(nn.Linear(4, 3)), {"0": {"r": 2}})))
        tensor  adapter  r  scale  kind  parameters
        0       default  2  1      hard  14
        14 of 29 parameters train (48.28 %)
    """
    rows = tuple(_row(path, update) for path, _, update in updates(model))
    parameters = list(model.parameters())
    return Summary(
        rows,
        sum(row.parameters for row in rows),
        sum(p.numel() for p in parameters if p.requires_grad),
        sum(p.numel() for p in parameters),
    )


def _row(path: str, update: AttachedUpdate) -> Row:
    size = sum(p.numel() for p in update.parameters())
    r, scale, kind = answer(update, "described")
    return Row(path, update.adapter, r, scale, update.strength, kind, size)
