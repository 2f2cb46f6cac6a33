"""Files of ``torch.save``: read without unpickling anything but plain tensors and containers."""

import io
import re
import zipfile
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import count, islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO, Optional

import torch
from torch import Tensor

from paramlora.config.reading import LARGE, MOST_TEXT, check_written, head_of, open_regular
from paramlora.errors import FileError, listed, unread
from paramlora.files.opcodes import Told, Unsafe, told
from paramlora.files.safetensors import Count, Spec, spec_of
from paramlora.files.zipped import archive_of
from paramlora.update.geometry import possible
from paramlora.update.memory import pieces_of

_NESTS = ("state_dict", "model", "module")
_PLACE = re.compile(r"^\[enforce fail at [^\]]*\] \. ")  # in torch's own code
_MOST_TOLD, _MOST_LEVELS = 8, 4  # of the places of state dicts that an error names


class PickledFile:
    """A file of ``torch.save``, its tensors left on the disk until they are used.

    Args:
        path: the file.
        key: where in it the state dict is, with dots between levels; by default the top, or one
            of ``state_dict``, ``model``, ``module`` there.

    Raises:
        FileError: it cannot be read, needs more than tensors and containers, or has no state dict.
    """

    metadata: Mapping[str, str] = {}

    def __init__(self, path: Path, key: Optional[str] = None) -> None:
        self.path = path
        self.content = load(path)
        self.place = _place(path, self.content, key)
        self.state: Mapping[str, Any] = self.content
        for name in self.place:
            self.state = self.state[name]
        # what is no tensor (a step, a list) stays in `state`, and conversions write it back
        self.specs = {
            k: checked_spec(path, k, v) for k, v in self.state.items() if isinstance(v, Tensor)
        }
        self._flat: tuple[Optional[str], Tensor] = (None, torch.empty(0))

    def close(self) -> None:
        """Nothing is held but the mapped file, which goes with its last tensor."""

    def read(self, key: str) -> Tensor:
        """A tensor, on the disk where the file could be mapped; never to be written to."""
        return self.state[key]  # type: ignore[no-any-return]

    def raw(self, key: str) -> Iterator[memoryview]:
        """A tensor's bytes in pieces."""
        return pieces_of(self.state[key])

    def run(self, key: str, elements: slice) -> Tensor:
        """Some of a tensor's elements, in order."""
        if self._flat[0] != key:  # a tensor in another order would be copied for each run
            self._flat = (key, self.state[key].detach().reshape(-1))
        return self._flat[1][elements]

    def beside(self) -> list[str]:
        """What the file holds beside the tensors of its state dict."""
        rest = [key for key in self.state if key not in self.specs]
        level = self.content
        for name in self.place:
            rest += [key for key in level if key != name]
            level = level[name]
        return [str(key) for key in rest]

    def around(self, state: Mapping[str, Any]) -> Any:
        """The whole content with `state` in the place of the state dict."""
        return _around(self.content, self.place, state)


def save(content: Any, file: BinaryIO, progress: Count) -> None:
    """Write with ``torch.save``.

    Raises:
        OSError: as the file raised it, such as for a full disk.
        FileError: hostile content that could be read but not written.
    """
    watched = _Watched(file, progress)
    try:
        torch.save(content, watched)  # type: ignore[arg-type]
    except Exception as error:
        if watched.error is not None:  # torch hides it behind its own
            raise watched.error from None
        reason = str(error) or type(error).__name__
        raise FileError(
            f"what was read cannot be written with torch.save: {reason}. Write a .safetensors file."
        ) from error


class _Watched:
    """A file that tells what is written, and remembers why that failed."""

    def __init__(self, file: BinaryIO, progress: Count) -> None:
        self._file, self._progress = file, progress
        self.error: Optional[BaseException] = None

    def write(self, piece: bytes) -> int:
        try:
            count = self._file.write(piece)
            self._progress(count)
        except BaseException as error:
            self.error = error
            raise
        return count

    def flush(self) -> None:
        self._file.flush()


def load(path: Path) -> Any:
    """The content of a file of ``torch.save``; the tensors of a large one are left on the disk,
    where they can be.

    Raises:
        FileError: it cannot be read, or needs more than tensors and plain containers.
    """
    zipped = head_of(path).startswith(b"PK\x03\x04")  # as torch writes since 1.6
    try:
        _check_zip(path) if zipped else _check_legacy(path)
        with open_regular(path) as file:
            check_written(path, file)
        # what is mapped ends the process where another program makes the file shorter meanwhile
        mapped = zipped and path.stat().st_size > LARGE
        # weights_only still makes any tensor that it is told to make, so the checks come first
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileError:
        raise
    except Unsafe as error:
        raise _needs(path, error.names) from error
    except OSError as error:
        raise unread(path, error) from error
    except Exception as error:  # an unpickler of hostile bytes raises whatever they lead to
        raise _refused(path, error) from error


