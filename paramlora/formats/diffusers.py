"""diffusers' ``pytorch_lora_weights.safetensors``, today's and the older spellings.

Read from diffusers 0.42: loaders/peft.py (``save_lora_adapter``), loaders/lora_base.py (pipelines'
``save_lora_weights``), utils/state_dict_utils.py (the older spellings), utils/peft_utils.py (the
scale of a file without metadata).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Optional

from torch import Tensor

from paramlora.errors import FileError, with_article
from paramlora.formats import peft
from paramlora.formats.base import COMPONENTS, Base
from paramlora.formats.content import (
    DEFAULTS,
    Content,
    Options,
    check_first,
    number,
    parsed,
    report_unused,
)
from paramlora.formats.factors import (
    difference_of,
    grouped,
    kernels,
    pair,
    rescaled,
    with_low_ranks,
)
from paramlora.formats.format import Format, Mark, Prefix, any_key
from paramlora.formats.loaders import of_diffusers
from paramlora.formats.metadata import METADATA
from paramlora.formats.pipeline import PARTS, part_told
from paramlora.formats.scale import alpha_of, headed, recorded, scale_of, scales_metadata
from paramlora.update.value import Adapter, Update, Value, apart_by_kind

_ROLES = {
    "A": "down",
    "B": "up",
    "down": "down",
    "up": "up",
    "alpha": "alpha",
    "lora_magnitude_vector": "vector",  # peft's
    "dora_scale": "dora_scale",  # LyCORIS's
    **dict.fromkeys(("diff", "w_norm"), "diff"),  # ComfyUI's and LyCORIS's changes, whole
    **dict.fromkeys(("diff_b", "b_norm"), "diff_b"),
    "bias": "bias",  # peft's lora_bias, which is scaled
}
_SPELLINGS = tuple(
    re.compile(spelling, re.DOTALL)
    for spelling in (
        r"(?P<path>.+)\.lora_(?P<role>[AB])(?:\.[^.]+)?\.weight",  # 0.22 and later
        r"(?P<path>.+)\.lora_(?P<role>[AB])",  # mochi
        r"(?P<path>.+)\.lora_(?P<role>down|up)(?:\.weight)?",  # OneTrainer and ComfyUI
        r"(?P<path>.+)\.lora(?:_linear_layer)?\.(?P<role>down|up)\.weight",  # 0.19 to 0.25
        r"(?P<path>.+\.processor\.(?:qkv|proj)_lora[12]?)\.(?P<role>down|up)\.weight",  # XLabs
        # attention processors, before 0.22
        r"(?P<path>.+?)(?:\.processor)?\.(?P<to>to_(?:q|k|v|out))_lora\.(?P<role>down|up)\.weight",
        r"(?P<path>.+)\.(?P<role>alpha|dora_scale|diff|diff_b|w_norm|b_norm)",
        r"(?P<path>.+)\.lora_B(?:\.[^.]+)?\.(?P<role>bias)",
        r"(?P<path>.+)\.(?P<role>lora_magnitude_vector)(?:\..+)?",
    )
)
_SELF_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def read(content: Content, base: Optional[Base] = None, options: Options = DEFAULTS) -> Adapter:
    """The adapter in a diffusers file, of one model or of a pipeline.

    The paths keep a component's name (``unet.``); `fit` leaves it out where the model is that
    component. Without metadata and alphas the scale is 1, as in diffusers.

    Raises:
        FileError: tensors of something else, Control-LoRA, or half an update.
    """
    halves, unused = _halves(content)
    report_unused(content, unused, options.strict)
    configs, exact = _configs(content), recorded(content)
    alphas = _alphas(configs, halves, content.source, options.strict)
    if not configs:
        told = headed(content, halves, _is_of, options.alpha)
        # the header's, under no component: each path there is the whole one
        alphas[""] = alphas.get("", {}) | told
    updates: dict[str, Value] = {}
    for path, half in halves.items():
        where = f"{content.source}: {path}"
        updates |= _differences(path, half, where)
        # a lone alpha is half an update, and refused below
        if half.keys() <= {"diff", "diff_b", "alpha"} and half.keys() != {"alpha"}:
            continue
        if not {"down", "up"} <= half.keys() or "diff" in half:
            raise FileError(f"{where}: has {', '.join(sorted(half))} only. Save it again.")
        update = pair(half["down"], half["up"], 1.0, where)
        scale = _scale(path, half, configs, alphas, exact, options, where)
        update = replace(update, scale=scale)
        if "bias" in half:
            # peft multiplies B's bias by the scale, as B itself
            updates[f"{path}.bias"] = difference_of(half["bias"] * scale, f"{where}.bias")
        if "vector" in half:
            updates[path] = rescaled(update, half["vector"].flatten(), where)
        elif "dora_scale" in half:
            updates[path] = rescaled(update, half["dora_scale"], where)
        else:
            updates[path] = update
    adapter = Adapter(**apart_by_kind(updates))
    inside: dict[str, list[str]] = {}
    for path in adapter.updates:
        inside.setdefault(_component(path, configs), []).append(path)
    for component, config in configs.items():
        peft.check_magnitudes(config, inside.get(component, []), content.source)
        meant = options.component in (None, component) and "target_modules" in config
        if base is None or not meant:
            continue
        own = {path: slot for path, slot in base.items() if path.startswith(f"{component}.")}
        peft.report_targets(content, config, own or base, adapter, options)
    return adapter


def _differences(path: str, half: Mapping[str, Tensor], where: str) -> dict[str, Value]:
    """The changes that are added whole, of a layer's weight and of its bias."""
    names = {"diff": path, "diff_b": f"{path}.bias"}
    return {
        name: difference_of(half[role], f"{where}.{role}")
        for role, name in names.items()
        if role in half
    }


