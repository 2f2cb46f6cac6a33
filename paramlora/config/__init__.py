"""The configuration: JSON parsed once into frozen values."""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from paramlora.config.reading import parse_json, read_text
from paramlora.errors import ConfigError, FileError, closest, spelled

_MOST = 2**31  # elements along one side
ALLOWED = (
    "adapter_dtype",
    "alpha",
    "dropout",
    "hard",
    "init",
    "kind",
    "r",
    "rslora",
    "scale",
    "trainable_scale",
    "up_kernel",
    "whole",
)
DTYPES = ("bfloat16", "float16", "float32", "float64")
INITS = ("default", "kaiming", "olora", "orthogonal", "pissa")
FROM_WEIGHT = ("olora", "pissa")  # saved at twice their rank (see `paramlora.update.init`)


@dataclass(frozen=True)
class KindKeys:
    """What an entry of a kind of update says beside the keys that every entry may have.

    Args:
        own: further keys, each with what makes a value that can be hashed of it; that is given the
            value and its place, for messages, and raises ConfigError.
        only: those of `ALLOWED` that it may have; all where None.
        ranked: whether it has a rank.
        implied_by: a key of its own that asks for it, without "kind".
        branched: whether a parallel branch can add it, as ``"hard": 0`` asks.
    """

    own: Mapping[str, Callable[[Any, str], Any]] = field(default_factory=dict)
    only: Optional[tuple[str, ...]] = None
    ranked: bool = True
    implied_by: str = ""
    branched: bool = False


def _rows(value: Any, where: str) -> tuple[int, ...]:
    """The numbers of rows, ascending."""
    numbers = value if isinstance(value, (list, tuple)) else ()
    sound = numbers and all(type(one) is int and 0 <= one < _MOST for one in numbers)
    if not sound or len(set(numbers)) < len(numbers):
        raise ConfigError(
            f'{where}: "rows" must be a list of different numbers of rows, got {spelled(value)}.'
        )
    return tuple(sorted(numbers))


def _flag(key: str) -> Callable[[Any, str], bool]:
    return lambda value, where: _boolean(value, where, key)


def _factor(value: Any, where: str) -> int:
    if type(value) is int and (value == -1 or 0 < value < _MOST):
        return int(value)
    raise ConfigError(
        f'{where}: "factor" must be a whole number above 0, or -1, got {spelled(value)}.'
    )


