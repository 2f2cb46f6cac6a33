"""What a file of adapters holds, whoever wrote it, and what the caller wants of it."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Optional

import torch
from torch import Tensor

from paramlora.config.reading import parse_json
from paramlora.errors import FileError, kind_of, listed, spelled, warn
from paramlora.update.memory import all_finite
from paramlora.update.value import Adapter


@dataclass(frozen=True)
class Content:
    """The inside of a file.

    Args:
        state: tensors by key; a list's stand under ``"0"``, ``"1"``, and so on.
        metadata: of the safetensors header.
        config: of the file beside it: PEFT's ``adapter_config.json``, litgpt's
            ``hyperparameters.yaml``.
        source: its name, for messages.
        path: its whole path, of what was opened.
    """

    state: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    source: str = "adapter"
    path: str = ""


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
        enable: which parts of loralib's fused projections were trained (its ``enable_lora``).
    """

    strict: bool = True
    rank: Optional[int] = None
    alpha: Optional[float] = None
    component: Optional[str] = None
    split: int = 1
    enable: Optional[tuple[bool, ...]] = None

    def __post_init__(self) -> None:
        if self.alpha is not None and not math.isfinite(self.alpha):
            raise FileError(f"alpha must be finite, got {self.alpha}.")
        if self.rank is not None and self.rank < 1:
            raise FileError(f"rank must be at least 1, got {self.rank}.")


DEFAULTS = Options()


def unwrapped(content: Content) -> Content:
    """A content without a dictionary around its tensors, such as ``{"state_dict": {...}}``.

    ``model`` is not told from a module of that name: who opens a file knows which it is.
    """
    for outer in ("state_dict", "model_state_dict"):
        start = f"{outer}."
        if content.state and all(key.startswith(start) for key in content.state):
            state = {key.removeprefix(start): value for key, value in content.state.items()}
            return replace(content, state=state)
    return content


def widened(content: Content) -> Content:
    """8-bit floats as float32, since nothing can be computed in them."""
    state = {
        key: tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor
        for key, tensor in content.state.items()
    }
    return replace(content, state=state)


def report(source: str, what: str, names: Iterable[str], strict: bool, way_out: str) -> None:
    """An error that tells `names`, or a warning where the caller asked for one."""
    known = sorted(names)
    if not known:
        return
    text = f"{source}: {what}: {listed(known)}. {way_out}"
    if strict:
        raise FileError(text)
    warn(text)


def halves(
    content: Content, pattern: "re.Pattern[str]", strict: bool
) -> dict[str, dict[str, Tensor]]:
    """``{path: {role: tensor}}`` of the keys that `pattern` matches, which must be all.

    Raises:
        FileError: a key that it does not match, or a path with one role of two.
    """
    found: dict[str, dict[str, Tensor]] = {}
    unused = []
    for key, tensor in content.state.items():
        match = pattern.fullmatch(key)
        if match is None:
            unused.append(key)
        else:
            found.setdefault(match["path"], {})[match["role"]] = tensor
    report_unused(content, unused, strict)
    check_whole(content, found)
    return found


def check_whole(content: Content, found: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Both factors of each path, and no other tensors than factors can be."""
    single = [path for path, half in found.items() if len(half) < 2]
    report(content.source, "one factor of two is missing", single, True, "Save it again.")
    for path, half in found.items():
        check_factors(f"{content.source}: {path}", *half.values())


def check_first(taken: bool, key: str, source: str) -> None:
    """Refuse a tensor for what the file has one of already, spelled or named in another way."""
    if taken:
        raise FileError(
            f"{source}: {key} is a second tensor for one factor: several adapters, or an update in "
            "two spellings. Save one of them alone."
        )


def check_factors(where: str, *tensors: Tensor) -> None:
    """Refuse what cannot be multiplied: integers, vectors, two types, and nothing at all."""
    shapes = " and ".join(f"{list(t.shape)} {str(t.dtype).split('.')[1]}" for t in tensors)
    if any(not t.numel() for t in tensors):
        raise FileError(
            f"{where}: an empty factor ({shapes}). A sharded one was not gathered before saving. "
            "Gather it, and save again."
        )
    kinds = {t.dtype for t in tensors}
    if any(t.dim() < 2 or not t.is_floating_point() for t in tensors) or len(kinds) > 1:
        raise FileError(f"{where}: no factors of an update: {shapes}. Save it again.")


def report_unused(content: Content, keys: Iterable[str], strict: bool) -> None:
    """Every tensor of a file is accounted for: `keys` are those that no reader took."""
    report(
        content.source,
        "tensors that are no update of one weight",
        keys,
        strict,
        "Read with strict=False (--loose) to leave them out." if strict else "They were left out.",
    )


def refuse_dora(content: Content, keys: Iterable[str]) -> None:
    """DoRA (arXiv:2402.09353) is no sum, so no `Update` holds it: an error if there are `keys`."""
    report(
        content.source,
        "DoRA, which rescales W + B·A by a magnitude",
        keys,
        True,
        "Merge it with the tool that trained it.",
    )


_SOUND = "It was damaged in training or in copying: give a sound copy, or one from before."


def check_finite(adapter: Adapter, source: str) -> None:
    """Refuse a tensor that is not finite."""
    values = adapter.values()
    odd = {path for path, value in values.items() if not math.isfinite(value.listed()[1])}
    # asked of all at once, which waits for a device once; one by one only to name the culprit
    if not odd and all_finite(t for value in values.values() for t in value.tensors().values()):
        return
    bad = [*(f"{path}.lora_scale" for path in sorted(odd))]
    bad += [
        path if value.alone else f"{path}.{name}"
        for path, value in values.items()
        for name, tensor in value.tensors().items()
        if not all_finite([tensor])  # without a copy of its size
    ]
    report(source, "not finite", bad, True, _SOUND)


def check_values(adapter: Adapter, source: str) -> None:
    """Refuse a tensor that is not finite; warn of one that is all zero, which changes nothing."""
    check_finite(adapter, source)
    told = {
        path: u for path, u in adapter.updates.items() if not (u.lora_A.is_meta or u.lora_B.is_meta)
    }
    empty = [path for path, update in told.items() if update.idle()]
    report(source, "all zero, so without effect", empty, False, "Was it saved before training?")


def number(value: Any, where: str) -> float:
    """A finite number out of a tensor, a string or JSON, or an error that says where."""
    try:
        result = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        told = f"of shape {list(value.shape)}," if isinstance(value, Tensor) else spelled(value)
        told = "null" if value is None else told
        raise FileError(f"{where}: {told} is not a number. Mend it, or save it again.") from error
    # as a float32, in which a scale is stored: 1e39 is finite to Python alone
    if not torch.isfinite(torch.tensor(result)):
        raise FileError(f"{where}: {result} is not finite. Mend it, or save it again.")
    return result


def _json_of(text: str, where: str) -> Any:
    """What the JSON in a file's metadata says, or an error that says where."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise FileError(
            f"{where}: its metadata is damaged ({error}). Copy or save it again."
        ) from error


def parsed(text: str, where: str) -> dict[str, Any]:
    """A JSON object out of a file's metadata, or an error that says where."""
    value = _json_of(text, where)
    if not isinstance(value, dict):
        raise FileError(f"{where}: its metadata is {kind_of(value)}, not an object. Save it again.")
    return value


def parsed_list(text: str, where: str) -> list[str]:
    """A JSON list of strings out of a file's metadata, or an error that says where."""
    value = _json_of(text, where)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise FileError(f"{where}: its metadata is not a list of names. Save it again.")
    return value
