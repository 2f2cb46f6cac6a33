"""Zip archives, as ``torch.save`` writes them: opened only where their list of records is small."""

import os
import struct
import zipfile
from typing import BinaryIO

_MOST_LIST = 16 << 20  # bytes; a hundred thousand records take some eight million
_END, _LOCATOR, _WIDE_END = b"PK\5\6", b"PK\6\7", b"PK\6\6"
_END_SIZE, _LOCATOR_SIZE, _WIDE_SIZE = 22, 20, 56


def archive_of(file: BinaryIO) -> zipfile.ZipFile:
    """An open archive; its list of records, which each reader reads whole, is of a bounded size.

    Readers look for the list in ways of their own, and two could be found: only the place that they
    agree on is accepted, where ``torch.save`` has it.

    Raises:
        ValueError: the list is not there, or longer than any real one.
        zipfile.BadZipFile: it is damaged.
    """
    stop = os.fstat(file.fileno()).st_size - _END_SIZE
    length, start, stop = _list_of(file, stop)
    if start + length != stop:
        raise ValueError("its list of records is not at its end")
    if length > _MOST_LIST:
        raise ValueError(f"{length:,} bytes of a list of records, more than any real file has")
    file.seek(0)
    return zipfile.ZipFile(file)


def _list_of(file: BinaryIO, stop: int) -> tuple[int, int, int]:
    """The list's length and start, as a file's last bytes tell, and where these begin."""
    end = _bytes(file, stop, _END_SIZE)
    if not end.startswith(_END) or not end.endswith(b"\0\0"):  # no remark behind it
        return 0, 0, -1
    # of PKWARE's format: at byte 12 the length and the start of the list of records
    length, start = struct.unpack_from("<II", end, 12)
    locator = _bytes(file, stop - _LOCATOR_SIZE, _LOCATOR_SIZE)
    if not locator.startswith(_LOCATOR):
        return length, start, stop
    # larger archives repeat both in 64 bits, in front of a note of where that stands
    stop -= _LOCATOR_SIZE + _WIDE_SIZE
    wide = _bytes(file, stop, _WIDE_SIZE)
    if not wide.startswith(_WIDE_END) or struct.unpack_from("<Q", locator, 8)[0] != stop:
        return 0, 0, -1
    return (*struct.unpack_from("<QQ", wide, 40), stop)


def _bytes(file: BinaryIO, at: int, count: int) -> bytes:
    if at < 0:
        return b""
    file.seek(at)
    return file.read(count)
