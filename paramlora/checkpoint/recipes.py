"""What a conversion of a checkpoint does to each key, planned from types and shapes alone."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
from torch import Tensor

from paramlora.checkpoint.keys import Key, weights_at
from paramlora.checkpoint.scales import scale_of
from paramlora.errors import AdapterError, FileError, closest, counted, listed, warn
from paramlora.update.attached import AttachedUpdate, lacking
from paramlora.update.geometry import FLOATS, NARROW, factor_dtype
from paramlora.update.kinds import kind_with
from paramlora.update.memory import pieces_of
from paramlora.update.outline import looked
from paramlora.update.rounding import Rounding
from paramlora.update.sum import Fold, ScaledTerm, Term, folded
from paramlora.update.value import Adapter, Value
from paramlora.update.weighted import pairs_of

# what spectral norm and torch's orthogonal parametrization keep
_OF_TORCH = ("_u", "_v", "base")
Weighted = Union[Adapter, tuple[Adapter, float]]
Read = Callable[[str], Any]
Strong = tuple[Value, float]  # what is done to a tensor, and how strongly


@dataclass(frozen=True)
class Recipe:
    """How one value of the result comes about.

    Args:
        source: the key of the input that it is, or beside which it stands.
        changes: what to fold into it, in order.
        value: a new tensor instead.
        scale: of a weight of 8-bit floats, what its elements are to be multiplied by: one number,
            or one for each row.
        rounding: how sums come into the weight's type; to the nearest number where None.
    """

    source: str
    changes: tuple[Strong, ...] = ()
    value: Optional[Tensor] = None
    scale: Optional[Tensor] = None
    rounding: Optional[Rounding] = None

    def make(self, read: Read) -> Any:
        """The value, from a function that gives the input's."""
        if self.value is not None:
            return self.value
        base = read(self.source)
        if not self.changes:
            return base
        terms = self.terms(base.dtype, base.device)
        merged = folded(base, terms, self.rounding)
        self.check(base, merged, lambda wide: folded(wide, terms))
        return merged

    def fold(self, shape: "tuple[int, ...] | torch.Size", dtype: torch.dtype) -> Fold:
        """The sum for a tensor of that shape and type, a block of it at a time."""
        return Fold(shape, dtype, self.terms(dtype), rounding=self.rounding)

    def check(self, before: Tensor, after: Tensor, summed: Callable[[Tensor], Tensor]) -> None:
        """Refuse a sum that its type cannot hold; what the base itself has not finite stays.

        In 8 bits the largest number takes the place of larger ones (see `terms`).

        Raises:
            AdapterError: names the tensor and the sum.
        """
        if after.dtype in NARROW or torch.isfinite(after).all():
            return
        # a mask of -inf in the base is meant so: only what the sum has made infinite is an error
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
        terms = [change.term(s, dtype, device) for change, s in self.changes if s != 0]
        if dtype not in NARROW or not terms:
            return terms
        scale = torch.ones(()) if self.scale is None else self.scale.to(device)
        # the numbers of 8 bits times their scale are the weight; the sum goes back, clamped
        return [ScaledTerm(scale), *terms, ScaledTerm(1 / scale, torch.finfo(dtype).max)]


