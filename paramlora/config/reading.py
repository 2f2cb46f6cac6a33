"""Opening files that others made: regular ones only, and JSON within limits."""

import errno
import json
import os
import re
import stat
from collections import Counter
from io import BufferedReader
from pathlib import Path
from typing import Any, Union

from paramlora.errors import FileError, shown, unread

# the longest real header, of a checkpoint with a hundred thousand tensors, takes some 15 MB, and
# the safetensors library takes twice this; one character of four bytes makes all take four
MOST_TEXT = 50_000_000
SMALL_TEXT = 1 << 20  # bytes that cannot become much memory
# a tensor's entry has eight; each value takes some hundred bytes of memory
_MOST_VALUES, _MOST_DEPTH = 2_000_000, 100
_MOST_ESCAPES = 4_000_000  # as many bytes of memory for each; JSON in a string has one a quote
_MOST_HOLES, LARGE = 8, 256 << 20  # bytes that a file claims for each written one; and at all
_TOKENS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{},]', re.DOTALL)
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Union[str, "os.PathLike[str]"]) -> BufferedReader:
    """A regular file, open for reading; anything else could wait, or act, for ever.

    Raises:
        FileError: it is missing, not to be read, or another kind of file.
    """
    try:
        _check_regular(path, os.stat(path).st_mode)  # before the opening: that may act
        # without waiting: what is at a name may have changed since
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        file = open(os.open(path, flags), "rb")
    except OSError as error:
        raise unread(path, error) from error
    except ValueError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path}: no path of a file: {error}. Give one.") from error
    try:
        _check_regular(path, os.fstat(file.fileno()).st_mode)
    except BaseException:
        file.close()
        raise
    return file


def read_text(path: Union[str, "os.PathLike[str]"], most: int = MOST_TEXT) -> str:
    """The text of a small file, of at most so many bytes.

    Raises:
        FileError: as `open_regular`, or it is larger than any real one, or not UTF-8.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise FileError(
                f"{path}: {size:,} bytes, more than any real file of its kind has. Give another."
            )
        content = _read(path, file, size)
    try:
        return content.decode("utf-8-sig")  # some editors put a mark in front
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: not UTF-8 text: {error.reason}. Save it as UTF-8.") from error


def head_of(path: Path) -> bytes:
    """The bytes that tell a file's kind.

    Raises:
        FileError: as `open_regular`.
    """
    with open_regular(path) as file:
        return _read(path, file, 9)


def check_written(path: Union[str, "os.PathLike[str]"], file: BufferedReader) -> None:
    """Refuse a large file that is nearly all holes: they take no room on the disk, and time and
    memory as any bytes do. One made to harm has them, and so has a download that did not end.

    Raises:
        FileError: less than an eighth of it was ever written, as far as its disk tells.
    """
    handle, size = file.fileno(), os.fstat(file.fileno()).st_size
    if size <= LARGE or not hasattr(os, "SEEK_DATA"):
        return
    before, at, written = os.lseek(handle, 0, os.SEEK_CUR), 0, 0
    try:
        while _MOST_HOLES * written < size:
            start = os.lseek(handle, at, os.SEEK_DATA)
            at = os.lseek(handle, start, os.SEEK_HOLE)
            written += at - start
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing more is written
            raise FileError(
                f"{path}: of its {size:,} bytes {written:,} were written, and the rest are holes, "
                "as a download leaves that has not ended. Download or copy it again."
            ) from error
    finally:
        os.lseek(handle, before, os.SEEK_SET)


def is_pickled(head: bytes) -> bool:
    """Whether a file that begins so is of ``torch.save``, zipped or not."""
    # a safetensors file has 8 bytes and then "{"
    return head.startswith(b"PK\x03\x04") or (head.startswith(b"\x80") and head[8:] != b"{")


def parse_json(text: str) -> Any:
    """The value in a text that somebody else wrote, in time and memory that grow with its length.

    Raises:
        ValueError: no JSON, a key twice, or more and deeper than any real file.
    """
    if len(text) > SMALL_TEXT:
        _check_counts(text)
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        if "digits" not in str(error):
            raise
        raise ValueError("a number has more digits than any real one") from None


def _read(path: Union[str, "os.PathLike[str]"], file: BufferedReader, count: int) -> bytes:
    try:
        return file.read(count)
    except OSError as error:
        raise unread(path, error) from error


def _check_regular(path: Union[str, "os.PathLike[str]"], mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise FileError(f"{path}: {kind}, and only regular files are read. Give a file.")


def _check_counts(text: str) -> None:
    """Refuse what would fill the memory, before anything is made of it."""
    if len(text) > MOST_TEXT:
        raise ValueError(f"{len(text):,} characters, more than any real file has")
    if text.count("\\") > _MOST_ESCAPES:
        raise ValueError("it has more escaped characters than any real file")
    values = depth = 0
    for token in _TOKENS.finditer(text):
        sign = text[token.start()]
        if sign in "{[":
            depth += 1
        elif sign in "}]":
            depth -= 1
        values += sign in "{[,"
        if values > _MOST_VALUES or depth > _MOST_DEPTH:
            raise ValueError("it has more values, or is nested deeper, than any real file")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f'"{shown(twice)}" stands twice')
    return out
