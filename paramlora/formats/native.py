"""The native format: one safetensors file that describes itself."""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from pathlib import PurePath
from typing import Any, Optional, Union

from torch import Tensor, float32, int64, isfinite, tensor

from paramlora.checkpoint.recipes import check_types, fits_shape
from paramlora.config import LoRAConfig, TargetConfig, parsed
from paramlora.config.reading import parse_json
from paramlora.errors import ConfigError, FileError, listed, spelled
from paramlora.formats.base import Base
from paramlora.formats.content import DEFAULTS, Content, Options
from paramlora.formats.format import Format, Mark
from paramlora.model.match import Names
from paramlora.model.targets import as_pattern, own_path, specificity
from paramlora.update.geometry import LAYOUTS, MOST_SIDE, Layout, matrix_shape, possible
from paramlora.update.names import LOW_RANK, WHOLE
from paramlora.update.value import Adapter, Holder, Update

NATIVE, FORMAT_VERSION = "native", 1  # its name, and the version of what is written
_ROOT = "weight"  # names the empty path in a configuration
_PLAIN = re.compile(r"(?!re:)[^*]+")  # a path that means itself as a name of a configuration
_Holders = dict[str, Holder]
_Place = Union[str, PurePath]  # of a file, for messages
_Shapes = dict[str, tuple[Optional[tuple[int, ...]], Layout, int, Optional[str]]]


def read(content: Content, base: Optional[Base] = None, options: Options = DEFAULTS) -> Adapter:
    """The adapter in a native file, which needs neither a model nor options.

    Raises:
        FileError: its tensors or its metadata are damaged.
    """
    return native_of(content.path or content.source, content.metadata, content.state)


def write(adapter: Adapter, base: Optional[Base] = None, **_: Any) -> Content:
    """An adapter with all that it has, and its metadata.

    Raises:
        FileError: `read` would refuse it.
    """
    return Content(*described(adapter, "adapter"))


def _check(content: Content) -> None:
    checked_entries(content.path or content.source, content.metadata, content.state)


def described(adapter: Adapter, path: _Place) -> tuple[dict[str, Tensor], dict[str, str]]:
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
        "format": FORMAT_VERSION,
        "adapter": adapter.name,
        "config": LoRAConfig(tuple(_entry(*item) for item in own.items())).to_dict(),
        "shapes": {path: _weight(v) for path, v in own.items() if _shape(v) is not None},
        "ties": {path: head for path, head in ties.items() if path != head},
        "base": dict(adapter.base),
        "holders": {path: asdict(holder) for path, holder in adapter.holders.items()},
    }
    metadata = {**adapter.metadata, "paramlora": json.dumps(about)}
    state = {key: value for item in own.items() for key, value in _tensors(*item).items()}
    _check_readable(PurePath(path), metadata, state, values)
    return state, metadata


def native_of(path: _Place, metadata: Mapping[str, str], state: Mapping[str, Tensor]) -> Adapter:
    """The adapter in a native file that was read already; `path` is for messages."""
    path = PurePath(path)
    about, entries = checked_entries(path, metadata, state)
    shapes, ties, holders = _shapes(path, about), _ties(path, about), _holders(path, about)
    updates = {s: _update(path, s, state, e, shapes) for s, e in entries.items() if not e.whole}
    whole = {s: state[_key(s, WHOLE)] for s, e in entries.items() if e.whole}
    for stem, one in whole.items():
        if one.dtype != int64:  # of BatchNorm's counts
            check_types(f"{path}: {_key(stem, WHOLE)}", one)
    updates |= {tied: updates[head] for tied, head in ties.items() if head in updates}
    whole |= {tied: whole[head] for tied, head in ties.items() if head in whole}
    rest = {key: value for key, value in metadata.items() if key != "paramlora"}
    return Adapter(
        updates, str(about["adapter"]), rest, whole, base=_base(path, about), holders=holders
    )


def _base(path: PurePath, about: Mapping[str, Any]) -> dict[str, str]:
    """What tells the base, by path; empty in files from before it was written."""
    told = about.get("base", {})
    sound = isinstance(told, dict) and all(
        isinstance(one, str) and re.fullmatch("([0-9a-f]{4}){1,16}", one) for one in told.values()
    )
    if not sound:
        raise FileError(f'{path}: the "base" in its metadata is damaged.')
    return dict(told)


def _check_value(path: _Place, stem: str, value: Union[Update, Tensor]) -> None:
    """Refuse what `load_adapter` would refuse, before an older file is replaced."""
    for key, one in _tensors(stem, value).items():
        if one.is_floating_point() and not isfinite(one).all():
            bad = one[~isfinite(one)].flatten()[0].item()
            raise FileError(
                f"{path}: {key} is not finite ({bad}), and no file of that could be "
                "loaded. Nothing was written; save it from before training diverged."
            )


def _check_readable(
    path: PurePath,
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
    path: _Place, metadata: Mapping[str, str], state: Collection[str]
) -> tuple[dict[str, Any], dict[str, TargetConfig]]:
    """What the metadata tells, and the entry of each path, which the tensors' names must be of."""
    path = PurePath(path)
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
    return (WHOLE,) if entry.whole else LOW_RANK


def _tensors(stem: str, value: Union[Update, Tensor]) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {_key(stem, WHOLE): value}
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
    path: PurePath, stem: str, state: Mapping[str, Tensor], entry: TargetConfig, shapes: _Shapes
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


def _shapes(path: PurePath, about: Mapping[str, Any]) -> _Shapes:
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


def _ties(path: PurePath, about: Mapping[str, Any]) -> dict[str, str]:
    ties = about.get("ties", {})
    if not isinstance(ties, dict) or not all(isinstance(head, str) for head in ties.values()):
        raise FileError(f'{path}: the "ties" in its metadata are damaged.')
    return ties


def _holders(path: PurePath, about: Mapping[str, Any]) -> _Holders:
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
    path: PurePath, config: LoRAConfig, state: Iterable[str], told: bool
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


def _named(path: PurePath, entry: TargetConfig, names: Names) -> set[str]:
    """The names of tensors and layers that an entry of an old file means."""
    inside = r"(?:\..*)?" if entry.whole else ""  # it also names what it contains
    try:
        return names.matching(f"(?:{as_pattern(entry.name)}){inside}")
    except ValueError as error:
        raise FileError(f"{path}: its pattern {error}. Save it again, with plain names.") from error


def _about(path: PurePath, metadata: Mapping[str, str]) -> tuple[dict[str, Any], LoRAConfig]:
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
    if version != FORMAT_VERSION:
        raise FileError(
            f"{path}: format {spelled(version)}; this paramlora reads {FORMAT_VERSION}. Upgrade it."
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


FORMAT = Format(
    NATIVE,
    marks=(Mark(0, lambda content: "paramlora" in content.metadata),),
    read=read,
    write=write,
    weights=("adapter.safetensors",),
    weights_rank=50,
    complete=True,
    check=_check,
)