def _halves(content: Content) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    halves: dict[str, dict[str, Tensor]] = {}
    unused = []
    if "lora_controlnet" in content.state:
        raise FileError(
            f"{content.source}: a Control-LoRA, which is more than W + scale·B·A. Use it with the "
            "tool that it was made for."
        )
    for key, tensor in content.state.items():
        match = next((m for s in _SPELLINGS if (m := s.fullmatch(key))), None)
        if match is None:
            unused.append(key)
        else:
            half = halves.setdefault(_path(match), {})
            check_first(_ROLES[match["role"]] in half, key, content.source)
            half[_ROLES[match["role"]]] = tensor
    return halves, unused


def _path(match: "re.Match[str]") -> str:
    path, to = match["path"], match.groupdict().get("to")
    if to is None:
        # before 0.22 the factors were their attention's processor's, not the projection's
        return path.replace(".processor.", ".")
    if path.endswith("self_attn"):  # of a text encoder
        return f"{path}.{_SELF_ATTENTION[to]}"
    # to_out is a list of a Linear and a dropout
    return f"{path}.{'to_out.0' if to == 'to_out' else to}"


def _configs(content: Content) -> dict[str, dict[str, Any]]:
    """``LoraConfig``s by the prefix of their keys: ``{"unet": {...}}``, or ``{"": {...}}``."""
    peft.check_config(content.config, content.source)
    if METADATA not in content.metadata:
        return {"": dict(content.config)} if content.config else {}
    found: dict[str, dict[str, Any]] = {}
    for key, value in parsed(content.metadata[METADATA], content.source).items():
        # diffusers flattens: unet.r, unet.lora_alpha, ...; a file of one model has no component
        component = next((c for c in COMPONENTS if key.startswith(f"{c}.")), "")
        found.setdefault(component, {})[key.removeprefix(f"{component}.")] = value
    for config in found.values():
        peft.check_config(config, content.source)
    return found


def _is_of(path: str, component: str) -> bool:
    return path.startswith(f"{component}.")


def _alphas(
    configs: Mapping[str, Mapping[str, Any]],
    halves: Mapping[str, Mapping[str, Tensor]],
    source: str,
    strict: bool,
) -> dict[str, dict[str, Any]]:
    """What each component's patterns say of its layers' alphas, where its ranks are theirs."""
    inside: dict[str, dict[str, int]] = {component: {} for component in configs}
    for path, half in halves.items():
        down, component = half.get("down"), _component(path, configs)
        if down is not None and down.dim():
            own = inside.setdefault(component, {})
            own[path.removeprefix(f"{component}.")] = down.shape[0]
    for component, own in inside.items():
        peft.check_ranks(configs.get(component, {}), own, source, strict)
    return {
        component: peft.by_pattern(configs.get(component, {}), "alpha_pattern", own, source)
        for component, own in inside.items()
    }


def _component(path: str, configs: Mapping[str, Mapping[str, Any]]) -> str:
    first, _, rest = path.partition(".")
    second, _, _ = rest.partition(".")
    return next((c for c in (f"{first}.{second}", first) if c in configs and c != path), "")


