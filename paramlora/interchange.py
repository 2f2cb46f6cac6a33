"""Adapter files of any tool on disk: opened, loaded onto a model, converted."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Optional

from safetensors.torch import save
from torch import Tensor, nn

from paramlora import formats, pickles
from paramlora.adapter import Adapter
from paramlora.contexts import own_context
from paramlora.disk import PathLike, check_new, new_file, new_folder
from paramlora.errors import FileError
from paramlora.formats import Base, Content, Options, base_of, base_of_shapes
from paramlora.formats.base import check_holders, check_known
from paramlora.formats.content import DEFAULTS, check_finite, report
from paramlora.formats.factors import within
from paramlora.mistaken import check_tensors
from paramlora.native import native_of, write_native
from paramlora.state import attach_adapter
from paramlora.stored import PICKLED, SAFE, Stored
from paramlora.stream import SafeFile
from paramlora.targets import tensor_paths

NATIVE = "native"
# the weights in a folder, the best first: torchtune writes PEFT's form beside its own
_WEIGHTS = (
    "adapter_model.safetensors adapter_model.bin adapter_model.pt "
    "pytorch_lora_weights.safetensors pytorch_lora_weights.bin lit_model.pth.lora"
).split()
# formats that are a folder: the weights and the configuration beside them
_FOLDERS = {
    "peft": ("adapter_model.safetensors", "adapter_config.json"),
    "torchtune": ("adapter_model.pt", "adapter_config.json"),
    "litgpt": ("lit_model.pth.lora", "hyperparameters.yaml"),
}
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
    weights = weights_in(path)
    state, metadata = _read(weights)
    content = _content(weights, state, metadata)
    if formats.detect(content) != NATIVE:
        return formats.read(content, base, options)
    adapter = native_of(weights, metadata, state)
    check_finite(adapter, content.source)  # all zero is how our own begin
    if base is None:
        return adapter
    known = {path: update for path, update in adapter.updates.items() if path in base}
    check_known(adapter.updates.keys() - known.keys(), base, options, content.source)
    return replace(adapter, updates=known)


def format_of(path: PathLike) -> str:
    """The name of the format of an adapter's file, told by its content.

    Raises:
        FileError: it cannot be read, or is of no known format.
    """
    return formats.detect(opened(path))


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
    content = opened(path)
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
    return _content(weights, *_read(weights))


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
    found = [file for file in sorted(folder.iterdir()) if file.is_file() and _is_weights(file)]
    known = [folder / name for name in _WEIGHTS if folder / name in found]
    if known or len(found) == 1:
        return (known or found)[0]
    names = ", ".join(file.name for file in found[:5]) or "none"
    raise FileError(
        f"{folder}: a folder needs one file of tensors, and has {names}. Name the file."
    )


def _is_weights(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(9)
    return head[:4] == b"PK\x03\x04" or head[:1] == b"\x80" or head[8:] == b"{"


def _read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}.") from error
    if head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[8:] != b"{"):
        return dict(_flat(path, pickles.load(path))), {}
    file_ = SafeFile(path)
    try:
        return {key: file_.read(key) for key in file_.specs}, file_.metadata
    finally:
        file_.close()


def _flat(path: Path, value: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested containers, their keys joined by dots."""
    if isinstance(value, Tensor):
        key = prefix.removesuffix(".")
        pickles.checked_spec(path, key, value)
        yield key, value.detach()
        return
    if isinstance(value, Mapping):
        parts = ((str(key), item) for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        parts = ((str(key), item) for key, item in enumerate(value))
    else:
        return
    for key, item in parts:
        yield from _flat(path, item, f"{prefix}{key}.")


def _beside(folder: Path) -> dict[str, Any]:
    """The configuration beside a file: PEFT's and torchtune's JSON, litgpt's YAML."""
    config: dict[str, Any] = {}
    readers: list[tuple[str, Callable[[str], Any]]] = [
        ("hyperparameters.yaml", _flat_yaml),
        ("adapter_config.json", json.loads),
    ]
    for name, read in readers:
        if (folder / name).is_file():
            try:
                found = read((folder / name).read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
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
                config[name] = json.loads(value.split(" #")[0])
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
    state: Any = _apart(content.state)
    if to in _PICKLED:
        whole = {"model": state} if to == "litgpt" else state
        pickles.save(whole, file, lambda count: None)
    else:
        file.write(save(state, dict(content.metadata)))


def _text(config: Mapping[str, Any], name: str) -> str:
    if name.endswith(".json"):
        return json.dumps(config, indent=2) + "\n"
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in config.items())


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor in memory of its own, whole: files hold no views and no shared ones."""
    return {key: tensor.detach().clone().contiguous() for key, tensor in state.items()}
