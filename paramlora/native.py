"""The native adapter file: one safetensors file that describes itself."""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional, Union

from torch import Tensor, float32, int64, isfinite, nn, tensor

from paramlora.adapter import Adapter, Holder, Update
from paramlora.config import LoRAConfig, TargetConfig, parsed
from paramlora.contexts import own_context
from paramlora.disk import PathLike, new_file
from paramlora.errors import ConfigError, FileError, listed, spelled
from paramlora.geometry import LAYOUTS, Layout, matrix_shape
from paramlora.mistaken import check_tensors
from paramlora.patterns import Names
from paramlora.plan import check_types, fits_shape
from paramlora.reading import parse_json
from paramlora.sharded import is_sharded, wait, writes
from paramlora.state import LOW_RANK, adapter_of, adapter_state_dict
from paramlora.statistics import warn_moved
from paramlora.stream import MOST_SIDE, SafeFile, pieces_of, possible, spec_of, write_safetensors
from paramlora.targets import as_pattern, own_path, specificity

NATIVE, FORMAT = "native", 1  # its name, and the version of what is written
_WHOLE, _ROOT = "lora_whole", "weight"  # _ROOT names the empty path in a configuration
_PLAIN = re.compile(r"(?!re:)[^*]+")  # a path that means itself as a name of a configuration
_Holders = dict[str, Holder]
_Shapes = dict[str, tuple[Optional[tuple[int, ...]], Layout, int, Optional[str]]]


@own_context()
def save_adapter(model: nn.Module, path: PathLike, adapter: str = "default") -> None:
    """Write one adapter and its configuration; an older file at `path` survives a failure.

    The file holds the tensors of `adapter_state_dict` and describes itself in its metadata
    (see `write_native`): `load_adapter` needs nothing else. Where the adapter is sharded over
    processes all of them call this; the first one writes.

    Raises:
        AdapterError: `adapter` is not attached.
        FileError: the file cannot be written, its name ends in something other than
            ``.safetensors``, or `load_adapter` would refuse it: numbers that are not finite.
    """
    warn_moved(model)
    live = adapter_state_dict(model, adapter)
    for key, one in live.items():
        if one.is_meta:
            raise FileError(
                f"{path}: {key} lies on the meta device, without values. Load the model first. "
                "Nothing was written."
            )
    together = any(map(is_sharded, live.values()))
    value = adapter_of(model, adapter)
    if not together or writes():
        write_native(value, path)
    if together:
        wait()


@own_context()
def write_native(adapter: Adapter, path: PathLike) -> None:
    """Write an adapter as the native file, whole or not at all.

    Keys are ``<path>.lora_A``, ``.lora_B``, ``.lora_scale``, or ``.lora_whole``. The metadata
    keeps `adapter`'s own and adds ``paramlora``, JSON of ``format``, ``adapter`` (its name),
    ``config`` (an entry for each path), ``shapes`` (``{path: {"shape": [...], "layout": "..."}}``,
    of the weights, with ``kind`` and ``groups``), ``base`` (``{path: digits}``, see
    `paramlora.digest`), ``ties`` (``{path: first path}`` where tied tensors share one update) and
    ``holders`` (``{path: {"kind", "layout", "groups"}}`` of the layers of those that are tied,
    where known).

    Raises:
        FileError: the file cannot be written, or `read_native` would refuse it.
    """
    _check_name(path)
    state, metadata = described(adapter, path)
    specs = {key: spec_of(value) for key, value in state.items()}
    with new_file(path) as file:
        write_safetensors(file, specs, metadata, lambda key: pieces_of(state[key]))


