"""The native format: one safetensors file that describes itself."""

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import PurePath
from typing import Any, Optional, Union

from torch import Tensor, isfinite

from paramlora.config import KINDS, LoRAConfig, TargetConfig, parsed
from paramlora.config.reading import parse_json
from paramlora.errors import ConfigError, FileError, listed, spelled
from paramlora.formats.base import Base
from paramlora.formats.content import DEFAULTS, Content, Options
from paramlora.formats.format import Format, Mark
from paramlora.model.match import Names
from paramlora.model.targets import as_pattern, own_path, specificity
from paramlora.update.attached import AttachedUpdate, Told
from paramlora.update.geometry import LAYOUTS, MOST_SIDE, Layout, possible
from paramlora.update.kinds import KINDS as KNOWN
from paramlora.update.kinds import kind_of
from paramlora.update.value import Adapter, Holder, Value, apart_by_kind

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
        FileError: `native_of` would refuse it.
    """
    values = adapter.values()
    for stem, value in values.items():
        _check_value(path, stem, value)
    # tied layers share one value: it is stored once, and the others name its path
    first: dict[int, str] = {}
    ties = {path: first.setdefault(id(value), path) for path, value in values.items()}
    own = {path: value for path, value in values.items() if ties[path] == path}
    about = {
        "format": FORMAT_VERSION,
        "adapter": adapter.name,
        "config": LoRAConfig(tuple(v.entry(_name(path)) for path, v in own.items())).to_dict(),
        # of factors alone the weight's shape could not be told; a whole tensor tells its own
        "shapes": {p: v.about() for p, v in own.items() if v.shape is not None and not v.alone},
        "ties": {path: head for path, head in ties.items() if path != head},
        "base": dict(adapter.base),
        "holders": {path: asdict(holder) for path, holder in adapter.holders.items()},
        "apart": dict(adapter.apart),
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
    values = {stem: _value(path, stem, state, e, shapes) for stem, e in entries.items()}
    values |= {tied: values[head] for tied, head in ties.items() if head in values}
    # other people's, which goes with the adapter into the next file
    rest = {key: value for key, value in metadata.items() if key != "paramlora"}
    return Adapter(
        name=str(about["adapter"]),
        metadata=rest,
        base=_base(path, about),
        holders=holders,
        apart=_apart(path, about),
        **apart_by_kind(values),
    )


def _base(path: PurePath, about: Mapping[str, Any]) -> dict[str, str]:
    """What tells the base, by path; empty in files from before it was written."""
    told = about.get("base", {})
    sound = isinstance(told, dict) and all(
        isinstance(one, str) and re.fullmatch("([0-9a-f]{4}){1,16}", one) for one in told.values()
    )
    if not sound:
        raise FileError(f'{path}: the "base" in its metadata is damaged. Copy or save it again.')
    return dict(told)


def _check_value(path: _Place, stem: str, value: Value) -> None:
    """Refuse what `load_adapter` would refuse, before an older file is replaced."""
    scale = value.listed()[1]
    # stored in the factors' type: 1e39 is finite in Python and not in float32
    held = value.stored().get("lora_scale")
    if held is not None and math.isfinite(scale) and not isfinite(held):
        raise FileError(
            f"{path}: the scale of {stem or 'weight'}, {scale:g}, is beyond {held.dtype}, in which "
            "it would be stored. Nothing was written; give a smaller scale or weight."
        )
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
    values: Mapping[str, Value],
) -> None:
    """Read back what is to be written, since a file that cannot be read is a training lost."""
    try:
        "".join([*state, *metadata, *metadata.values()]).encode()
    except UnicodeEncodeError as error:
        name = repr(error.object[max(0, error.start - 20) : error.end])
        raise FileError(f"{path}: {name} is no text that a file can hold. Rename it.") from error
    again = native_of(path, metadata, state)
    if again.values().keys() != values.keys():
        raise FileError(
            f"{path}: the names of its tensors could not be read back. Rename its layers, and "
            "report this."
        )


def checked_entries(
    path: _Place, metadata: Mapping[str, str], state: Collection[str]
) -> tuple[dict[str, Any], dict[str, TargetConfig]]:
    """What the metadata tells, and the entry of each path, which the tensors' names must be of."""
    return _checked(PurePath(path), metadata.get("paramlora"), tuple(state), tuple(KNOWN.values()))


