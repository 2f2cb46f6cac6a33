"""What a conversion of a checkpoint does to each key, planned from types and shapes alone."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Optional, Union

import torch
from torch import Tensor

from paramlora.adapter import Adapter, Update
from paramlora.errors import AdapterError, FileError, closest
from paramlora.fold import Term, folded
from paramlora.keys import Key, weights_at
from paramlora.lowrank import LAYOUTS, Layout, ambiguous, factor_dtype, matrix_shape
from paramlora.soft import refuse_two_kernels

Weighted = Union[Adapter, tuple[Adapter, float]]
Read = Callable[[str], Any]
Strong = tuple[Update, float]  # an update and its strength
_NAMES = ("lora_A", "lora_B", "lora_scale")


@dataclass(frozen=True)
class Recipe:
    """How one value of the result comes about.

    Args:
        source: the key of the input that it is, or beside which it stands.
        updates: what to fold into it, in order.
        value: a new tensor instead.
    """

    source: str
    updates: tuple[Strong, ...] = ()
    value: Optional[Tensor] = None

    def make(self, read: Read) -> Any:
        """The value, from a function that gives the input's."""
        if self.value is not None:
            return self.value
        base = read(self.source)
        return folded(base, self.terms(base.dtype, base.device)) if self.updates else base

    def terms(self, dtype: torch.dtype, device: Union[str, torch.device] = "cpu") -> list[Term]:
        """What to fold into a tensor of that type, as a live model has it."""
        kind = factor_dtype(dtype)
        return [
            Term(
                update.lora_A.to(device, kind),
                update.lora_B.to(device, kind),
                torch.tensor(update.scale, dtype=kind, device=device) * strength,
                update.layout,
            )
            for update, strength in self.updates
            if strength != 0
        ]


Plan = dict[str, Recipe]


