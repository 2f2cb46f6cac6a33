"""The original wrapper's files: ``torch.save`` of ``.lora_A``, ``.lora_B`` and ``.lora_scale``.

Read from the original: a Linear's update is ``lora_scale · lora_B · lora_A``, never divided by the
rank; a soft branch names its two layers the other way round (``lora_B.weight`` comes first).
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Optional

import torch
from torch import Tensor

from paramlora.errors import FileError, with_article
from paramlora.formats.base import Base
from paramlora.formats.content import (
    DEFAULTS,
    Content,
    Options,
    check_factors,
    number,
    report_unused,
)
from paramlora.formats.factors import kernels, pair
from paramlora.formats.format import Format, Mark, any_key
from paramlora.formats.fused import fused_linear
from paramlora.formats.loaders import of_state_dict
from paramlora.update.value import Adapter, Update

_PART = re.compile(r"(?:(?P<path>.+)\.)?(?P<part>lora_[AB](?:\.weight)?|lora_scale)", re.DOTALL)
_HARD, _SOFT = {"lora_A", "lora_B"}, {"lora_A.weight", "lora_B.weight"}


def read(content: Content, base: Optional[Base] = None, options: Options = DEFAULTS) -> Adapter:
    """The adapter in an extracted file, or in a checkpoint of a wrapped model.

    Of a checkpoint, what is not ``lora_*`` is the base model, and left to `merge`.

    Raises:
        FileError: half an update, or a soft branch of two kernels, which no weight equals.
    """
    layers, rest = _layers(content)
    # a whole wrapped model, whose other tensors are the base: not an error
    wrapped = any(".base_layer." in key for key in rest)
    if not wrapped:
        report_unused(content, rest, options.strict)
    return Adapter({path: _update(path, parts, content) for path, parts in layers.items()})


def _layers(content: Content) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    layers: dict[str, dict[str, Tensor]] = {}
    rest = []
    for key, tensor in content.state.items():
        match = _PART.fullmatch(key)
        if match is None:
            rest.append(key)
        else:
            layers.setdefault(match["path"] or "", {})[match["part"]] = tensor
    return layers, rest


def _update(path: str, parts: Mapping[str, Tensor], content: Content) -> Update:
    where = f"{content.source}: {path or '(model)'}"
    # its embedLoRA drops the scale of soft branches, which was 1 unless it was trained
    scale = number(parts["lora_scale"], f"{where}.lora_scale") if "lora_scale" in parts else 1.0
    if set(parts) - {"lora_scale"} == _HARD:
        return pair(parts["lora_A"], parts["lora_B"], scale, where)
    if set(parts) - {"lora_scale"} != _SOFT:
        raise FileError(f"{where}: has {', '.join(sorted(parts))} only. Save it again.")
    down, up = parts["lora_B.weight"], parts["lora_A.weight"]
    check_factors(where, down, up)
    if any(k != 1 for k in up.shape[2:]):
        kernel = [2 * k - 1 for k in up.shape[2:]]
        raise FileError(
            f"{where}: a soft branch of two kernels of {list(up.shape[2:])} in a row is one of "
            f'{kernel}, which the weight has no place for. Train it again with "hard": 1.'
        )
    groups = down.shape[0] // up.shape[1]
    if groups < 2:
        return pair(down, up, scale, where)
    # each group of both layers has factors of its own: [r, in/g, 1, 1] and [out, r/g, 1, 1]
    rows = [up.shape[0] // groups] * groups
    update = fused_linear(down.flatten(1), up.flatten(1), scale, rows, [True] * groups, where)
    shape = (up.shape[0], *down.shape[1:])
    return replace(update, shape=shape, kind="convolution", groups=groups)


def write(adapter: Adapter, base: Optional[Base] = None, **_: Any) -> Content:
    """An adapter as the original's extracted file: ``lora_A``, ``lora_B``, ``lora_scale``.

    Raises:
        FileError: a layer other than Linear, which the original cannot adapt, named.
    """
    state = {}
    for path, update in adapter.updates.items():
        start = f"{path}." if path else ""
        if update.kind not in (None, "linear") or update.layout != "matrix" or _is_conv(update):
            kind = update.kind or update.layout
            raise FileError(
                f"{path}: {with_article(kind)}; the original wrapper's files hold Linear only. "
                "Keep the native format."
            )
        a, b = kernels(update) if update.shape is not None else (update.lora_A, update.lora_B)
        state[f"{start}lora_A"], state[f"{start}lora_B"] = a.contiguous(), b.contiguous()
        state[f"{start}lora_scale"] = _exact(update.scale)
    return Content(state)


def _is_conv(update: Update) -> bool:
    return update.up_kernel == "same" or (update.shape is not None and len(update.shape) != 2)


def _exact(scale: float) -> Tensor:
    value = torch.tensor(scale, dtype=torch.float32)
    return value if value.item() == scale else torch.tensor(scale, dtype=torch.float64)


def _is_soft(content: Content) -> bool:
    """Whether ``lora_B`` comes first, as in soft branches, and not in PEFT's layers."""
    state = content.state
    return any(_comes_second(state, key) for key in state if key.endswith(".lora_A.weight"))


def _comes_second(state: Mapping[str, Tensor], key: str) -> bool:
    a, b = state[key], state.get(key.replace(".lora_A.", ".lora_B."))
    if b is None or min(a.dim(), b.dim()) < 2 or not a.numel() or not b.numel():
        return False
    # PEFT's order fits: [r, in] and [out, r]
    if a.shape[0] == b.shape[1]:
        return False
    grouped = b.shape[0] % a.shape[1] == 0 and a.shape[0] % b.shape[1] != 0
    return a.shape[1] == b.shape[0] or grouped


FORMAT = Format(
    "original",
    marks=(Mark(70, any_key(r"(?:.+\.)?lora_scale")), Mark(71, _is_soft)),
    read=read,
    write=write,
    passed_over=of_state_dict,
    pickled=True,
)