Recipes = dict[str, Recipe]


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

    def found(self, adapter: Adapter, narrow: bool = False) -> dict[str, Value]:
        """The changes by tensor, each with its shape; of tied tensors it is enough that one is.

        Args:
            adapter: under the names of this checkpoint.
            narrow: whether a weight may be of 8-bit floats.

        Raises:
            FileError: a path that is not there, or factors that do not fit.
        """
        changes = adapter.values()
        at = {p: next((w for w in weights_at(p) if w in self.stored), None) for p in changes}
        # safetensors stores a tied tensor under one of its names alone
        kept = {id(change) for path, change in changes.items() if at[path] is not None}
        missing = [p for p, change in changes.items() if at[p] is None and id(change) not in kept]
        if missing:
            raise self._lacks(missing, len(changes))
        there = {path: w for path, w in at.items() if w is not None}
        return {w: self.fitted(w, changes[path], narrow) for path, w in there.items()}

    def check_apart(self, adapter: Adapter) -> None:
        """Refuse to fold into a tensor what is of one of several layers that hold it.

        Raises:
            FileError: names them.
        """
        for path, others in adapter.apart.items():
            names = {weight for one in others for weight in weights_at(one)}
            if names.isdisjoint(self.stored):
                raise FileError(
                    f"{path}: {listed(others)} held the same tensor without this update, and the "
                    "base has it under one name, so all of them would have it. Merge it in the "
                    "model (paramlora.merge), or give a base that stores them apart."
                )

    def fitted(self, weight: str, change: Value, narrow: bool = False) -> Value:
        """A change with its tensor's shape and layout, where those fit it."""
        base = self.base(weight)
        counts = change.alone and base.dtype == torch.int64  # such as BatchNorm's batches
        sums = base.dtype in FLOATS or (narrow and base.dtype in NARROW)
        if not sums and not counts:
            raise AdapterError(
                f"{weight} is of type {base.dtype}, in which no update can be stored. Where it was "
                "quantised, use the checkpoint from before."
            )
        change.check_types(weight, base.dtype)
        told, shape = change.shape, tuple(base.shape)
        if told is not None and tuple(told) != shape:
            raise FileError(
                f"{weight}: shape {list(shape)}, and the adapter was made for {list(told)}. "
                "Is it the base of this adapter?"
            )
        fitted = change.fitted(shape)
        if fitted is None:
            held = [f"{name} of shape {list(t.shape)}" for name, t in change.tensors().items()]
            raise FileError(
                f"{weight}: {' and '.join(held)} do not fit {list(shape)}. "
                "Was the adapter made for another model?"
            )
        return fitted

    def base(self, weight: str) -> Any:
        """What has the weight's type and shape."""
        stored = self.stored[weight]
        if not stored.endswith(".original0"):
            return self.there[stored]
        # weight_norm: original0 is the magnitude, original1 has the weight's shape
        second = f"{stored.removesuffix('0')}1"
        if second not in self.there:
            raise FileError(f"{stored}: without its {second}. Save the state dict again.")
        return self.there[second]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The base's tensors, by the names that they have without an adapter attached."""
        return {weight: tuple(self.base(weight).shape) for weight in self.stored}

    def inside(self, read: Read) -> dict[str, list[Value]]:
        """The changes of an attached model by tensor: hard ones, then soft ones."""
        ours = {key.place for key in self.keys.values() if key.of_update}
        # all of a place: a kind that nobody registered may begin as one that somebody did
        there = {text: self.there[text] for text, key in self.keys.items() if key.place in ours}
        self._tell_unknown(ours)
        # by shapes first: what does not fit is told before gigabytes are read
        looked(there, read, self._changes)
        return _shared(self._changes({text: read(text).detach() for text in there}))

    def _tell_unknown(self, ours: Collection[tuple[str, bool, int]]) -> None:
        """Warn of parametrizations that are neither ours nor torch's, which stay as they are."""
        unknown: dict[str, list[str]] = {}
        for key in self.keys.values():
            if key.hard and key.index >= 0 and key.place not in ours and key.part not in _OF_TORCH:
                unknown.setdefault(key.weight, []).append(key.part)
        if unknown:
            weight, parts = next(iter(unknown.items()))
            warn(
                f"{weight}: {listed(parts)} of a parametrization that is not known here stays as "
                f"it is, and so in {counted(len(unknown), 'tensor')}. Import what registers it, if "
                "it is a kind of update."
            )

    def _changes(self, state: Mapping[str, Tensor]) -> dict[str, list[Value]]:
        groups: dict[tuple[str, bool, int], dict[str, Tensor]] = {}
        for text, tensor in state.items():
            key = self.keys[text]
            group = groups.setdefault((key.weight, not key.hard, key.index), {})
            group[key.part] = tensor
        out: dict[str, list[Value]] = {}
        # by the places in torch's lists: sums of floats depend on their order
        for (weight, soft, _), parts in sorted(groups.items(), key=lambda item: item[0]):
            out.setdefault(weight, []).append(self._attached(weight, soft, parts))
        return out

    def held(self, weight: str) -> list[type[AttachedUpdate]]:
        """The kinds of the updates that act on a tensor inside."""
        parts: dict[tuple[bool, int], set[str]] = {}
        for key in self.inner.get(weight, []):
            if key.of_update:
                parts.setdefault((key.hard, key.index), set()).add(key.part)
        return [_kind_of(weight, names, hard) for (hard, _), names in parts.items()]

    def next(self, weight: str, hard: bool) -> int:
        """The place of one more update in a tensor's list."""
        taken = [key.index for key in self.inner.get(weight, []) if key.hard == hard]
        # weight norm keeps two originals, and nothing in its own place
        unseen = [0] if hard and self.stored[weight].endswith(".original0") else []
        return 1 + max(taken + unseen, default=-1)

    def alone(self, weight: str) -> bool:
        """Whether no parametrization but ours acts on a tensor, as far as the keys tell."""
        # gaps in the numbers are parametrizations without tensors, which no key shows
        hard = [key for key in self.inner.get(weight, []) if key.hard]
        ours = {key.index for key in hard if key.of_update}
        under = self.stored[weight] != weight
        single = not self.stored[weight].endswith(".original0")
        return (
            single
            and bool(ours) == under
            and {key.index for key in hard} == ours == set(range(len(ours)))
        )

    def _attached(self, weight: str, soft: bool, parts: Mapping[str, Tensor]) -> Value:
        if weight not in self.stored:
            raise FileError(lacking(weight, ["base"]))
        kind = _kind_of(weight, set(parts), not soft)
        return self.fitted(weight, kind.read_state(weight, parts, self.base(weight).dtype))

    def _lacks(self, missing: list[str], total: int) -> FileError:
        near = closest(weights_at(missing[0])[0], self.stored)
        return FileError(
            f"the base lacks what {len(missing)} of {counted(total, 'update')} would change, such "
            f"as {missing[0] or 'weight'}.{f' Closest: {near[0]}.' if near else ''} "
            "Is it the base of this adapter?"
        )


