"""A checkpoint on disk, whatever its kind: one file, or a folder of shards with an index."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Optional, Union

from torch import Tensor

from paramlora.config.reading import head_of, is_pickled, parse_json, read_text
from paramlora.errors import FileError, listed, spelled, unread, warn
from paramlora.files.atomic import PathLike, is_left
from paramlora.files.mistaken import check_tensors
from paramlora.files.safetensors import SafeFile, Spec
from paramlora.files.torch_save import PickledFile

SAFE, PICKLED = (".safetensors",), (".pt", ".pth", ".ckpt", ".bin")
_INDEX = ".index.json"
_WEIGHTS = (  # as diffusers and transformers name what is one file
    *("model.safetensors", "diffusion_pytorch_model.safetensors"),
    *("pytorch_model.bin", "diffusion_pytorch_model.bin"),
)
Part = Union[SafeFile, PickledFile]


class Stored:
    """An open checkpoint; its kind is told by its content, not by its name.

    Args:
        path: a file, a folder with one ``*.index.json`` or one file of weights, or such an index.
        key: where the state dict is in a file of ``torch.save`` (see `PickledFile`).

    Attributes:
        parts: the open files, by name.
        where: the name of the file that holds each tensor.
        index: the content of the index, and `index_name` its name; None for one file.
        is_folder: whether it is a folder, with or without an index.

    Raises:
        FileError: it cannot be read, or is not what it says.
    """

    def __init__(self, path: PathLike, key: Optional[str] = None) -> None:
        self.path = Path(path)
        self.parts: dict[str, Part] = {}
        self.index: Optional[dict[str, Any]] = None
        self.index_name = ""
        self.is_folder = False
        self.folder = self.path
        try:
            self._open(key)
            self.file_of = self._places()
        except BaseException:
            self.close()
            raise
        self.specs: dict[str, Spec] = {k: self.parts[n].specs[k] for k, n in self.file_of.items()}

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
        return self.parts[self.file_of[key]].read(key)

    def raw(self, key: str) -> Iterator[memoryview]:
        """One tensor's bytes in pieces."""
        return self.parts[self.file_of[key]].raw(key)

    def run(self, key: str, elements: slice) -> Tensor:
        """Some of one tensor's elements; not to be written to."""
        return self.parts[self.file_of[key]].run(key, elements)

    def _open(self, key: Optional[str]) -> None:
        # an index that is named itself stands for its folder
        if not os.path.isdir(self.path) and not self.path.name.endswith(_INDEX):
            self.parts[self.path.name] = _part(self.path, key)
            return
        self.is_folder = True
        alone = weights_in(self.path) if os.path.isdir(self.path) else None
        if alone is not None:
            self.parts[alone.name] = _part(alone, key)
            return
        index = _index_in(self.path) if os.path.isdir(self.path) else self.path
        self.folder, self.index_name = index.parent, index.name
        self.index = _read_index(index)
        for name in dict.fromkeys(self.index["weight_map"].values()):
            self._check_there(index, name)
            self.parts[name] = _part(self.folder / name, key)

    def _check_there(self, index: Path, name: str) -> None:
        if not os.path.lexists(self.folder / name):
            raise FileError(
                f"{self.folder / name}: not there, and {index.name} places tensors in it. Download "
                "it too."
            )

    def _places(self) -> dict[str, str]:
        file_of: dict[str, str] = {}
        for name, part in self.parts.items():
            for key in part.specs:
                if key in file_of:
                    raise FileError(
                        f"{self.path}: {key} is both in {file_of[key]} and in {name}. Remove the "
                        "one of another copy, or download all again."
                    )
                file_of[key] = name
        for key, name in (self.index or {"weight_map": {}})["weight_map"].items():
            # a shard of another version: told here, and not later as a layer that is missing
            if file_of.get(key) != name:
                raise FileError(
                    f"{self.path}: {name} lacks {key}, which the index places there. Download "
                    "the index and all of its files again."
                )
        return file_of


class Pipeline:
    """An open folder of models, as diffusers saves a pipeline: each in a folder of its own.

    The tensors of all have their component's name in front (``unet.``).

    Args:
        path: the folder.

    Attributes:
        components: the open checkpoints, by the names of their folders.
        others: the folders without weights, such as a tokenizer's.

    Raises:
        FileError: one cannot be read.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = self.folder = Path(path)
        self.components: dict[str, Stored] = {}
        self.others: list[Path] = []
        try:
            for folder in _own_folders(self.path):
                if has_weights(folder):
                    self.components[folder.name] = Stored(folder)
                else:
                    self.others.append(folder)
        except BaseException:
            self.close()
            raise
        self.specs: dict[str, Spec] = {
            f"{name}.{key}": spec
            for name, stored in self.components.items()
            for key, spec in stored.specs.items()
        }

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files."""
        for stored in self.components.values():
            stored.close()

    def read(self, key: str) -> Tensor:
        """One tensor; not to be written to."""
        name, _, rest = key.partition(".")
        return self.components[name].read(rest)

    def run(self, key: str, elements: slice) -> Tensor:
        """Some of one tensor's elements; not to be written to."""
        name, _, rest = key.partition(".")
        return self.components[name].run(rest, elements)