@lru_cache(maxsize=1)  # asked before the tensors are read, and again with them
def _checked(
    path: PurePath,
    told: Optional[str],
    state: tuple[str, ...],
    kinds: tuple[type[AttachedUpdate], ...],
) -> tuple[dict[str, Any], dict[str, TargetConfig]]:
    about, config = _about(path, told)
    entries = _entries(path, config, state, told="shapes" in about)
    there = _names_there(state)
    needed = {
        _key(stem, name)
        for stem, entry in entries.items()
        for name in kind_of(entry).names(there.get(stem, ()))
    }
    missing, unexpected = sorted(needed - set(state)), sorted(set(state) - needed)
    if missing or unexpected:
        raise FileError(
            f"{path}: its tensors do not match its metadata: missing: {listed(missing) or 'none'}; "
            f"unexpected: {listed(unexpected) or 'none'}. Copy or save it again."
        )
    return about, entries


def _key(stem: str, name: str) -> str:
    return f"{stem}.{name}" if stem else name


def _names_there(state: Iterable[str]) -> dict[str, set[str]]:
    """The names of a file's tensors, by the path of what they update."""
    there: dict[str, set[str]] = {}
    for key in state:
        stem, _, name = key.rpartition(".")
        there.setdefault(stem, set()).add(name)
    return there


def _tensors(stem: str, value: Value) -> dict[str, Tensor]:
    return {_key(stem, name): one for name, one in value.stored().items()}


def _name(path: str) -> str:
    """The name in a configuration of exactly what is at a path.

    A pattern where the path itself would mean something else: the model's own ``weight``, another
    key of the configuration, a pattern.
    """
    if not path:
        return _ROOT
    plain = _PLAIN.fullmatch(path) and path not in (_ROOT, "trainable_model")
    return path if plain else f"re:{re.escape(path)}"


def _value(
    path: PurePath, stem: str, state: Mapping[str, Tensor], entry: TargetConfig, shapes: _Shapes
) -> Value:
    kind = kind_of(entry)
    start = f"{stem}." if stem else ""
    own = {key.removeprefix(start): tensor for key, tensor in _under(state, start, kind).items()}
    shape, layout, groups, known = shapes.get(stem, (None, None, 1, None))
    told = Told(shape, layout, groups, known)
    return kind.read_file(f"{path}: {stem or 'weight'}", own, entry, told)


def _under(
    state: Mapping[str, Tensor], start: str, kind: type[AttachedUpdate]
) -> dict[str, Tensor]:
    """The tensors of one update."""
    keys = (f"{start}{name}" for name in kind.parts)
    return {key: state[key] for key in keys if key in state}


def _shapes(path: PurePath, about: Mapping[str, Any]) -> _Shapes:
    """The weights' shapes and layouts, by path; empty in files from before they were written."""
    out: _Shapes = {}
    try:
        for stem, told in _objects(about, "shapes"):
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
        raise _damaged(path, "shapes", error) from error
    return out


def _objects(about: Mapping[str, Any], name: str) -> Iterable[tuple[str, dict[str, Any]]]:
    """What the metadata tells by path, each an object."""
    told = about.get(name, {})
    for one in [told, *told.values()] if isinstance(told, dict) else [told]:
        if not isinstance(one, dict):
            raise ValueError(f"{spelled(one)}, where an object belongs")
    return told.items()  # type: ignore[no-any-return]


