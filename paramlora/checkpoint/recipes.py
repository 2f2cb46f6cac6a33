"""What a conversion of a checkpoint does to each key, planned from types and shapes alone."""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Optional, Union

import torch
from torch import Tensor

from paramlora.checkpoint.keys import Key, weights_at
from paramlora.errors import AdapterError, FileError, closest
from paramlora.update.geometry import FLOATS, LAYOUTS, Layout, ambiguous, factor_dtype, matrix_shape
from paramlora.update.memory import pieces_of
from paramlora.update.names import LOW_RANK
from paramlora.update.sum import LowRankTerm, Term, WholeTerm, folded
from paramlora.update.value import Adapter, Update, refuse_two_kernels

Weighted = Union[Adapter, tuple[Adapter, float]]
Read = Callable[[str], Any]
Change = Union[Update, Tensor]  # of one tensor: an update, or a tensor to have instead
Strong = tuple[Change, float]  # and how strongly


@dataclass(frozen=True)
class Recipe:
    """How one value of the result comes about.

    Args:
        source: the key of the input that it is, or beside which it stands.
        changes: what to fold into it, in order.
        value: a new tensor instead.
    """

    source: str
    changes: tuple[Strong, ...] = ()
    value: Optional[Tensor] = None

    def make(self, read: Read) -> Any:
        """The value, from a function that gives the input's."""
        if self.value is not None:
            return self.value
        base = read(self.source)
        if not self.changes:
            return base
        terms = self.terms(base.dtype, base.device)
        merged = folded(base, terms)
        self.check(base, merged, lambda wide: folded(wide, terms))
        return merged

    def check(self, before: Tensor, after: Tensor, summed: Callable[[Tensor], Tensor]) -> None:
        """Refuse a sum that its type cannot hold; what the base itself has not finite stays.

        Raises:
            AdapterError: names the tensor and the sum.
        """
        if torch.isfinite(after).all():
            return
        lost = (torch.isfinite(before) & ~torch.isfinite(after)).reshape(-1)
        if not lost.any():
            return
        wide = before.to(factor_dtype(before.dtype))
        value, dtype = summed(wide).reshape(-1)[lost][0].item(), before.dtype
        raise AdapterError(
            f"{Key.parse(self.source).weight}: its sum with the update is {value:g}, and {dtype} "
            f"holds up to {torch.finfo(dtype).max:g}. Nothing was merged; convert the base to a "
            "wider type, or merge with a smaller weight."
        )

    def terms(self, dtype: torch.dtype, device: Union[str, torch.device] = "cpu") -> list[Term]:
        """What to fold into a tensor of that type, as a live model has it."""
        return [_term(change, s, dtype, device) for change, s in self.changes if s != 0]


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

    def found(self, adapter: Adapter) -> dict[str, Change]:
        """The changes by tensor, each with its shape; of tied tensors it is enough that one is.

        Raises:
            FileError: a path that is not there, or factors that do not fit.
        """
        changes: dict[str, Change] = {**adapter.updates, **adapter.whole}
        at = {p: next((w for w in weights_at(p) if w in self.stored), None) for p in changes}
        kept = {id(change) for path, change in changes.items() if at[path] is not None}
        missing = [p for p, change in changes.items() if at[p] is None and id(change) not in kept]
        if missing:
            raise self._lacks(missing, len(changes))
        return {w: self.fitted(w, changes[path]) for path, w in at.items() if w is not None}

    def fitted(self, weight: str, change: Change) -> Change:
        """A change with its tensor's shape and layout, where those fit it."""
        base = self.base(weight)
        counts = isinstance(change, Tensor) and change.dtype == base.dtype == torch.int64
        if base.dtype not in FLOATS and not counts:
            raise AdapterError(
                f"{weight} is of type {base.dtype}, in which no update can be stored. Where it was "
                "quantised, use the checkpoint from before."
            )
        if not counts:
            parts = (change,) if isinstance(change, Tensor) else (change.lora_A, change.lora_B)
            check_types(weight, *parts)
        told = change.shape
        if told is not None and tuple(told) != tuple(base.shape):
            raise FileError(
                f"{weight}: shape {list(base.shape)}, and the adapter was made for {list(told)}. "
                "Is it the base of this adapter?"
            )
        return change if isinstance(change, Tensor) else self._laid_out(weight, change)

    def base(self, weight: str) -> Any:
        """What has the weight's type and shape."""
        stored = self.stored[weight]
        if not stored.endswith(".original0"):
            return self.there[stored]
        second = f"{stored.removesuffix('0')}1"  # of weight norm's two originals
        if second not in self.there:
            raise FileError(f"{stored}: without its {second}. Save the state dict again.")
        return self.there[second]

    def inside(self, read: Read) -> dict[str, list[Change]]:
        """The changes of an attached model by tensor: hard ones, then soft ones."""
        groups: dict[tuple[str, bool, int], dict[str, Tensor]] = {}
        for text, key in self.keys.items():
            if key.of_update:
                group = groups.setdefault((key.weight, not key.hard, key.index), {})
                group[key.part] = read(text).detach()
        out: dict[str, list[Change]] = {}
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

    def _attached(self, weight: str, soft: bool, parts: Mapping[str, Tensor]) -> Change:
        if weight in self.stored and "lora_whole" in parts:
            return self.fitted(weight, parts["lora_whole"])
        missing = [name for name in LOW_RANK if name not in parts]
        missing += [] if weight in self.stored else ["base"]
        if missing:
            raise FileError(
                f"{weight}: an update is inside without its {', '.join(missing)}. Save the "
                "attached model's state dict again."
            )
        a, b = _factors(parts)
        scale = parts["lora_scale"]
        check_types(weight, scale)
        if scale.numel() != 1 or a.dim() < 2 or b.dim() < 2:
            raise FileError(f"{weight}: the update inside it has factors of impossible shape.")
        layout: Layout = "stack" if a.dim() == 3 else "matrix"
        layout = "transposed" if "lora_transposed" in parts else layout
        kernel = "same" if soft and b.dim() > 2 else 1
        usual = a.dtype == factor_dtype(self.base(weight).dtype)
        kind = None if usual else str(a.dtype).removeprefix("torch.")
        update = Update(a, b, float(scale), None, layout, False, not soft, kernel)
        return self.fitted(weight, replace(update, adapter_dtype=kind))

    def _laid_out(self, weight: str, update: Update) -> Update:
        shape = tuple(self.base(weight).shape)
        layouts = [update.layout] if update.shape is not None else [update.layout, *LAYOUTS]
        for layout in layouts:
            if fits_shape(update, shape, layout):
                return replace(update, shape=shape, layout=layout)
        a, b = list(update.lora_A.shape), list(update.lora_B.shape)
        raise FileError(
            f"{weight}: lora_A of shape {a} and lora_B of {b} do not fit {list(shape)}. "
            "Was the adapter made for another model?"
        )

    def _lacks(self, missing: list[str], total: int) -> FileError:
        near = closest(weights_at(missing[0])[0], self.stored)
        return FileError(
            f"the base lacks what {len(missing)} of {total} updates adapt, such as "
            f"{missing[0] or 'weight'}.{f' Closest: {near[0]}.' if near else ''} "
            "Is it the base of this adapter?"
        )


