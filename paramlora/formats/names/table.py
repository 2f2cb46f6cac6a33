"""One architecture's names for its weights, as data."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, Optional

_BRACES = re.compile(r"(?P<start>.*)\{(?P<inside>.+)\}(?P<end>.*)")
_ORDER = re.compile(r"(?P<name>.+)\[(?P<order>[0-9,]+)\]")
Pairs = Callable[[Iterable[str]], Mapping[str, str]]


@dataclass(frozen=True)
class Table:
    """How tools spell the modules of one architecture.

    The right side of a spelling is diffusers' name, or that of transformers; the left another
    tool's for the same weight. A parameter other than ``weight`` is named in full.

    Args:
        spellings: ``{"blocks.*.qkv": "layers.*.{to_q,to_k,to_v}"}``. ``*`` is a number, the same on
            both sides, and ``**.`` at the start any path. ``{a,b}``: the left weight holds the rows
            of these one below the other; where ``|`` stands for a comma, another size begins.
            ``name[1,0]``: it has the equal parts of `name` in that order. One ``*`` more on the
            right: it is a stack of matrices, one for each number. A name that ends in ``@2`` is so
            only where the weight has 2 rows to a column.
        pairs: what no pattern tells: of all names of a model, ``{other name: diffusers' name}``.
        published: whether the names on the left are those of a checkpoint that has been published.
    """

    spellings: Mapping[str, str]
    pairs: Optional[Pairs] = None
    published: bool = True

    def rows(self) -> "list[Row]":
        """What each name stands for; diffusers' own names are among them."""
        spelled = [_row(name, told) for name, told in self.spellings.items()]
        # a part alone in a row has the size that it has among others
        size = {part.name: part.size for row in spelled if len(row.parts) > 1 for part in row.parts}
        spelled = [row.sized(size) for row in spelled]
        own: dict[tuple[str, Optional[int]], dict[Template, None]] = {}
        for row in spelled:
            for part in row.parts:
                own.setdefault((part.name, row.ratio), {})[part] = None
        return spelled + [_own(name, parts, ratio) for (name, ratio), parts in own.items()]


class Name(NamedTuple):
    """A name with ``*`` for numbers: its components, and whether any path may stand before."""

    parts: tuple[str, ...]
    anywhere: bool = False

    @classmethod
    def parse(cls, text: str) -> "Name":
        """A name as a table spells it.

        Example:
            >>> Name.parse("**.layers.*.up").parts
            ('layers', '*', 'up')
        """
        return cls(tuple(text.removeprefix("**.").split(".")), text.startswith("**."))

    @property
    def stars(self) -> int:
        """How many numbers it leaves open."""
        return self.parts.count("*")

    def match(self, parts: tuple[str, ...]) -> Optional[tuple[int, tuple[str, ...]]]:
        """(how many of `parts` come before it, its numbers), or None.

        Example:
            >>> Name.parse("layers.*.up").match(("model", "layers", "3", "up"))
            (1, ('3',))
        """
        before = len(parts) - len(self.parts)
        if before < 0:
            return None
        numbers = []
        for have, want in zip(parts[before:], self.parts):
            if want == "*":
                # isdigit alone takes superscripts, which int refuses
                if not (have.isascii() and have.isdigit() and len(have) < 10):
                    return None
                numbers.append(have)
            elif have != want:
                return None
        return before, tuple(numbers)

    def filled(self, before: tuple[str, ...], numbers: Iterable[str]) -> str:
        """The name with these numbers, behind these components."""
        given = iter(numbers)
        return ".".join((*before, *(next(given) if p == "*" else p for p in self.parts)))


class Template(NamedTuple):
    """A part that no tool's weight divides: a module, or one of the equal parts of a module.

    Args:
        name: of diffusers' module.
        piece: which of its parts; None where it is whole.
        size: the same for parts of one size.
    """

    name: str
    piece: Optional[int]
    size: str


@dataclass(frozen=True)
class Row:
    """A weight's name, and the parts that it holds in the order of its rows.

    Args:
        name: the weight's.
        parts: what it holds.
        stack: whether it holds one matrix for each last number of its parts.
        ratio: its rows to a column, where that tells it from others of the name.
    """

    name: Name
    parts: tuple[Template, ...]
    stack: bool = False
    ratio: Optional[int] = None

    def sized(self, size: Mapping[str, str]) -> "Row":
        """The row with these sizes of its parts, where they are told."""
        parts = tuple(part._replace(size=size.get(part.name, part.size)) for part in self.parts)
        return replace(self, parts=parts)


def _row(name: str, told: str) -> Row:
    name, _, ratio = name.partition("@")
    pattern, parts = Name.parse(name), tuple(_templates(told))
    stack = Name.parse(parts[0].name).stars > pattern.stars
    return Row(pattern, parts, stack, int(ratio) if ratio else None)


def _own(name: str, parts: Iterable[Template], ratio: Optional[int]) -> Row:
    """diffusers' own weight, which may be spelled by its parts."""
    return Row(Name.parse(name), tuple(sorted(parts, key=lambda p: p.piece or 0)), ratio=ratio)


def _templates(told: str) -> Iterator[Template]:
    match = _ORDER.fullmatch(told)
    if match is not None:
        for number in match["order"].split(","):
            yield Template(match["name"], int(number), f"{match['name']}[]")
        return
    match = _BRACES.fullmatch(told)
    if match is None:
        yield Template(told, None, told)
        return
    for group in match["inside"].split("|"):
        names = [f"{match['start']}{name}{match['end']}" for name in group.split(",")]
        yield from (Template(name, None, names[0]) for name in names)