def _sizes(value: Any, where: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """``[[a, c], [b, d]]``, see `paramlora.update.lokr`."""
    pairs = [tuple(pair) for pair in value] if _is_square(value) else []
    if not all(type(n) is int and 0 < n < _MOST for pair in pairs for n in pair) or not pairs:
        raise ConfigError(
            f'{where}: "sizes" must be [[a, c], [b, d]] of numbers above 0, got {spelled(value)}.'
        )
    return pairs[0], pairs[1]


def _is_square(value: Any) -> bool:
    rows = value if isinstance(value, (list, tuple)) else ()
    return len(rows) == 2 and all(isinstance(r, (list, tuple)) and len(r) == 2 for r in rows)


_ADDED = ("adapter_dtype", "alpha", "kind", "r", "rslora", "scale", "trainable_scale")
_DEFAULT = "lora"  # what an entry without "kind" asks for
# by the value of "kind"; `paramlora.update.kinds.register` adds to it
KINDS: dict[str, KindKeys] = {
    "lora": KindKeys(branched=True),
    "dora": KindKeys(),
    "loha": KindKeys({"tucker": _flag("tucker")}, _ADDED),
    "lokr": KindKeys(
        {
            "decompose_both": _flag("decompose_both"),
            "factor": _factor,
            "full_matrix": _flag("full_matrix"),
            "sizes": _sizes,
            "tucker": _flag("tucker"),
        },
        _ADDED,
    ),
    "difference": KindKeys({}, ("kind", "adapter_dtype"), ranked=False),
    "rows": KindKeys({"rows": _rows}, ("kind", "adapter_dtype"), ranked=False, implied_by="rows"),
}


@dataclass(frozen=True)
class TargetConfig:
    """One entry of the configuration: how the tensors it names are adapted.

    Args:
        name: module path, parameter path, or ``re:`` pattern (see `paramlora.targets`).
        r: rank of the update, at least 1; 0 where the tensors are trained whole.
        scale: the factor in ``W + scale·B·A``, never divided by ``r``. In JSON ``alpha`` gives
            ``alpha / r``, with ``rslora`` ``alpha / sqrt(r)`` (Kalajdzievski 2023,
            arXiv:2312.03732, equation 9).
        trainable_scale: whether the scale is trained too.
        hard: parametrize the weight (True) or add a parallel branch (False).
        up_kernel: kernel of a soft convolution's second factor, 1 or ``"same"``.
        dropout: probability of zeroing an element of the low-rank branch's input in training
            (Srivastava et al. 2014, JMLR 15:1929); the base's own input is never touched.
        init: how the factors start, one of `INITS` (see `paramlora.update.init`).
        adapter_dtype: the factors' type, one of `DTYPES`; None is float32 on a 16-bit weight
            and the weight's own type elsewhere.
        whole: train the tensors themselves, of any number of dimensions, and save them in the
            adapter file.
        kind: what the update makes of a weight, one of `KINDS` (see docs/kinds.md).
        options: the kind's own keys, each with its value.
    """

    name: str
    r: int
    scale: float = 1.0
    trainable_scale: bool = False
    hard: bool = True
    up_kernel: Union[int, str] = 1
    dropout: float = 0.0
    init: str = "default"
    adapter_dtype: Optional[str] = None
    whole: bool = False
    kind: str = _DEFAULT
    options: tuple[tuple[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The entry as plain JSON values, without its name."""
        out: dict[str, Any] = {"whole": True} if self.whole else self._own()
        if self.adapter_dtype is not None:
            out["adapter_dtype"] = self.adapter_dtype
        return out

    def _own(self) -> dict[str, Any]:
        """The keys of an entry that trains an update: of its rank, of its kind, and the kind's."""
        keys = KINDS.get(self.kind, KindKeys())
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in self.options}
        out = self._low_rank()
        if keys.only is not None:
            out = {key: value for key, value in out.items() if key in keys.only}
        if self.kind != _DEFAULT and not keys.implied_by:
            out["kind"] = self.kind
        return {**out, **options}

    def _low_rank(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            "r": self.r,
            "scale": self.scale,
            "trainable_scale": self.trainable_scale,
            "hard": self.hard,
        }
        if not self.hard:
            out["up_kernel"] = self.up_kernel
        if self.dropout:
            out["dropout"] = self.dropout
        if self.init != "default":
            out["init"] = self.init
        return out


@dataclass(frozen=True)
class LoRAConfig:
    """A whole configuration: its entries in order, and whether the backbone trains.

    Args:
        entries: one for each name or pattern.
        trainable_model: whether the backbone trains too.
        source: where it is from, for messages.
        exclude: names and patterns as of entries; what they name, and what lies in it, belongs to
            no entry.

    Example:
        >>> config = LoRAConfig.from_dict({"to_q": {"r": 8, "alpha": 16}})
        >>> assert config.entries[0].scale == 2.0
        >>> assert LoRAConfig.from_dict(config.to_dict()) == config
    """

    entries: tuple[TargetConfig, ...]
    trainable_model: bool = False
    source: str = field(default="config", compare=False)
    exclude: tuple[str, ...] = ()

    @classmethod
    def from_file(cls, path: Union[str, "os.PathLike[str]"]) -> "LoRAConfig":
        """Read a JSON file.

        Raises:
            ConfigError: the file is missing, is not JSON (with line and column), or is wrong.
        """
        name = Path(path).name
        try:
            data = parse_json(read_text(path))
        except FileError as error:
            raise ConfigError(str(error)) from error
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{name}: invalid JSON at line {error.lineno}, column {error.colno}: {error.msg}. "
                "Mend it there."
            ) from error
        except ValueError as error:
            raise ConfigError(f"{name}: cannot be read as JSON: {error}. Mend it there.") from error
        return cls.from_dict(data, source=name)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "config") -> "LoRAConfig":
        """Check a mapping and freeze it.

        Raises:
            ConfigError: names the source, the entry, the value and what is allowed.
        """
        config = parsed(data, source)
        for entry in config.entries:
            _check_pattern(entry.name, source, f'"{entry.name}"')
        for pattern in config.exclude:
            _check_pattern(pattern, source, f'"{pattern}" in "exclude"')
        return config

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values; `from_dict` reads it back equal."""
        return {
            "trainable_model": self.trainable_model,
            **({"exclude": list(self.exclude)} if self.exclude else {}),
            **{entry.name: entry.to_dict() for entry in self.entries},
        }


def parsed(data: Any, source: str) -> LoRAConfig:
    """The configuration in plain data; nothing is made of its patterns, which may be a file's.

    Raises:
        ConfigError: as there.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{source}: expected an object of entries, got {spelled(data)}.")
    # a copy: keys are taken out of it, and the caller's stays whole
    rest = dict(data)
    trainable = _boolean(rest.pop("trainable_model", False), source, "trainable_model")
    exclude = _exclude(rest.pop("exclude"), source) if _is_exclude(rest) else ()
    if not rest:
        raise ConfigError(f'{source}: no entries. Add one, for example "to_q": {{"r": 8}}.')
    entries = tuple(_entry(name, entry, source) for name, entry in rest.items())
    whole = [entry.name for entry in entries if entry.whole]
    if trainable and whole:
        raise ConfigError(
            f'{source}, "{whole[0]}": "whole" while "trainable_model" trains every tensor in '
            "place. Remove one of them."
        )
    return LoRAConfig(entries, trainable, source, exclude)


