"""What is in an adapter file of any tool, as values and as a printed table."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Optional

import torch
from torch import Tensor

from paramlora import formats
from paramlora.errors import ParamloraWarning, shown
from paramlora.files.adapters import opened, outlined
from paramlora.files.atomic import PathLike
from paramlora.formats import Base, Options
from paramlora.update.contexts import own_context
from paramlora.update.value import Update

_SHOWN = 60  # characters of a metadata value in the table
_LOOSE = Options(strict=False)


@dataclass(frozen=True)
class Row:
    """One update of the file, or one tensor that was trained whole.

    Args:
        path: as the file names it; kohya's and cloneofsimo's names need a model to be told.
        shape: of the weight, empty where the file does not tell.
        r: its rank, 0 of a whole tensor.
        scale: its factor, 1 of a whole tensor.
        norm: the Frobenius norm of ``scale · B·A``, or of the whole tensor.
        flag: ``"not finite"``, ``"all zero"`` or nothing.
        kind: ``"low-rank"`` or ``"whole"``.
    """

    path: str
    shape: tuple[int, ...]
    r: int
    scale: float
    norm: float
    flag: str
    kind: str = "low-rank"


@dataclass(frozen=True)
class Inspection:
    """A whole file; ``str()`` is a table, `to_dict` plain values for JSON."""

    format: str
    metadata: Mapping[str, str]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def flagged(self) -> int:
        """How many updates have a flag."""
        return sum(1 for row in self.rows if row.flag)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; a number that is not finite is None, which JSON can hold."""
        out = asdict(self) | {"flagged": self.flagged}
        out["metadata"], out["notes"] = dict(self.metadata), list(self.notes)
        out["rows"] = [
            {
                k: None if isinstance(v, float) and not math.isfinite(v) else v
                for k, v in row.items()
            }
            for row in out["rows"]
        ]
        return out

    def __str__(self) -> str:
        lines = [f"format: {self.format}"]
        for key, value in sorted(self.metadata.items()):
            cut = value if len(value) <= _SHOWN else value[:_SHOWN] + "..."
            lines.append(f"{shown(key)}: {shown(cut)}")
        head = ("tensor", "shape", "r", "scale", "norm", "")
        body = [
            (shown(row.path) or "(model)", "×".join(map(str, row.shape)))
            + (("whole", "-") if row.kind == "whole" else (str(row.r), f"{row.scale:g}"))
            + (f"{row.norm:.4g}", row.flag)
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(head, *body)]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
            for line in (head, *body)
        ]
        lines += self.notes
        whole = sum(1 for row in self.rows if row.kind == "whole")
        counts = [f"{len(self.rows) - whole} updates", f"{self.flagged} flagged"]
        counts[1:1] = [f"{whole} whole tensors"] if whole else []
        return "\n".join([*lines, ", ".join(counts)])


@own_context()
def inspect(path: PathLike, options: Options = _LOOSE, base: Optional[Base] = None) -> Inspection:
    """Look into an adapter file of any tool; nothing is loaded onto a model.

    Args:
        path: the file, or a folder such as PEFT's.
        options: what some formats do not tell.
        base: the names and shapes of the model, to show the layers by; what it lacks is noted.

    Raises:
        FileError: it cannot be read, or is no adapter that is known.
    """
    content = outlined(path)
    form = formats.form_of(content)
    form.check(content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ParamloraWarning)
        adapter = form.read(opened(path), base, options)
        if base is not None or options.component is not None:
            adapter = formats.chosen(form, adapter, base, options, content.source)
    notes = [str(w.message) for w in caught if issubclass(w.category, ParamloraWarning)]
    rows = [_row(path_, update) for path_, update in adapter.updates.items()]
    rows += [_whole_row(path_, tensor) for path_, tensor in adapter.whole.items()]
    return Inspection(form.name, dict(content.metadata), tuple(rows), tuple(notes))


def _row(path: str, update: Update) -> Row:
    a, b = update.lora_A, update.lora_B
    finite = bool(torch.isfinite(a).all() and torch.isfinite(b).all())
    finite = finite and math.isfinite(update.scale)
    flag = "not finite" if not finite else "" if a.any() and b.any() else "all zero"
    return Row(path, update.shape or (), update.r, update.scale, _norm(update), flag)


def _whole_row(path: str, tensor: Tensor) -> Row:
    flag = "" if torch.isfinite(tensor).all() else "not finite"  # zeros are what a bias may be
    norm = tensor.double().norm().item()
    return Row(path, tuple(tensor.shape), 0, 1.0, norm, flag, "whole")


def _norm(update: Update) -> float:
    """Of ``scale · B·A`` without forming it: ``tr(BᵀB · AAᵀ)``."""
    if update.up_kernel != 1:
        return math.nan
    a, b = update.lora_A.double(), update.lora_B.double()
    squared = ((b.mT @ b) * (a @ a.mT)).sum().clamp(min=0)
    return abs(update.scale) * squared.sqrt().item()
