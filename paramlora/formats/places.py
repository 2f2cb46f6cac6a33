"""Where in a model the weight lies that a file names: the tables of names, asked for one model."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import NamedTuple, Optional

from paramlora.errors import FileError
from paramlora.formats.names import TABLES, Name, Row, Table, Template
from paramlora.formats.names.levels import INSIDE, flat, shorter

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


@dataclass(frozen=True)
class Found:
    """What a file's name means in a model.

    Args:
        whole: the weight that it is, as it stands; None where only rows of it are meant.
        rows: what the file's own weight holds.
        held: by the name of a part, the model's weight that it lies in, and all that lies there.
    """

    whole: Optional[str]
    rows: Rows = ()
    held: Mapping[str, tuple[str, Rows]] = field(default_factory=dict)

    @property
    def paths(self) -> list[str]:
        """The weights of the model that it has rows of."""
        if self.whole is not None:
            return [self.whole]
        return list(dict.fromkeys(path for path, _ in self.held.values()))


class Places:
    """The names by which a file can mean the weights of one model.

    Args:
        shapes: of the model's weights, by path.
    """

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes

    def find(self, path: str, where: str) -> Optional[Found]:
        """What a file's path means here, however it is prefixed, mangled or fused.

        Raises:
            FileError: several weights.
        """
        if path in self.shapes:
            return Found(path)
        inside = _without_wrappers(path)
        dotted = (name for spelled in dict.fromkeys((path, inside)) for name in shorter(spelled))
        for known, names in ((self._dotted, dotted), (self._flat, flat(inside))):
            for name, components in names:
                found = _nearest(known.get(name, ()), components, where)
                if found is not None:
                    return found
        return None

    @cached_property
    def others(self) -> Mapping[str, Found]:
        """Every name that is not the model's own, and whose parts are all in the model."""
        parts = _parts(self.shapes)
        found: dict[str, Found] = {}
        tried: set[tuple[str, Row]] = set()
        for held in parts.values():
            for row in _WITH.get((held.template.name, held.template.piece), ()):
                name = row.name.filled(held.before, held.numbers)
                if (name, row) in tried or name in self.shapes or name in found:
                    continue
                tried.add((name, row))
                rows = _instance(row, held.before, held.numbers, parts)
                if rows is not None and _has_ratio(row, self.shapes[held.path]):
                    found[name] = _found(rows, parts)
        return found | _paired(self.shapes, found)

    def original(self) -> dict[str, Found]:
        """The names of the checkpoint that the model's authors have published, as they are known.

        They are those of the table that names most of the model, of all that are in it for about
        as much as any; of two names for the same rows the first. What has no other name is left
        out, and all is, where the model has these names itself.
        """
        here = {held.template.name for held in _parts(self.shapes).values()}
        shares = {
            name: _share(table, here, self.shapes)
            for name, table in TABLES.items()
            if table.published
        }
        most = max(shares.values())
        names = [self._spelled(TABLES[name]) for name, part in shares.items() if part > 0.8 * most]
        best = max(names, key=lambda n: sum(len(found.paths) for found in n.values()), default={})
        return {} if best.keys() & self.shapes.keys() else best

    def _spelled(self, table: Table) -> dict[str, Found]:
        """The names of one table, its own spellings alone."""
        known = {path: Found(path) for path in self.shapes} | dict(self.others)
        ranks = _ranks(table, known)
        taken: set[str] = set()
        found: dict[str, Found] = {}
        for name in sorted(ranks, key=lambda name: ranks[name]):
            parts = set(known[name].held) or set(known[name].paths)
            if not parts & taken:
                taken |= parts
                found[name] = known[name]
        return found

    @cached_property
    def _dotted(self) -> "dict[str, list[_Known]]":
        """The names, each also without the levels above it: a file may be of what is inside."""
        known: dict[str, list[_Known]] = {}
        own = {path: Found(path) for path in self.shapes}
        for order, names in enumerate((own, self.others)):
            for name, found in names.items():
                for far, (rest, components) in enumerate(shorter(_without_wrappers(name))):
                    known.setdefault(rest, []).append(_Known(found, components, (order, far)))
        return known

    @cached_property
    def _flat(self) -> "dict[str, list[_Known]]":
        known: dict[str, list[_Known]] = {}
        for name, found in self._dotted.items():
            known.setdefault(name.replace(".", "_"), []).extend(found)
        return known


class _Known(NamedTuple):
    """One meaning of a name: the component it is in, and the model's own and whole names first."""

    found: Found
    components: tuple[str, ...]
    far: tuple[int, int]


def _nearest(known: Iterable[_Known], components: tuple[str, ...], where: str) -> Optional[Found]:
    """The nearest meaning of one name in the component that the file tells.

    A name that stands so in the model comes before one that has levels above it there, of which
    those of two components are as near.
    """
    fits = [k for k in known if not components or not k.components or _meet(components, k)]
    exact = any(k.far[1] == 0 for k in fits)
    nearest: dict[tuple[str, ...], _Known] = {}
    for one in sorted(fits, key=lambda k: k.far):
        nearest.setdefault(() if exact else one.components, one)
    meant = {", ".join(k.found.paths): k.found for k in fits if k.far == _far(k, nearest, exact)}
    if len(meant) > 1:
        raise FileError(f"{where}: means {' or '.join(meant)}, which its name does not tell apart.")
    return next(iter(meant.values()), None)


def _far(one: _Known, nearest: Mapping[tuple[str, ...], _Known], exact: bool) -> tuple[int, int]:
    return nearest[() if exact else one.components].far