def _is_exclude(data: Mapping[str, Any]) -> bool:
    """Whether there is a list of what to leave out, and no entry of a layer that is called so."""
    value = data.get("exclude", {})
    if isinstance(value, Mapping):
        return "exclude" in data and value.keys().isdisjoint({*ALLOWED, "rows"})
    return True


def _exclude(value: Any, source: str) -> tuple[str, ...]:
    names = value if isinstance(value, (list, tuple)) else ()
    if not names or not all(isinstance(one, str) and one for one in names):
        raise ConfigError(
            f'{source}: "exclude" must be a list of names such as ["lm_head"], got '
            f"{spelled(value)}."
        )
    return tuple(dict.fromkeys(names))


ConfigLike = Union[LoRAConfig, Mapping[str, Any], str, "os.PathLike[str]"]


def as_config(config: ConfigLike) -> LoRAConfig:
    """A `LoRAConfig` from itself, a mapping, or a path to JSON."""
    if isinstance(config, LoRAConfig):
        return config
    if isinstance(config, (str, os.PathLike)):
        return LoRAConfig.from_file(config)
    if not isinstance(config, Mapping):  # such as a model, which would be spelled out whole
        raise ConfigError(
            "expected a configuration (a dict, a path or a LoRAConfig), got a "
            f"{type(config).__name__}. The model comes first, then the configuration."
        )
    return LoRAConfig.from_dict(config)