def _kind_of(weight: str, parts: set[str], hard: bool) -> type[AttachedUpdate]:
    """The kind of an update inside, by the names of its tensors."""
    try:
        return kind_with(parts, hard)
    except ValueError as error:
        raise FileError(
            f"{weight}: {', '.join(sorted(parts))} inside, which no kind of update that is "
            "registered has together. Import what registers it."
        ) from error


def embed_recipes(contents: Contents, adapter: Adapter) -> Recipes:
    """The recipes of `paramlora.checkpoint.embed`."""
    renamed: dict[str, str] = {}
    beside: dict[str, Recipes] = {}
    for weight, change in contents.found(adapter).items():
        _check_free(contents, weight, change)
        source = contents.stored[weight]
        hard = change.hard
        # torch's parametrize moves the tensor itself to .original
        if hard and source == weight:
            renamed[source] = str(Key(weight, "original"))
        index = contents.next(weight, hard)
        made = change.attached(contents.base(weight).dtype)
        for name, value in made.items():
            _check_held(Key(weight).path, name, value)
        beside[source] = {
            str(Key(weight, name, index, hard)): Recipe(source, value=value)
            for name, value in made.items()
        }
    recipes: Recipes = {}
    for text in contents.there:
        recipes[renamed.get(text, text)] = Recipe(text)
        recipes.update(beside.get(text, {}))
    return recipes


def merge_recipes(contents: Contents, adapters: Iterable[Weighted], read: Read) -> Recipes:
    """The recipes of `paramlora.checkpoint.merge`; only what is inside is read."""
    pairs = pairs_of(adapters)
    inside = contents.inside(read)
    if inside and pairs:
        raise AdapterError(
            "an adapter is inside already. Merge that first, without others, and then these into "
            "what comes of it."
        )
    if not inside and not pairs:
        raise AdapterError("nothing to merge: no update is inside. Give an adapter.")
    folds = {weight: [(change, 1.0) for change in held] for weight, held in inside.items()}
    for adapter, strength in pairs:
        contents.check_apart(adapter)
        for weight, change in contents.found(adapter, narrow=True).items():
            folds.setdefault(weight, []).append((change, strength))
    for weight, strong in folds.items():
        _check_mergeable(contents, weight, strong)
    return _merged(contents, folds, read)


def _merged(contents: Contents, folds: Mapping[str, list[Strong]], read: Read) -> Recipes:
    recipes: Recipes = {}
    attached = {key.weight for key in contents.keys.values() if key.hard and key.of_update}
    for text, key in contents.keys.items():
        if key.of_update:
            continue
        strong = folds.get(key.weight, []) if key.part in ("", "original") else []
        # a live model folds its parametrizations before its branches
        ordered = sorted(strong, key=lambda pair: not pair[0].hard)
        # somebody else's parametrization stays, and so does the original under it
        erased = key.part == "original" and key.weight in attached
        recipes[key.weight if erased else text] = Recipe(
            text, tuple(ordered), scale=scale_of(contents.there, text, read) if ordered else None
        )
    return recipes


def _shared(inside: dict[str, list[Value]]) -> dict[str, list[Value]]:
    """One value for changes that are equal, as those of tied tensors are."""
    seen: dict[object, Value] = {}
    for changes in inside.values():
        changes[:] = [seen.setdefault(_content(change), change) for change in changes]
    return inside


def _content(change: Value) -> object:
    """Equal for equal changes."""
    # by content, as a state dict read from a file has lost which tensors were one
    held = sorted(change.tensors().items())
    return (*change.content(), *((name, _digest(tensor)) for name, tensor in held))


def _digest(tensor: Tensor) -> tuple[object, ...]:
    digest = hashlib.sha256()
    for piece in pieces_of(tensor):
        digest.update(piece)
    return (tensor.dtype, tuple(tensor.shape), digest.digest())


def _check_mergeable(contents: Contents, weight: str, strong: list[Strong]) -> None:
    """Refuse what no stored tensor would give."""
    path = Key(weight).path
    for change, _ in strong:
        if change.alone and not all(other.alone for other, _ in strong):
            raise AdapterError(
                f"{path}: it is trained whole by one adapter, and changed by another. Nothing "
                "was merged; give only one of them."
            )
        change.check_mergeable(path)
        for name, value in change.parts().items():
            _check_finite(path, name, value)
    if not contents.alone(weight):
        raise AdapterError(
            f"{path}: its weight is under another parametrization, and no tensor in a file gives "
            "the sum. Nothing was merged; load the model and use paramlora.merge."
        )


def _check_free(contents: Contents, weight: str, change: Value) -> None:
    """Refuse a tensor trained whole beside an update of another kind, as `attach` does."""
    if any(kind.alone != change.alone for kind in contents.held(weight)):
        raise AdapterError(
            f"{Key(weight).path}: an update is inside already, and a tensor trained whole has none "
            "of another kind beside it. Nothing was embedded; merge what is inside first, and "
            "embed this into what comes of it."
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
