"""PEFT's tensors, read."""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, Optional

import torch
from torch import Tensor

from paramlora.errors import FileError, listed
from paramlora.formats.base import Base, is_named_conv1d, stacks_of
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
    check_size,
    difference_of,
    pair,
    product_of,
    rescaled,
    wide,
)
from paramlora.formats.peft.configuration import (
    INNER,
    PREFIX,
    alpha,
    by_pattern,
    check_config,
    check_magnitudes,
    check_ranks,
    report_targets,
    stem,
)
from paramlora.formats.peft.copies import copies_in, with_copies
from paramlora.formats.peft.experts import (
    Experts,
    Pair,
    expert_of,
    experts_of,
    is_attention,
    owner_of,
    parameter_path,
)
from paramlora.formats.peft.tokens import TOKENS, tokens_of
from paramlora.formats.scale import headed, recorded, scale_of, tells_alpha
from paramlora.model.match import Names
from paramlora.update import lokr
from paramlora.update.value import Adapter, KindUpdate, Update

_NAME = r"(?P<role>[AB])(?:\.(?P<name>[^.]+))?"
_FACTOR = re.compile(rf"(?P<path>.+)\.lora_{_NAME}\.weight", re.DOTALL)
_MAGNITUDE = re.compile(r"(?P<path>.+)\.lora_magnitude_vector(?:\..+)?", re.DOTALL)
_EMBEDDING = re.compile(rf"(?P<path>.+)\.lora_embedding_{_NAME}", re.DOTALL)
_VERSION = re.compile(r"([0-9]{1,4})\.([0-9]{1,4})")
_PRODUCT = re.compile(
    r"(?P<path>.+)\.(?P<name>hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))", re.DOTALL
)


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
    if not content.config and options.alpha is None and not tells_alpha(content):
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
        match = _PRODUCT.fullmatch(stem(key))
        if match is None:
            unused.append(key)
        else:
            found.setdefault(match["path"], {})[match["name"]] = one
    whole = _whole(set(unused), content.state, config, source)
    report_unused(content, set(unused) - whole.keys(), options.strict)
    alphas = by_pattern(config, "alpha_pattern", found, source)
    ranks = by_pattern(config, "rank_pattern", found, source)
    own = {path: _rank(held) for path, held in found.items()}
    check_ranks(config, {p: r for p, r in own.items() if r}, source, options.strict)
    others = {}
    for path, held in found.items():
        check_factors(f"{source}: {path}", *held.values())
        # not lora_alpha; and the rank is the configuration's, as a whole factor has none
        alpha_ = number(alphas.get(path, config.get("alpha", 1)), f"{source}: alpha of {path}")
        r = number(ranks.get(path, config.get("r", 1)), f"{source}: r of {path}")
        scale = alpha_ / max(r, 1.0)
        if "lokr_w2" in held and held["lokr_w2"].dim() == 3:
            others[path] = _misordered(held, scale, f"{source}: {path}")
        else:
            others[path] = product_of(held, scale, f"{source}: {path}")
    return Adapter({}, whole=dict(whole.values()), others=others)


def _rank(held: Mapping[str, Tensor]) -> int:
    """The rank of LoHa's or LoKr's factors; 0 where both of LoKr's are dense."""
    names = ("hada_w1_b", "lokr_w1_b", "lokr_w2_b")
    return next((held[name].shape[0] for name in names if name in held and held[name].dim()), 0)


def _misordered(held: Mapping[str, Tensor], scale: float, where: str) -> KindUpdate:
    """A Conv1d's LoKr as peft 0.21 multiplies it (tuners/lokr/layer.py's ``make_kron``): its second
    factor has a dimension more than its first, and the product is laid out another way."""
    sizes = {name: torch.empty_like(tensor, device="meta") for name, tensor in held.items()}
    first, second = lokr.factors(sizes)
    out, fan_in = (a * b for a, b in zip(first.shape, second.shape))
    check_size((out, fan_in, second.shape[2]), where)
    change = torch.kron(*lokr.factors({n: wide(tensor) for n, tensor in held.items()})) * scale
    return difference_of(change.reshape(out, fan_in, second.shape[2]), where)


_Made = dict[str, tuple[str, Optional[Update]]]


