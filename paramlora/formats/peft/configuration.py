"""PEFT's ``adapter_config.json``: what it may say, what it says of a layer, and as written."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from paramlora.errors import FileError, kind_of, spelled
from paramlora.formats.base import Base, places_of
from paramlora.formats.content import (
    Content,
    Options,
    number,
    report,
)
from paramlora.model.match import Names, Unbounded
from paramlora.update.value import Adapter

PREFIX = "base_model.model."
_MOST_LEVELS = 64  # of modules inside modules
INNER = ".base_layer"
_READ = ("LORA", "TRAINABLE_TOKENS", "LOHA", "LOKR")
# what these do is more than W + scale·B·A
_BEYOND = (
    "lora_bias use_qalora alora_invocation_tokens kasa_config velora_config "
    "monteclora_config arrow_config layer_replication use_bdlora"
).split()
# a value of another type would raise Python's words somewhere behind
_TYPES: dict[str, tuple[type, ...]] = {
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
    "target_modules": (list, str),
    "target_parameters": (list,),
    "exclude_modules": (list, str),
    "modules_to_save": (list,),
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_magnitudes(config: Mapping[str, Any], plain: Iterable[str], source: str) -> None:
    """Refuse updates without a magnitude in a file that its configuration calls DoRA."""
    lacking = plain if config.get("use_dora") else ()
    report(source, "use_dora, and no magnitude in the file of", lacking, True, "Save it again.")


def stem(key: str) -> str:
    return key.removeprefix(PREFIX) if key.startswith(PREFIX) else key.removeprefix("base_model.")


def _told(value: Any) -> str:
    """A value of the configuration as it is written there."""
    return f'"{spelled(value)[1:-1]}"' if isinstance(value, str) else kind_of(value)


def check_config(config: Mapping[str, Any], source: str) -> None:
    """Refuse an adapter that is more than ``W + scale·B·A`` on the weights it was given."""
    kind = config.get("peft_type", "LORA")
    if kind not in _READ:
        raise FileError(
            f"{source}: peft_type {_told(kind)}; only {', '.join(_READ)} can be read. "
            "Merge it with peft."
        )
    for name, types in _TYPES.items():
        if not isinstance(config.get(name), (*types, type(None))):
            raise FileError(
                f'{source}: "{name}" is {spelled(config[name])}; its configuration is damaged. '
                "Mend it, or save it again."
            )
    beyond = [name for name in _BEYOND if config.get(name)]
    init = config.get("init_lora_weights")
    # these train on a base that they have changed: on the untouched one the update is wrong
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        beyond.append(f'init_lora_weights="{init}" (which changed the base weights)')
    if beyond:
        raise FileError(
            f"{source}: {', '.join(beyond)}: more than W + scale·B·A. Merge it with peft "
            "(merge_and_unload), or train it without."
        )


def tails(path: str) -> Iterator[str]:
    """The path, and what is left of it after its last dots, of which no model has more."""
    yield path
    at = len(path)
    for _ in range(_MOST_LEVELS):
        at = path.rfind(".", 0, at)
        if at < 0:
            return
        yield path[at + 1 :]


def ends_in(path: str, names: Collection[str]) -> bool:
    return any(tail in names for tail in tails(path))


def alpha(
    config: Mapping[str, Any],
    chosen: Mapping[str, Any],
    path: str,
    r: int,
    options: Options,
    source: str,
) -> float:
    """The alpha of one layer, by its path in the model that PEFT adapted.

    Args:
        config: ``adapter_config.json``.
        chosen: of its ``alpha_pattern``, from `by_pattern`.
        path, r: of the layer.
        options: see `Options`.
        source: the file.
    """
    fallback = r if options.alpha is None else options.alpha
    value = chosen.get(path, config.get("lora_alpha", fallback))
    return number(value, f"{source}: lora_alpha of {path}")


def check_ranks(
    config: Mapping[str, Any], ranks: Mapping[str, int], source: str, strict: bool
) -> None:
    """Refuse tensors of another rank than is told of them, which peft does not load either: by
    which of the two ``lora_alpha`` is to be divided nobody knows.

    Args:
        config: ``adapter_config.json``.
        ranks: of each layer's tensors, by its path in the model that PEFT adapted.
        source, strict: see `report`.
    """
    chosen = by_pattern(config, "rank_pattern", ranks, source)
    told = {path: chosen.get(path, config.get("r")) for path in ranks}
    wrong = [
        f"{path} ({r}, not {spelled(told[path])})"
        for path, r in ranks.items()
        if told[path] is not None and told[path] != r
    ]
    what = "tensors of another rank than its configuration tells"
    way = "Mend its r or rank_pattern, or read with strict=False (--loose) to go by the tensors."
    report(source, what, wrong, strict, way)


def by_pattern(
    config: Mapping[str, Any], name: str, paths: Iterable[str], source: str
) -> dict[str, Any]:
    """The value of each path by the first pattern that fits, as peft.utils.other.get_pattern_key.

    Raises:
        FileError: a pattern that cannot be matched in bounded time.
    """
    values = list((config.get(name) or {}).values())
    try:
        found = Names(paths).first(config.get(name) or {})
    except ValueError as error:
        raise FileError(f"{source}: {name}: {error}. Mend it there.") from error
    return {path: values[number] for path, number in found.items()}


def report_targets(
    content: Content, config: Mapping[str, Any], base: Base, adapter: Adapter, options: Options
) -> None:
    """What ``target_modules`` names in the model, and the file has no tensors for."""
    modules = config.get("target_modules")
    if not modules or modules == "all-linear" or config.get("layers_to_transform") is not None:
        return
    try:
        named = _targeted(modules, base) - _targeted(config.get("exclude_modules") or [], base)
    except Unbounded as error:
        what = "target_modules was not compared with the file"
        report(content.source, what, [str(error)], False, "Its updates are read.")
        return
    except ValueError as error:
        raise FileError(f"{content.source}: target_modules: {error}. Mend it there.") from error
    places = places_of(base)
    found = [places.find(path, content.source) for path in adapter.values()]
    if any(there is not None and there.held for there in found):
        return  # trained on a model of other names
    have = {path for there in found if there is not None for path in there.paths}
    missing = [
        path
        for path, slot in base.items()
        if slot.kind in ("linear", "convolution", "embedding")
        and path in named
        and path not in have
        and f"{path.rpartition('.')[0]}.in_proj_weight" not in base
    ]
    report(content.source, "targets without tensors", missing, options.strict, "Is it whole?")


def _targeted(names: Any, base: Base) -> set[str]:
    # peft: a string is a pattern of whole paths, a list has ends of paths
    if isinstance(names, str):
        return Names(base).matching(names)
    known = set(map(str, names))
    return {path for path in base if ends_in(path, known)}


def config_of(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    modules: set[str],
    parameters: list[str],
) -> dict[str, Any]:
    """``adapter_config.json``: the commonest rank and alpha, and a pattern for every other."""
    # so that the patterns, which peft tries one by one for each layer, are few
    r = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": _short(alpha),
        "target_modules": sorted(modules),
        "rank_pattern": {_exactly(p): v for p, v in ranks.items() if v != r},
        "alpha_pattern": {_exactly(p): _short(v) for p, v in alphas.items() if v != alpha},
        "use_dora": False,
        "use_rslora": False,
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
    }
    return {**config, "target_parameters": parameters} if parameters else config


def _short(alpha: float) -> "int | float":
    return int(alpha) if alpha == int(alpha) else alpha


def _exactly(path: str) -> str:
    # peft matches (.*\.)?(pattern)$: without ^ a path would also mean all that end in it
    return f"^{re.escape(path)}"
