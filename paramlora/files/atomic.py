"""Putting files in their place: whole, or not at all."""

import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Union

from paramlora.errors import FileError, listed, unwritten
from paramlora.model.undo import undisturbed

PathLike = Union[str, "os.PathLike[str]"]
_STRIDE = 32 << 20
_LEFT = re.compile(r"\..+\.[0-9a-f]{8}")  # as `_temporary` names them
_AT_FDCWD, _EXCHANGE = -100, 2  # of Linux's renameat2
_KINDS: dict[str, Callable[[int], bool]] = {
    "a folder": stat.S_ISDIR,
    "a pipe": stat.S_ISFIFO,
    "a socket": stat.S_ISSOCK,
    "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
}


@contextmanager
def new_file(path: PathLike) -> Iterator[BinaryIO]:
    """A file to fill, beside `path`; it takes that place when the block ends well.

    It is flushed to the disk and renamed, so a crash at any moment leaves the older file or the
    new one; an error, or Ctrl-C, in the block leaves no trace. An older file's mode and owner stay.

    Raises:
        FileError: the place cannot be written, or is no file.
    """
    # behind a link it is the file that is replaced, and the link stays
    target = Path(os.path.realpath(path))
    with _told(path), _temporary(target) as temporary:
        _check_file(path)
        with open(temporary, "xb", opener=_private if target.exists() else None) as file:
            _keep_access(target, temporary)
            yield file
            file.flush()
            # before the rename, which else may reach the disk first and show an empty file
            os.fsync(file.fileno())
        os.replace(temporary, target)
        # a name is written in its folder
        _sync(target.parent)


class Ahead:
    """Has the system write out a file while it grows, so that its last flush is short."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._told, self._written = file, 0, 0

    def wrote(self, count: int) -> None:
        """Count bytes that were written; where the system takes no advice nothing is done."""
        self._written += count
        if self._written - self._told >= _STRIDE and hasattr(os, "posix_fadvise"):
            length, number = self._written - self._told, self._file.fileno()
            # Linux starts to write such pages out, and fsync then waits for the last ones alone
            os.posix_fadvise(number, self._told, length, os.POSIX_FADV_DONTNEED)
            self._told = self._written


@contextmanager
def new_folder(path: PathLike, names: Collection[str]) -> Iterator[Path]:
    """A folder to fill, beside `path`; it takes that place when the block ends well.

    A folder that is there is exchanged in one step where the system can (Linux), and only where
    `names`, those of the new one, cover the old one, so that nothing else is lost. Its mode and
    owner stay, and those of the files in it.

    Raises:
        FileError: the place cannot be written, or holds what would be lost.
    """
    target = Path(os.path.realpath(path))
    check_lost(path, target, names)
    with _told(path), _temporary(target) as temporary:
        # closed to others while it is filled, if the one that it replaces may be
        temporary.mkdir(0o700 if target.exists() else 0o777)
        yield temporary
        # the files, then their folder, then the rename: no name comes before what it names
        for file in temporary.rglob("*"):
            _keep_access(target / file.relative_to(temporary), file)
            _sync(file)
        _keep_access(target, temporary)
        _sync(temporary)
        if target.exists():
            with undisturbed():  # between its renames nothing would be at `path`
                _exchange(temporary, target)
        else:
            os.rename(temporary, target)
        _sync(target.parent)


def check_new(path: PathLike, force: bool) -> None:
    """Refuse a place that is taken, unless forced.

    Raises:
        FileError: something is there, what no file can replace, or no folder to write in.
    """
    with _told(path):
        if not os.path.isdir(path):
            _check_file(path)
        folder = os.path.dirname(os.path.realpath(path))
        os.stat(folder)
        if not os.access(folder, os.W_OK | os.X_OK):
            number = errno.EROFS if _is_read_only(folder) else errno.EACCES
            raise OSError(number, os.strerror(number))
    # a link to nothing is there, too
    if not force and os.path.lexists(path):
        raise FileError(f"{path}: exists. Give another place, or force (--force) to replace it.")


def _is_read_only(folder: str) -> bool:
    """Whether the disk of a folder is mounted for reading alone."""
    told = os.statvfs(folder).f_flag if hasattr(os, "statvfs") else 0
    return bool(told & getattr(os, "ST_RDONLY", 0))


@contextmanager
def _told(path: PathLike) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise unwritten(path, error) from error


def is_left(name: str) -> bool:
    """Whether a name is one of a temporary file or folder, as a killed process leaves it.

    Example:
        >>> is_left(".a.safetensors.0123abcd"), is_left(".gitattributes")
        (True, False)
    """
    return _LEFT.fullmatch(name) is not None


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A name beside `target`, free to be made; what is left at it in the end is removed."""
    name = target.parent / f".{target.name}.{secrets.token_hex(4)}"
    try:  # before it exists, so that no moment is left at which Ctrl-C would leave it
        yield name
    finally:
        try:
            _remove(name)
        except KeyboardInterrupt:
            _remove(name)  # a folder may have been half removed
            raise