def _entry(name: Any, entry: Any, source: str) -> TargetConfig:
    where = f'{source}, "{name}"'
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"{source}: an entry's name must be a non-empty string, got {spelled(name)}."
        )
    if not isinstance(entry, Mapping):
        hint = closest(name, ["trainable_model", "exclude"])
        also = f' Did you mean "{hint[0]}"?' if hint else ""
        raise ConfigError(
            f'{where}: expected an object such as {{"r": 8}}, got {spelled(entry)}.{also}'
        )
    kind = _choice(entry, "kind", tuple(KINDS), where) or _implied(entry)
    # all kinds' common keys: what this kind has no use for `_check_kind` tells more plainly
    allowed = sorted((*ALLOWED, *KINDS[kind].own))
    for key in entry:
        if key not in allowed:
            hint = closest(str(key), allowed)
            also = f' Did you mean "{hint[0]}"?' if hint else ""
            raise ConfigError(f'{where}: unknown key "{key}". Allowed: {", ".join(allowed)}.{also}')
    if _boolean(entry.get("whole", False), where, "whole"):
        return _whole(name, entry, where)
    _check_kind(entry, kind, where)
    r = _rank(entry, where) if KINDS[kind].ranked else 0
    scale = _scale(entry, r, where)
    hard = _boolean(entry.get("hard", True), where, "hard")
    if not (KINDS[kind].branched or hard):
        raise ConfigError(
            f'{where}: "kind": "{kind}" is a weight of its own, which no parallel branch adds. '
            'Remove "hard": 0.'
        )
    return TargetConfig(
        name=name,
        r=r,
        scale=scale,
        trainable_scale=_boolean(entry.get("trainable_scale", False), where, "trainable_scale"),
        hard=hard,
        up_kernel=_up_kernel(entry, hard, where),
        dropout=_dropout(entry, where),
        init=_init(entry, scale, where),
        adapter_dtype=_choice(entry, "adapter_dtype", DTYPES, where),
        kind=kind,
        options=_options(entry, kind, where),
    )


def _implied(entry: Mapping[str, Any]) -> str:
    """The kind that an entry asks for by a key of its own."""
    return next((kind for kind, keys in KINDS.items() if keys.implied_by in entry), _DEFAULT)


def _check_kind(entry: Mapping[str, Any], kind: str, where: str) -> None:
    """Refuse keys that mean nothing to a kind, and one that it needs and has not."""
    keys = KINDS[kind]
    only = ALLOWED if keys.only is None else keys.only
    lost = [key for key in entry if key not in (*only, *keys.own) and entry[key] is not None]
    # a configuration may say what is so anyway
    if "hard" not in only and entry.get("hard", 0) in (1, True) and "hard" in lost:
        lost.remove("hard")  # which all but the low-rank kind are
    if lost:
        raise ConfigError(
            f'{where}: "{lost[0]}" means nothing to the kind "{kind}". Allowed beside it: '
            f"{', '.join((*keys.own, *only))}."
        )
    if keys.implied_by and keys.implied_by not in entry:
        raise ConfigError(f'{where}: the kind "{kind}" needs "{keys.implied_by}". Add it.')


def _options(entry: Mapping[str, Any], kind: str, where: str) -> tuple[tuple[str, Any], ...]:
    """The kind's own keys, checked."""
    own = KINDS[kind].own
    return tuple((key, own[key](entry[key], where)) for key in sorted(own) if key in entry)


def _check_pattern(name: str, source: str, place: str) -> None:
    if name.startswith("type:"):
        _check_class(name, source)
    if not name.startswith("re:"):
        return
    try:
        re.compile(name[3:])
    except re.error as error:
        raise ConfigError(
            f"{source}, {place}: not a regular expression: {error}. Mend it."
        ) from error
    except (RecursionError, OverflowError) as error:
        raise ConfigError(
            f"{source}, {place}: nested or repeated too deeply. Write a simpler one."
        ) from error


def _check_class(name: str, source: str) -> None:
    if not all(part.isidentifier() for part in name[5:].split(".")):
        raise ConfigError(
            f'{source}: "type:" takes the name of one class, such as "type:Linear" or '
            f'"type:torch.nn.Linear", got {spelled(name)}.'
        )