class Contents:
    """The keys of a checkpoint, read once.

    Args:
        there: for each key what has the tensor's ``dtype`` and ``shape``, such as itself.
    """

    def __init__(self, there: Mapping[str, Any]) -> None:
        self.there = there
        self.keys = {text: Key.parse(text) for text in there}
        self.stored: dict[str, str] = {}  # the key under which a tensor of the base stands
        self.inner: dict[str, list[Key]] = {}  # what stands in its parametrizations or branches
        for text, key in self.keys.items():
            if key.index >= 0:
                self.inner.setdefault(key.weight, []).append(key)
            elif key.part in ("", "original", "original0"):
                self.stored[key.weight] = text

    def found(self, adapter: Adapter) -> dict[str, Update]:
        """The updates by tensor, each with its shape; of tied tensors it is enough that one is.

        Raises:
            FileError: a path that is not there, or factors that do not fit.
        """
        updates = adapter.updates
        at = {p: next((w for w in weights_at(p) if w in self.stored), None) for p in updates}
        kept = {id(update) for path, update in updates.items() if at[path] is not None}
        missing = [p for p, update in updates.items() if at[p] is None and id(update) not in kept]
        if missing:
            raise self._lacks(missing, len(updates))
        return {w: self.fit(w, updates[path]) for path, w in at.items() if w is not None}

    def fit(self, weight: str, update: Update) -> Update:
        """An update with its tensor's shape and layout, where those fit its factors."""
        # of weight norm's two originals the second one has the weight's shape
        base = self.there[self.stored[weight].replace(".original0", ".original1")]
        shape = tuple(base.shape)
        _check_type(weight, base.dtype)
        if update.shape is not None and tuple(update.shape) != shape:
            raise FileError(
                f"{weight}: shape {list(shape)}, and the adapter was made for "
                f"{list(update.shape)}. Is it the base of this adapter?"
            )
        layouts = [update.layout] if update.shape is not None else [update.layout, *LAYOUTS]
        for layout in layouts:
            if len(shape) >= 2 and _fits(update, shape, layout):
                return replace(update, shape=shape, layout=layout)
        a, b = list(update.lora_A.shape), list(update.lora_B.shape)
        raise FileError(
            f"{weight}: lora_A of shape {a} and lora_B of {b} do not fit {list(shape)}. "
            "Was the adapter made for another model?"
        )

    def inside(self, read: Read) -> dict[str, list[Update]]:
        """The updates of an attached model by tensor: hard ones, then soft ones."""
        groups: dict[tuple[str, bool, int], dict[str, Tensor]] = {}
        for text, key in self.keys.items():
            if key.of_update:
                group = groups.setdefault((key.weight, not key.hard, key.index), {})
                group[key.part] = read(text)
        out: dict[str, list[Update]] = {}
        for (weight, soft, _), parts in sorted(groups.items(), key=lambda item: item[0]):
            out.setdefault(weight, []).append(self._attached(weight, soft, parts))
        return _shared(out)

    def next(self, weight: str, hard: bool) -> int:
        """The place of one more update in a tensor's list."""
        taken = [key.index for key in self.inner.get(weight, []) if key.hard == hard]
        # weight norm keeps two originals, and nothing in its own place
        unseen = [0] if hard and self.stored[weight].endswith(".original0") else []
        return 1 + max(taken + unseen, default=-1)

    def alone(self, weight: str) -> bool:
        """Whether no parametrization but ours acts on a tensor, as far as the keys tell."""
        hard = [key for key in self.inner.get(weight, []) if key.hard]
        ours = {key.index for key in hard if key.of_update}
        under = self.stored[weight] != weight
        single = not self.stored[weight].endswith(".original0")
        return (
            single
            and bool(ours) == under
            and {key.index for key in hard} == ours == set(range(len(ours)))
        )

    def _attached(self, weight: str, soft: bool, parts: Mapping[str, Tensor]) -> Update:
        missing = [name for name in _NAMES if name not in parts]
        missing += [] if weight in self.stored else ["base"]
        if missing:
            raise FileError(
                f"{weight}: an update is inside without its {', '.join(missing)}. Save the "
                "attached model's state dict again."
            )
        a, b, scale = (parts[name].detach() for name in _NAMES)
        if scale.numel() != 1 or a.dim() < 2 or b.dim() < 2:
            raise FileError(f"{weight}: the update inside it has factors of impossible shape.")
        layout: Layout = "stack" if a.dim() == 3 else "matrix"
        layout = "transposed" if "lora_transposed" in parts else layout
        kernel = "same" if soft and b.dim() > 2 else 1
        return self.fit(weight, Update(a, b, float(scale), None, layout, False, not soft, kernel))

    def _lacks(self, missing: list[str], total: int) -> FileError:
        near = closest(weights_at(missing[0])[0], self.stored)
        return FileError(
            f"the base lacks what {len(missing)} of {total} updates adapt, such as "
            f"{missing[0] or 'weight'}.{f' Closest: {near[0]}.' if near else ''} "
            "Is it the base of this adapter?"
        )


def embed_plan(contents: Contents, adapter: Adapter) -> Plan:
    """The plan of `paramlora.checkpoint.embed`."""
    renamed: dict[str, str] = {}
    beside: dict[str, Plan] = {}
    for weight, update in contents.found(adapter).items():
        source = contents.stored[weight]
        if update.hard and source == weight:
            renamed[source] = str(Key(weight, "original"))
        index = contents.next(weight, update.hard)
        beside[source] = {
            str(Key(weight, name, index, update.hard)): Recipe(source, value=value)
            for name, value in _tensors(update, contents.there[source].dtype).items()
        }
    plan: Plan = {}
    for text in contents.there:
        plan[renamed.get(text, text)] = Recipe(text)
        plan.update(beside.get(text, {}))
    return plan


