"""What a file of adapters holds, whoever wrote it, and what the caller wants of it."""

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor

from paramlora.adapter import Adapter
from paramlora.errors import FileError, ParamloraWarning

SCALES = "paramlora_scales"


@dataclass(frozen=True)
class Content:
    """The inside of a file.

    Args:
        state: tensors by key; a list's stand under ``"0"``, ``"1"``, and so on.
        metadata: of the safetensors header.
        config: of the file beside it: PEFT's ``adapter_config.json``, litgpt's
            ``hyperparameters.yaml``.
        source: its name, for messages.
    """

    state: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    source: str = "adapter"


@dataclass(frozen=True)
class Options:
    """What a reader cannot find in every file.

    Args:
        strict: a tensor that belongs to nothing, and a target without one, are errors.
        rank: for LoHa, LoKr and other dense updates, the rank of the nearest low-rank one;
            None keeps them whole.
        alpha: for formats that do not store it, ``scale = alpha / r``.
        component: of a pipeline's file, the part to read, such as ``"text_encoder_2"``.
        split: parts that kohya trained apart and saved as one tensor: 3 for a fused q/k/v.
    """

    strict: bool = True
    rank: Optional[int] = None
    alpha: Optional[float] = None
    component: Optional[str] = None
    split: int = 1


def unwrapped(content: Content) -> Content:
    """Without a dictionary around the tensors, such as ``{"state_dict": {...}}``."""
    for outer in ("state_dict", "model"):
        start = f"{outer}."
        if content.state and all(key.startswith(start) for key in content.state):
            state = {key.removeprefix(start): value for key, value in content.state.items()}
            return Content(state, content.metadata, content.config, content.source)
    return content


def report(source: str, what: str, names: Iterable[str], strict: bool, way_out: str) -> None:
    """An error that lists `names`, or a warning where the caller asked for one."""
    listed = sorted(names)
    if not listed:
        return
    shown = ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
    text = f"{source}: {what}: {shown}. {way_out}"
    if strict:
        raise FileError(text)
    warnings.warn(text, ParamloraWarning, stacklevel=4)


def check_values(adapter: Adapter, source: str) -> Adapter:
    """Refuse a tensor that is not finite; warn of one that is all zero, which changes nothing."""
    bad = [
        f"{path}.{name}"
        for path, update in adapter.updates.items()
        for name, tensor in (("lora_A", update.lora_A), ("lora_B", update.lora_B))
        if not torch.isfinite(tensor).all()
    ]
    report(source, "not finite", bad, True, "It was damaged in training or in copying.")
    empty = [
        path for path, u in adapter.updates.items() if not (u.lora_A.any() and u.lora_B.any())
    ]
    report(source, "all zero, so without effect", empty, False, "Was it saved before training?")
    return adapter


def number(value: Any, where: str) -> float:
    """A finite number out of a tensor, a string or JSON, or an error that says where."""
    try:
        result = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise FileError(f"{where}: {value!r} is not a number ({error}).") from error
    if not torch.isfinite(torch.tensor(result)):
        raise FileError(f"{where}: {result} is not finite.")
    return result


def parsed(text: str, where: str) -> dict[str, Any]:
    """A JSON object out of a file's metadata, or an error that says where."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{where}: its metadata is damaged: {error}.") from error
    if not isinstance(value, dict):
        raise FileError(f"{where}: its metadata is a {type(value).__name__}, not an object.")
    return value
