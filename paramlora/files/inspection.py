"""What is in an adapter file of any tool, as values and as a printed table."""

import math
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Optional

import torch

from paramlora import formats
from paramlora.errors import FileError, ParamloraWarning, counted, shown
from paramlora.files.adapters import checked
from paramlora.files.atomic import PathLike
from paramlora.formats import Base, Content, Options
from paramlora.update.contexts import own_context
from paramlora.update.value import Adapter, Listed, Value

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
        norm: the Frobenius norm of ``scale · B·A``, or of the whole tensor; no number of another
            kind, which needs the weight for it.
        flag: ``"not finite"``, ``"all zero"`` or nothing.
        kind: ``"low-rank"``, ``"whole"``, or the name of another kind, such as ``"dora"``.
        listed: as the table shows it.
    """

    path: str
    shape: tuple[int, ...]
    r: int
    scale: float
    norm: float
    flag: str
    kind: str
    listed: Listed


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
                if k != "listed"
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
            + (row.listed.r, row.listed.scale, row.listed.norm, row.flag or row.listed.kind)
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(head, *body)]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
            for line in (head, *body)
        ]
        lines += self.notes
        nouns = Counter({"update": 0})
        nouns.update(row.listed.noun for row in self.rows)
        counts = [counted(count, noun) for noun, count in nouns.items()]
        return "\n".join([*lines, ", ".join([*counts, f"{self.flagged} flagged"])])


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

    def read(content: Content) -> Adapter:
        form = formats.form_of(content)
        adapter = form.read(content, base, options)
        if base is None and options.component is None:
            return adapter
        return formats.chosen(form, adapter, base, options, content.source)

    # read twice: a large file first by its outline, then with the warnings kept as notes
    content = checked(path, look=read)
    form = formats.form_of(content)
    options = formats.noting(options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ParamloraWarning)
        adapter = read(content)
    formats.check_alpha(content.source, options)
    if options.component is not None and base is None and not adapter.values():
        raise FileError(f"{content.source}: {formats.none_of(options.component)}.")
    notes = [str(w.message) for w in caught if issubclass(w.category, ParamloraWarning)]
    rows = [_row(path_, value) for path_, value in adapter.values().items()]
    return Inspection(form.name, dict(content.metadata), tuple(rows), tuple(notes))


def _row(path: str, value: Value) -> Row:
    finite = all(bool(torch.isfinite(part).all()) for part in value.parts().values())
    flag = "not finite" if not finite else "all zero" if value.idle() else ""
    (r, scale), norm = value.listed(), value.norm()
    return Row(path, value.shape or (), r, scale, norm, flag, value.shown, value.row(norm))
