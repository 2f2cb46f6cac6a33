"""The original names of a model's weights, where the model has others."""

import re
from collections.abc import Iterable

from paramlora.formats.names import TABLES, Name, Table
from paramlora.formats.parts import befores, last, parsed, parts_of
from paramlora.formats.places import Found, Places

_ENOUGH = 0.8  # of what the best table has in a model, for another to be its table
_VECTOR = re.compile(r"(?:norm|table|bias)[^.]*\Z")


def original_names(places: Places) -> dict[str, Found]:
    """The names of the checkpoint that the model's authors have published, as they are known.

    They are those of the table that names most of the model, of all that are in it for about
    as much as any; of two names for the same rows the first. What has no other name is left
    out, and all is, where the model has these names itself.
    """
    here = {held.template.name for held in parts_of(places.shapes).values()}
    shares = {
        name: _share(table, here, places.shapes)
        for name, table in TABLES.items()
        if table.published
    }
    most = max(shares.values())
    names = [
        _spelled(places, TABLES[name]) for name, part in shares.items() if part > _ENOUGH * most
    ]
    best = max(names, key=lambda n: sum(len(found.paths) for found in n.values()), default={})
    return {} if best.keys() & places.shapes.keys() else best


def _spelled(places: Places, table: Table) -> dict[str, Found]:
    """What the names mean in the model that one table spells, no rows of the model under two."""
    known = {path: Found(path) for path in places.shapes} | dict(places.others)
    ranks = _ranks(table, known)
    taken: set[str] = set()
    found: dict[str, Found] = {}
    for name in sorted(ranks, key=lambda name: ranks[name]):
        # in the table's order: of two names for the same rows the later one finds them taken
        parts = set(known[name].held) or set(known[name].paths)
        if not parts & taken:
            taken |= parts
            found[name] = known[name]
    return found


def _share(table: Table, here: set[str], names: Iterable[str]) -> float:
    """How much of a table a model has: the share of the table's matrices that are in it, or, of a
    table that is a function of all names, the share of the model's names that it tells."""
    known = set(names)
    if table.pairs is not None:
        found = table.pairs(known)
        return len((set(found) | set(found.values())) & known) / max(len(known), 1)
    parts = {part.name for row in table.rows() for part in row.parts}
    # without vectors: a base may know of matrices alone
    own = {name for name in parts if not _VECTOR.search(name)}
    return len(own & here) / len(own)


def _ranks(table: Table, names: Iterable[str]) -> dict[str, int]:
    """The place in a table of each name that it spells."""
    known = dict.fromkeys(names)  # in order, which ties in rank have then
    ranks = dict.fromkeys(table.pairs(known) if table.pairs else (), 0)
    spellings: dict[str, list[tuple[int, Name]]] = {}
    for rank, spelling in enumerate(table.spellings):
        pattern = parsed(spelling.partition("@")[0])
        spellings.setdefault(last(pattern.parts), []).append((rank, pattern))
    for name in known:
        parts = tuple(name.split("."))
        for rank, pattern in spellings.get(last(parts), ()):
            match = pattern.match(parts)
            if match is not None and (pattern.anywhere or match[0] in befores(name)):
                ranks.setdefault(name, rank)
    return {name: rank for name, rank in ranks.items() if name in known}
