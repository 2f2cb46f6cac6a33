"""Regular expressions out of files, matched in a time that grows with their length and no faster.

Python's own matcher tries one way after the other, for hours where a file's author wants it to.
Here a pattern is followed from its end to its beginning, over all names at once: the places that it
has reached are the bits of one number, so that no place is visited twice (the idea of Cameron et
al. 2014, "Bitwise data parallelism in regular expression matching"). What that cannot do, such as
a reference back to a group, is refused, and so is what would take more than some seconds.
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from typing import Any, Optional

from paramlora.errors import shown

# Python's own parser, so that its rules are not written twice
_PARSER: Any = import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
_MOST_PATTERN = 20_000  # characters; a list of a large model's layers takes some thousand
_MOST_NAMES = 1 << 24  # characters of all names; those of 140,000 tensors take as many
_MOST_PLACES = 1 << 27  # bytes of the places of every character
_MOST_WORK = 1 << 32  # bytes of numbers that are gone through, some seconds
# no path has this character
_ANY = "\0"  # for any one character, in a pattern of a fixed length
_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": lambda c: c.isalnum() or c == "_",
}
_ONE = {"LITERAL", "NOT_LITERAL", "ANY", "IN"}  # what stands for one character


class Unbounded(ValueError):
    """A pattern that may be sound, and is not followed: it could take more time than a file may."""


class Names:
    """Names to match with patterns out of a file.

    Example:
        >>> names = Names(["a.to_q", "a.to_k", "not_to_k"])
        >>> sorted(names.matching(r".*\\.to_[qk]")), names.first(["to_q", "to_k"])
        (['a.to_k', 'a.to_q'], {'a.to_q': 0, 'a.to_k': 1})
    """

    def __init__(self, names: Iterable[str]) -> None:
        # a line break stands between names, and in none that a pattern matches
        self._names = [name for name in dict.fromkeys(names) if "\n" not in name]
        self._tails: dict[tuple[int, tuple[int, ...]], dict[str, list[str]]] = {}
        self._work = 0

    def matching(self, pattern: str) -> set[str]:
        """The names that a whole pattern matches, as `re.fullmatch` does.

        Raises:
            ValueError: no regular expression.
            Unbounded: one that could take for ever.
        """
        with _about(pattern):
            # bits where names end, moved backwards through the pattern to where they begin
            return set(self._at(self._followed(pattern, self._places.ends)))

    def first(self, patterns: Iterable[str]) -> dict[str, int]:
        """The number of the first pattern that matches each name, or its end after a dot.

        Raises:
            ValueError, Unbounded: as `matching`.
        """
        found: dict[str, int] = {}
        for number, pattern in enumerate(patterns):
            with _about(pattern):
                for name in self._ending(pattern):
                    found.setdefault(name, number)
        return found

    def _ending(self, pattern: str) -> Iterable[str]:
        # without repeats or choices the names are looked up by their ends
        fixed = _fixed(_parsed(pattern))
        if fixed is None:  # spelled as PEFT spells it, and as there free at its end
            places = self._places
            return self._at(self._followed(rf"(.*\.)?({pattern})$", places.ends | places.inside))
        text = fixed.removeprefix("^")
        anchored = len(fixed) > len(text)
        tails = self._by_tail(len(text), tuple(i for i, c in enumerate(text) if c == _ANY))
        # after `^` the whole name, not its end
        return [name for name in tails.get(text, []) if not anchored or len(name) == len(text)]

    def _by_tail(self, length: int, free: tuple[int, ...]) -> dict[str, list[str]]:
        """The names by an end of that length after a dot, with some of its characters left out."""
        if (length, free) not in self._tails:
            tails: dict[str, list[str]] = {}
            for name in self._names:
                self._spend(100 + 8 * len(free))
                # the end of a whole component
                if len(name) == length or name[-length - 1 : -length] == ".":
                    tail = list(name[len(name) - length :])
                    for place in free:
                        tail[place] = _ANY
                    tails.setdefault("".join(tail), []).append(name)
            self._tails[length, free] = tails
        return self._tails[length, free]

    @cached_property
    def _places(self) -> "_Places":
        return _Places("".join(f"{name}\n" for name in self._names))

    def _at(self, reached: int) -> Iterator[str]:
        """The names at whose beginnings there is a bit."""
        if not reached:
            return
        self._spend(100 * len(self._names))
        bits, start = reached.to_bytes(self._places.size, "little"), 0
        for name in self._names:
            if bits[start >> 3] >> (start & 7) & 1:
                yield name
            start += len(name) + 1

    def _followed(self, pattern: str, ends: int) -> int:
        try:
            return self._before(_parsed(pattern), ends) & self._places.starts
        except RecursionError:
            raise Unbounded("nested too deeply") from None

    def _spend(self, work: int) -> None:
        self._work += work
        if self._work > _MOST_WORK:
            raise Unbounded("too much work, with those before it")

    def _before(self, parts: Sequence[Any], ends: int) -> int:
        """The places from which the parts lead to one of `ends`."""
        for kind, argument in reversed(parts):
            if not ends:
                break
            self._spend(self._places.size + 100)
            ends = self._step(str(kind), argument, ends)
        return ends

    def _step(self, kind: str, argument: Any, ends: int) -> int:
        places = self._places
        if kind in _ONE:
            # one character: every bit goes to the place before it, where the character is right
            return ends >> 1 & places.of(kind, argument)
        if kind == "BRANCH":
            return self._either(argument[1], ends)
        if kind == "SUBPATTERN":
            return self._before(argument[3], ends)
        if kind in ("MAX_REPEAT", "MIN_REPEAT"):
            return self._repeated(argument, ends)
        if kind in ("ASSERT", "ASSERT_NOT"):
            # from any place to any place: what is ahead may end anywhere in a name
            ahead = self._before(argument[1], places.ends | places.inside)
            # a negated bit set is infinite; `ends` bounds it
            return ends & (ahead if kind == "ASSERT" else ~ahead)
        return ends & places.at(str(argument))

    def _either(self, branches: Sequence[Any], ends: int) -> int:
        out = 0
        for parts in branches:
            out |= self._before(parts, ends)
        return out

    def _repeated(self, argument: Any, ends: int) -> int:
        least, most, parts = argument
        for _ in range(least):
            before = self._before(parts, ends)
            # the parts may be empty: more turns give nothing new
            if before == ends:
                break
            ends = before
        endless = str(most) == "MAXREPEAT"
        if endless and len(parts) == 1 and str(parts[0][0]) in _ONE:
            return self._flooded(self._places.of(str(parts[0][0]), parts[0][1]), ends)
        new, count = ends, least
        # each turn may only reach new places: at most as many turns as there are places
        while new and (endless or count < most):
            new = self._before(parts, new) & ~ends
            ends, count = ends | new, count + 1
        return ends

    def _flooded(self, through: int, ends: int) -> int:
        """The places from which `ends` are reached through any number of places; twice as many in
        each step."""
        step = 1
        while through:
            self._spend(4 * self._places.size)
            ends |= ends >> step & through
            # from here on a bit stands for a run of twice as many places
            through &= through >> step
            step *= 2
        return ends


class _Places:
    """For each character the places where it stands in a text, as the bits of a number."""

    def __init__(self, text: str) -> None:
        alphabet = set(text)
        self.size = len(text) // 8 + 1
        if len(text) > _MOST_NAMES or len(alphabet) * self.size > _MOST_PLACES:
            raise Unbounded("too much work for names of so many characters")
        bits = {character: bytearray(self.size) for character in alphabet}
        # bytes, as setting a bit of a whole number would copy all of it
        for place, character in enumerate(text):
            bits[character][place >> 3] |= 1 << (place & 7)
        self._bits = {c: int.from_bytes(held, "little") for c, held in bits.items()}
        self._known: dict[tuple[str, str], int] = {}
        every = (1 << len(text)) - 1
        self.ends = self._bits.pop("\n", 0)
        self.inside = every & ~self.ends
        self.starts = (self.ends << 1 | 1) & every

    def of(self, kind: str, argument: Any) -> int:
        """Where a character stands that a part of a pattern means."""
        key = (kind, repr(argument))
        if key not in self._known:
            self._known[key] = 0
            for character, bits in self._bits.items():
                if _means(kind, argument, character):
                    self._known[key] |= bits
        return self._known[key]

    def at(self, kind: str) -> int:
        """The places that are a beginning, an end, or between a word and something else."""
        if kind in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return self.starts
        if kind in ("AT_END", "AT_END_STRING"):
            return self.ends
        word = self.of("IN", [("CATEGORY", "CATEGORY_WORD")])
        # a place is a boundary where it and the one before it differ
        boundary = word ^ word << 1
        return boundary if kind == "AT_BOUNDARY" else ~boundary


def _means(kind: str, argument: Any, character: str) -> bool:
    """Whether one character is meant by a part of a pattern."""
    if kind == "ANY":
        return True
    if kind in ("LITERAL", "NOT_LITERAL"):
        return bool(ord(character) == argument) == (kind == "LITERAL")
    if kind == "RANGE":
        return bool(argument[0] <= ord(character) <= argument[1])
    if kind == "CATEGORY":
        name = str(argument).replace("_NOT_", "_")
        return _CATEGORIES[name](character) == (name == str(argument))
    negated = str(argument[0][0]) == "NEGATE"
    # "[^...]" has a mark in front, which is skipped
    return negated != any(_means(str(k), a, character) for k, a in argument[negated:])


@contextmanager
def _about(pattern: str) -> Iterator[None]:
    """Say of an error which pattern it is of."""
    try:
        yield
    except ValueError as error:
        raise type(error)(f'"{shown(pattern)}" is {error}') from error


def _parsed(pattern: str) -> Any:
    if len(pattern) > _MOST_PATTERN:
        raise Unbounded(f"{len(pattern):,} characters, more than any real pattern has")
    try:
        parsed = _PARSER.parse(pattern)
    except re.error as error:
        raise ValueError(f"no regular expression: {error}") from error
    except (RecursionError, OverflowError):
        raise Unbounded("nested too deeply, or repeated too often") from None
    # a flag in the pattern would change what every part means
    if parsed.state.flags != re.UNICODE:
        raise Unbounded("more than is followed in bounded time (flags)")
    _check(parsed)
    return parsed


def _check(parts: Any) -> None:
    """Refuse parts that look back, or that decide for good on one of several ways."""
    for kind, argument in parts:
        inside: Sequence[Any] = []
        if str(kind) == "BRANCH":
            inside = argument[1]
        elif str(kind) in ("MAX_REPEAT", "MIN_REPEAT"):
            inside = argument[2:]
        # [1] and [2]: flags that the group switches on or off
        elif str(kind) == "SUBPATTERN" and not argument[1] and not argument[2]:
            inside = argument[3:]
        # 1: looks ahead; behind would need places that are not reached yet
        elif str(kind) in ("ASSERT", "ASSERT_NOT") and argument[0] == 1:
            inside = argument[1:]
        elif str(kind) not in (*_ONE, "AT"):
            raise Unbounded(f"more than is followed in bounded time ({str(kind).lower()})")
        for one in inside:
            _check(one)


def _fixed(parts: Any) -> Optional[str]:
    """The text of a pattern that is plain but for characters of any kind, after ``^`` if it is."""
    kinds = [(str(kind), argument) for kind, argument in parts]
    start = "^" if kinds and (kinds[0][0], str(kinds[0][1])) == ("AT", "AT_BEGINNING") else ""
    rest = kinds[len(start) :]
    if any(kind not in ("LITERAL", "ANY") for kind, _ in rest):
        return None
    text = "".join(_ANY if kind == "ANY" else chr(argument) for kind, argument in rest)
    # a literal "^" would be taken for the anchor, and a literal NUL for any character
    return (
        None
        if "^" in text or text.count(_ANY) != sum(k == "ANY" for k, _ in rest)
        else start + text
    )