def _damaged(path: PurePath, name: str, error: Exception) -> FileError:
    """What is wrong with a part of the metadata, without Python's words for it."""
    other = "a value of another kind than belongs there"
    reason = f"no {error}" if isinstance(error, KeyError) else other
    reason = str(error) if isinstance(error, ValueError) else reason
    return FileError(
        f'{path}: the "{name}" in its metadata are damaged ({reason}). Copy or save it again.'
    )


def _ties(path: PurePath, about: Mapping[str, Any]) -> dict[str, str]:
    ties = about.get("ties", {})
    if not isinstance(ties, dict) or not all(isinstance(head, str) for head in ties.values()):
        raise FileError(f'{path}: the "ties" in its metadata are damaged. Copy or save it again.')
    return ties


def _apart(path: PurePath, about: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    told = about.get("apart", {})
    sound = isinstance(told, dict) and all(
        isinstance(others, list) and all(isinstance(one, str) for one in others)
        for others in told.values()
    )
    if not sound:
        raise FileError(f'{path}: the "apart" in its metadata is damaged. Copy or save it again.')
    return {stem: tuple(others) for stem, others in told.items()}


def _holders(path: PurePath, about: Mapping[str, Any]) -> _Holders:
    """The kinds of layers that hold tied tensors; empty in files from before they were written."""
    out: _Holders = {}
    try:
        for stem, told in _objects(about, "holders"):
            holder = Holder(told["kind"], told["layout"], told["groups"])
            sound = type(holder.groups) is int and holder.groups > 0 and holder.layout in LAYOUTS
            if not sound or not isinstance(holder.kind, str):
                raise ValueError(f"{stem}: no layer")
            out[stem] = holder
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, "holders", error) from error
    return out


def _entries(
    path: PurePath, config: LoRAConfig, state: Iterable[str], told: bool
) -> dict[str, TargetConfig]:
    """The entry of each path; by the patterns, in files from before the paths were told."""
    stems = dict.fromkeys(key.rpartition(".")[0] for key in state)
    if told:
        # entries are spelled as a configuration has them, so the paths are spelled so too
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
    # the most specific first, and setdefault keeps it: as `attach` chooses among entries
    for entry in sorted(config.entries, key=lambda entry: -specificity(entry.name)):
        for name in sorted(_named(path, entry, names)):
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


def _about(path: PurePath, told: Optional[str]) -> tuple[dict[str, Any], LoRAConfig]:
    if told is None:
        raise FileError(
            f'{path}: no "paramlora" in its metadata, so another tool wrote it. Convert it '
            "first (paramlora convert --to native)."
        )
    try:
        about: dict[str, Any] = parse_json(told)
        version, _, _ = about["format"], about["adapter"], about["config"]
    except (ValueError, KeyError, TypeError) as error:
        reason = {KeyError: f"no {error}", TypeError: "no object"}.get(type(error), error)
        raise FileError(
            f'{path}: its "paramlora" metadata is damaged ({reason}). Copy or save it again.'
        ) from error
    if version != FORMAT_VERSION:
        raise FileError(
            f"{path}: written in format {spelled(version)}, and this paramlora reads "
            f"{FORMAT_VERSION}. Upgrade paramlora."
        )
    _check_registered(path, about["config"])
    try:
        return about, parsed(_escaped(about["config"]), "configuration")
    except ConfigError as error:
        raise FileError(
            f"{path}: the configuration in its metadata is damaged ({str(error).rstrip('.')}). "
            "Copy or save it again."
        ) from error


def _check_registered(path: PurePath, config: Any) -> None:
    """Refuse an update of a kind that somebody else's code would have to register."""
    for name, entry in config.items() if isinstance(config, Mapping) else ():
        kind = entry.get("kind") if isinstance(entry, Mapping) else None
        if isinstance(kind, str) and kind not in KINDS:
            raise FileError(
                f"{path}: {spelled(name)} is of the kind {spelled(kind)}, which is not registered "
                f"here. There are: {', '.join(KINDS)}. Import what registers it."
            )


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