def _scale(
    path: str,
    half: Mapping[str, Tensor],
    configs: Mapping[str, Mapping[str, Any]],
    alphas: Mapping[str, Mapping[str, Any]],
    exact: Mapping[str, Any],
    options: Options,
    where: str,
) -> float:
    r = half["down"].shape[0]
    if "alpha" in half:
        return scale_of(number(half["alpha"], where), r, exact.get(path), where)
    component = _component(path, configs)
    # what diffusers does then: it takes the rank for the alpha
    if component not in configs and options.alpha is None and path not in alphas.get("", {}):
        return 1.0
    config, own = configs.get(component, {}), path.removeprefix(f"{component}.")
    alpha = peft.alpha(config, alphas[component], own, r, options, where)
    if config.get("use_rslora"):
        return alpha / float(r**0.5)
    return scale_of(alpha, r, exact.get(path), where)


def write(
    adapter: Adapter, base: Optional[Base] = None, component: Optional[str] = None
) -> Content:
    """An adapter as a pipeline's file, which ``pipe.load_lora_weights`` takes, or as a model's.

    Args:
        adapter: fitted to its model where kinds of layers matter.
        base: tells which part of a pipeline the model is, where its names do not.
        component: ``"unet"``, ``"transformer"``, ``"text_encoder"``: the pipeline's name for the
            model; empty for a file that the model itself loads (``load_lora_adapter`` with
            ``prefix=None``), as it is where nothing tells the part.

    Raises:
        FileError: a layer that is no Linear or convolution, named; a text encoder, of which a
            pipeline may have several; a component that no pipeline has.
    """
    component = _component_of(adapter, base) if component is None else component
    if component and component not in PARTS:
        raise FileError(
            f'"{component}" is no part of a pipeline, which would load nothing of it. Parts: '
            f"{', '.join(PARTS)}."
        )
    state: dict[str, Tensor] = {}
    ranks: dict[str, dict[str, int]] = {}  # by component, since each has a configuration
    alphas: dict[str, dict[str, float]] = {}
    scales: dict[str, tuple[float, int]] = {}
    start = f"{component}." if component else ""
    peft.check_all_rescaled(adapter, "diffusers")
    adapter, magnitudes = with_low_ranks(adapter)
    each_tells = not component and part_told(adapter.updates) == ""
    for path, update in adapter.updates.items():
        _check(path, update)
        down, up = grouped(update) if update.groups > 1 else kernels(update)
        r = down.shape[0]
        # a pipeline's file has a configuration for each model, with patterns of its own paths
        part, own = path.split(".", 1) if each_tells else (component, path)
        ranks.setdefault(part, {})[own] = r
        alphas.setdefault(part, {})[own] = alpha_of(update.scale, r)
        scales[f"{start}{path}"] = update.scale, r
        state[f"{start}{path}.lora_A.weight"] = down.contiguous()
        state[f"{start}{path}.lora_B.weight"] = up.contiguous()
        if path in magnitudes:
            magnitude = peft.magnitude_of(path, update, magnitudes[path], "diffusers")
            state[f"{start}{path}.lora_magnitude_vector"] = magnitude
    flat: dict[str, Any] = {}
    for part, own_ranks in ranks.items():
        config = peft.config_of(own_ranks, alphas[part], set(own_ranks), [])
        config["use_dora"] = bool(magnitudes)
        flat |= {f"{part}.{key}" if part else key: value for key, value in config.items()}
    told = json.dumps(flat, sort_keys=True)
    about = {"format": "pt", METADATA: told, **scales_metadata(scales)}
    return Content(state, about)


def _component_of(adapter: Adapter, base: Optional[Base]) -> str:
    part = part_told(adapter.values(), base)
    if part == "text_encoder":
        raise FileError(
            "a text encoder, of which a pipeline may have several: give its name as component "
            "(--prefix), such as text_encoder or text_encoder_2."
        )
    return part or ""


def _check(path: str, update: Update) -> None:
    peft.check_writable(path, update)
    if update.kind in ("embedding", "parameter", "weight") or update.layout != "matrix":
        what = "transformers Conv1D" if update.kind == "linear" else update.kind or update.layout
        raise FileError(
            f"{path}: {with_article(what)}; diffusers' files hold Linear and convolutions only. "
            "Keep the native format."
        )


FORMAT = Format(
    "diffusers",
    marks=(
        Mark(
            60,
            any_key(r".+(?:_lora[12]?\.down\.weight|\.lora_linear_layer\..+|\.lora\.down\.weight)"),
        ),
        Mark(80, any_key(r".+\.lora_A(?:\.[^.]+)?\.weight")),
        Mark(81, lambda content: METADATA in content.metadata),
    ),
    read=read,
    write=write,
    passed_over=of_diffusers,
    kinds=("lora", "soft", "dora"),
    weights=("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"),
    weights_rank=30,
    prefix=Prefix("component", "diffusers' keys (unet)"),
    beside={"diffusers": {"component": ""}},  # the model's own file, which is in no pipeline
)
