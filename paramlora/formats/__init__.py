"""Adapter files: one file for each format, read into and written from `Adapter`.

A file of this folder with a `Format` called ``FORMAT`` is a format: no other names it.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Optional

from paramlora.errors import FileError, ParamloraWarning, counted, listed
from paramlora.formats.base import (
    Base,
    Slot,
    apart,
    base_of,
    base_of_shapes,
    check_known,
    fit,
    original_of,
    part_of,
    places_of,
    vectors_of,
)
from paramlora.formats.content import (
    DEFAULTS,
    Content,
    Options,
    check_finite,
    check_values,
    widened,
)
from paramlora.formats.detect import detect, unwrapped
from paramlora.formats.factors import with_scale_in_B, without_differences
from paramlora.formats.format import (
    FORMATS,
    READERS,
    WRITERS,
    Format,
    Mark,
    Prefix,
    any_key,
    register,
    unregister,
    writable,
)
from paramlora.formats.metadata import kept, placed
from paramlora.formats.scale import Noted
from paramlora.update.value import Adapter, Value

__all__ = [
    "FORMATS",
    "READERS",
    "WRITERS",
    "Base",
    "Content",
    "Format",
    "Mark",
    "OWN",
    "Options",
    "Prefix",
    "Slot",
    "any_key",
    "base_of",
    "base_of_shapes",
    "check_loads",
    "chosen",
    "detect",
    "fit",
    "form_of",
    "original_of",
    "places_of",
    "read",
    "register",
    "unregister",
    "unwrapped",
    "writable",
    "write",
]

for _file in iter_modules(__path__):  # so that a new format's file is all that it takes
    _form = getattr(import_module(f"{__name__}.{_file.name}"), "FORMAT", None)
    if _form is not None:
        register(_form)


OWN = next(name for name, form in FORMATS.items() if form.complete)  # the package's own format


def form_of(content: Content) -> Format:
    """The format that a file's content tells (see `detect`).

    Raises:
        FileError: none that is known.
    """
    return FORMATS[detect(content)]


def read(
    content: Content,
    base: Optional[Base] = None,
    options: Options = DEFAULTS,
    source: Optional[str] = None,
) -> Adapter:
    """The adapter in a file of any tool.

    Args:
        content: what the file holds.
        base: the model's names and shapes; the adapter is then fitted to them.
        options: see `Options`.
        source: the format's name; told by `detect` without.

    Raises:
        FileError: no format that is known, damaged or foreign tensors, or another model's.
    """
    content = unwrapped(content)
    form = FORMATS[source or detect(content)]
    if form.complete:
        return _read_complete(form, content, base, options)
    # 8 bits widened: readers multiply factors, and torch computes nothing in float8
    adapter = form.read(widened(content), base, options)
    adapter = replace(adapter, metadata=kept(content))
    if not adapter.values():
        raise FileError(f"{content.source}: {none_of(options.component)}.")
    check_values(adapter, content.source)
    return chosen(form, adapter, base, options, content.source)


def none_of(component: Optional[str]) -> str:
    """What is wrong with a file in which no update was found."""
    if component is None:
        return "no update in it. Give the file that training wrote"
    return f"it has no part {component}. Give another component (--component), or leave it out"


def chosen(
    form: Format, adapter: Adapter, base: Optional[Base], options: Options, source: str
) -> Adapter:
    """What a reader found, under the names of `base`; the part of it that is asked for.

    Raises:
        FileError: there is no such part, or it does not fit `base`.
    """
    if base is not None and form.complete:
        return _known(adapter, base, options, source)
    if base is not None:
        return fit(adapter, base, options, source)
    # without names in the file, its reader has left the other parts out
    if options.component is None or not form.names_layers:
        return adapter
    return part_of(adapter, options.component, source)


def noting(options: Options) -> Options:
    """Options whose alpha knows whether it was used (see `check_alpha`)."""
    return options if options.alpha is None else replace(options, alpha=Noted(options.alpha))


def check_alpha(source: str, options: Options) -> None:
    """Refuse an alpha where the file tells all scales itself: it has said nothing.

    Args:
        source: the file's name.
        options: how it was read, from `noting`.

    Raises:
        FileError: names the alpha.
    """
    if isinstance(options.alpha, Noted) and not options.alpha.used:
        raise FileError(
            f"{source}: alpha = {float(options.alpha):g} says nothing to it, since it tells its "
            "own scales. Leave alpha (--alpha) out."
        )


def _read_complete(
    form: Format, content: Content, base: Optional[Base], options: Options
) -> Adapter:
    """The adapter in a complete file; updates of what the model lacks are reported, or left out."""
    adapter = form.read(content, base, options)
    check_finite(adapter, content.source)  # all zero is how our own begin
    return chosen(form, adapter, base, options, content.source)


def _known(adapter: Adapter, base: Base, options: Options, source: str) -> Adapter:
    """The updates of what the model has; others are reported."""
    known = {**base, **vectors_of(base)}
    if options.component is not None:
        within_pipeline = any(path.startswith(f"{options.component}.") for path in known)
        adapter = part_of(adapter, options.component, source, within_pipeline)
    there = {**adapter.updates, **adapter.others}
    check_known(there.keys() - known.keys(), base, options, source)
    _check_shapes(adapter.values(), known, source)
    return replace(
        adapter,
        updates={path: update for path, update in adapter.updates.items() if path in base},
        others={path: update for path, update in adapter.others.items() if path in known},
    )


def _check_shapes(values: Mapping[str, Value], known: Base, source: str) -> None:
    """Refuse what was made for tensors of other shapes than the model's."""
    lost = []
    for path, value in values.items():
        if path not in known:
            continue
        shape = tuple(known[path].shape)
        told = shape if value.shape is None else tuple(value.shape)
        if told != shape or value.fitted(shape) is None:
            held = " and ".join(str(list(tensor.shape)) for tensor in value.tensors().values())
            made = held if told == shape else f"an update of {list(told)}"
            lost.append(f"{path or 'weight'} ({made}, and the model's is {list(shape)})")
    if lost:
        raise FileError(
            f"{source}: {counted(len(lost), 'update')} of other shapes than the model's: "
            f"{listed(lost, 3)}. Was it made for another model?"
        )