def _check_file(path: PathLike) -> None:
    """Refuse what a file would replace and never be: a pipe, a device, a socket, a folder."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        kind = next((name for name, told in _KINDS.items() if told(mode)), "no regular file")
        raise FileError(f"{path}: is {kind}, which no file replaces. Give the name of a file.")


def _private(path: str, flags: int) -> int:
    """Open a new file that only its owner can read, as the one that it replaces may be."""
    return os.open(path, flags, 0o600)


def _keep_access(old: Path, new: Path) -> None:
    """Give `new` the mode and owner of `old`, or less access where the owner cannot be kept."""
    if os.name != "posix" or not old.exists():
        return
    had, has = old.stat(), new.stat()
    mode = stat.S_IMODE(had.st_mode)
    if (had.st_uid, had.st_gid) != (has.st_uid, has.st_gid):
        mode = _keep_owner(had, new, mode)
    os.chmod(new, mode)  # after the owner, whose change takes bits away


def _keep_owner(had: os.stat_result, new: Path, mode: int) -> int:
    """Give a file the owner and group that another had, as far as the system lets; the mode that it
    may then have.

    With both kept that is the old mode. With the group alone the bits that run a file as its owner
    or group go; with neither, also what the group was allowed, for it would be another group.
    """
    for user, kept in ((had.st_uid, mode), (-1, mode & ~0o6000)):
        try:
            os.chown(new, user, had.st_gid)
            return kept
        except OSError:  # only root gives files away
            continue
    return mode & ~0o6070


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_lost(path: PathLike, old: Path, names: Collection[str]) -> None:
    """Refuse to replace a folder by one that lacks some of its names.

    Raises:
        FileError: names them.
    """
    # a file that stands there is lost as well
    there = os.listdir(old) if os.path.isdir(old) else [old.name] if old.exists() else []
    lost = sorted(name for name in set(there) - set(names) if not is_left(name))
    if lost:
        raise FileError(
            f"{path}: replacing it would lose {listed(lost, 5)}. Give another place, or move what "
            "is there."
        )


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders; what was at `old` is then at `new`."""
    system = ctypes.CDLL(None) if os.name == "posix" else None
    swap = getattr(system, "renameat2", None)
    paths = (_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old))
    # other systems, and some file systems of Linux, do not exchange: two renames then
    if swap is not None and swap(*paths, _EXCHANGE) == 0:
        return
    aside = new.with_name(f"{new.name}.old")
    os.rename(old, aside)
    try:
        # for a moment nothing is at `old`: signals wait (`undisturbed`), a failure moves it back
        os.rename(new, old)
    except BaseException:
        os.rename(aside, old)
        raise
    os.rename(aside, new)


def _sync(path: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