def _meet(components: tuple[str, ...], known: _Known) -> bool:
    return not set(components).isdisjoint(known.components)


def _without_wrappers(path: str) -> str:
    for level in INSIDE:
        path = path.replace(f".{level}.", ".")
    return path


class _Held(NamedTuple):
    """A part of a model's weight, and by which row of a table it is known."""

    template: Template
    before: tuple[str, ...]
    numbers: tuple[str, ...]
    path: str
    rows: Rows


def _parts(shapes: Shapes) -> dict[str, _Held]:
    """``{part: where it lies}`` of all weights that a table knows."""
    parts: dict[str, _Held] = {}
    for path, shape in shapes.items():
        names = tuple(path.split("."))
        allowed = _befores(path)
        for row in _BY_LAST.get(_last(names), ()):
            match = row.name.match(names)
            if match is None or not (row.name.anywhere or match[0] in allowed):
                continue
            if _has_ratio(row, shape):
                _hold(parts, path, shape, row, names[: match[0]], match[1])
    return parts


def _has_ratio(row: Row, shape: tuple[int, ...]) -> bool:
    return row.ratio is None or (len(shape) > 1 and shape[0] == row.ratio * shape[1])


def _hold(
    parts: dict[str, _Held],
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
            parts.setdefault(part.name, _Held(template, before, inner, path, rows))


def _part(template: Template, before: tuple[str, ...], numbers: tuple[str, ...]) -> Part:
    name = _parsed(template.name).filled(before, numbers)
    if template.piece is None:
        return Part(name, _parsed(template.size).filled(before, numbers))
    return Part(f"{name}[{template.piece}]", f"{name}[]")


def _instance(
    row: Row, before: tuple[str, ...], numbers: tuple[str, ...], parts: Mapping[str, _Held]
) -> Optional[Rows]:
    """The rows of a weight that the model does not have, if it has all that lies in them."""
    outer = numbers[: row.name.stars]
    if not row.stack:
        block = tuple(_part(template, before, outer) for template in row.parts)
        return (block,) if all(part.name in parts for part in block) else None
    blocks: list[tuple[Part, ...]] = []
    while True:
        each = (*outer, str(len(blocks)))
        block = tuple(_part(template, before, each) for template in row.parts)
        if not all(part.name in parts for part in block):
            return tuple(blocks) or None
        blocks.append(block)


def _found(rows: Rows, parts: Mapping[str, _Held]) -> Found:
    held = {p.name: parts[p.name] for block in rows for p in block}
    paths = {one.path for one in held.values()}
    first = next(iter(held.values()))
    same = len(paths) == 1 and first.rows == rows
    places = {name: (one.path, one.rows) for name, one in held.items()}
    return Found(first.path if same else None, rows, places)


def _paired(shapes: Shapes, known: Mapping[str, Found]) -> dict[str, Found]:
    """The names that no pattern tells, of every model that may be inside."""
    inside: dict[str, list[str]] = {}
    for path in shapes:
        for rest, _ in shorter(path):
            inside.setdefault(path[: len(path) - len(rest)], []).append(rest)
    found = {}
    for start, names in inside.items():
        for table in TABLES.values():
            for other, own in (table.pairs(names) if table.pairs else {}).items():
                for name, path in ((other, own), (own, other)):
                    if start + path in shapes and start + name not in {**shapes, **known}:
                        found[start + name] = Found(start + path)
    return found


def _share(table: Table, here: set[str], names: Iterable[str]) -> float:
    """Which part of a table's matrices is in a model; of a model, in what no pattern tells."""
    known = set(names)
    if table.pairs is not None:
        found = table.pairs(known)
        return len((set(found) | set(found.values())) & known) / max(len(known), 1)
    parts = {part.name for row in table.rows() for part in row.parts}
    own = {name for name in parts if not _VECTOR.search(name)}
    return len(own & here) / len(own)


def _ranks(table: Table, names: Iterable[str]) -> dict[str, int]:
    """Of names that the table spells, the place in it."""
    known = list(names)
    ranks = dict.fromkeys(table.pairs(known) if table.pairs else (), 0)
    spellings: dict[str, list[tuple[int, Name]]] = {}
    for rank, spelling in enumerate(table.spellings):
        pattern = _parsed(spelling.partition("@")[0])
        spellings.setdefault(_last(pattern.parts), []).append((rank, pattern))
    for name in known:
        parts = tuple(name.split("."))
        for rank, pattern in spellings.get(_last(parts), ()):
            match = pattern.match(parts)
            if match is not None and (pattern.anywhere or match[0] in _befores(name)):
                ranks.setdefault(name, rank)
    return {name: rank for name, rank in ranks.items() if name in known}


def _befores(path: str) -> set[int]:
    """How many of a path's components can be levels above the model."""
    return {path.count(".") - rest.count(".") for rest, _ in shorter(path)}


_parsed = cache(Name.parse)
_VECTOR = re.compile(r"(?:norm|table|bias)[^.]*\Z")


def _last(names: tuple[str, ...]) -> str:
    return "*" if names[-1].isdigit() else names[-1]


def _rows() -> Iterator[Row]:
    for table in TABLES.values():
        yield from table.rows()


STACKS = [row.name.parts[-1] for row in _rows() if row.stack]
_BY_LAST: dict[str, list[Row]] = {}
_WITH: dict[tuple[str, Optional[int]], list[Row]] = {}
for _row in dict.fromkeys(_rows()):
    _BY_LAST.setdefault(_last(_row.name.parts), []).append(_row)
    for _template in _row.parts:
        _WITH.setdefault((_template.name, _template.piece), []).append(_row)
