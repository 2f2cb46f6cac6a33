"""loralib's ``lora_state_dict``: bare ``lora_A`` and ``lora_B``, and no scale.

Read from microsoft/LoRA loralib/layers.py and utils.py.
"""

import math
import re
from typing import Any, Optional

from torch import Tensor

from paramlora.errors import FileError, with_article
from paramlora.formats.base import Base, Slot, place
from paramlora.formats.content import DEFAULTS, Content, Options, halves, report
from paramlora.formats.factors import from_dense, pair, wide
from paramlora.formats.format import Format, Mark, any_key
from paramlora.formats.fused import fused_linear
from paramlora.formats.loaders import of_state_dict
from paramlora.update.value import Adapter, Update

_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?P<role>[AB])", re.DOTALL)


def read(content: Content, base: Optional[Base] = None, options: Options = DEFAULTS) -> Adapter:
    """The adapter in a loralib file.

    Args:
        content: what the file holds.
        base: tells embeddings, convolutions and fused projections from Linear layers.
        options: `Options.alpha` is what the layers were built with; without it the scale is 1,
            with a warning.

    Raises:
        FileError: half an update, or tensors of something else.
    """
    if options.alpha is None:
        report(
            content.source,
            "the scale is not in this file",
            ["lora_alpha"],
            False,
            "Using 1; give alpha (--alpha) for another.",
        )
    updates = {}
    for path, half in halves(content, _FACTOR, options.strict).items():
        where = f"{content.source}: {path}"
        there = place(path, base) if base is not None else None
        slot = base[there] if base is not None and there is not None else None
        updates[path] = _update(half["A"], half["B"], slot, options, where)
    return Adapter(updates)


def _update(a: Tensor, b: Tensor, slot: Optional[Slot], options: Options, where: str) -> Update:
    # loralib's ConvLoRA has factors of r * kernel ranks, for any number of dimensions
    kernel = slot.shape[2] if slot is not None and len(slot.shape) > 2 else 1
    r = a.shape[0] // kernel if a.shape[0] == b.shape[1] else b.shape[1]
    scale = 1.0 if options.alpha is None else options.alpha / r
    if slot is not None and len(slot.shape) > 2:
        if a.shape[0] != b.shape[1] or b.shape[0] * a.shape[1] != math.prod(slot.shape):
            raise FileError(
                f"{where}: factors of {list(a.shape)} and {list(b.shape)} do not fit the weight of "
                f"{list(slot.shape)}. Was it made for another model?"
            )
        # [r·k, in·k] and [out·k, r·k], reshaped to the weight: of low rank in no order of its axes
        return from_dense((wide(b) @ wide(a)).reshape(slot.shape), options.rank, scale)
    if slot is not None and slot.kind == "embedding":
        return Update(a, b, scale, slot.shape, "transposed", kind="embedding")
    if a.shape[0] != b.shape[1]:
        return _fused(a, b, scale, slot, options, where)
    return pair(a, b, scale, where)


def _fused(
    a: Tensor, b: Tensor, scale: float, slot: Optional[Slot], options: Options, where: str
) -> Update:
    # MergedLinear: A has r rows for each trained part, B's columns are r
    count = a.shape[0] // b.shape[1]
    size = b.shape[0] // max(count, 1)
    parts = slot.shape[0] // max(size, 1) if slot is not None else count
    on = (True,) * count if options.enable is None else options.enable
    if len(on) != parts:
        raise FileError(
            f"{where}: {count} of {parts} parts of a fused projection were trained. Which is not "
            "in the file: load it with load_adapter(enable=...), such as (True, False, True)."
        )
    return fused_linear(a, b, scale, [size] * parts, on, where)


def write(adapter: Adapter, base: Optional[Base] = None, **_: Any) -> Content:
    """An adapter of Linear layers and embeddings with scale 1, as loralib's.

    Raises:
        FileError: another kind of layer, or a scale other than 1, which loralib takes from the
            code that builds the model; named.
    """
    state = {}
    for path, update in adapter.updates.items():
        flat = update.shape is not None and len(update.shape) == 2
        held = update.layout == "matrix" or update.kind == "embedding"
        if not path or not flat or not held or update.kind not in (None, "linear", "embedding"):
            raise FileError(
                f"{path or '(model)'}: {with_article(update.kind or update.layout)}; loralib's "
                "files hold Linear and Embedding layers only. Keep the native format."
            )
        if update.scale != 1:
            raise FileError(
                f"{path}: scale {update.scale:g}; loralib's files have no place for a "
                "scale. Fold it into lora_B (fold_scale, --fold-scale)."
            )
        state[f"{path}.lora_A"] = update.lora_A.contiguous()
        state[f"{path}.lora_B"] = update.lora_B.contiguous()
    return Content(state)


FORMAT = Format(
    "loralib",
    marks=(Mark(100, any_key(r".+\.lora_A")),),
    read=read,
    write=write,
    passed_over=of_state_dict,
    pickled=True,
)