def _check_zip(path: Path) -> None:
    """Refuse what ``torch.save`` never writes: compressed, doubled or overlapping records."""
    with open_regular(path) as file, archive_of(file) as archive:
        # torch finds a record of a name in other letters too: two such would be one to it
        records = {record.filename.lower(): record for record in archive.infolist()}
        stored = all(record.compress_type == zipfile.ZIP_STORED for record in records.values())
        # records that share bytes of the file add up to more than it has
        total = sum(max(record.file_size, record.compress_size) for record in records.values())
        if not stored or len(records) < len(archive.infolist()) or total > path.stat().st_size:
            raise FileError(
                f"{path}: its records are compressed, doubled or larger than the file, which "
                "torch.save never writes. It may be made to fill the memory, so it is not read. "
                "Save it again with torch.save."
            )
        # torch takes the folder in front from the archive, whatever it is called
        pickles = [name for name in records if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"{len(pickles)} records of names and values, and one is to be there")
        record = records[pickles[0]]
        if record.file_size > MOST_TEXT:
            raise ValueError(f"{record.file_size:,} bytes of names, more than any real file has")
        found = told(io.BytesIO(archive.read(record)))
        _check_records(pickles[0].removesuffix("data.pkl"), found, records)


def _check_records(folder: str, found: Told, records: Mapping[str, zipfile.ZipInfo]) -> None:
    for key, storage in found.storages.items():
        record = records.get(f"{folder}data/{key.lower()}")
        if record is None:
            raise ValueError(f"the record of storage {key} is missing")
        if storage.nbytes > record.file_size:
            raise ValueError(f"storage {key} is larger than its record")


def _check_legacy(path: Path) -> None:
    """Files from before torch 1.6: five pickles in a row, then bytes."""
    with open_regular(path) as file:  # names alone may claim, or lack, an end far away
        pickles = io.BytesIO(file.read(MOST_TEXT))
        steps = count()
        head, keys = [told(pickles, steps) for _ in range(4)], told(pickles, steps)
    # a magic number, a version, the system, the object; then the keys of its storages
    unread = {key for part in head for key in part.storages} - set(keys.value)
    size = sum(storage.nbytes for part in head for storage in part.storages.values())
    if unread or size > path.stat().st_size:
        raise ValueError("a storage without its bytes")


def _needs(path: Path, names: list[str]) -> FileError:
    return FileError(
        f"{path}: needs {', '.join(names)} to be unpickled, which could run anything, and only "
        "tensors and plain containers are. Where you trust it: "
        f'state = torch.load("{path.name}", weights_only=False), then torch.save the state dict '
        "alone."
    )


def _refused(path: Path, error: Exception) -> FileError:
    # torch's unpickler names a class that it does not know by its opcode
    named = re.search(r"GLOBAL (\S+)", str(error))
    if named:
        return _needs(path, [named[1]])
    told = _PLACE.sub("", str(error)).splitlines()
    # what the others say is of the code that they were raised in
    plain = told and isinstance(error, (ValueError, RuntimeError, EOFError, UnpicklingError))
    reason = told[0][:200] if plain else "its values are damaged"
    return FileError(
        f"{path}: not a whole file of torch.save ({reason}). Copy it again, or save "
        "its tensors with torch.save."
    )


def _place(path: Path, content: Any, key: Optional[str]) -> tuple[str, ...]:
    # a nested state dict first: the top of such a file may hold lone tensors beside it
    places = [tuple(key.split("."))] if key else [*((name,) for name in _NESTS), ()]
    for place in places:
        level = content
        for name in place:
            level = level.get(name) if isinstance(level, Mapping) else None
        if _is_state(level):
            return place
    asked = f'under "{key}"' if key else f"at the top, nor under {', '.join(_NESTS)}"
    raise FileError(f"{path}: no state dict {asked}. {_way_out(content)}.")


def _way_out(content: Any) -> str:
    if _is_state(content):  # a key was given
        return "It is at the top: leave out key (--key)"
    there = list(islice(_states(content), _MOST_TOLD))
    if there:
        return f"Name its place with key (--key), of: {listed(there)}"
    return "Give a checkpoint, or name the place with key (--key)"


def _states(content: Any) -> Iterator[str]:
    """The places of state dicts, one below the other; not deep, and never two ways to one."""
    levels: deque[tuple[tuple[str, ...], Any]] = deque([((), content)])
    seen = {id(content)}
    while levels:
        place, level = levels.popleft()
        if place and _is_state(level):
            yield ".".join(place)
        if len(place) < _MOST_LEVELS and isinstance(level, Mapping):
            for name, inner in level.items():
                if isinstance(name, str) and isinstance(inner, Mapping) and id(inner) not in seen:
                    seen.add(id(inner))
                    levels.append(((*place, name), inner))


def _is_state(value: Any) -> bool:
    named = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    return named and any(isinstance(v, Tensor) for v in value.values())


def checked_spec(path: Path, key: str, tensor: Tensor) -> Spec:
    """A tensor's type and shape, or an error where it is no dense tensor of its own."""
    # others (sparse, quantised, nested, of a subclass) are not their bytes alone
    plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested
    plain = plain and tensor.device.type == "cpu"
    if not plain or type(tensor) not in (Tensor, torch.nn.Parameter):
        kind = tensor.layout if type(tensor) is Tensor else type(tensor).__name__
        raise FileError(f"{path}: {key} is no dense tensor ({kind}). Save it dense.")
    if not possible(tensor.shape):
        raise FileError(f"{path}: {key} has a shape that no tensor has. Save it again.")
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise FileError(f"{path}: {key} claims more bytes than its file holds. Save it again.")
    return spec_of(tensor)


def _around(level: Any, place: tuple[str, ...], state: Mapping[str, Any]) -> Any:
    if not place:
        return state
    # a copy of each level on the way: what was loaded stays as it was
    out = type(level)(level)
    out[place[0]] = _around(level[place[0]], place[1:], state)
    return out