def write(
    adapter: Adapter,
    to: str,
    base: Optional[Base] = None,
    *,
    fold_scale: bool = False,
    **how: Any,
) -> Content:
    """An adapter as a tool's file.

    Args:
        adapter: fitted to its model where a format tells kinds of layers apart (see `fit`).
        to: the name of a format with a `Format.write`.
        base: the model's names and shapes.
        fold_scale: multiply each scale into ``lora_B``, for formats with no place for it.
        how: what the format's own `write` takes, such as kohya's `prefix`.

    Raises:
        FileError: a layer or a number that the format cannot hold, named.
    """
    form = writable(to)
    assert form.write is not None
    if not (adapter.updates or adapter.others or adapter.whole):
        raise FileError(
            "the adapter has no updates, so a file would hold nothing. Give one that has some."
        )
    if form.complete:
        return form.write(adapter, base, **how)
    if not (adapter.updates or adapter.others):
        raise FileError(
            f"{listed(adapter.whole)}: whole tensors alone, without an update beside them, which "
            f"no file of {form.name} holds. Keep the native format."
        )
    held = "difference" in form.kinds
    # before the fit, which turns the factors of a tied tensor for each layer that holds it
    told = apart(adapter if held else without_differences(adapter), base)
    # and behind it, as rows that the base has in one weight may be a difference together
    told = told if held else without_differences(told)
    _check_kinds(told, form)
    if adapter.whole and not form.whole:
        raise FileError(
            f"{', '.join(adapter.whole)}: whole tensors beside the updates, which only the native "
            "format and peft's hold. Keep one of those."
        )
    check_finite(adapter, "adapter")
    if fold_scale:
        told = replace(told, updates={p: with_scale_in_B(u) for p, u in told.updates.items()})
    _check_scales(told, to)
    return placed(form.write(told, base, **how), adapter.metadata, form)


def check_loads(content: Content, adapter: Adapter, to: str, base: Optional[Base] = None) -> None:
    """Refuse a file of which something would match nothing where it is loaded.

    It is read back as any file of its format is, and its keys are held against the tool's own rule
    of names (see `Format.passed_over`), where the model's layers are known.

    Args:
        content: what was written.
        adapter: what was to be written.
        to: the format.
        base: the model's names and shapes.

    Raises:
        FileError: names what would be lost.
    """
    form = writable(to)
    lost = [] if base is None else form.passed_over(content, base)
    if lost:
        raise FileError(
            f"{content.source}: what loads {to}'s files would match nothing to {listed(lost)}. "
            "Give the model that it is for (--model), or another name of it (--prefix)."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ParamloraWarning)  # they were told
        # of formats without scales any will do
        back = read(content, base, Options(alpha=1.0), form.name if form.marks else None).values()
    # by the values: of tied layers that share one update a file may hold but the first
    there = {id(value) for path, value in adapter.values().items() if path in back}
    gone = [path for path, value in adapter.values().items() if id(value) not in there]
    lacks = listed(gone) if base is not None and gone else ""
    # without a model names may be another tool's, and a count tells
    given, found = (len({*map(id, some)}) for some in (adapter.values().values(), back.values()))
    if base is None and found < given:
        lacks = f"{given - found} of {counted(given, 'update')}"
    if lacks:
        raise FileError(
            f"{content.source}: read back as a file of {to} it lacks {lacks}. Nothing was left "
            "there; keep the native format, and report this."
        )


def _check_kinds(adapter: Adapter, form: Format) -> None:
    for path, update in adapter.others.items():
        if update.method not in form.kinds:
            raise FileError(
                f'{path or "weight"}: an update of the kind "{update.method}", which no file of '
                f"{form.name} holds. Keep the native format, or merge it."
            )


def _check_scales(adapter: Adapter, to: str) -> None:
    for path, value in adapter.values().items():
        r, scale = value.listed()
        if not math.isfinite(scale * r):
            raise FileError(
                f"{path}: its alpha, scale · r = {scale:g} · {r}, is beyond any "
                f"number that {to}'s files hold. Give a smaller scale and larger factors."
            )
