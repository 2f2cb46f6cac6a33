"""cloneofsimo's lora: a list of factors in the order of the layers, or ``unet:0:up`` keys.

Read from cloneofsimo/lora lora_diffusion/lora.py (``save_lora_weight``, ``save_safeloras``,
``_find_modules_v2``).
"""

import re
from typing import Optional

from torch import Tensor

from paramlora.errors import FileError, counted
from paramlora.formats.base import Base
from paramlora.formats.content import DEFAULTS, Content, Options, parsed_list, report_unused
from paramlora.formats.factors import pair
from paramlora.formats.format import Format, Mark, any_key
from paramlora.update.value import Adapter, Update

_FACTOR = re.compile(r"(?P<model>.+):(?P<index>[0-9]{1,9}):(?P<role>up|down)", re.DOTALL)
_NUMBER = re.compile("[0-9]{1,9}")
UNET = {"CrossAttention", "Attention", "GEGLU"}
EXTENDED = {*UNET, "ResnetBlock2D"}
TEXT = {"CLIPAttention"}


def read(content: Content, base: Optional[Base] = None, options: Options = DEFAULTS) -> Adapter:
    """The adapter in such a file; its layers have no names but their order.

    The scale was multiplied into ``up`` when a ``.safetensors`` was written, and lost in a
    ``.pt``: it is 1 here.

    Args:
        content: what the file holds.
        base: the layers in their order, with their classes; without it the numbers stay.
        options: `Options.component` is ``"unet"`` or ``"text_encoder"`` where a file has both.

    Raises:
        FileError: the numbers of layers differ, or a file of several models.
    """
    parts, unused = _parts(content)
    report_unused(content, unused, options.strict)
    if options.component is not None:
        parts = {k: v for k, v in parts.items() if k == options.component}
    if base is None:
        return Adapter({f"{m}:{i}": u for m, us in parts.items() for i, u in us.items()})
    if len(parts) != 1:
        raise FileError(
            f"{content.source}: holds {', '.join(parts) or 'nothing'}. Choose one with "
            "component=... (--component)."
        )
    ((model, numbered),) = parts.items()
    updates = [update for _, update in sorted(numbered.items())]
    paths = _ordered(content, model, base, len(updates))
    start = f"{options.component}." if options.component is not None else ""
    return Adapter({start + path: updates[i] for i, path in enumerate(paths)})


def _parts(content: Content) -> tuple[dict[str, dict[int, Update]], list[str]]:
    halves: dict[tuple[str, int], dict[str, Tensor]] = {}
    unused = []
    for key, tensor in content.state.items():
        match = _FACTOR.fullmatch(key)
        if _NUMBER.fullmatch(key):  # a list: up, down, up, down
            role = "down" if int(key) % 2 else "up"
            halves.setdefault(("", int(key) // 2), {})[role] = tensor
        elif match is None:
            unused.append(key)
        else:
            halves.setdefault((match["model"], int(match["index"])), {})[match["role"]] = tensor
    parts: dict[str, dict[int, Update]] = {}
    for (model, index), half in halves.items():
        where = f"{content.source}: {model}:{index}"
        if len(half) < 2:
            raise FileError(f"{where}: one factor of two is missing. Save it again.")
        parts.setdefault(model, {})[index] = pair(half["down"], half["up"], 1.0, where)
    return parts, unused


def _ordered(content: Content, model: str, base: Base, count: int) -> list[str]:
    """The layers inside the classes that were searched, in the model's order."""
    searched = [UNET, EXTENDED, TEXT]
    if model in content.metadata:
        searched = [set(parsed_list(content.metadata[model], content.source))]
    tried = {}
    for classes in searched:
        # convolutions only beside more than attention, as inject_trainable_lora_extended does
        paths = [
            path
            for path, slot in base.items()
            if slot.kind in ("linear", "convolution")
            and classes & set(slot.classes[:-1])
            and (slot.kind == "linear" or classes - UNET - TEXT)
        ]
        if len(paths) == count:
            return paths
        tried[", ".join(sorted(classes))] = len(paths)
    found = "; ".join(f"{n} inside {names}" for names, n in tried.items())
    raise FileError(
        f"{content.source}: {counted(count, 'update')}, and the model has {found}. Give the model "
        "that it was made for (--model)."
    )


def _is_list(content: Content) -> bool:
    return bool(content.state) and all(_NUMBER.fullmatch(key) for key in content.state)


FORMAT = Format(
    "cloneofsimo",
    marks=(Mark(10, any_key(r".+:\d+:(?:up|down)")), Mark(11, _is_list)),
    read=read,
    names_layers=False,
)
