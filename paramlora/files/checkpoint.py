"""A checkpoint on disk, whatever its kind: one file, or a folder of shards with an index."""

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Optional, Union

from torch import Tensor

from paramlora.config.reading import head_of, is_pickled, parse_json, read_text
from paramlora.errors import FileError
from paramlora.files.atomic import PathLike
from paramlora.files.mistaken import check_tensors
from paramlora.files.safetensors import SafeFile, Spec
from paramlora.files.torch_save import PickledFile

SAFE, PICKLED = (".safetensors",), (".pt", ".pth", ".ckpt", ".bin")
_INDEX = ".index.json"
Part = Union[SafeFile, PickledFile]


class Stored:
    """An open checkpoint; its kind is told by its content, not by its name.

    Args:
        path: a file, a folder with one ``*.index.json``, or such an index.
        key: where the state dict is in a file of ``torch.save`` (see `PickledFile`).

    Attributes:
        parts: the open files, by name.
        where: the name of the file that holds each tensor.
        index: the content of the index, and `index_name` its name; None for one file.

    Raises:
        FileError: it cannot be read, or is not what it says.
    """

    def __init__(self, path: PathLike, key: Optional[str] = None) -> None:
        self.path = Path(path)
        self.parts: dict[str, Part] = {}
        self.index: Optional[dict[str, Any]] = None
        self.index_name = ""
        self.folder = self.path
        try:
            self._open(key)
            self.where = self._places()
        except BaseException:
            self.close()
            raise
        self.specs: dict[str, Spec] = {k: self.parts[n].specs[k] for k, n in self.where.items()}

    def __enter__(self) -> "Stored":
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files."""
        for part in self.parts.values():
            part.close()

    def read(self, key: str) -> Tensor:
        """One tensor; not to be written to."""
        return self.parts[self.where[key]].read(key)

    def raw(self, key: str) -> Iterator[memoryview]:
        """One tensor's bytes in pieces."""
        return self.parts[self.where[key]].raw(key)

    def run(self, key: str, elements: slice) -> Tensor:
        """Some of one tensor's elements; not to be written to."""
        return self.parts[self.where[key]].run(key, elements)

    def _open(self, key: Optional[str]) -> None:
        if not self.path.is_dir() and not self.path.name.endswith(_INDEX):
            self.parts[self.path.name] = _part(self.path, key)
            return
        index = _index_in(self.path) if self.path.is_dir() else self.path
        self.folder, self.index_name = index.parent, index.name
        self.index = _read_index(index)
        for name in dict.fromkeys(self.index["weight_map"].values()):
            self.parts[name] = _part(self.folder / name, key)

    def _places(self) -> dict[str, str]:
        where: dict[str, str] = {}
        for name, part in self.parts.items():
            for key in part.specs:
                if key in where:
                    raise FileError(f"{self.path}: {key} is both in {where[key]} and in {name}.")
                where[key] = name
        for key, name in (self.index or {"weight_map": {}})["weight_map"].items():
            if where.get(key) != name:
                raise FileError(f"{self.path}: {name} lacks {key}, which the index places there.")
        return where


def _part(path: Path, key: Optional[str]) -> Part:
    check_tensors(path)
    if is_pickled(head_of(path)):
        return PickledFile(path, key)
    if key is not None:
        raise FileError(f'{path}: a safetensors file has no levels; leave out the key "{key}".')
    return SafeFile(path)


def _index_in(folder: Path) -> Path:
    try:
        found = sorted(p for p in folder.iterdir() if p.name.endswith(_INDEX))
    except OSError as error:
        raise FileError(f"{folder}: cannot be read: {error.strerror}.") from error
    safe = [p for p in found if p.name.endswith(f".safetensors{_INDEX}")]
    chosen = safe or found
    if len(chosen) != 1:
        names = ", ".join(p.name for p in chosen) or "none"
        raise FileError(
            f"{folder}: a folder needs one *{_INDEX}, and has {names}. Name the file itself."
        )
    return chosen[0]


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = parse_json(read_text(path))
        names = index["weight_map"].values()
        plain = all(isinstance(name, str) and _is_plain(name) for name in names)
        whole = isinstance(index.get("metadata", {}), dict)
    except FileError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{path}: not an index of shards: {error}.") from error
    if not plain or not whole or not names:
        raise FileError(f"{path}: not an index of files in its own folder. It is not followed.")
    return index  # type: ignore[no-any-return]


def _is_plain(name: str) -> bool:
    """Whether a name stays in its folder."""
    return name not in ("", ".", "..") and not set(name) & set("/\\:\0")