def _whole(name: str, entry: Mapping[str, Any], where: str) -> TargetConfig:
    rest = sorted(set(entry) - {"whole", "adapter_dtype"})
    if rest:
        raise ConfigError(
            f'{where}: "whole" trains the tensors themselves, so "{rest[0]}" means nothing. '
            "Remove one of them."
        )
    return TargetConfig(
        name, r=0, whole=True, adapter_dtype=_choice(entry, "adapter_dtype", DTYPES, where)
    )


def _choice(
    entry: Mapping[str, Any], key: str, allowed: tuple[str, ...], where: str
) -> Optional[str]:
    value = entry.get(key)
    if value is None or (isinstance(value, str) and value in allowed):
        return value
    raise ConfigError(
        f'{where}: "{key}" must be one of {", ".join(allowed)}, got {spelled(value)}.'
    )


def _init(entry: Mapping[str, Any], scale: float, where: str) -> str:
    init = _choice(entry, "init", INITS, where) or "default"
    if init in FROM_WEIGHT:
        if scale == 0:
            raise ConfigError(f'{where}: "init": "{init}" needs a scale other than 0. Give one.')
        for key, plain in (("trainable_scale", False), ("up_kernel", 1)):
            if entry.get(key, plain) != plain:
                raise ConfigError(
                    f'{where}: "init": "{init}" starts from the weight itself and cannot go with '
                    f'"{key}": {spelled(entry[key])}. Remove one of them.'
                )
    return init


def _dropout(entry: Mapping[str, Any], where: str) -> float:
    dropout = _number(entry.get("dropout", 0.0), where, "dropout")
    if not 0 <= dropout < 1:
        raise ConfigError(
            f'{where}: "dropout" must be at least 0 and below 1, got {spelled(dropout)}.'
        )
    return dropout


def _rank(entry: Mapping[str, Any], where: str) -> int:
    if "r" not in entry:
        raise ConfigError(f'{where}: "r" is missing. Give a rank, for example "r": 8.')
    r = entry["r"]
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ConfigError(f'{where}: "r" must be a whole number of at least 1, got {spelled(r)}.')
    if r > _MOST:
        raise ConfigError(
            f'{where}: "r" is more than {_MOST}, which no matrix holds. Give a smaller one.'
        )
    return r


def _scale(entry: Mapping[str, Any], r: int, where: str) -> float:
    if "scale" in entry and "alpha" in entry:
        raise ConfigError(
            f'{where}: both "scale" and "alpha" are given. Keep one: scale = alpha / r.'
        )
    if "alpha" in entry:
        rslora = _boolean(entry.get("rslora", False), where, "rslora")
        return _number(entry["alpha"], where, "alpha") / (math.sqrt(r) if rslora else r)
    if _boolean(entry.get("rslora", False), where, "rslora"):
        raise ConfigError(
            f'{where}: "rslora" is scale = alpha / sqrt(r). Give "alpha", not "scale".'
        )
    return _number(entry.get("scale", 1.0), where, "scale")


def _number(value: Any, where: str, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f'{where}: "{key}" must be a number, got {spelled(value)}.')
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(f'{where}: "{key}" must be finite, got {spelled(value)}.')
    return number


def _boolean(value: Any, where: str, key: str) -> bool:
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise ConfigError(f'{where}: "{key}" must be 0, 1, true or false, got {spelled(value)}.')


def _up_kernel(entry: Mapping[str, Any], hard: bool, where: str) -> Union[int, str]:
    value = entry.get("up_kernel", 1)
    if hard and "up_kernel" in entry:
        raise ConfigError(f'{where}: "up_kernel" belongs to soft entries. Add "hard": 0.')
    # True is 1 to Python, and no kernel
    if value == 1 and not isinstance(value, bool):
        return 1
    if value == "same":
        return "same"
    raise ConfigError(f'{where}: "up_kernel" must be 1 or "same", got {spelled(value)}.')