def described(adapter: Adapter, path: PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of an adapter's native file.

    Args:
        adapter: with all that it has.
        path: of the file, for messages.

    Raises:
        FileError: `read_native` would refuse it.
    """
    values: dict[str, Union[Update, Tensor]] = {**adapter.updates, **adapter.whole}
    for stem, value in values.items():
        _check_value(path, stem, value)
    first: dict[int, str] = {}
    ties = {path: first.setdefault(id(value), path) for path, value in values.items()}
    own = {path: value for path, value in values.items() if ties[path] == path}
    about = {
        "format": FORMAT,
        "adapter": adapter.name,
        "config": LoRAConfig(tuple(_entry(*item) for item in own.items())).to_dict(),
        "shapes": {path: _weight(v) for path, v in own.items() if _shape(v) is not None},
        "ties": {path: head for path, head in ties.items() if path != head},
        "base": dict(adapter.base),
        "holders": {path: asdict(holder) for path, holder in adapter.holders.items()},
    }
    metadata = {**adapter.metadata, "paramlora": json.dumps(about)}
    state = {key: value for item in own.items() for key, value in _tensors(*item).items()}
    _check_readable(Path(path), metadata, state, values)
    return state, metadata


@own_context()
def read_native(path: PathLike) -> Adapter:
    """The adapter in a native file.

    Files without ``shapes`` (written before there were any) give updates without a shape.

    Raises:
        FileError: missing, truncated, written by another tool, or not whole.
    """
    check_tensors(Path(path))
    file = SafeFile(Path(path))
    try:
        checked_entries(file.path, file.metadata, file.specs)  # before anything is read
        return native_of(file.path, file.metadata, file.every())
    finally:
        file.close()


def native_of(path: PathLike, metadata: Mapping[str, str], state: Mapping[str, Tensor]) -> Adapter:
    """The adapter in a native file that was read already; `path` is for messages."""
    path = Path(path)
    about, entries = checked_entries(path, metadata, state)
    shapes, ties, holders = _shapes(path, about), _ties(path, about), _holders(path, about)
    updates = {s: _update(path, s, state, e, shapes) for s, e in entries.items() if not e.whole}
    whole = {s: state[_key(s, _WHOLE)] for s, e in entries.items() if e.whole}
    for stem, one in whole.items():
        if one.dtype != int64:  # of BatchNorm's counts
            check_types(f"{path}: {_key(stem, _WHOLE)}", one)
    updates |= {tied: updates[head] for tied, head in ties.items() if head in updates}
    whole |= {tied: whole[head] for tied, head in ties.items() if head in whole}
    rest = {key: value for key, value in metadata.items() if key != "paramlora"}
    return Adapter(
        updates, str(about["adapter"]), rest, whole, base=_base(path, about), holders=holders
    )


def _base(path: Path, about: Mapping[str, Any]) -> dict[str, str]:
    """What tells the base, by path; empty in files from before it was written."""
    told = about.get("base", {})
    sound = isinstance(told, dict) and all(
        isinstance(one, str) and re.fullmatch("([0-9a-f]{4}){1,16}", one) for one in told.values()
    )
    if not sound:
        raise FileError(f'{path}: the "base" in its metadata is damaged.')
    return dict(told)


def _check_name(path: PathLike) -> None:
    if Path(path).suffix in (".pt", ".pth", ".ckpt", ".bin"):
        raise FileError(
            f"{path}: it would be a safetensors file under a name of torch.save's. Give a name "
            "that ends in .safetensors."
        )


def _check_value(path: PathLike, stem: str, value: Union[Update, Tensor]) -> None:
    """Refuse what `load_adapter` would refuse, before an older file is replaced."""
    for key, one in _tensors(stem, value).items():
        if one.is_floating_point() and not isfinite(one).all():
            bad = one[~isfinite(one)].flatten()[0].item()
            raise FileError(
                f"{path}: {key} is not finite ({bad}), and no file of that could be "
                "loaded. Nothing was written; save it from before training diverged."
            )


def _check_readable(
    path: Path,
    metadata: Mapping[str, str],
    state: Mapping[str, Tensor],
    values: Mapping[str, Union[Update, Tensor]],
) -> None:
    """Read back what is to be written, since a file that cannot be read is a training lost."""
    try:
        "".join([*state, *metadata, *metadata.values()]).encode()
    except UnicodeEncodeError as error:
        name = repr(error.object[max(0, error.start - 20) : error.end])
        raise FileError(f"{path}: {name} is no text that a file can hold. Rename it.") from error
    again = native_of(path, metadata, state)
    if (again.updates | again.whole).keys() != values.keys():  # type: ignore[operator]
        raise FileError(f"{path}: the names of its tensors could not be read back.")


def checked_entries(
    path: PathLike, metadata: Mapping[str, str], state: Collection[str]
) -> tuple[dict[str, Any], dict[str, TargetConfig]]:
    """What the metadata tells, and the entry of each path, which the tensors' names must be of."""
    path = Path(path)
    about, config = _about(path, metadata)
    entries = _entries(path, config, state, told="shapes" in about)
    wanted = {_key(stem, name) for stem, e in entries.items() for name in _names(e)}
    missing, unexpected = sorted(wanted - set(state)), sorted(set(state) - wanted)
    if missing or unexpected:
        raise FileError(
            f"{path}: its tensors do not match its metadata: missing: {listed(missing) or 'none'}; "
            f"unexpected: {listed(unexpected) or 'none'}. Copy or save it again."
        )
    return about, entries


def _key(stem: str, name: str) -> str:
    return f"{stem}.{name}" if stem else name


def _names(entry: TargetConfig) -> tuple[str, ...]:
    return (_WHOLE,) if entry.whole else LOW_RANK


def _tensors(stem: str, value: Union[Update, Tensor]) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {_key(stem, _WHOLE): value}
    # a 16-bit scale would not survive
    kind = value.lora_A.dtype if value.lora_A.dtype.itemsize > 2 else float32
    all_three = (value.lora_A, value.lora_B, tensor(value.scale, dtype=kind))
    return {_key(stem, name): one for name, one in zip(LOW_RANK, all_three)}


def _entry(path: str, value: Union[Update, Tensor]) -> TargetConfig:
    name = _name(path)
    return TargetConfig(name, 0, whole=True) if isinstance(value, Tensor) else value.entry(name)


def _name(path: str) -> str:
    """The name in a configuration of exactly what is at a path.

    A pattern where the path itself would mean something else: the model's own ``weight``, another
    key of the configuration, a pattern.
    """
    if not path:
        return _ROOT
    plain = _PLAIN.fullmatch(path) and path not in (_ROOT, "trainable_model")
    return path if plain else f"re:{re.escape(path)}"


def _shape(value: Union[Update, Tensor]) -> Optional[tuple[int, ...]]:
    return None if isinstance(value, Tensor) else value.shape


def _weight(value: Union[Update, Tensor]) -> dict[str, Any]:
    if isinstance(value, Tensor):
        return {"shape": [], "layout": "matrix"}
    about = {"shape": list(value.shape or ()), "layout": value.layout, "groups": value.groups}
    return about if value.kind is None else {**about, "kind": value.kind}


def _update(
    path: Path, stem: str, state: Mapping[str, Tensor], entry: TargetConfig, shapes: _Shapes
) -> Update:
    a, b, scale = (state[_key(stem, name)] for name in LOW_RANK)
    check_types(f"{path}: {stem or 'weight'}", a, b, scale)
    if min(a.dim(), b.dim()) < 2 or 0 in (a.numel(), b.numel()) or scale.numel() != 1:
        raise FileError(f"{path}: {stem or 'weight'} is no update: its factors are no matrices.")
    exact = float(tensor(entry.scale, dtype=scale.dtype)) == float(scale)
    by_factors: Layout = "stack" if a.dim() == 3 else "matrix"
    shape, layout, groups, kind = shapes.get(stem, (None, by_factors, 1, None))
    update = Update(
        a,
        b,
        entry.scale if exact else float(scale),
        shape,
        layout,
        entry.trainable_scale,
        entry.hard,
        entry.up_kernel,
        dropout=entry.dropout,
        adapter_dtype=entry.adapter_dtype,
        kind=kind,
        groups=groups,
    )
    if shape is not None:
        _check_fits(f"{path}: {stem}", update, shape)
    return update


def _check_fits(where: str, update: Update, shape: tuple[int, ...]) -> None:
    """Refuse factors of another weight than the metadata tells of, which anything may be."""
    a = update.lora_A
    if fits_shape(update, shape, update.layout) and shape[0] % update.groups == 0:
        return
    if len(shape) >= 2 and a.shape[-1] != (wanted := matrix_shape(shape, update.layout)[2]):
        raise FileError(
            f"{where}.lora_A: shape {list(a.shape)} does not fit {[*a.shape[:-1], wanted]}, of the "
            f"weight of {list(shape)} in its metadata. Save it again."
        )
    raise FileError(
        f"{where}: factors of {list(a.shape)} and {list(update.lora_B.shape)} do not fit the shape "
        f"{list(shape)} in its metadata. Save it again."
    )


def _shapes(path: Path, about: Mapping[str, Any]) -> _Shapes:
    """The weights' shapes and layouts, by path; empty in files from before they were written."""
    out: _Shapes = {}
    try:
        for stem, told in about.get("shapes", {}).items():
            shape, layout = tuple(told["shape"]), told["layout"]
            groups, kind = told.get("groups", 1), told.get("kind")
            counts = all(type(n) is int and 0 < n <= MOST_SIDE for n in (*shape, groups))
            if (
                not counts
                or not possible(shape)
                or layout not in LAYOUTS
                or not isinstance(kind, (str, type(None)))
            ):
                raise ValueError(f"{stem}: no shape and layout of a weight")
            out[stem] = (shape, layout, groups, kind)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f'{path}: the "shapes" in its metadata are damaged: {error}.') from error
    return out