def merge_plan(contents: Contents, adapters: Iterable[Weighted], read: Read) -> Plan:
    """The plan of `paramlora.checkpoint.merge`; only what is inside is read."""
    pairs = [one if isinstance(one, tuple) else (one, 1.0) for one in adapters]
    inside = contents.inside(read)
    if inside and pairs:
        raise AdapterError("an adapter is inside already. Merge that first, without others.")
    if not inside and not pairs:
        raise AdapterError("nothing to merge: no update is inside. Give an adapter.")
    folds = {weight: [(update, 1.0) for update in held] for weight, held in inside.items()}
    for adapter, strength in pairs:
        if not math.isfinite(strength):
            raise AdapterError(f'adapter "{adapter.name}": its weight {strength} is not finite.')
        for weight, update in contents.found(adapter).items():
            folds.setdefault(weight, []).append((update, float(strength)))
    for weight, strong in folds.items():
        _check_mergeable(contents, weight, strong)
    return _merged(contents, folds)


def _merged(contents: Contents, folds: Mapping[str, list[Strong]]) -> Plan:
    plan: Plan = {}
    attached = {key.weight for key in contents.keys.values() if key.hard and key.of_update}
    for text, key in contents.keys.items():
        if key.of_update:
            continue
        strong = folds.get(key.weight, []) if key.part in ("", "original") else []
        # a live model folds its parametrizations before its branches
        ordered = sorted(strong, key=lambda pair: not pair[0].hard)
        erased = key.part == "original" and key.weight in attached
        plan[key.weight if erased else text] = Recipe(text, tuple(ordered))
    return plan


def _check_type(weight: str, dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        raise AdapterError(
            f"{weight} is of type {dtype}, so quantised: an update cannot be stored in it. Use "
            "the checkpoint from before it was quantised."
        )


def _fits(update: Update, shape: tuple[int, ...], layout: Layout) -> bool:
    stack, out, fan_in = matrix_shape(shape, layout)
    lead = (stack,) if layout == "stack" else ()
    a, b = tuple(update.lora_A.shape), tuple(update.lora_B.shape)
    if update.up_kernel != "same":
        return a == (*lead, update.r, fan_in) and b == (*lead, out, update.r)
    size = math.prod(b[2:])
    if layout == "transposed":
        return a == (update.r * size, fan_in) and b[0] * size == out
    return a == (update.r, fan_in) and b[0] == out


def _tensors(update: Update, dtype: torch.dtype) -> dict[str, Tensor]:
    """What an attached update shows in a state dict."""
    kind = factor_dtype(dtype)
    scale = torch.tensor(update.scale, dtype=kind)
    out = dict(zip(_NAMES, (update.lora_A.to(kind), update.lora_B.to(kind), scale)))
    if update.layout == "transposed" and ambiguous(update.shape or (), update.layout):
        out["lora_transposed"] = torch.ones((), dtype=torch.uint8)
    return out


def _shared(inside: dict[str, list[Update]]) -> dict[str, list[Update]]:
    """One value for updates that are equal, as those of tied tensors are."""
    seen: dict[object, list[Update]] = {}
    for updates in inside.values():
        for i, update in enumerate(updates):
            mark = (update.shape, update.r, update.scale, float(update.lora_A.double().sum()))
            alike = seen.setdefault(mark, [])
            twins = [other for other in alike if _equal(update, other)]
            if twins:
                updates[i] = twins[0]
            else:
                alike.append(update)
    return inside


def _equal(one: Update, other: Update) -> bool:
    flags = (one.layout, one.hard, one.up_kernel) == (other.layout, other.hard, other.up_kernel)
    same = torch.equal(one.lora_A, other.lora_A) and torch.equal(one.lora_B, other.lora_B)
    return flags and same


def _check_mergeable(contents: Contents, weight: str, strong: list[Strong]) -> None:
    """Refuse what no stored tensor would give."""
    path = Key(weight).path
    for update, _ in strong:
        if update.up_kernel == "same":
            refuse_two_kernels(path, tuple(update.lora_B.shape[2:]))
        scale = torch.tensor(update.scale)
        for name, value in zip(_NAMES, (update.lora_A, update.lora_B, scale)):
            if not torch.isfinite(value).all():
                raise AdapterError(
                    f"{path}.{name}: not finite. Nothing was merged; give a sound adapter."
                )
    if not contents.alone(weight):
        raise AdapterError(
            f"{path}: its weight is under another parametrization, and no tensor in a file gives "
            "the sum. Nothing was merged; load the model and use paramlora.merge."
        )
