"""The weights of a base model, by name and shape, and an adapter made to fit them."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Optional, get_args

import torch
from torch import nn

from paramlora.errors import FileError, closest
from paramlora.formats.content import Options, report
from paramlora.model.targets import Target, adaptable, unwrapped
from paramlora.update.geometry import Layout, matrix_shape
from paramlora.update.value import Adapter, Holder, Update

COMPONENTS = (
    "unet transformer transformer_2 prior decoder text_encoder text_encoder_2 text_encoder_3 "
    "text_encoders diffusion_model model.diffusion_model base_model.model base_model"
).split()


@dataclass(frozen=True)
class Slot:
    """One weight that can be adapted.

    Args:
        shape: the weight's own.
        layout: None where only a checkpoint is known.
        kind, groups: as in `Update`.
        classes: the names of the classes from the model down to the layer.
        input_first: whether a stack of matrices is ``[E, in, out]``, as its owner's
            ``is_transposed`` says (transformers' expert layers).
    """

    shape: tuple[int, ...]
    layout: Optional[Layout] = None
    kind: Optional[str] = None
    groups: Optional[int] = None
    classes: tuple[str, ...] = ()
    input_first: bool = False


Base = Mapping[str, Slot]


def base_of(model: nn.Module) -> Base:
    """What can be adapted in `model`, in its order, by the paths of adapter files.

    Example:
        >>> base_of(nn.Sequential(nn.Embedding(5, 2)))["0"].shape
        (5, 2)
    """
    inside = unwrapped(model)
    return {target.path: _slot(inside, target) for target in adaptable(inside)}


def base_of_shapes(shapes: Mapping[str, "tuple[int, ...] | torch.Size"]) -> Base:
    """The same out of a checkpoint's keys and shapes, where layers' kinds are unknown."""
    return {
        key.removesuffix(".weight"): Slot(tuple(shape))
        for key, shape in shapes.items()
        if len(shape) >= 2
    }


def fit(adapter: Adapter, base: Base, options: Options, source: str) -> Adapter:
    """`adapter` under the names of `base`, with its shapes; one that does not fit is an error.

    A component's name in front (``unet.``) is left out where the model is that component.

    Raises:
        FileError: an update without a weight, two for one weight, or another shape.
    """
    chosen = _component(adapter, options.component)
    places = {path: place(path, base) for path in chosen}
    check_known((path for path, there in places.items() if there is None), base, options, source)
    updates: dict[str, Update] = {}
    made: dict[tuple[int, Slot], Update] = {}  # tied tensors keep sharing one update
    holders = Counter(map(id, chosen.values()))
    for path, there in places.items():
        if there is None:
            continue
        if there in updates:
            raise FileError(
                f"{source}: {path} is a second update of {there}. Choose one part of the file "
                "with component=... (convert --component), such as text_encoder_2."
            )
        slot = _told(base[there], adapter.holders.get(path))
        key = (id(chosen[path]), slot)
        tied = holders[id(chosen[path])] > 1
        fresh = _fitted(there, chosen[path], slot, source, tied)
        updates[there] = made.setdefault(key, fresh)
    return replace(adapter, updates=updates)


def apart(adapter: Adapter, base: Optional[Base]) -> Adapter:
    """`adapter` with an update of its own for each layer that holds a tied tensor, as `fit` gives.

    Raises:
        FileError: nothing tells what kind of layers hold an embedding's tensor.
    """
    if any(adapter.updates[path].kind == "embedding" for path in _untold(adapter, base)):
        check_holders(adapter, base)
    if base is not None:
        return fit(adapter, base, Options(), "adapter")
    fresh = {}
    for path, holder in adapter.holders.items():
        update = adapter.updates.get(path)
        if update is not None and update.shape is not None:
            slot = _told(Slot(update.shape), holder)
            fresh[path] = _fitted(path, update, slot, "adapter", True)
    return replace(adapter, updates={**adapter.updates, **fresh})


def check_holders(adapter: Adapter, base: Optional[Base]) -> None:
    """Refuse tied tensors of whose layers nothing tells the kind, as files of 0.1.0 do not.

    Raises:
        FileError: names them.
    """
    untold = _untold(adapter, base)
    if untold:
        raise FileError(
            f"{', '.join(untold)}: one tied tensor, and the adapter does not tell what kind of "
            "layer each is. Give the model (--model)."
        )


def _untold(adapter: Adapter, base: Optional[Base]) -> list[str]:
    count = Counter(map(id, adapter.updates.values()))
    tied = [path for path, update in adapter.updates.items() if count[id(update)] > 1]
    kinds = {path for path, slot in (base or {}).items() if slot.kind is not None}
    return [p for p in tied if p not in adapter.holders and place(p, base or {}) not in kinds]


def _told(slot: Slot, holder: Optional[Holder]) -> Slot:
    """With what the adapter tells of the layer, where the base does not."""
    if slot.kind is not None or holder is None:
        return slot
    return replace(slot, kind=holder.kind, layout=holder.layout, groups=holder.groups)


def check_known(lost: Iterable[str], base: Base, options: Options, source: str) -> None:
    """Report the updates that found no weight in the model."""
    paths = sorted(lost)
    near = closest(paths[0], base) if paths else []
    hint = f' Closest to "{paths[0]}": "{near[0]}".' if near else ""
    report(
        source,
        "updates of what the model does not have",
        paths,
        options.strict,
        f"Is it for another model, or for several, of which component=... (convert --component) "
        f"chooses one?{hint}",
    )


def place(path: str, base: Base) -> Optional[str]:
    """The weight that a file's path means."""
    for component in ("", *COMPONENTS):
        rest = path.removeprefix(f"{component}.") if component else path
        if component and rest == path:
            continue
        # transformers 5 has left out this level of CLIP's text model
        for name in (rest, rest.removeprefix("text_model.")):
            if name in base:
                return name
    return None


def _component(adapter: Adapter, component: Optional[str]) -> dict[str, Update]:
    if component is None:
        return dict(adapter.updates)
    start = f"{component}."
    return {path: u for path, u in adapter.updates.items() if path.startswith(start)}


def _fitted(path: str, update: Update, slot: Slot, source: str, tied: bool) -> Update:
    layout = slot.layout or _guessed(update, slot.shape)
    if tied and layout is not None and {layout, update.layout} == {"matrix", "transposed"}:
        update = _turned(update)
    a, b = tuple(update.lora_A.shape), tuple(update.lora_B.shape)
    if layout is None or (a, b) != _factors(update, slot.shape, layout):
        raise FileError(
            f"{source}: {path}: an update of {list(a)} and {list(b)} (lora_A, lora_B) does not fit "
            f"the weight of {list(slot.shape)}. Was it made for another model?"
        )
    kind, groups = slot.kind or update.kind, slot.groups or update.groups
    return replace(update, shape=slot.shape, layout=layout, kind=kind, groups=groups)


def _turned(update: Update) -> Update:
    """The update of a tied weight as the holder sees it to which its input is the output."""
    return replace(update, lora_A=update.lora_B.mT, lora_B=update.lora_A.mT)


def _guessed(update: Update, shape: tuple[int, ...]) -> Optional[Layout]:
    """Of a checkpoint's weight: the file's own layout where it fits, else any that does."""
    have = (tuple(update.lora_A.shape), tuple(update.lora_B.shape))
    order = sorted(get_args(Layout), key=lambda layout: layout != update.layout)
    return next((layout for layout in order if have == _factors(update, shape, layout)), None)


def _factors(
    update: Update, shape: tuple[int, ...], layout: Layout
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes that lora_A and lora_B have on a weight of `shape`."""
    stack, out, fan_in = matrix_shape(shape, layout)
    lead = (stack,) if layout == "stack" else ()
    kernel = shape[2:] if update.up_kernel == "same" else ()
    size = torch.Size(kernel).numel() if layout == "transposed" else 1
    return (*lead, update.r * size, fan_in), (*lead, out // size, update.r, *kernel)


def _slot(model: nn.Module, target: Target) -> Slot:
    owner = model.get_submodule(target.module)
    return Slot(
        target.shape,
        target.layout,
        target.kind,
        target.groups,
        tuple(_classes(model, target.module)),
        bool(getattr(owner, "is_transposed", False)) and target.layout == "stack",
    )


def _classes(model: nn.Module, path: str) -> Iterator[str]:
    yield type(model).__name__
    for part in path.split(".") if path else []:
        model = model.get_submodule(part)
        yield type(model).__name__
