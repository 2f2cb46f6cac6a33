"""The parts of a model's weights that a table knows, and the weights made of them elsewhere."""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import NamedTuple, Optional

from paramlora.formats.names import TABLES, Name, Row, Template
from paramlora.formats.names.levels import shorter

Shapes = Mapping[str, tuple[int, ...]]
_MOST_MATRICES = 1 << 14  # of one stack: an empty one can claim any number


class Part(NamedTuple):
    """Rows that belong together, in whatever weight they lie.

    Args:
        name: the same for the same rows in another weight.
        size: the same for parts of one number of rows.
    """

    name: str
    size: str


# what the rows of a weight are, from the first to the last; for each matrix of a stack
Rows = tuple[tuple[Part, ...], ...]


class Held(NamedTuple):
    """A part of a model's weight, and by which row of a table it is known."""

    template: Template
    before: tuple[str, ...]
    numbers: tuple[str, ...]
    path: str
    rows: Rows


def parts_of(shapes: Shapes) -> dict[str, Held]:
    """``{part: where it lies}`` of all weights that a table knows."""
    parts: dict[str, Held] = {}
    for path, shape in shapes.items():
        names = tuple(path.split("."))
        allowed = befores(path)
        for row in _BY_LAST.get(last(names), ()):
            match = row.name.match(names)
            if match is None or not (row.name.anywhere or match[0] in allowed):
                continue
            if has_ratio(row, shape):
                _hold(parts, path, shape, row, names[: match[0]], match[1])
    return parts


def has_ratio(row: Row, shape: tuple[int, ...]) -> bool:
    return row.ratio is None or (len(shape) > 1 and shape[0] == row.ratio * shape[1])


def _hold(
    parts: dict[str, Held],
    path: str,
    shape: tuple[int, ...],
    row: Row,
    before: tuple[str, ...],
    numbers: tuple[str, ...],
) -> None:
    if row.stack and (len(shape) != 3 or not 0 < shape[0] <= _MOST_MATRICES):
        return
    each = [(*numbers, str(e)) for e in range(shape[0])] if row.stack else [numbers]
    rows = tuple(tuple(_part(t, before, n) for t in row.parts) for n in each)
    for block, inner in zip(rows, each):
        for template, part in zip(row.parts, block):
            parts.setdefault(part.name, Held(template, before, inner, path, rows))


def _part(template: Template, before: tuple[str, ...], numbers: tuple[str, ...]) -> Part:
    name = parsed(template.name).filled(before, numbers)
    if template.size == template.name:
        return Part(name, name)
    if template.piece is None:
        return Part(name, parsed(template.size).filled(before, numbers))
    # one size for all pieces of a module: they are its equal parts
    return Part(f"{name}[{template.piece}]", f"{name}[]")


def instance(
    row: Row, before: tuple[str, ...], numbers: tuple[str, ...], parts: Mapping[str, Held]
) -> Optional[Rows]:
    """The rows of a weight that the model does not have, if it has all that lies in them."""
    outer = numbers[: row.name.stars]
    if not row.stack:
        block = tuple(_part(template, before, outer) for template in row.parts)
        return (block,) if all(part.name in parts for part in block) else None
    # matrix after matrix for as long as the model has all that lies in the next
    blocks: list[tuple[Part, ...]] = []
    while True:
        each = (*outer, str(len(blocks)))
        block = tuple(_part(template, before, each) for template in row.parts)
        if not all(part.name in parts for part in block):
            return tuple(blocks) or None
        blocks.append(block)


def befores(path: str) -> set[int]:
    """How many of a path's components can be levels above the model."""
    return {path.count(".") - rest.count(".") for rest, _ in shorter(path)}


parsed = cache(Name.parse)


def last(names: tuple[str, ...]) -> str:
    return "*" if names[-1].isdigit() else names[-1]


def _rows() -> Iterator[Row]:
    for table in TABLES.values():
        yield from table.rows()


STACKS = [row.name.parts[-1] for row in _rows() if row.stack]
# by the last component of a name, and by part: few rows are then tried on each path
_BY_LAST: dict[str, list[Row]] = {}
WITH: dict[tuple[str, Optional[int]], list[Row]] = {}
for _row in dict.fromkeys(_rows()):
    _BY_LAST.setdefault(last(_row.name.parts), []).append(_row)
    for _template in _row.parts:
        WITH.setdefault((_template.name, _template.piece), []).append(_row)
