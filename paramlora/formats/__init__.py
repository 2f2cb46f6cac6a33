"""Adapters of other tools: one file for each format, read into and written from `Adapter`."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Optional

from paramlora.adapter import Adapter
from paramlora.errors import FileError
from paramlora.formats import (
    cloneofsimo,
    diffusers,
    kohya,
    litgpt,
    loralib,
    original,
    peft,
    torchtune,
)
from paramlora.formats.base import Base, Slot, apart, base_of, base_of_shapes, fit
from paramlora.formats.content import (
    DEFAULTS,
    Content,
    Options,
    check_finite,
    check_values,
    unwrapped,
    widened,
)
from paramlora.formats.detect import detect
from paramlora.formats.factors import folded

__all__ = [
    "NAMELESS",
    "READERS",
    "WRITERS",
    "Base",
    "Content",
    "Options",
    "Slot",
    "base_of",
    "base_of_shapes",
    "detect",
    "fit",
    "read",
    "unwrapped",
    "write",
]

READERS: dict[str, Callable[..., Adapter]] = {
    "cloneofsimo": cloneofsimo.read,
    "diffusers": diffusers.read,
    "kohya": kohya.read,
    "litgpt": litgpt.read,
    "loralib": loralib.read,
    "peft": peft.read,
    "original": original.read,
    "torchtune": torchtune.read,
}
WRITERS: dict[str, Callable[..., Content]] = {
    "diffusers": diffusers.write,
    "kohya": kohya.write,
    "litgpt": litgpt.write,
    "loralib": loralib.write,
    "peft": peft.write,
    "original": original.write,
    "torchtune": torchtune.write,
}
NAMELESS = ("cloneofsimo", "kohya")  # whose names of layers only a model or checkpoint explains


def read(
    content: Content,
    base: Optional[Base] = None,
    options: Options = DEFAULTS,
    source: Optional[str] = None,
) -> Adapter:
    """The adapter in a file of another tool.

    Args:
        content: what the file holds.
        base: the model's names and shapes; the adapter is then fitted to them.
        options: see `Options`.
        source: the format's name; told by `detect` without.

    Raises:
        FileError: no format that is known, damaged or foreign tensors, or another model's.
    """
    content = widened(unwrapped(content))
    adapter = READERS[source or detect(content)](content, base, options)
    if not adapter.updates:
        raise FileError(f"{content.source}: no update in it.")
    check_values(adapter, content.source)
    return adapter if base is None else fit(adapter, base, options, content.source)


def write(
    adapter: Adapter,
    to: str,
    base: Optional[Base] = None,
    *,
    fold_scale: bool = False,
    **how: Any,
) -> Content:
    """An adapter as another tool's file.

    Args:
        adapter: fitted to its model where a format tells kinds of layers apart (see `fit`).
        to: a name in `WRITERS`.
        base: the model's names and shapes.
        fold_scale: multiply each scale into ``lora_B``, for formats with no place for it.
        how: `prefix` for kohya and peft, `component` for diffusers.

    Raises:
        FileError: a layer or a number that the format cannot hold, named.
    """
    if to not in WRITERS:
        known = ", ".join(sorted([*WRITERS, "native"]))  # which has a writer of its own
        raise FileError(f'"{to}" cannot be written. Known: {known}.')
    if not adapter.updates:
        raise FileError("the adapter has no updates.")
    if adapter.whole:
        raise FileError(
            f"{', '.join(adapter.whole)}: whole tensors beside the updates, which only the native "
            "format holds."
        )
    check_finite(adapter, "adapter")
    told = apart(adapter, base)
    if fold_scale:
        told = replace(told, updates={p: folded(u) for p, u in told.updates.items()})
    _check_scales(told, to)
    return WRITERS[to](told, base, **how)


def _check_scales(adapter: Adapter, to: str) -> None:
    for path, update in adapter.updates.items():
        if not math.isfinite(update.scale * update.r):
            raise FileError(
                f"{path}: its alpha, scale · r = {update.scale:g} · {update.r}, is beyond any "
                f"number that {to}'s files hold. Give a smaller scale and larger factors."
            )