def read_pairs(
    content: Content, config: Mapping[str, Any], base: Optional[Base], options: Options
) -> Adapter:
    """The updates of all ``lora_A`` and ``lora_B`` in a file whose configuration is `config`."""
    magnitudes, tokens = _magnitudes(content.state), tokens_of(content, config)
    found, rest = _pairs(content, magnitudes)
    rest -= {key for key in rest if TOKENS.fullmatch(stem(key))}
    # in this order, each takes its keys out of the rest; what nobody has taken is reported
    whole = _whole(rest, content.state, config, content.source)
    copies = copies_in(rest - whole.keys(), found)
    report_unused(content, rest - whole.keys() - copies.keys(), options.strict)
    if base is not None and config.get("target_parameters"):
        # target_parameters names fused experts, which the model may hold one by one
        base = {**base, **stacks_of(base)}
    updates: dict[str, Update] = {}
    others: dict[str, KindUpdate] = {**tokens}
    made = _updates(content, config, base, options, found)
    untold = _untold(made.values(), config)
    for path, (key, update) in made.items():
        shape = None if key in untold else update.shape
        if path in magnitudes:
            own = rescaled(update, magnitudes[path].flatten(), f"{content.source}: {path}")
            others[key] = replace(own, shape=shape)
        else:
            updates[key] = replace(update, shape=shape)
    check_magnitudes(config, updates, content.source)
    adapter = Adapter(updates, whole=dict(whole.values()), others=others)
    # after the updates are known: a saved embedding takes the base's place under its update
    saved = {path: content.state[key] for key, path in copies.items()}
    return with_copies(adapter, saved, base, content.source)


def _untold(made: Iterable[tuple[str, Update]], config: Mapping[str, Any]) -> set[str]:
    """The paths of which the file does not tell whether their weight is a Conv1D's: its
    ``fan_in_fan_out`` is that of the last layer that peft adapted (tuners/lora/layer.py,
    ``dispatch_default``), whatever the others are."""
    linear = [key for key, update in made if update.kind == "linear"]
    named = {key for key in linear if is_named_conv1d(key)}
    rest = set(linear) - named
    if not named or not rest:
        return set()
    return rest if config.get("fan_in_fan_out") else named


def _updates(
    content: Content,
    config: Mapping[str, Any],
    base: Optional[Base],
    options: Options,
    found: Mapping[str, Pair],
) -> dict[str, tuple[str, Update]]:
    """By the file's path of each pair of factors its weight's path, and its update."""
    experts = experts_of(found, config, base, content.source)
    made_of = {
        path: _update(path, pair_, found, experts, config, base, content.source)
        for path, pair_ in found.items()
    }
    alphas = _alphas(content, config, made_of, options)
    ranks = {
        path: found[own].a.shape[0]
        for path, (own, (key, made)) in zip(_pattern_paths(made_of), made_of.items())
        if made is not None and made.layout != "stack" and not experts.parameters.get(owner_of(own))
    }
    check_ranks(config, ranks, content.source, options.strict)
    twice, exact = _twice(content, config, made_of), recorded(content)
    out = {}
    for path, (key, made) in made_of.items():
        if made is None:
            continue
        # A's rows: of a grouped convolution peft counts all groups' ranks; of experts E * r
        r = made.r if made.layout == "stack" or found[path].embedding else len(found[path].a)
        at = _pattern_path(path, key, made.kind)
        value = alpha(config, alphas, at, r, options, content.source)
        # rsLoRA (Kalajdzievski 2023): alpha / sqrt(r)
        root = math.sqrt(r) if config.get("use_rslora") else None
        scale = value / root if root else scale_of(value, r, exact.get(key), content.source)
        out[path] = key, replace(made, scale=2 * scale if key in twice else scale)
    return out


def _pattern_paths(made_of: _Made) -> list[str]:
    """The path at which PEFT looks each pair's rank and alpha up."""
    return [
        _pattern_path(path, key, None if made is None else made.kind)
        for path, (key, made) in made_of.items()
    ]


def _alphas(
    content: Content, config: Mapping[str, Any], made_of: _Made, options: Options
) -> dict[str, float]:
    """The alphas that the configuration tells of single layers, or without one the file's head."""
    paths = _pattern_paths(made_of)
    found = by_pattern(config, "alpha_pattern", paths, content.source)
    return found if config else found | _headed(content, paths, options.alpha)


def _twice(content: Content, config: Mapping[str, Any], made_of: _Made) -> set[str]:
    """The weights whose update acts twice in the peft that wrote it, with a warning."""
    twice = {key for path, (key, made) in made_of.items() if made and _is_twice(path, config)}
    what = "the output projection of a MultiheadAttention, which peft (0.21 and before) adds twice"
    report(content.source, what, twice, False, "It is read with twice its scale, as trained.")
    return twice


def _magnitudes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DoRA's magnitudes, by the path that the file gives their layer."""
    matches = {key: _MAGNITUDE.fullmatch(stem(key)) for key in state}
    return {match["path"]: state[key] for key, match in matches.items() if match is not None}


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
            own = module.removesuffix(INNER).removesuffix(".modules_to_save")
            path = f"{own.removesuffix('.original_module')}.{name}".removesuffix(".weight")
            # peft's wrapper keeps the frozen module beside the trained copy: both keys mean that
            frozen = ".original_module." in key
            found[key] = (
                path,
                state[key.replace(".original_module", "")] if frozen else state[key],
            )
    return found