def _ties(path: Path, about: Mapping[str, Any]) -> dict[str, str]:
    ties = about.get("ties", {})
    if not isinstance(ties, dict) or not all(isinstance(head, str) for head in ties.values()):
        raise FileError(f'{path}: the "ties" in its metadata are damaged.')
    return ties


def _holders(path: Path, about: Mapping[str, Any]) -> _Holders:
    """The kinds of layers that hold tied tensors; empty in files from before they were written."""
    out: _Holders = {}
    try:
        for stem, told in about.get("holders", {}).items():
            holder = Holder(told["kind"], told["layout"], told["groups"])
            sound = type(holder.groups) is int and holder.groups > 0 and holder.layout in LAYOUTS
            if not sound or not isinstance(holder.kind, str):
                raise ValueError(f"{stem}: no layer")
            out[stem] = holder
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f'{path}: the "holders" in its metadata are damaged: {error}.') from error
    return out


def _entries(
    path: Path, config: LoRAConfig, state: Iterable[str], told: bool
) -> dict[str, TargetConfig]:
    """The entry of each path; by the patterns, in files from before the paths were told."""
    stems = dict.fromkeys(key.rpartition(".")[0] for key in state)
    if told:
        known = {_name(stem): stem for stem in stems}
        if "" not in stems:  # 0.1.0 wrote a layer called "weight" under that name
            known[_ROOT] = _ROOT
        return {known.get(e.name, e.name): e for e in config.entries}
    meant: dict[str, list[str]] = {}  # the stems by the names of their layers and tensors
    for stem in stems:
        for name in dict.fromkeys((stem, f"{stem}.weight" if stem else _ROOT)):
            meant.setdefault(own_path(name), []).append(stem)
    names = Names(meant)
    entries: dict[str, TargetConfig] = {}
    for entry in sorted(config.entries, key=lambda entry: -specificity(entry.name)):
        for name in _named(path, entry, names):
            for stem in meant[name]:
                entries.setdefault(stem, entry)
    lost = [stem for stem in stems if stem not in entries]
    if lost:
        raise FileError(f'{path}: no entry of its configuration names "{lost[0]}". Save it again.')
    return entries


