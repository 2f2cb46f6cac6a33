"""PEFT's LoRA: ``adapter_model.safetensors`` and ``adapter_config.json``.

Read from peft 0.21's writers and readers: utils/save_and_load.py, tuners/lora/layer.py,
utils/other.py (patterns), tuners/tuners_utils.py (targets).
"""

import math
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Optional

import torch
from einops import rearrange
from torch import Tensor

from paramlora.errors import FileError, listed, spelled
from paramlora.formats.base import COMPONENTS, Base, places_of, stacks_of
from paramlora.formats.content import (
    DEFAULTS,
    Content,
    Options,
    check_factors,
    check_whole,
    number,
    report,
    report_unused,
)
from paramlora.formats.factors import (
    check_told,
    grouped,
    kernels,
    pair,
    product_of,
    rescaled,
    with_low_ranks,
)
from paramlora.formats.format import Format, Mark
from paramlora.formats.loaders import of_peft
from paramlora.formats.scale import alpha_of, recorded, scale_of, scales_metadata
from paramlora.model.match import Names, Unbounded
from paramlora.update.value import Adapter, KindUpdate, Update

PREFIX = "base_model.model."
_NAME = r"(?P<role>[AB])(?:\.(?P<name>[^.]+))?"
_FACTOR = re.compile(rf"(?P<path>.+)\.lora_{_NAME}\.weight", re.DOTALL)
_MAGNITUDE = re.compile(r"(?P<path>.+)\.lora_magnitude_vector(?:\..+)?", re.DOTALL)
_TOKENS = re.compile(r"(?P<path>.+?)(?:\.token_adapter)?\.trainable_tokens_delta", re.DOTALL)
_EMBEDDING = re.compile(rf"(?P<path>.+)\.lora_embedding_{_NAME}", re.DOTALL)
_MOST_LEVELS = 64  # of modules inside modules
_INNER = ".base_layer"
_READ = ("LORA", "TRAINABLE_TOKENS", "LOHA", "LOKR")
_PRODUCT = re.compile(
    r"(?P<path>.+)\.(?P<name>hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))", re.DOTALL
)
# the layers of an expert before transformers 5, which peft 0.21 takes for parts of fused parameters
# wherever they stand; and what tells that a model has such experts
_PARTS = ("gate_proj", "up_proj", "down_proj", "gate", "w1", "w2", "w3")
_EXPERTS = re.compile(r".*\b(?:experts\.(?:gate_up_proj|down_proj)|shared_experts?(?:\..+)?)")
# what these do is more than W + scale·B·A
_BEYOND = (
    "lora_bias use_qalora alora_invocation_tokens kasa_config velora_config "
    "monteclora_config arrow_config layer_replication use_bdlora"
).split()
_TYPES: dict[str, tuple[type, ...]] = {
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
    "target_modules": (list, str),
    "target_parameters": (list,),
    "exclude_modules": (list, str),
    "modules_to_save": (list,),
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class _Pair:
    """The two tensors of one layer, under the path that the file gives it."""

    a: Tensor
    b: Tensor
    embedding: bool = False


def read(content: Content, base: Optional[Base] = None, options: Options = DEFAULTS) -> Adapter:
    """The adapter in a PEFT file.

    Args:
        content: `config` is ``adapter_config.json``; without one ``alpha`` is ``r`` unless
            `options` tells it, with a warning.
        base: needed for expert parameters, whose names the file does not hold.
        options: see `Options`.

    Raises:
        FileError: tensors of something else, terms beyond ``W + scale·B·A`` and DoRA,
            or a target that got no tensors.
    """
    check_config(content.config, content.source)
    if not content.config and options.alpha is None:
        report(
            content.source,
            "the scale is not in this file",
            ["adapter_config.json is missing"],
            False,
            "Using 1; give alpha (--alpha) for another.",
        )
    if content.config.get("peft_type") in ("LOHA", "LOKR"):
        return _read_products(content, options)
    adapter = read_pairs(content, content.config, base, options)
    if base is not None:
        report_targets(content, content.config, base, adapter, options)
    return adapter


def _read_products(content: Content, options: Options) -> Adapter:
    """PEFT's LoHa or LoKr, whose tensors are LyCORIS's; each layer's scale is ``alpha / r``."""
    config, source = content.config, content.source
    found: dict[str, dict[str, Tensor]] = {}
    unused = []
    for key, one in content.state.items():
        match = _PRODUCT.fullmatch(_stem(key))
        if match is None:
            unused.append(key)
        else:
            found.setdefault(match["path"], {})[match["name"]] = one
    report_unused(content, unused, options.strict)
    alphas = by_pattern(config, "alpha_pattern", found, source)
    ranks = by_pattern(config, "rank_pattern", found, source)
    others = {}
    for path, held in found.items():
        check_factors(f"{source}: {path}", *held.values())
        alpha_ = number(alphas.get(path, config.get("alpha", 1)), f"{source}: alpha of {path}")
        r = number(ranks.get(path, config.get("r", 1)), f"{source}: r of {path}")
        others[path] = product_of(held, alpha_ / max(r, 1.0), f"{source}: {path}")
    return Adapter({}, others=others)


def read_pairs(
    content: Content, config: Mapping[str, Any], base: Optional[Base], options: Options
) -> Adapter:
    """The updates of all ``lora_A`` and ``lora_B`` in a file whose configuration is `config`."""
    magnitudes, tokens = _magnitudes(content.state), _tokens(content, config)
    found, rest = _pairs(content, magnitudes)
    rest -= {key for key in rest if _TOKENS.fullmatch(_stem(key))}
    whole = _whole(rest, content.state, config, content.source)
    report_unused(content, rest - whole.keys(), options.strict)
    exact = recorded(content)
    if base is not None and config.get("target_parameters"):
        base = {**base, **stacks_of(base)}
    experts = _experts(found, config, base, content.source)
    made_of = {
        path: _update(path, pair_, found, experts, config, base, content.source)
        for path, pair_ in found.items()
    }
    paths = [
        _pattern_path(path, key, None if made is None else made.kind)
        for path, (key, made) in made_of.items()
    ]
    chosen = by_pattern(config, "alpha_pattern", paths, content.source)
    updates: dict[str, Update] = {}
    others: dict[str, KindUpdate] = {**tokens}
    for path, (key, made) in made_of.items():
        if made is None:
            continue
        pair_ = found[path]
        r = made.r if made.layout == "stack" or pair_.embedding else pair_.a.shape[0]
        value = alpha(config, chosen, _pattern_path(path, key, made.kind), r, options)
        root = math.sqrt(r) if config.get("use_rslora") else None
        scale = value / root if root else scale_of(value, r, exact.get(key), content.source)
        update = replace(made, scale=scale)
        if path in magnitudes:
            others[key] = rescaled(update, magnitudes[path].flatten(), f"{content.source}: {path}")
        else:
            updates[key] = update
    check_magnitudes(config, updates, content.source)
    return Adapter(updates, whole=dict(whole.values()), others=others)


def check_magnitudes(config: Mapping[str, Any], plain: Iterable[str], source: str) -> None:
    """Refuse updates without a magnitude in a file that its configuration calls DoRA."""
    lacking = plain if config.get("use_dora") else ()
    report(source, "use_dora, and no magnitude in the file of", lacking, True, "Save it again.")


def _magnitudes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of DoRA, by the path that the file gives their layer."""
    matches = {key: _MAGNITUDE.fullmatch(_stem(key)) for key in state}
    return {match["path"]: state[key] for key, match in matches.items() if match is not None}


def _tokens(content: Content, config: Mapping[str, Any]) -> dict[str, KindUpdate]:
    """The rows that PEFT trained (its trainable tokens), by the path of their layer."""
    found: dict[str, KindUpdate] = {}
    for key, rows in content.state.items():
        match = _TOKENS.fullmatch(_stem(key))
        if match is not None:
            path = match["path"]
            ids = _token_ids(path, config, content.source)
            if rows.dim() < 2 or len(ids) != len(rows):
                raise FileError(
                    f"{content.source}: {path}: {list(rows.shape)} for {len(ids)} trained tokens."
                )
            made = _rows(ids, rows)
            same = (one for one in found.values() if _is_same(one, made))
            found[path] = next(same, made)  # of tied layers both are in the file
    return found


def _is_same(one: KindUpdate, other: KindUpdate) -> bool:
    return one.options == other.options and torch.equal(
        one.held["lora_rows"], other.held["lora_rows"]
    )


def _rows(ids: list[int], rows: Tensor) -> KindUpdate:
    """Rows in ascending order; of a number that stands twice PEFT's own last one counts."""
    at = {number: place for place, number in enumerate(ids)}
    order = sorted(at)
    held = {"lora_rows": rows[[at[n] for n in order]], "lora_ids": torch.tensor(order)}
    return KindUpdate("rows", held, options=(("rows", tuple(order)),))


def _token_ids(path: str, config: Mapping[str, Any], source: str) -> list[int]:
    """The numbers that the configuration tells of a layer."""
    told = config.get("trainable_token_indices") or config.get("token_indices") or []
    if isinstance(told, dict):
        told = next((ids for name, ids in told.items() if _ends_in(path, {name})), [])
    sound = isinstance(told, list) and all(type(n) is int and 0 <= n < 2**31 for n in told)
    if not sound or not told:
        raise FileError(
            f"{source}: {path}: trained tokens, and the configuration does not tell which. Is "
            "adapter_config.json whole?"
        )
    return told


def _stem(key: str) -> str:
    return key.removeprefix(PREFIX) if key.startswith(PREFIX) else key.removeprefix("base_model.")


def _whole(
    rest: set[str], state: Mapping[str, Tensor], config: Mapping[str, Any], source: str
) -> dict[str, tuple[str, Tensor]]:
    """``{key: (path, tensor)}`` of what PEFT trained whole: ``modules_to_save``, and biases."""
    saved = _saved([key.removeprefix(PREFIX).rpartition(".")[0] for key in rest], config, source)
    found = {}
    for key in sorted(rest):
        module, _, name = key.removeprefix(PREFIX).rpartition(".")
        bias = name == "bias" and config.get("bias", "none") != "none"
        if bias or module in saved:
            # with bias="all" PEFT saves those of its wrapper too: the frozen one and a second time
            own = module.removesuffix(_INNER).removesuffix(".modules_to_save")
            path = f"{own.removesuffix('.original_module')}.{name}".removesuffix(".weight")
            frozen = ".original_module." in key
            found[key] = (
                path,
                state[key.replace(".original_module", "")] if frozen else state[key],
            )
    return found


def _saved(modules: list[str], config: Mapping[str, Any], source: str) -> set[str]:
    """Those that ``modules_to_save`` names, and what is inside them."""
    names = {str(name) for name in config.get("modules_to_save") or []}
    single = {name for name in names if "." not in name}
    found = {module for module in modules if not single.isdisjoint(module.split("."))}
    known = Names(modules)
    try:
        for name in sorted(names - single):
            found |= known.matching(rf"(?:.*\.)?{re.escape(name)}(?:\..*)?")
    except ValueError as error:
        raise FileError(f"{source}: modules_to_save: {error}.") from error
    return found


def check_config(config: Mapping[str, Any], source: str) -> None:
    """Refuse an adapter that is more than ``W + scale·B·A`` on the weights it was given."""
    kind = config.get("peft_type", "LORA")
    if kind not in _READ:
        raise FileError(
            f'{source}: peft_type "{spelled(kind)[1:-1]}"; only {", ".join(_READ)} can be read. '
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
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        beyond.append(f'init_lora_weights="{init}" (which changed the base weights)')
    if beyond:
        raise FileError(
            f"{source}: {', '.join(beyond)}: more than W + scale·B·A. Merge it with peft "
            "(merge_and_unload), or train it without."
        )


def _pairs(content: Content, magnitudes: Collection[str]) -> tuple[dict[str, _Pair], set[str]]:
    halves: dict[str, dict[str, Tensor]] = {}
    embeddings, names, unused = set(), set(), []
    for key, tensor in content.state.items():
        stem = _stem(key)
        magnitude = _MAGNITUDE.fullmatch(stem)
        if magnitude is not None and magnitude["path"] in magnitudes:
            continue
        match = _FACTOR.fullmatch(stem) or _EMBEDDING.fullmatch(stem)
        if match is None:
            unused.append(key)
            continue
        halves.setdefault(match["path"], {})[match["role"]] = tensor
        names.add(match["name"])
        if match.re is _EMBEDDING:
            embeddings.add(match["path"])
    if len(names) > 1:
        raise FileError(
            f"{content.source}: several adapters in one file: {listed(sorted(map(str, names)))}."
        )
    check_whole(content, halves)
    single = sorted(set(magnitudes) - halves.keys())
    report(content.source, "a magnitude without factors", single, True, "Save it again.")
    pairs = {p: _Pair(h["A"], h["B"], p in embeddings) for p, h in halves.items()}
    copies = {f"{path}{_INNER}.weight" for path in embeddings}  # save_embedding_layers
    return pairs, {key for key in unused if key.removeprefix(PREFIX) not in copies}


def _update(
    path: str,
    pair_: _Pair,
    found: Mapping[str, _Pair],
    experts: "_Experts",
    config: Mapping[str, Any],
    base: Optional[Base],
    source: str,
) -> tuple[str, Optional[Update]]:
    """(path of the weight, its update with scale 1); None for an untouched half of attention."""
    where = f"{source}: {path}"
    if pair_.embedding:
        shape = (pair_.a.shape[1], pair_.b.shape[0])
        return path, Update(pair_.a, pair_.b, 1.0, shape, "transposed", kind="embedding")
    inside = f"{path}{_INNER}.out_proj"
    if _is_attention(path, found):
        # PEFT always adapts both weights of attention: one that was never trained has B = 0
        other = found.get(inside) or found.get(path.removesuffix(f"{_INNER}.out_proj"))
        idle = not pair_.b.any() and other is not None and bool(other.b.any())
        own = path.replace(_INNER, "") if inside not in found else f"{path}.in_proj_weight"
        kind = "parameter" if inside in found else "linear"
        return own, None if idle else replace(pair(pair_.a, pair_.b, 1.0, where), kind=kind)
    owner = _owner(path)
    if experts.parameters.get(owner):
        return _expert(path, owner, experts, pair_, base, where)
    turned = bool(config.get("fan_in_fan_out")) and pair_.a.dim() == 2
    update = pair(pair_.a, pair_.b, 1.0, where)
    if turned and update.shape is not None:
        update = replace(update, layout="transposed", shape=update.shape[::-1])
    return path, update


def _is_attention(path: str, found: Mapping[str, _Pair]) -> bool:
    return f"{path}{_INNER}.out_proj" in found or path.endswith(f"{_INNER}.out_proj")


def _owner(path: str) -> str:
    """The module inside PEFT's wrappers of its parameters."""
    end = len(path)
    while path.endswith(_INNER, 0, end):
        end -= len(_INNER)
    return path[:end]


@dataclass(frozen=True)
class _Experts:
    """The parameters that ``target_parameters`` names, by their owner, and the ranks of each."""

    parameters: Mapping[str, list[str]]
    ranks: Mapping[str, Any]


def _experts(
    found: Mapping[str, _Pair], config: Mapping[str, Any], base: Optional[Base], source: str
) -> _Experts:
    wanted = [name for name in config.get("target_parameters") or [] if isinstance(name, str)]
    owners = {_owner(p) for p, q in found.items() if not (q.embedding or _is_attention(p, found))}
    if not wanted:
        return _Experts({}, {})
    if base is None:
        parameters = _named_parameters(owners, wanted, source)
    else:
        parameters = _held_parameters(owners, wanted, base)
    told = {name: _parameter_path(at, name) for at, own in parameters.items() for name in own}
    chosen = by_pattern(config, "rank_pattern", told.values(), source)
    ranks = {name: chosen.get(path, config.get("r")) for name, path in told.items()}
    return _Experts(parameters, ranks)


def _named_parameters(owners: set[str], wanted: list[str], source: str) -> dict[str, list[str]]:
    by_module: dict[str, list[str]] = {}
    for name in wanted:
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    out = {}
    for owner in owners:
        named = [name for tail in _tails(owner) for name in by_module.get(tail, [])]
        if len(named) > 1:
            raise FileError(
                f"{source}: {owner}: several parameters of one module; give the model, which "
                "knows their order (load_adapter, or convert --model)."
            )
        inner = [name.rpartition(".")[2] for name in named]
        out[owner] = [owner if name == "weight" else f"{owner}.{name}" for name in inner]
    return out


def _held_parameters(owners: set[str], wanted: list[str], base: Base) -> dict[str, list[str]]:
    """The parameters of each, innermost wrapper first: PEFT wraps them in the order in which the
    module holds them, which only a model tells."""
    held: dict[str, list[str]] = {}
    for key in base:
        held.setdefault(key.rpartition(".")[0], []).append(key)
    known, names, out = sorted(base), set(wanted), {}
    for owner in owners:
        there = _place_of_owner(owner, known)
        own = [there] if there in base and _ends_in(f"{owner}.weight", names) else []
        out[owner] = own + [key for key in held.get(there, []) if _ends_in(key, names)]
    return out


def _place_of_owner(owner: str, known: list[str]) -> str:
    """`owner` without a component's name in front, where the base has none."""
    if _begins(owner, known) or _begins(f"{owner}.", known):
        return owner
    for component in COMPONENTS:
        rest = owner.removeprefix(f"{component}.")
        if rest != owner and _begins(f"{rest}.", known):
            return rest
    return owner


def _begins(start: str, known: list[str]) -> bool:
    """Whether one of the sorted names is `start`, or begins so where that ends in a dot."""
    at = bisect_left(known, start)
    if at == len(known):
        return False
    return known[at].startswith(start) if start.endswith(".") else known[at] == start


def _tails(path: str) -> Iterator[str]:
    """The path, and what is left of it after its last dots, of which no model has more."""
    yield path
    at = len(path)
    for _ in range(_MOST_LEVELS):
        at = path.rfind(".", 0, at)
        if at < 0:
            return
        yield path[at + 1 :]


def _ends_in(path: str, names: Collection[str]) -> bool:
    return any(tail in names for tail in _tails(path))


def _expert(
    path: str,
    owner: str,
    experts: _Experts,
    pair_: _Pair,
    base: Optional[Base],
    where: str,
) -> tuple[str, Update]:
    parameters = experts.parameters[owner]
    depth = path.count(_INNER, len(owner))
    if depth >= len(parameters):
        raise FileError(
            f"{where}: more wrapped parameters than the model has: {listed(parameters)}."
        )
    name = parameters[len(parameters) - 1 - depth]
    r = int(number(experts.ranks[name], f"{where}, r"))
    count, extra = divmod(pair_.a.shape[0], max(r, 1))
    if extra or pair_.a.dim() != 2 or pair_.b.dim() != 2 or pair_.b.shape[1] != r * count:
        raise FileError(
            f"{where}: factors of {list(pair_.a.shape)} and {list(pair_.b.shape)} for "
            f"experts of rank {r}."
        )
    if count == 1 and (base is None or len(base[name].shape) == 2):
        return name, replace(pair(pair_.a, pair_.b, 1.0, where), kind="parameter")
    if base is None:
        raise FileError(
            f"{where}: {count} experts, stored as [out, in] or [in, out]; give the "
            "model, which knows."
        )
    a = rearrange(pair_.a, "(e r) i -> e r i", e=count)
    b = rearrange(pair_.b, "o (r e) -> e o r", e=count)
    shape = base[name].shape
    plain, swapped = (b.shape[1], a.shape[2]) == shape[-2:], (a.shape[2], b.shape[1]) == shape[-2:]
    if swapped and (base[name].input_first or not plain):
        a, b = b.mT.contiguous(), a.mT.contiguous()
    return name, Update(a, b, 1.0, shape, "stack", kind="parameter")


def _parameter_path(owner: str, name: str) -> str:
    """The path of a parameter as PEFT spells it: here a layer's own weight has the layer's."""
    return f"{name}.weight" if _ends_in(owner, {name}) else name


def _pattern_path(path: str, key: str, kind: Optional[str]) -> str:
    """The path at which PEFT looks up a layer's rank and alpha: attention's own, for both."""
    if kind == "parameter" and not key.endswith(".in_proj_weight"):
        return _parameter_path(path.removesuffix(_INNER), key)
    if key.endswith(".in_proj_weight"):
        return key.removesuffix(".in_proj_weight")
    return path.removesuffix(f"{_INNER}.out_proj") if path.endswith(f"{_INNER}.out_proj") else key


def alpha(
    config: Mapping[str, Any], chosen: Mapping[str, Any], path: str, r: int, options: Options
) -> float:
    """The alpha of one layer, by its path in the model that PEFT adapted.

    Args:
        config: ``adapter_config.json``.
        chosen: of its ``alpha_pattern``, from `by_pattern`.
        path, r: of the layer.
        options: see `Options`.
    """
    fallback = r if options.alpha is None else options.alpha
    value = chosen.get(path, config.get("lora_alpha", fallback))
    return number(value, f"lora_alpha of {path}")


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
        raise FileError(f"{source}: {name}: {error}.") from error
    return {path: values[number] for path, number in found.items()}


def report_targets(
    content: Content, config: Mapping[str, Any], base: Base, adapter: Adapter, options: Options
) -> None:
    """What ``target_modules`` names in the model, and the file has no tensors for."""
    wanted = config.get("target_modules")
    if not wanted or wanted == "all-linear" or config.get("layers_to_transform") is not None:
        return
    try:
        named = _targeted(wanted, base) - _targeted(config.get("exclude_modules") or [], base)
    except Unbounded as error:
        what = "target_modules was not compared with the file"
        report(content.source, what, [str(error)], False, "Its updates are read.")
        return
    except ValueError as error:
        raise FileError(f"{content.source}: target_modules: {error}.") from error
    places = places_of(base)
    found = [places.find(path, content.source) for path in (*adapter.updates, *adapter.others)]
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
    if isinstance(names, str):
        return Names(base).matching(names)
    known = set(map(str, names))
    return {path for path in base if _ends_in(path, known)}


def write(adapter: Adapter, base: Optional[Base] = None, prefix: str = PREFIX) -> Content:
    """An adapter as PEFT's file and configuration.

    Args:
        adapter: fitted to its model where kinds of layers matter (see `fit`).
        base: needed where several parameters of one module are adapted.
        prefix: in front of every key.

    Raises:
        FileError: a layer that PEFT cannot adapt, named with the reason.
    """
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    scales: dict[str, tuple[float, int]] = {}
    modules: set[str] = set()
    parameters: list[str] = []
    adapter, tokens = _without_rows(adapter)
    if not (adapter.updates or adapter.others):
        return _tokens_alone(tokens, prefix)
    check_all_rescaled(adapter, "PEFT")
    adapter, magnitudes = with_low_ranks(adapter)
    for path, update in adapter.updates.items():
        check_writable(path, update)
        if path in magnitudes:
            _check_rescaled(path, update, adapter, base)
            own = magnitude_of(path, update, magnitudes[path], "PEFT")
            state[f"{prefix}{path}.lora_magnitude_vector"] = own
        for key, tensor, r, module in _tensors(path, update, adapter, base):
            state[f"{prefix}{key}"] = tensor.contiguous()
            ranks[module], alphas[module] = r, alpha_of(update.scale, r)
            scales[path] = update.scale, r
            if update.kind in ("parameter", "weight") and not _attention(path, adapter, base):
                parameters.append(module)
            else:
                modules.add(module)
    _check_attention(adapter, base)
    if any(_EXPERTS.fullmatch(path) for path in (*adapter.updates, *(base or ()))):
        modules, ranks, alphas = _apart(modules, parameters, ranks, alphas)
    config = config_of(ranks, alphas, modules, sorted(set(parameters)))
    config["fan_in_fan_out"] = _fan_in_fan_out(adapter)
    config["use_dora"] = bool(magnitudes)
    for path, value in tokens.items():
        state[f"{prefix}{path}.token_adapter.trainable_tokens_delta"] = value.held["lora_rows"]
    if tokens:
        config["trainable_token_indices"] = {p: _numbers(value) for p, value in tokens.items()}
    return Content(state, {"format": "pt", **scales_metadata(scales)}, config)


def _without_rows(adapter: Adapter) -> tuple[Adapter, dict[str, KindUpdate]]:
    """An adapter without the rows that it trains, and those; of tied layers the first one's."""
    rows, seen = {}, set()
    for path, value in adapter.others.items():
        if value.method == "rows" and id(value) not in seen:
            seen.add(id(value))
            rows[path] = value
    rest = {p: value for p, value in adapter.others.items() if value.method != "rows"}
    return replace(adapter, others=rest), rows


def _numbers(value: KindUpdate) -> list[int]:
    numbers: list[int] = value.held["lora_ids"].tolist()
    return numbers


def _tokens_alone(tokens: Mapping[str, KindUpdate], prefix: str) -> Content:
    """A file of trained tokens only, which PEFT tells by another type of its own."""
    told = {tuple(_numbers(value)) for value in tokens.values()}
    if len(told) > 1:
        raise FileError(
            f"{', '.join(tokens)}: rows of different numbers, and without low-rank updates PEFT "
            "holds one list of them. Save an adapter for each."
        )
    config = {
        "peft_type": "TRAINABLE_TOKENS",
        "token_indices": list(told.pop()),
        "target_modules": sorted(tokens),
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
    }
    state = {
        f"{prefix}{path}.trainable_tokens_delta": value.held["lora_rows"].contiguous()
        for path, value in tokens.items()
    }
    return Content(state, {"format": "pt"}, config)


def check_all_rescaled(adapter: Adapter, tool: str) -> None:
    """Refuse DoRA beside plain updates, between which one switch of a tool's file decides."""
    if adapter.updates and adapter.others:
        raise FileError(
            f'{next(iter(adapter.others))} is of the kind "dora", {next(iter(adapter.updates))} is '
            f"not: {tool} has one switch for both. Save two adapters."
        )


def magnitude_of(path: str, update: Update, magnitude: Tensor, tool: str) -> Tensor:
    """A magnitude as peft has it: ``[out]``, of a convolution ``[1, out, 1, ...]``.

    Raises:
        FileError: its norm is over the outputs, which peft does not know.
    """
    outer = 1 if update.layout == "transposed" else 0
    if magnitude.shape[outer] != magnitude.numel():
        raise FileError(
            f"{path}: its magnitude is of the norm over outputs, {list(magnitude.shape)}, and "
            f"{tool} takes that over inputs. Keep the native format, or kohya's."
        )
    flat = magnitude.reshape(-1).contiguous()
    dims = 0 if update.kind != "convolution" else len(update.shape or ())
    return flat.reshape(1, -1, *[1] * (dims - 2)) if dims else flat


def _check_rescaled(path: str, update: Update, adapter: Adapter, base: Optional[Base]) -> None:
    """Refuse DoRA where peft has none."""
    if update.kind in ("parameter", "weight") or _attention(path, adapter, base):
        what = "attention" if _attention(path, adapter, base) else f"a {update.kind}"
        raise FileError(f'{path}: "dora" of {what}, which PEFT does not have.')


def _apart(
    modules: set[str], parameters: list[str], ranks: dict[str, int], alphas: dict[str, float]
) -> tuple[set[str], dict[str, int], dict[str, float]]:
    """Layers under the names of experts' parts as parameters, which peft leaves as they are.

    Fused experts and their shared or dense neighbours are in one model: peft 0.21 rewrites every
    module of these names into the fused parameters, and drops the updates of all others.
    """
    moved = {path for path in modules if path.rpartition(".")[2] in _PARTS}
    parameters.extend(f"{path}.weight" for path in moved)
    names = {path: f"{path}.weight" if path in moved else path for path in ranks}
    return (
        modules - moved,
        {names[path]: r for path, r in ranks.items()},
        {names[path]: alpha for path, alpha in alphas.items()},
    )


def check_writable(path: str, update: Update) -> None:
    """Refuse what is no update of a layer that PEFT knows."""
    check_told(path, update, "PEFT")
    known = (None, "linear", "convolution", "embedding", "parameter", "weight")
    if update.kind not in known:
        raise FileError(f"{path}: a {update.kind}, which PEFT cannot adapt.")


def _tensors(
    path: str, update: Update, adapter: Adapter, base: Optional[Base]
) -> Iterator[tuple[str, Tensor, int, str]]:
    """(key, tensor, rank there, module or parameter) of one update."""
    owner = path.rpartition(".")[0]
    if update.kind == "embedding":
        yield f"{path}.lora_embedding_A", update.lora_A, update.r, path
        yield f"{path}.lora_embedding_B", update.lora_B, update.r, path
        return
    stem, module, r = path, path, update.r
    a, b = kernels(update) if update.layout != "stack" else _stacked(path, update, base)
    if update.groups > 1:
        a, b = grouped(update)
        r = a.shape[0]
    if _attention(path, adapter, base):
        inside = path.endswith(".out_proj")
        stem, module = f"{owner}{_INNER}.out_proj" if inside else owner, owner
        yield from _idle_half(owner, update, adapter, inside)
    elif update.kind in ("parameter", "weight"):
        stem = _wrapped(path, update, adapter, base)
        module = f"{path}.weight" if update.kind == "weight" else path
    yield f"{stem}.lora_A.weight", a, r, module
    yield f"{stem}.lora_B.weight", b, r, module


def _stacked(path: str, update: Update, base: Optional[Base]) -> tuple[Tensor, Tensor]:
    if update.shape is None or len(update.shape) != 3:
        raise FileError(
            f"{path}: a parameter of shape {list(update.shape or ())}; PEFT adapts parameters of "
            "two or three dimensions. Leave it out, or keep the native format."
        )
    a, b = update.lora_A, update.lora_B
    if base is not None and path in base and base[path].input_first:
        a, b = b.mT, a.mT
    return rearrange(a, "e r i -> (e r) i"), rearrange(b, "e o r -> o (r e)")


def _attention(path: str, adapter: Adapter, base: Optional[Base]) -> bool:
    """Whether a weight is one of the two that PEFT adapts together in MultiheadAttention."""
    owner, _, name = path.rpartition(".")
    if name == "in_proj_weight":
        return True
    sibling = f"{owner}.in_proj_weight"
    apart = base is not None and f"{owner}.q_proj_weight" in base
    if name == "out_proj" and apart:
        raise FileError(f"{path}: PEFT adapts attention only where q, k and v have one width.")
    return name == "out_proj" and (sibling in adapter.updates or sibling in (base or ()))


def _idle_half(
    owner: str, update: Update, adapter: Adapter, inside: bool
) -> Iterator[tuple[str, Tensor, int, str]]:
    """Zeros for the weight of attention that has no update, since PEFT always adapts both."""
    other = f"{owner}.in_proj_weight" if inside else f"{owner}.out_proj"
    if other in adapter.updates:
        return
    stem, width = (owner, 3) if inside else (f"{owner}{_INNER}.out_proj", 1)
    size = update.lora_B.shape[0] // (1 if inside else 3)
    yield f"{stem}.lora_A.weight", update.lora_A.new_zeros(update.r, size), update.r, owner
    yield f"{stem}.lora_B.weight", update.lora_B.new_zeros(width * size, update.r), update.r, owner


def _check_attention(adapter: Adapter, base: Optional[Base]) -> None:
    for path, update in adapter.updates.items():
        owner, _, name = path.rpartition(".")
        twin = adapter.updates.get(f"{owner}.out_proj") if name == "in_proj_weight" else None
        if twin is not None and (twin.r, twin.scale) != (update.r, update.scale):
            raise FileError(
                f"{path} has r = {update.r} and scale {update.scale:g}, {owner}.out_proj {twin.r} "
                f"and {twin.scale:g}: PEFT holds one of each for both."
            )


def _wrapped(path: str, update: Update, adapter: Adapter, base: Optional[Base]) -> str:
    """The module of a parameter, with a wrapper for each parameter that PEFT wraps after it."""
    owner = path if update.kind == "weight" else path.rpartition(".")[0]
    if not owner:
        raise FileError(f"{path}: a parameter of the model itself, which PEFT cannot adapt.")
    siblings = [
        p
        for p, u in adapter.updates.items()
        if u.kind in ("parameter", "weight")
        and (p if u.kind == "weight" else p.rpartition(".")[0]) == owner
    ]
    if len(siblings) > 1 and base is None:
        raise FileError(
            f"{owner}: several parameters of one module ({', '.join(siblings)}). Give "
            "the model, which knows their order."
        )
    order = [p for p in (base or siblings) if p in siblings]
    return owner + _INNER * (len(order) - 1 - order.index(path))


def _fan_in_fan_out(adapter: Adapter) -> bool:
    turned = [p for p, u in adapter.updates.items() if _is_conv1d(u)]
    experts = [p for p, u in adapter.updates.items() if u.kind in ("parameter", "weight")]
    experts = [p for p in experts if not p.endswith(".in_proj_weight")]
    if turned and experts:
        raise FileError(
            f"{turned[0]} is a transformers Conv1D and {experts[0]} a parameter: PEFT "
            "refuses both in one adapter. Save two adapters."
        )
    return bool(turned)


def _is_conv1d(update: Update) -> bool:
    return update.kind == "linear" and update.layout == "transposed"


def config_of(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    modules: set[str],
    parameters: list[str],
) -> dict[str, Any]:
    """``adapter_config.json``: the commonest rank and alpha, and a pattern for every other."""
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
    return f"^{re.escape(path)}"


def _is_peft(content: Content) -> bool:
    keys = list(content.state)
    names = (".lora_A", ".lora_embedding_A", ".trainable_tokens_delta", ".hada_w", ".lokr_w")
    inside = any(name in key for key in keys for name in names)
    prefixed = any(key.startswith("base_model.") or "lora_embedding_A" in key for key in keys)
    return inside and (prefixed or "peft_type" in content.config)


FORMAT = Format(
    "peft",
    marks=(Mark(30, _is_peft),),
    read=read,
    write=write,
    passed_over=of_peft,
    kinds=("lora", "soft", "dora", "rows"),
    weights=("adapter_model.safetensors", "adapter_model.bin"),
    weights_rank=10,  # before torchtune's, which writes this form beside its own
    config="adapter_config.json",
)
