"""Where in a model the weight lies that a file names: the tables of names, asked for one model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, Optional

from paramlora.errors import FileError
from paramlora.formats.names import TABLES, Row
from paramlora.formats.names.clip import TURNED
from paramlora.formats.names.levels import INSIDE, flat, shorter
from paramlora.formats.parts import WITH, Held, Rows, Shapes, has_ratio, instance, parts_of


@dataclass(frozen=True)
class Found:
    """What a file's name means in a model.

    Args:
        weight: the one that it is, as it stands; None where only rows of it are meant.
        rows: what the file's own weight holds.
        held: by the name of a part, the model's weight that it lies in, and all that lies there.
        turned: whether the model's weight is the transpose of the file's.
    """

    weight: Optional[str]
    rows: Rows = ()
    held: Mapping[str, tuple[str, Rows]] = field(default_factory=dict)
    turned: bool = False

    @property
    def paths(self) -> list[str]:
        """The weights of the model that it has rows of."""
        if self.weight is not None:
            return [self.weight]
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
        # with dots first: a mangled name fits more
        for known, names in ((self._dotted, dotted), (self._flat, flat(inside))):
            for name, components in names:
                found = _nearest(known.get(name, ()), components, where)
                if found is not None:
                    return replace(found, turned=self._is_turned(found))
        return None

    def _is_turned(self, found: Found) -> bool:
        start, name = _apart(found.weight or "")
        # OpenCLIP multiplies by text_projection from the right; transformers has its transpose
        beside = TURNED.get(name)
        return beside is not None and any(p.startswith(f"{start}{beside}.") for p in self.shapes)

    @cached_property
    def others(self) -> Mapping[str, Found]:
        """Every name that is not the model's own, and whose parts are all in the model."""
        parts = parts_of(self.shapes)
        found: dict[str, Found] = {}
        tried: set[tuple[str, Row]] = set()
        # only rows that hold a part which is there: of all tables most are of other models
        for held in parts.values():
            for row in WITH.get((held.template.name, held.template.piece), ()):
                name = row.name.filled(held.before, held.numbers)
                if (name, row) in tried or name in self.shapes or name in found:
                    continue
                tried.add((name, row))
                rows = instance(row, held.before, held.numbers, parts)
                if rows is not None and has_ratio(row, self.shapes[held.path]):
                    found[name] = _found(rows, parts)
        return found | _paired(self.shapes, found)

    @cached_property
    def _dotted(self) -> "dict[str, list[_Known]]":
        """The names, each also without the levels above it: a file may be of what is inside."""
        known: dict[str, list[_Known]] = {}
        own = {path: Found(path) for path in self.shapes}
        # order 0: what is spelled as in the model is meant before what only a table knows
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
    # a file that tells no component may mean any, and so may a model
    fits = [k for k in known if not components or not k.components or _meet(components, k)]
    exact = any(k.far[1] == 0 for k in fits)
    nearest: dict[tuple[str, ...], _Known] = {}
    for one in sorted(fits, key=lambda k: k.far):
        nearest.setdefault(() if exact else one.components, one)
    meant = {", ".join(k.found.paths): k.found for k in fits if k.far == _far(k, nearest, exact)}
    if len(meant) > 1:
        raise FileError(
            f"{where}: means {' or '.join(meant)}, which its name does not tell apart. Rename one."
        )
    return next(iter(meant.values()), None)


def _far(one: _Known, nearest: Mapping[tuple[str, ...], _Known], exact: bool) -> tuple[int, int]:
    return nearest[() if exact else one.components].far


def _meet(components: tuple[str, ...], known: _Known) -> bool:
    return not set(components).isdisjoint(known.components)


def _apart(path: str) -> tuple[str, str]:
    """What stands before the last name, with its dot, and that name."""
    start, dot, name = path.rpartition(".")
    return f"{start}{dot}", name


def _without_wrappers(path: str) -> str:
    for level in INSIDE:
        path = path.replace(f".{level}.", ".")
    return path


def _found(rows: Rows, parts: Mapping[str, Held]) -> Found:
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
                    new = start + name not in shapes and start + name not in known
                    if new and start + path in shapes:
                        # both ways: a model of either spelling, and a file of the other
                        found[start + name] = Found(start + path)
    return found