def check_types(where: str, *tensors: Tensor) -> None:
    """Refuse tensors of an update in whose type nothing can be computed, as in 8 bits."""
    wrong = next((tensor.dtype for tensor in tensors if tensor.dtype not in FLOATS), None)
    if wrong is not None:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise FileError(f"{where}: an update of type {wrong}. Save it in one of {names}.")


def embed_plan(contents: Contents, adapter: Adapter) -> Plan:
    """The plan of `paramlora.checkpoint.embed`."""
    renamed: dict[str, str] = {}
    beside: dict[str, Plan] = {}
    for weight, change in contents.found(adapter).items():
        source = contents.stored[weight]
        hard = isinstance(change, Tensor) or change.hard
        if hard and source == weight:
            renamed[source] = str(Key(weight, "original"))
        index = contents.next(weight, hard)
        made = _tensors(change, contents.base(weight).dtype)
        for name, value in made.items():
            _check_held(Key(weight).path, name, value)
        beside[source] = {
            str(Key(weight, name, index, hard)): Recipe(source, value=value)
            for name, value in made.items()
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
    folds = {weight: [(change, 1.0) for change in held] for weight, held in inside.items()}
    for adapter, strength in pairs:
        if not math.isfinite(strength):
            raise AdapterError(f'adapter "{adapter.name}": its weight {strength} is not finite.')
        for weight, change in contents.found(adapter).items():
            folds.setdefault(weight, []).append((change, float(strength)))
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
        ordered = sorted(strong, key=lambda pair: isinstance(pair[0], Update) and not pair[0].hard)
        erased = key.part == "original" and key.weight in attached
        plan[key.weight if erased else text] = Recipe(text, tuple(ordered))
    return plan


def fits_shape(update: Update, shape: tuple[int, ...], layout: Layout) -> bool:
    """Whether an update's factors are those of a weight of that shape."""
    if len(shape) < 2:
        return False
    stack, out, fan_in = matrix_shape(shape, layout)
    lead = (stack,) if layout == "stack" else ()
    a, b = tuple(update.lora_A.shape), tuple(update.lora_B.shape)
    if update.up_kernel != "same":
        return a == (*lead, update.r, fan_in) and b == (*lead, out, update.r)
    size = math.prod(b[2:])
    if layout == "transposed":
        return a == (update.r * size, fan_in) and b[0] * size == out
    return a == (update.r, fan_in) and b[0] == out


def _factors(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """``A`` and ``B``, with what a start from the weight takes out again (see `LowRank`)."""
    a, b = parts["lora_A"], parts["lora_B"]
    if "start_A" not in parts or "start_B" not in parts:
        return a, b
    return torch.cat([a, parts["start_A"]], -2), torch.cat([b, -parts["start_B"]], -1)


def _kind(update: Update, dtype: torch.dtype) -> torch.dtype:
    """The type that an update's factors have when attached to a tensor of a type."""
    named = update.adapter_dtype
    return factor_dtype(dtype) if named is None else getattr(torch, named)


def _tensors(change: Change, dtype: torch.dtype) -> dict[str, Tensor]:
    """What an attached change shows in a state dict."""
    if isinstance(change, Tensor):
        return {"lora_whole": change}
    kind = _kind(change, dtype)
    scale = torch.tensor(change.scale, dtype=kind)
    out = dict(zip(LOW_RANK, (change.lora_A.to(kind), change.lora_B.to(kind), scale)))
    if change.layout == "transposed" and ambiguous(change.shape or (), change.layout):
        out["lora_transposed"] = torch.ones((), dtype=torch.uint8)
    return out


def _term(
    change: Change, strength: float, dtype: torch.dtype, device: Union[str, torch.device]
) -> Term:
    if isinstance(change, Tensor):
        gain = torch.tensor(strength, dtype=change.dtype, device=device)
        return WholeTerm(change.to(device), gain)
    kind = _kind(change, dtype)
    a, b = (factor.to(device, kind) for factor in (change.lora_A, change.lora_B))
    scale = torch.tensor(change.scale, dtype=kind, device=device)
    wide = torch.promote_types(kind, torch.float32)  # as a live update's strength is held
    return LowRankTerm(
        a, b, scale * torch.tensor(strength, dtype=wide, device=device), change.layout
    )


def _shared(inside: dict[str, list[Change]]) -> dict[str, list[Change]]:
    """One value for changes that are equal, as those of tied tensors are."""
    seen: dict[object, Change] = {}
    for changes in inside.values():
        changes[:] = [seen.setdefault(_content(change), change) for change in changes]
    return inside


def _content(change: Change) -> object:
    """Equal for equal changes."""
    if isinstance(change, Tensor):
        return _digest(change)
    told = (change.shape, change.scale, change.layout, change.hard, change.up_kernel)
    return (*told, _digest(change.lora_A), _digest(change.lora_B))


def _digest(tensor: Tensor) -> tuple[object, ...]:
    digest = hashlib.sha256()
    for piece in pieces_of(tensor):
        digest.update(piece)
    return (tensor.dtype, tuple(tensor.shape), digest.digest())


def _check_mergeable(contents: Contents, weight: str, strong: list[Strong]) -> None:
    """Refuse what no stored tensor would give."""
    path = Key(weight).path
    for change, _ in strong:
        if isinstance(change, Tensor):
            _check_finite(path, "lora_whole", change)
            if len(strong) > 1:
                raise AdapterError(
                    f"{path}: it is trained whole by one adapter, and changed by another. Nothing "
                    "was merged; give only one of them."
                )
            continue
        if change.up_kernel == "same":
            refuse_two_kernels(path, tuple(change.lora_B.shape[2:]))
        values = (change.lora_A, change.lora_B, torch.tensor(change.scale, dtype=torch.float64))
        for name, value in zip(LOW_RANK, values):
            _check_finite(path, name, value)
    if not contents.alone(weight):
        raise AdapterError(
            f"{path}: its weight is under another parametrization, and no tensor in a file gives "
            "the sum. Nothing was merged; load the model and use paramlora.merge."
        )


def _check_finite(path: str, name: str, value: Tensor) -> None:
    if not torch.isfinite(value).all():
        raise AdapterError(f"{path}.{name}: not finite. Nothing was merged; give a sound adapter.")


def _check_held(path: str, name: str, value: Tensor) -> None:
    """Refuse what would be embedded in a type that does not hold it."""
    if not torch.isfinite(value).all():
        raise AdapterError(
            f"{path}.{name}: not finite in {value.dtype}. Nothing was embedded; give a sound "
            "adapter."
        )