def _saved(modules: list[str], config: Mapping[str, Any], source: str) -> set[str]:
    """The modules that ``modules_to_save`` names, and what is inside them."""
    names = {str(name) for name in config.get("modules_to_save") or []}
    # peft takes a name of one part for any module that is called so, at any level
    single = {name for name in names if "." not in name}
    found = {module for module in modules if not single.isdisjoint(module.split("."))}
    known = Names(modules)
    try:
        for name in sorted(names - single):
            found |= known.matching(rf"(?:.*\.)?{re.escape(name)}(?:\..*)?")
    except ValueError as error:
        raise FileError(f"{source}: modules_to_save: {error}. Mend it there.") from error
    return found


def _pairs(content: Content, magnitudes: Collection[str]) -> tuple[dict[str, Pair], set[str]]:
    halves: dict[str, dict[str, Tensor]] = {}
    embeddings, names, unused = set(), set(), []
    for key, tensor in content.state.items():
        name = stem(key)
        magnitude = _MAGNITUDE.fullmatch(name)
        if magnitude is not None and magnitude["path"] in magnitudes:
            continue
        match = _FACTOR.fullmatch(name) or _EMBEDDING.fullmatch(name)
        if match is None:
            unused.append(key)
            continue
        halves.setdefault(match["path"], {})[match["role"]] = tensor
        names.add(match["name"])
        if match.re is _EMBEDDING:
            embeddings.add(match["path"])
    # peft leaves the adapter's name out; a model's plain state dict has it, perhaps several
    if len(names) > 1:
        raise FileError(
            f"{content.source}: several adapters in one file: {listed(sorted(map(str, names)))}. "
            "Save one of them alone."
        )
    check_whole(content, halves)
    single = sorted(set(magnitudes) - halves.keys())
    report(content.source, "a magnitude without factors", single, True, "Save it again.")
    pairs = {p: Pair(h["A"], h["B"], p in embeddings) for p, h in halves.items()}
    return pairs, set(unused)


def _update(
    path: str,
    pair_: Pair,
    found: Mapping[str, Pair],
    experts: Experts,
    config: Mapping[str, Any],
    base: Optional[Base],
    source: str,
) -> tuple[str, Optional[Update]]:
    """(path of the weight, its update with scale 1); None for an untouched half of attention."""
    where = f"{source}: {path}"
    if pair_.embedding:
        shape = (pair_.a.shape[1], pair_.b.shape[0])
        update = Update(pair_.a, pair_.b, 1.0, shape, "transposed", kind="embedding")
        return path.replace(f"{INNER}.", "."), update
    inside = f"{path}{INNER}.out_proj"
    if is_attention(path, found):
        # PEFT always adapts both weights of attention: one that was never trained has B = 0
        other = found.get(inside) or found.get(path.removesuffix(f"{INNER}.out_proj"))
        # both all zero: an adapter that was never trained, of which neither is left out
        idle = not pair_.b.any() and other is not None and bool(other.b.any())
        own = path.replace(INNER, "") if inside not in found else f"{path}.in_proj_weight"
        own = own.replace(f"{INNER}.", ".")
        kind = "parameter" if inside in found else "linear"
        return own, None if idle else replace(pair(pair_.a, pair_.b, 1.0, where), kind=kind)
    plain = path.replace(f"{INNER}.", ".")  # inside of a module whose own parameter is wrapped
    owner = owner_of(path)
    if experts.parameters.get(owner):
        return expert_of(path, owner, experts, pair_, base, where)
    # transformers' Conv1D, which stores [in, out]; a convolution's kernel is never turned
    turned = bool(config.get("fan_in_fan_out")) and pair_.a.dim() == 2
    update = pair(pair_.a, pair_.b, 1.0, where)
    if turned and update.shape is not None:
        update = replace(update, layout="transposed", shape=update.shape[::-1])
    return plain, update


def _headed(
    content: Content, paths: Iterable[str], given: Optional[float] = None
) -> dict[str, float]:
    """The alphas in the header of a file that has lost its configuration."""
    return headed(content, paths, lambda path, part: path.startswith(f"{part}."), given)


def _is_twice(path: str, config: Mapping[str, Any]) -> bool:
    """Whether an update acts twice in the peft that wrote it: tuners/lora/layer.py's
    ``MultiheadAttention.merge``, by which it also trains."""
    version = _VERSION.match(str(config.get("peft_version")))
    mended = version is not None and (int(version[1]), int(version[2])) > (0, 21)
    return path.endswith(f"{INNER}.out_proj") and not mended


def _pattern_path(path: str, key: str, kind: Optional[str]) -> str:
    """The path at which PEFT looks up a layer's rank and alpha: attention's own, for both."""
    if kind == "parameter" and not key.endswith(".in_proj_weight"):
        return parameter_path(path.removesuffix(INNER), key)
    if key.endswith(".in_proj_weight"):
        return key.removesuffix(".in_proj_weight")
    return path.removesuffix(f"{INNER}.out_proj") if path.endswith(f"{INNER}.out_proj") else key
