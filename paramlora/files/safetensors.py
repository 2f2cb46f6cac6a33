"""Safetensors files, read and written tensor by tensor, so that none need fit in memory."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from paramlora.config.reading import MOST_TEXT, check_written, open_regular, parse_json
from paramlora.errors import FileError, counted, spelled, unread
from paramlora.files.atomic import Ahead
from paramlora.update.geometry import MOST_SIDE, possible
from paramlora.update.memory import bytes_of, installed

Count = Callable[[int], None]  # called with the bytes written since the last call
_CHUNK = 8 << 20
_MOST_CLAIMED = 2**40  # more than any header: the file begins with something else
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Spec:
    """A tensor without its content: type and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of its content."""
        return self.elements * self.dtype.itemsize


def spec_of(tensor: Tensor) -> Spec:
    """A tensor's type and shape."""
    return Spec(tensor.dtype, tuple(tensor.shape))


class SafeFile:
    """An open safetensors file: its header checked, its tensors read when asked for.

    Raises:
        FileError: it cannot be read, or its header is not true of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        self.specs: dict[str, Spec] = {}
        self._begin: dict[str, int] = {}
        self._file = open_regular(path)
        try:
            self._read_header()
            check_written(path, self._file)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def read(self, key: str) -> Tensor:
        """A tensor, in memory of its own."""
        spec = self.specs[key]
        size = spec.nbytes
        try:
            # torch's error where memory is short names neither the file nor the tensor
            out = torch.empty(size, dtype=torch.uint8)
        except RuntimeError as error:
            raise FileError(
                f"{self.path}: {key} takes {size:,} bytes, which memory does not hold. Give a "
                "smaller file, or use a machine with more."
            ) from error
        if size:
            self._fill(self._begin[key], bytes_of(out))
        return out.view(spec.dtype).reshape(spec.shape)

    def every(self, together: bool = False, locked: bool = False) -> dict[str, Tensor]:
        """All tensors, where memory can hold them: a file with holes may claim any size.

        Args:
            together: in one memory, which each of them keeps alive, for who drops them all soon:
                read at once, checked at once, and copied to a device at once.
            locked: that memory page-locked, from which copies to a device are fastest.
        """
        size, memory = sum(spec.nbytes for spec in self.specs.values()), installed()
        if size > memory:
            raise FileError(
                f"{self.path}: its tensors take {size:,} bytes, and this machine has {memory:,} of "
                "memory. Give a smaller file, or use a machine with more."
            )
        if together:
            return self._as_one(size, locked)
        return {key: self.read(key) for key in self.specs}

    def _as_one(self, size: int, locked: bool) -> dict[str, Tensor]:
        """All tensors as parts of one: in the file they lie so, see `_check_whole`."""
        try:  # of that memory torch keeps what was given back, so that the next file finds it
            memory = torch.empty(size, dtype=torch.uint8, pin_memory=locked)
        except RuntimeError:  # of no device, or of a system that locks less
            memory = torch.empty(size, dtype=torch.uint8)
        # the file's tensors lie without holes from here on
        start = min(self._begin.values(), default=0)
        if size:
            self._fill(start, bytes_of(memory))
        found = {}
        for key, spec in self.specs.items():
            at = self._begin[key] - start
            part = memory[at : at + spec.nbytes]
            part = part.clone() if at % spec.dtype.itemsize else part  # no view of such a place
            found[key] = part.view(spec.dtype).reshape(spec.shape)
        return found

    def raw(self, key: str) -> Iterator[memoryview]:
        """A tensor's bytes in pieces, each valid until the next one."""
        # one for all pieces: memory does not grow with the tensor
        buffer = memoryview(bytearray(min(_CHUNK, self.specs[key].nbytes)))
        begin, end = self._begin[key], self._begin[key] + self.specs[key].nbytes
        for at in range(begin, end, _CHUNK):
            piece = buffer[: min(_CHUNK, end - at)]
            self._fill(at, piece)
            yield piece

    def run(self, key: str, elements: slice) -> Tensor:
        """Some of a tensor's elements as they lie in the file, in memory of their own."""
        dtype = self.specs[key].dtype
        out = torch.empty(elements.stop - elements.start, dtype=dtype)
        self._fill(self._begin[key] + elements.start * dtype.itemsize, bytes_of(out))
        return out

    def _fill(self, at: int, buffer: memoryview) -> None:
        try:
            self._file.seek(at)
            while buffer and (got := self._file.readinto(buffer)):  # the system may give less
                buffer = buffer[got:]
        except OSError as error:
            raise unread(self.path, error) from error
        if buffer:
            raise self._damaged("it became shorter while it was read")

    def _bytes(self, at: int, count: int) -> bytearray:
        out = bytearray(count)
        self._fill(at, memoryview(out))
        return out

    def _read_header(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        # the format: 8 bytes of length, that much JSON, then the tensors' bytes
        length = int.from_bytes(self._bytes(0, min(8, size)), "little")
        # JSON begins with its brace at once, by the format; a file of another kind hardly so
        if size > 8 and (length > _MOST_CLAIMED or self._bytes(8, 1) != b"{"):
            raise FileError(
                f"{self.path}: neither a safetensors file nor one of torch.save. Give one of those."
            )
        if size <= 8:
            raise self._damaged(f"{counted(size, 'byte')}, and it begins with as many for a length")
        if length > min(size - 8, MOST_TEXT):
            raise self._damaged(f"a header of {counted(length, 'byte')} in a file of {size:,}")
        try:
            text = self._bytes(8, length).decode()
            header = parse_json(text)
        except ValueError as error:
            raise self._damaged(f"its header cannot be read: {error}") from error
        self.metadata = self._strings(header.pop("__metadata__", {}))
        for key, entry in header.items():
            self._add(key, entry, 8 + length)
        self._check_whole(8 + length, size)

    def _add(self, key: str, entry: Any, start: int) -> None:
        try:
            (begin, end), shape = entry["data_offsets"], entry["shape"]
            numbers = [begin, end, *shape] if isinstance(shape, list) else [None]
            dtype = DTYPES.get(entry["dtype"])
            # JSON can spell half of a surrogate pair, which cannot be encoded again
            key.encode()
        except (TypeError, KeyError, ValueError) as error:
            raise self._damaged(f'"{key}" is not a tensor') from error
        # by type: JSON's true is an int to Python
        sizes = all(type(n) is int and 0 <= n <= MOST_SIDE for n in numbers)
        if not sizes or not possible(shape):
            raise self._damaged(f'"{key}" has an offset or a shape that no tensor has')
        if dtype is None:
            raise FileError(
                f'{self.path}: "{key}" is of type {entry["dtype"]}, which is not known here. '
                f"Known: {', '.join(DTYPES)}."
            )
        spec = Spec(dtype, tuple(shape))
        if end - begin != spec.nbytes:
            size = counted(spec.nbytes, "byte")
            raise self._damaged(f'"{key}" of {size} stands in {end - begin:,}')
        self.specs[key], self._begin[key] = spec, start + begin

    def _check_whole(self, start: int, size: int) -> None:
        at = start
        # an empty tensor begins where its neighbour does, and comes first
        for key in sorted(self.specs, key=lambda k: (self._begin[k], self.specs[k].nbytes)):
            if self._begin[key] != at:
                raise self._damaged(f'"{key}" overlaps another tensor, or leaves a hole')
            at += self.specs[key].nbytes
        if at != size:
            raise self._damaged(f"its tensors end at byte {at:,} of {size:,}")

    def _strings(self, metadata: Any) -> dict[str, str]:
        try:
            "".join([*metadata, *metadata.values()]).encode()
        except (AttributeError, TypeError, ValueError) as error:
            raise self._damaged("its metadata is not of strings") from error
        return dict(metadata)

    def _damaged(self, reason: str) -> FileError:
        return FileError(
            f"{self.path}: not a whole safetensors file ({reason}). Copy or save it again."
        )


def write_safetensors(
    file: BinaryIO,
    specs: Mapping[str, Spec],
    metadata: Mapping[str, str],
    pieces: Callable[[str], Iterable[memoryview]],
    progress: Count = lambda count: None,
) -> None:
    """Write a safetensors file; each tensor's bytes are asked for when their turn comes."""
    # wide types first, so that each lies at a multiple of its size, as the library writes them
    keys = sorted(specs, key=lambda key: -specs[key].dtype.itemsize)
    file.write(_header(specs, keys, metadata))
    ahead = Ahead(file)
    for key in keys:
        for piece in pieces(key):
            file.write(piece)
            ahead.wrote(len(piece))
            progress(len(piece))


def _header(specs: Mapping[str, Spec], keys: list[str], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for key in keys:
        if key == "__metadata__":
            raise FileError(f"{key}: no name of a tensor in safetensors. Write a .pt file.")
        spec = specs[key]
        offsets = [at, at := at + spec.nbytes]
        code = CODES.get(spec.dtype)
        if code is None:
            raise FileError(f"{key}: safetensors holds no {spec.dtype}. Write a .pt file.")
        entries[key] = {"dtype": code, "shape": list(spec.shape), "data_offsets": offsets}
    try:
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise FileError(
            f"{spelled(error.object[error.start :])} is not Unicode text. Rename it."
        ) from error
    # spaces up to a multiple of 8 bytes, so that the tensors are aligned in the file
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
