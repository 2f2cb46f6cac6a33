"""The exception tree.

ParamloraError
├── ConfigError    the configuration itself is wrong (also a ValueError)
├── TargetError    the configuration does not fit the model (also a ValueError)
├── AdapterError   an adapter that is missing, doubled, or cannot be merged (also a ValueError)
└── FileError      a file that cannot be read or does not fit (also a ValueError)

ParamloraWarning   one entry of several found nothing to adapt, a tied weight is split, ...

A message may spell names and values out of a file that nobody trusts: what cannot be printed is
escaped in all of them, and what is too long is shortened.
"""

import errno
import os.path
import re
import reprlib
import sys
import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice
from typing import Optional

_MOST_WORD, _MOST_MESSAGE = 200, 980  # characters
_LONG = re.compile(rf"\S{{{_MOST_WORD + 1},}}")
# the work of comparing grows with the square of the length, and real names are shorter
_MOST_COMPARED, _MOST_KNOWN = 100, 5_000
_HERE = os.path.join(os.path.dirname(__file__), "")
_DECORATORS = ("contextlib.py", "_contextlib.py")  # Python's, and torch's of `torch.no_grad`


def is_stop(error: Optional[BaseException]) -> bool:
    """Whether Ctrl-C is behind an error: before Python 3.12 one that comes while an import makes a
    class is the cause of another error alone."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__
    return error is not None


def shown(text: str) -> str:
    """`text` as one line that any terminal can print: escaped, and shortened in the middle.

    Example:
        >>> shown("a\\n\\x1b[31mb"), len(shown("a" * 300_000))
        ('a\\\\n\\\\x1b[31mb', 200)
    """
    # shortened before it is escaped, which makes it longer, and after
    short = _shortened(_LONG.sub(lambda long: _shortened(long[0], _MOST_WORD), text), _MOST_MESSAGE)
    if short.isprintable():
        return short
    escaped = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in short)
    return _shortened(escaped, _MOST_MESSAGE)


def spelled(value: object) -> str:
    """A value out of a file as it is written, however long or deeply nested it is.

    Example:
        >>> spelled("a"), spelled([[[[[[[1]]]]]]]), spelled(10**5000)
        ("'a'", '[[[[[[...]]]]]]', 'a whole number beyond any float')
    """
    if isinstance(value, int) and abs(value) > 10**20:
        return "a whole number beyond any float"  # Python refuses to spell very long ones
    return _SPELLING.repr(value)


def kind_of(value: object) -> str:
    """What a value of JSON is, in JSON's own words.

    Example:
        >>> kind_of([1]), kind_of(None), kind_of(0.5)
        ('a list', 'null', 'a number')
    """
    return "null" if value is None else _JSON.get(type(value), "a number")


_JSON = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}


def _shortened(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end - 3]}...{text[-end:]}"


def listed(names: Iterable[str], most: int = 8) -> str:
    """The first names of many, each of a length that can be read."""
    known = list(names)
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return ", ".join(_shortened(name, 80) for name in known[:most]) + more


def with_article(noun: str) -> str:
    """A word with "a" or "an" in front.

    Example:
        >>> with_article("embedding"), with_article("convolution")
        ('an embedding', 'a convolution')
    """
    return f"{'an' if noun[0] in 'aeiouAEIOU' else 'a'} {noun}"


def counted(count: int, one: str) -> str:
    """A number of things, in the singular where there is one.

    Example:
        >>> counted(1, "update"), counted(2_000, "update"), counted(0, "update")
        ('1 update', '2,000 updates', '0 updates')
    """
    return f"{count:,} {one}" if count == 1 else f"{count:,} {one}s"


class _Spelling(reprlib.Repr):
    """Shows a container's first items, a string's both ends, and no very long number."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = _MOST_WORD

    def repr_int(self, x: int, level: int) -> str:
        return "a very long number" if abs(x) > 10**20 else repr(x)


_SPELLING = _Spelling()


_UNREAD = {  # what the system says, and what helps
    errno.ENOENT: "Give the path of a file that is there",
    errno.ENOTDIR: "Give the path of a file that is there",
    errno.EACCES: "Have its owner let you read it, or give a copy of your own",
    errno.EPERM: "Have its owner let you read it, or give a copy of your own",
    errno.ELOOP: "Give the file itself, not a link",
    errno.ENAMETOOLONG: "Give a shorter path",
    errno.EIO: "Copy it from a sound disk",
}
_UNWRITTEN = {
    errno.ENOENT: "Make its folder first, or give a folder that is there",
    errno.ENOTDIR: "Give a place in a folder",
    errno.EACCES: "Give a place in a folder that you may write in",
    errno.EPERM: "Give a place in a folder that you may write in",
    errno.EROFS: "Give a place in a folder that you may write in",
    errno.ENOSPC: "Make room there, or give a place on another disk",
    errno.EDQUOT: "Make room there, or give a place on another disk",
    errno.EFBIG: "Raise the limit on the size of files, or give a place without one",
    errno.ENAMETOOLONG: "Give a shorter name",
}


def unread(path: object, error: OSError) -> "FileError":
    """The error for a file that the system does not let be read, with the way out."""
    way = _UNREAD.get(error.errno or 0, "Give another file")
    return FileError(f"{path}: cannot be read: {error.strerror or error}. {way}.")


def unwritten(path: object, error: OSError) -> "FileError":
    """The error for a place that the system does not let be written, with the way out."""
    way = _UNWRITTEN.get(error.errno or 0, "Give another place")
    return FileError(
        f"{path}: cannot be written: {error.strerror or error}. {way}. Nothing was written."
    )


class ParamloraError(ValueError):
    """Base of every error raised on purpose by paramlora."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(shown(a) if isinstance(a, str) else a for a in arguments))


class ConfigError(ParamloraError):
    """A configuration that says something it cannot mean."""


class TargetError(ParamloraError):
    """A configuration that does not fit the model it is attached to."""


class AdapterError(ParamloraError):
    """An adapter that is missing, already there, or cannot be merged."""


class FileError(ParamloraError):
    """An adapter file that cannot be read or does not fit the model."""


class ParamloraWarning(UserWarning):
    """Something was left undone that the caller probably wanted."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(shown(a) if isinstance(a, str) else a for a in arguments))


def warn(text: str) -> None:
    """Warn at the line that called paramlora, however deep inside, and behind whichever decorators
    or context managers, that is found out."""
    # stacklevel 1 is `warn` itself, 2 is who called it
    frame, level = sys._getframe(1), 2
    while _is_inner(frame.f_code.co_filename) and frame.f_back is not None:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, ParamloraWarning, stacklevel=level)


def _is_inner(path: str) -> bool:
    return path.startswith(_HERE) or os.path.basename(path) in _DECORATORS


def closest(word: str, known: Iterable[str]) -> list[str]:
    """The name in `known` most like `word`, alone; none for a name of no real length."""
    if len(word) > _MOST_COMPARED:
        return []
    near = (name for name in known if len(name) <= _MOST_COMPARED)
    return get_close_matches(word, list(islice(near, _MOST_KNOWN)), n=1, cutoff=0.6)