def _named(path: Path, entry: TargetConfig, names: Names) -> set[str]:
    """The names of tensors and layers that an entry of an old file means."""
    inside = r"(?:\..*)?" if entry.whole else ""  # it also names what it contains
    try:
        return names.matching(f"(?:{as_pattern(entry.name)}){inside}")
    except ValueError as error:
        raise FileError(f"{path}: its pattern {error}. Save it again, with plain names.") from error


def _about(path: Path, metadata: Mapping[str, str]) -> tuple[dict[str, Any], LoRAConfig]:
    if "paramlora" not in metadata:
        raise FileError(
            f'{path}: no "paramlora" in its metadata, so another tool wrote it. Convert it '
            "first (paramlora convert --to native)."
        )
    try:
        about: dict[str, Any] = parse_json(metadata["paramlora"])
        version, _, _ = about["format"], about["adapter"], about["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(f'{path}: its "paramlora" metadata is damaged: {error}.') from error
    if version != FORMAT:
        raise FileError(
            f"{path}: format {spelled(version)}; this paramlora reads {FORMAT}. Upgrade it."
        )
    try:
        return about, parsed(_escaped(about["config"]), path.name)
    except ConfigError as error:
        raise FileError(f"{path}: its configuration is damaged: {error}") from error


def _escaped(config: Any) -> Any:
    """The configuration in a file, where 0.1.0 wrote a layer called ``trainable_model`` over a key
    of its own."""
    if not isinstance(config, Mapping) or not isinstance(config.get("trainable_model"), Mapping):
        return config
    own = _name("trainable_model")
    return {own if name == "trainable_model" else name: entry for name, entry in config.items()}