def _own_folders(path: Path) -> list[Path]:
    """The folders in a pipeline's, without links to elsewhere."""
    # a link would have files copied that are none of the pipeline's
    there = [one for one in entries_of(path) if os.path.isdir(one)]
    away = [one.name for one in there if one.resolve().parent != path.resolve()]
    if away:
        text = f"{path}: not copied, since they are links to elsewhere: {listed(away)}."
        warn(f"{text} Copy those that you trust.")
    return [one for one in there if one.name not in away]


def opened(path: PathLike, key: Optional[str] = None) -> Union[Stored, Pipeline]:
    """The checkpoint at a path: a model's, or a whole pipeline's.

    Raises:
        FileError: it cannot be read, or is none.
    """
    folder = Path(path)
    # a key is a place in one file of torch.save, which a pipeline has none of
    if key is not None or not os.path.isdir(folder) or has_weights(folder):
        return Stored(path, key)
    inside = any(os.path.isdir(one) and has_weights(one) for one in entries_of(folder))
    return Pipeline(path) if inside else Stored(path)


def has_weights(folder: Path) -> bool:
    """Whether a folder is that of a model."""
    indexed = any(path.name.endswith(_INDEX) for path in entries_of(folder))
    return indexed or weights_in(folder) is not None


def _part(path: Path, key: Optional[str]) -> Part:
    check_tensors(path)
    if is_pickled(head_of(path)):
        return PickledFile(path, key)
    if key is not None:
        raise FileError(f'{path}: a safetensors file has no levels; leave out the key "{key}".')
    return SafeFile(path)


def weights_in(folder: Path) -> Optional[Path]:
    """The one file of weights of a folder without an index; None where there is an index, or where
    several files could be meant.

    Libraries write it under one of a few names, and perhaps others (a variant in 16 bits) beside.
    """
    names = {path.name for path in entries_of(folder)}
    if any(name.endswith(_INDEX) for name in names):
        return None
    usual = [name for name in _WEIGHTS if name in names]
    # a usual name wins over others; without one there must be no choice
    kept = [path.name for path in _weights(folder)]
    chosen = usual[:1] or (kept if len(kept) == 1 else [])
    return folder / chosen[0] if chosen else None


def _weights(folder: Path) -> list[Path]:
    return [path for path in entries_of(folder) if path.name.endswith((*SAFE, *PICKLED))]


def entries_of(folder: Path) -> list[Path]:
    """What is in a folder, in order, but what a killed process left.

    Raises:
        FileError: it cannot be listed, or what is in it cannot be looked at.
    """
    try:
        os.stat(os.path.join(folder, "."))  # which a folder that may only be listed refuses
        return sorted(path for path in folder.iterdir() if not is_left(path.name))
    except OSError as error:
        raise unread(folder, error) from error


def _index_in(folder: Path) -> Path:
    found = [path for path in entries_of(folder) if path.name.endswith(_INDEX)]
    # repositories often hold the same weights as .bin too
    safe = [p for p in found if p.name.endswith(f".safetensors{_INDEX}")]
    chosen = safe or found
    if len(chosen) != 1:
        names = listed(path.name for path in chosen or _weights(folder)) or "none"
        if not chosen and names != "none":
            raise FileError(
                f"{folder}: several files of weights, {names}, and no *{_INDEX} that places the "
                "tensors. Add the index, or name the one file that is meant."
            )
        raise FileError(
            f"{folder}: a folder needs one *{_INDEX} or one file of weights, and has {names}. Name "
            "the file itself."
        )
    return chosen[0]


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index: Any = parse_json(read_text(path))
    except FileError:
        raise
    except ValueError as error:
        raise FileError(f"{path}: not an index of shards ({error}). Download it again.") from error
    told = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(told, dict) or not told or not isinstance(index.get("metadata", {}), dict):
        raise FileError(
            f'{path}: not an index of shards, which has a "weight_map" of tensors and their files. '
            "Download it again."
        )
    for key, name in told.items():
        if not _is_plain(name):
            raise FileError(
                f"{path}: places {key} in {spelled(name)}, which names no file of its own folder "
                "and is not followed. Put all files in one folder, and name them so."
            )
    return index  # type: ignore[no-any-return]


def _is_plain(name: object) -> bool:
    """Whether something names a file of its own folder."""
    # with separators of every system: an index must not lead out of its folder
    outside = ("", ".", "..")
    return isinstance(name, str) and name not in outside and not set(name) & set("/\\:\0")
