"""Adapter files of any tool on disk: opened, loaded onto a model, converted."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Optional

import torch
from torch import Tensor, nn

from paramlora import formats, pickles
from paramlora.adapter import Adapter
from paramlora.contexts import own_context
from paramlora.disk import PathLike, check_new, new_file, new_folder
from paramlora.errors import FileError, spelled
from paramlora.formats import Base, Content, Options, base_of, base_of_shapes
from paramlora.formats.base import check_holders, check_known
from paramlora.formats.content import DEFAULTS, check_finite, report
from paramlora.formats.factors import within
from paramlora.mistaken import check_tensors
from paramlora.native import read_native, write_native
from paramlora.reading import MOST_TEXT, head_of, is_pickled, parse_json, read_text
from paramlora.state import attach_adapter
from paramlora.stored import PICKLED, SAFE, Stored
from paramlora.stream import SafeFile, pieces_of, spec_of, write_safetensors
from paramlora.targets import tensor_paths

NATIVE = "native"
# the weights in a folder, the best first: torchtune writes PEFT's form beside its own
_WEIGHTS = (
    "adapter_model.safetensors adapter_model.bin adapter_model.pt "
    "pytorch_lora_weights.safetensors pytorch_lora_weights.bin lit_model.pth.lora "
    "adapter.safetensors"
).split()
# formats that are a folder: the weights and the configuration beside them
_FOLDERS = {
    "peft": ("adapter_model.safetensors", "adapter_config.json"),
    "torchtune": ("adapter_model.pt", "adapter_config.json"),
    "litgpt": ("lit_model.pth.lora", "hyperparameters.yaml"),
}
_MOST_PLACES, _MOST_LEVELS = 1_000_000, 32  # of values in a file's nested containers
_MOST_SHARED, _SMALL = 8, 256 << 20  # bytes of tensors for each of the file, and in any
_PICKLED = ("litgpt", "loralib", "original", "torchtune")


@own_context()
def load_adapter(
    model: nn.Module,
    path: PathLike,
    adapter: Optional[str] = None,
    *,
    strict: bool = True,
    alpha: Optional[float] = None,
    rank: Optional[int] = None,
    component: Optional[str] = None,
    split: int = 1,
    enable: Optional[tuple[bool, ...]] = None,
) -> nn.Module:
    """Attach the adapter in a file of paramlora or of another tool; all or nothing.

    The format is told by the content: PEFT, diffusers, kohya and LyCORIS, the original wrapper,
    loralib, litgpt, torchtune, cloneofsimo (see docs/checkpoints.md).

    Args:
        model: the model that it was trained for, or one with the same layers.
        path: the file, or a folder such as PEFT's.
        adapter: a name of your own instead of the file's.
        strict: tensors of the file that belong to nothing in the model are errors, not warnings.
        alpha, rank, component, split, enable: what some formats do not tell (see `Options`).

    Raises:
        FileError: the file is missing, damaged, of no known format, or does not fit the model.
        TargetError: a rank or kind of update that does not fit there.
        AdapterError: an adapter of that name is attached already.
    """
    options = Options(strict, rank, alpha, component, split, enable)
    found = read_adapter(path, base_of(model), options)
    if not strict:
        found = _without_strangers(found, model, Path(path).name)
    return attach_adapter(model, _within(found), adapter)


@own_context()
def read_adapter(
    path: PathLike, base: Optional[Base] = None, options: Options = DEFAULTS
) -> Adapter:
    """The adapter in a file of paramlora or of another tool.

    Args:
        path: the file, or a folder such as PEFT's.
        base: the names and shapes of the model, from `base_of` or `base_of_file`.
        options: what some formats do not tell.

    Raises:
        FileError: the file is missing, damaged, of no known format, or does not fit `base`.
    """
    outline = outlined(path)
    if formats.detect(outline) != NATIVE:
        return formats.read(opened(path), base, options)
    adapter = read_native(weights_in(path))
    check_finite(adapter, outline.source)  # all zero is how our own begin
    if base is None:
        return adapter
    known = {path: update for path, update in adapter.updates.items() if path in base}
    check_known(adapter.updates.keys() - known.keys(), base, options, outline.source)
    return replace(adapter, updates=known)


def format_of(path: PathLike) -> str:
    """The name of the format of an adapter's file, told by its content.

    Raises:
        FileError: it cannot be read, or is of no known format.
    """
    return formats.detect(outlined(path))


@own_context()
def base_of_file(path: PathLike, key: Optional[str] = None) -> Base:
    """The names and shapes of a checkpoint's weights, without reading them.

    Raises:
        FileError: it cannot be read.
    """
    with Stored(path, key) as stored:
        return base_of_shapes({name: spec.shape for name, spec in stored.specs.items()})


def convert(
    path: PathLike,
    out: PathLike,
    to: str,
    base: Optional[Base] = None,
    options: Options = DEFAULTS,
    *,
    force: bool = False,
    dry_run: bool = False,
    **how: Any,
) -> Adapter:
    """Write the adapter in a file as another tool's, and return it.

    Args:
        path: the file, or a folder such as PEFT's.
        out: the new file; a folder for PEFT, torchtune and litgpt.
        to: ``"native"``, or a name in `formats.WRITERS`.
        base: the names and shapes of the model, where a format needs them.
        options: what some formats do not tell.
        force: replace what is at `out`.
        dry_run: only check.
        how: as for `formats.write`.

    Raises:
        FileError: a file that cannot be read or written, or a layer that `to` cannot hold.
    """
    check_new(out, force or dry_run)
    _check_ending(Path(out), to)
    content = outlined(path)
    source = formats.detect(content)
    if base is None and source in formats.NAMELESS and source != to:
        raise FileError(
            f"{content.source}: {source}'s names of layers cannot be read back without the model. "
            "Give it (--model), or its checkpoint (--base)."
        )
    adapter = read_adapter(path, base, options)
    if to == NATIVE:
        if not dry_run:
            write_native(adapter, out)
        return adapter
    if source == NATIVE:
        check_holders(adapter, base)
    written = formats.write(adapter, to, base, **how)
    if not dry_run:
        _save(written, Path(out), to)
    return adapter


def opened(path: PathLike) -> Content:
    """The tensors, metadata and configuration of an adapter's file or folder.

    Raises:
        FileError: it cannot be read, or needs more than tensors and plain containers.
    """
    weights = weights_in(path)
    if is_pickled(head_of(weights)):
        return _content(weights, _flat(weights, pickles.load(weights)), {})
    file = SafeFile(weights)
    try:
        return _content(weights, file.every(), file.metadata)
    finally:
        file.close()


def outlined(path: PathLike) -> Content:
    """As `opened`, and the tensors of a safetensors file have no content: it was not read.

    Raises:
        FileError: as there.
    """
    weights = weights_in(path)
    if is_pickled(head_of(weights)):
        return opened(weights)
    file = SafeFile(weights)
    file.close()
    state = {
        key: torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        for key, spec in file.specs.items()
    }
    return _content(weights, state, file.metadata)


def _content(weights: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Content:
    return formats.unwrapped(Content(state, metadata, _beside(weights.parent), weights.name))


def weights_in(path: PathLike) -> Path:
    """The file of tensors that a path means: itself, or the one in a folder."""
    folder = Path(path)
    if not folder.is_dir():
        check_tensors(folder)
        return folder
    for name in _WEIGHTS:  # a pointer or a page under such a name is better told than passed over
        check_tensors(folder / name)
    try:
        there = sorted(folder.iterdir())
    except OSError as error:
        raise FileError(f"{folder}: cannot be read: {error.strerror}.") from error
    found = [file for file in there if file.is_file() and _is_weights(file)]
    known = [folder / name for name in _WEIGHTS if folder / name in found]
    if known or len(found) == 1:
        return (known or found)[0]
    names = ", ".join(file.name for file in found[:5]) or "none"
    raise FileError(
        f"{folder}: a folder needs one file of tensors, and has {names}. Name the file."
    )


def _is_weights(path: Path) -> bool:
    try:
        head = head_of(path)
    except FileError:
        return False
    return is_pickled(head) or head[8:] == b"{"


def _flat(path: Path, whole: Any) -> dict[str, Tensor]:
    """The tensors in nested containers, their keys joined by dots.

    One container may stand in many places, and so may what is inside it: both the places and the
    bytes that they stand for are counted, and no real file has so many.
    """
    out: dict[str, Tensor] = {}
    levels = [iter([("", whole)])]
    places = characters = size = 0
    while levels:
        for key, value in levels[-1]:
            places, characters = places + 1, characters + len(key)
            if places > _MOST_PLACES or characters > MOST_TEXT or len(levels) > _MOST_LEVELS:
                raise FileError(f"{path}: its containers hold more, or deeper, than any real file.")
            if isinstance(value, Tensor):
                pickles.checked_spec(path, key, value)
                out[key], size = value.detach(), size + value.nbytes
            elif isinstance(value, (Mapping, list, tuple)):
                levels.append(_items(key, value))
                break
        else:
            levels.pop()
    _check_shared(path, size)
    return out


def _items(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    start = f"{key}." if key else ""
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
    return ((f"{start}{name if isinstance(name, str) else spelled(name)}", v) for name, v in pairs)


def _check_shared(path: Path, size: int) -> None:
    """Refuse many tensors of the same few bytes: each of them would be worked on, and written."""
    there = path.stat().st_size
    if size > max(_MOST_SHARED * there, _SMALL):
        raise FileError(
            f"{path}: its tensors take {size:,} bytes, and share the {there:,} of the file. Save "
            "each with bytes of its own."
        )


def _beside(folder: Path) -> dict[str, Any]:
    """The configuration beside a file: PEFT's and torchtune's JSON, litgpt's YAML."""
    config: dict[str, Any] = {}
    readers: list[tuple[str, Callable[[str], Any]]] = [
        ("hyperparameters.yaml", _flat_yaml),
        ("adapter_config.json", parse_json),
    ]
    for name, read in readers:
        if os.path.lexists(folder / name):
            try:
                found = read(read_text(folder / name))
            except FileError:
                raise
            except ValueError as error:
                raise FileError(f"{folder / name}: cannot be read: {error}.") from error
            if not isinstance(found, dict):
                raise FileError(f"{folder / name}: a {type(found).__name__}, not an object.")
            config |= found
    return config


def _flat_yaml(text: str) -> dict[str, Any]:
    """The top level's plain values, which is where litgpt has LoRA's."""
    config: dict[str, Any] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon and name == name.strip() and value.strip():
            try:
                config[name] = parse_json(value.split(" #")[0])
            except ValueError:
                config[name] = value.strip()
    return config


def _without_strangers(adapter: Adapter, model: nn.Module, source: str) -> Adapter:
    """Without whole tensors that the model lacks; of updates `read_adapter` left none."""
    lost = adapter.whole.keys() - tensor_paths(model)
    report(source, "tensors of what the model does not have", lost, False, "They were left out.")
    if not adapter.updates and lost == adapter.whole.keys():
        raise FileError(f"{source}: nothing in it belongs to {type(model).__name__}.")
    return replace(adapter, whole={p: t for p, t in adapter.whole.items() if p not in lost})


def _within(adapter: Adapter) -> Adapter:
    made = {id(update): within(update) for update in adapter.updates.values()}
    return replace(adapter, updates={p: made[id(u)] for p, u in adapter.updates.items()})


def _check_ending(out: Path, to: str) -> None:
    """Refuse a name that says another kind of file than the one written."""
    pickled = to in _PICKLED
    if to not in _FOLDERS and out.suffix in (SAFE if pickled else PICKLED):
        kinds = "torch.save's", "safetensors"
        own, other = kinds if pickled else kinds[::-1]
        right = ".pt" if pickled else ".safetensors"
        raise FileError(
            f"{out}: {to}'s file would be {own}, under a name of {other}. Give a name that ends in "
            f"{right}."
        )


def _save(content: Content, out: Path, to: str) -> None:
    if to not in _FOLDERS:
        with new_file(out) as file:
            _fill(content, to, file)
        return
    weights, config = _FOLDERS[to]
    with new_folder(out, [weights, config]) as folder:
        (folder / config).write_text(_text(content.config, config), encoding="utf-8")
        with open(folder / weights, "wb") as file:
            _fill(content, to, file)


def _fill(content: Content, to: str, file: BinaryIO) -> None:
    if to in _PICKLED:
        state: Any = _apart(content.state)
        whole = {"model": state} if to == "litgpt" else state
        pickles.save(whole, file, lambda count: None)
    else:
        specs = {key: spec_of(tensor) for key, tensor in content.state.items()}
        # not the library, which writes metadata in another order each time
        write_safetensors(file, specs, content.metadata, lambda k: pieces_of(content.state[k]))


def _text(config: Mapping[str, Any], name: str) -> str:
    if name.endswith(".json"):
        return json.dumps(config, indent=2) + "\n"
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in config.items())


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor in memory of its own, whole: files hold no views and no shared ones."""
    return {key: tensor.detach().clone().contiguous() for key, tensor in state.items()}
