"""The adapter that leads from one checkpoint to another."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor

from paramlora.arithmetic.products import (
    Approximation,
    Decomposed,
    check_choice,
    distance,
    is_finite,
    nearest,
)
from paramlora.arithmetic.resize import named
from paramlora.checkpoint.keys import Key
from paramlora.checkpoint.scales import keys_of_scales, scale_of
from paramlora.errors import AdapterError, FileError, counted, listed, warn
from paramlora.formats.base import Base, Slot
from paramlora.model.digest import digest, middle
from paramlora.update.contexts import own_context
from paramlora.update.geometry import FLOATS, NARROW, matrix_shape
from paramlora.update.value import Adapter, Holder, Update

_MARK = "scaled_fp8"  # by which ComfyUI tells that scales are stored; no tensor of the model
Read = Callable[[str], Tensor]
Told = Callable[[int, int], None]


@dataclass(frozen=True)
class Side:
    """One of two checkpoints.

    Args:
        there: by key what has the tensor's ``dtype`` and ``shape``.
        read: gives a tensor.
        name: for messages.
    """

    there: Mapping[str, Any]
    read: Read
    name: str


@own_context()
def between(
    base: Side,
    tuned: Side,
    rank: Optional[int] = None,
    *,
    energy: Optional[float] = None,
    exclude: Collection[str] = (),
    whole: bool = False,
    known: Optional[Base] = None,
    progress: Told = lambda done, total: None,
) -> Approximation:
    """The adapter of ``tuned - base``, a tensor at a time, each of the nearest of a rank.

    Matrices, convolutions and stacks become updates by `nearest`; the error of each is measured
    on the difference itself, ``‖Δ - B·A‖ / ‖Δ‖``. Tensors that are equal are left out. What is one
    tensor under several keys, alike in both, has one update, also where a checkpoint stores it
    under one of them alone, as safetensors does.

    Args:
        base, tuned: the two checkpoints, of the same keys and shapes.
        rank: of each update; a layer that holds less has less.
        energy: instead, the share of ``‖Δ‖²`` that each keeps at least.
        exclude: names of tensors and layers to leave out, as a configuration has them.
        whole: keep what is no matrix (biases, norms) as whole tensors, else a warning names it.
        known: the model's layers (see `base_of`): a checkpoint tells neither embeddings nor
            convolutions of one dimension from other matrices and stacks.
        progress: called with the bytes done since its last call, and of all.

    Raises:
        FileError: other keys or shapes.
        AdapterError: nothing differs, or a rank above what there is.
    """
    check_choice(rank, energy)
    base, tuned = _scaled(base), _scaled(tuned)
    keys, lacked = _common(base, tuned, [exclude] if isinstance(exclude, str) else exclude)
    matrices = {key: tuple(base.there[key].shape) for key in keys if _is_matrix(base.there[key])}
    _check_rank(rank, [_slot(key, Key(key).path, matrices[key], known) for key in matrices])
    found, total = _Found(base, tuned, whole), sum(_bytes(base.there[key]) for key in keys)
    for key in keys:
        found.take(key, rank, energy, known)
        progress(_bytes(base.there[key]), total)
    for key, head in lacked.items():
        found.share(key, head)
    _report_left(found.vectors, found.updates, whole, tuned.name)
    told = {path: digits for path, digits in found.digests.items() if digits is not None}
    kept = {path: tensor for path, tensor in found.vectors.items() if tensor is not None}
    holders = _holders(found.updates, known)
    return Approximation(
        Adapter(found.updates, whole=kept, base=told, holders=holders), found.errors
    )


class _Found:
    """What two checkpoints differ in, by the paths of their layers.

    Attributes:
        updates: of the tensors that are matrices; `errors`, of each.
        vectors: the whole tensors; None where they are not asked for.
        digests: of the base's tensors, which the updates lead from; None of 8 bits.
    """

    def __init__(self, base: Side, tuned: Side, whole: bool) -> None:
        self.base, self.tuned, self.whole = base, tuned, whole
        self.updates: dict[str, Update] = {}
        self.errors: dict[str, float] = {}
        self.vectors: dict[str, Optional[Tensor]] = {}
        self.digests: dict[str, Optional[str]] = {}
        self._seen: dict[tuple[object, ...], list[str]] = {}  # keys of tensors that may be alike

    def share(self, key: str, head: str) -> None:
        """Take of a tensor what was found of another, which is the same."""
        path, first = Key(key).path, Key(head).path
        made: tuple[dict[str, Any], ...] = (self.updates, self.errors, self.vectors, self.digests)
        for of in made:
            of |= {path: of[first]} if first in of else {}

    def take(
        self, key: str, rank: Optional[int], energy: Optional[float], known: Optional[Base]
    ) -> None:
        """Find what differs in a tensor, and how; the arguments are those of `between`."""
        before, after = self._pair(key)
        if before.dtype == after.dtype and torch.equal(_bits(before), _bits(after)):
            return
        # one tensor twice, as a tied head is: by a few bytes first, and by all where those agree
        alike = self._seen.setdefault((*_mark(before), *_mark(after)), [])
        if alike:
            # comparing reads two more, and two tensors are the bound of memory
            del before, after
            head = next((one for one in alike if self._are_same(key, one)), None)
            if head is not None:
                return self.share(key, head)
            before, after = self._pair(key)
        alike.append(key)
        path = Key(key).path
        if _is_matrix(self.base.there[key]):
            slot = _slot(key, path, tuple(before.shape), known)
            change = _change(before, after)
            _check_finite(key, change, {self.tuned.name: after, self.base.name: before})
            self.updates[path], self.errors[path] = _update(slot, change, rank, energy)
            # which base it leads from, so that it can be told when another is loaded
            eight = self.base.there[key].dtype in NARROW
            self.digests[path] = None if eight else digest(before)
            return
        if self.whole:
            _check_finite(key, after, {self.tuned.name: after})
        self.vectors[path] = after if self.whole else None

    def _pair(self, key: str) -> tuple[Tensor, Tensor]:
        return self.base.read(key).detach(), self.tuned.read(key).detach()

    def _are_same(self, key: str, other: str) -> bool:
        return _same(self.base, key, other) and _same(self.tuned, key, other)


def _scaled(side: Side) -> Side:
    """A checkpoint whose weights of 8 bits are the numbers that they stand for, without the scales
    that are stored beside them: those are no tensors of the model."""
    scales = {scale for key in side.there for scale in keys_of_scales(side.there, key)}
    if not scales:
        return side

    def read(key: str) -> Tensor:
        own, scale = side.read(key), scale_of(side.there, key, side.read)
        if scale is None:
            return own
        return own.detach().float() * (scale[:, None] if scale.dim() else scale)

    kept = {k: spec for k, spec in side.there.items() if k not in scales and k != _MARK}
    return Side(kept, read, side.name)


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor of 8-bit floats, which torch does not compare."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _mark(tensor: Tensor) -> tuple[object, ...]:
    """Equal for equal tensors: the shape, the type, and some bytes."""
    some = _bits(tensor.detach().reshape(-1)[middle(tensor.numel())])
    return tuple(tensor.shape), tensor.dtype, bytes(some.tolist())


def _is_constant(tensor: Tensor) -> bool:
    bits = _bits(tensor).view(-1, tensor.element_size())
    return bool((bits == bits[0]).all())


def _same(side: Side, key: str, other: str) -> bool:
    """Whether two tensors of one checkpoint are the same numbers."""
    return torch.equal(_bits(side.read(key).detach()), _bits(side.read(other).detach()))


def _holders(updates: Mapping[str, Update], known: Optional[Base]) -> dict[str, Holder]:
    """The layers of tied tensors, where the model tells their kinds."""
    count = Counter(map(id, updates.values()))
    slots = {path: (known or {}).get(path) for path, one in updates.items() if count[id(one)] > 1}
    return {
        path: Holder(slot.kind, slot.layout, slot.groups or 1)
        for path, slot in slots.items()
        if slot is not None and slot.kind is not None and slot.layout is not None
    }


def _change(before: Tensor, after: Tensor) -> Tensor:
    """``after - before``, in the wider type of the two."""
    dtype = torch.promote_types(_real(before), _real(after))
    # subtracted in place: a second copy of the largest tensor is spared
    change = after.to(dtype, copy=True)
    return change.sub_(before if before.dtype in FLOATS else before.to(dtype))


def _update(
    slot: Slot,
    change: Tensor,
    rank: Optional[int],
    energy: Optional[float],
) -> tuple[Update, float]:
    """The nearest update of one tensor, and its relative distance."""
    assert slot.layout is not None
    stack, out, fan_in = matrix_shape(slot.shape, slot.layout)
    if slot.layout == "transposed":
        # a transposed layout stores [in, out]: factors are of [out, in]
        change = change.reshape(fan_in, out).mT.contiguous()
    matrix = change.reshape(*([stack] if slot.layout == "stack" else []), out, fan_in)
    most = min(out, fan_in)
    found = nearest(matrix, None if rank is None else min(rank, most), energy)
    a, b = found.factors(min(rank or _rank(found, energy), most))
    # measured, as a sketch of the singular values is not exact; it overwrites the matrix
    error = distance(matrix, a, b)
    shape, layout, kind, groups = slot.shape, slot.layout, slot.kind, slot.groups or 1
    a, b = a.contiguous(), b.contiguous()
    return Update(a, b, 1.0, shape, layout, kind=kind, groups=groups), error


def _check_finite(key: str, tensor: Tensor, sides: Mapping[str, Tensor]) -> None:
    """Refuse what is not finite, and name the checkpoint in which it is not."""
    if is_finite(tensor):
        return
    names = [name for name, one in sides.items() if not is_finite(one.to(_real(one)))]
    where = f"holds numbers that are not finite in {' and in '.join(names)}"
    told = where if names else "the difference is beyond any number of its type"
    raise AdapterError(f"{key}: {told}. Exclude it (--exclude).")


def _rank(found: Decomposed, energy: Optional[float]) -> int:
    return found.rank_of(1.0 if energy is None else energy)


def _real(tensor: Tensor) -> torch.dtype:
    """The type to subtract in: at least float32, and one that torch promotes."""
    dtype = tensor.dtype if tensor.dtype in FLOATS else torch.float32
    return torch.promote_types(dtype, torch.float32)


def _slot(key: str, path: str, shape: tuple[int, ...], known: Optional[Base]) -> Slot:
    """How a tensor's matrices lie: as the model says, else by its name."""
    slot = None if known is None else known.get(path)
    if slot is not None and slot.layout is not None:
        return slot
    # layers call theirs "weight"; a parameter of another name and more sides is a stack
    return Slot(shape, "stack" if path == key and len(shape) > 2 else "matrix")


def _common(base: Side, tuned: Side, exclude: Collection[str]) -> tuple[list[str], dict[str, str]]:
    """The keys of both checkpoints; and of each key that only one of them stores the key of both
    under which the same tensor stands there."""
    left = _excluded([*base.there, *tuned.there], exclude)
    both = [key for key in base.there if key in tuned.there]
    lacked: dict[str, str] = {}
    for one, other in ((base, tuned), (tuned, base)):
        missing = [key for key in one.there if key not in other.there and key not in left]
        heads = _stored_as(one, missing, both) if missing else {}
        lost = [key for key in missing if key not in heads]
        if lost:
            raise FileError(
                f"{other.name}: lacks {listed(lost, 4)} of {one.name}. Are both of one model? What "
                "is of no account can be left out by exclude (--exclude)."
            )
        lacked |= heads
    keys = [key for key in both if key not in left]
    if not keys:
        raise AdapterError("exclude (--exclude) leaves no tensor. Exclude less.")
    for key in keys:
        _check_types(key, base, tuned)
        had, has = tuple(base.there[key].shape), tuple(tuned.there[key].shape)
        if had != has:
            raise FileError(
                f"{key}: {list(had)} in {base.name}, and {list(has)} in {tuned.name}. Leave it out "
                "by exclude (--exclude), or give two checkpoints of one shape."
            )
    return keys, lacked


def _stored_as(side: Side, missing: list[str], both: list[str]) -> dict[str, str]:
    """By each missing key, the key of both checkpoints that holds the same tensor in this one, as
    of a tied head that the other does not store. Constant tensors and vectors do not count: those
    of norms start alike."""
    missing = [key for key in missing if _is_matrix(side.there[key])]
    sizes = {key: (tuple(side.there[key].shape), side.there[key].dtype) for key in missing}
    # only tensors of the same shape and type are read and compared
    near = [k for k in both if (tuple(side.there[k].shape), side.there[k].dtype) in sizes.values()]
    alike: dict[tuple[object, ...], list[str]] = {}
    for key in near:
        alike.setdefault(_mark(side.read(key)), []).append(key)
    found: dict[str, str] = {}
    for key in missing if near else ():
        own = side.read(key).detach()
        some = [] if _is_constant(own) else alike.get(_mark(own), [])
        del own
        head = next((one for one in some if _same(side, key, one)), None)
        found |= {key: head} if head is not None else {}
    return found


def _check_types(key: str, base: Side, tuned: Side) -> None:
    """Refuse what has no plain numbers, and integers beside floats: those of a quantised weight are
    not its values."""
    for side in (base, tuned):
        own = side.there[key]
        dense = not isinstance(own, Tensor) or (own.layout is torch.strided and not own.is_meta)
        if not dense:
            where = "on the meta device" if own.is_meta else f"of the layout {own.layout}"
            raise FileError(
                f"{key}: {where} in {side.name}, without numbers to subtract. Give a checkpoint of "
                "plain tensors, or leave it out by exclude (--exclude)."
            )
    types = [side.there[key].dtype for side in (base, tuned)]
    if types[0].is_floating_point != types[1].is_floating_point:
        raise FileError(
            f"{key}: {types[0]} in {base.name}, and {types[1]} in {tuned.name}. Give two "
            "checkpoints of floats, such as those from before one was quantised, or leave it out "
            "by exclude (--exclude)."
        )


def _excluded(keys: list[str], exclude: Collection[str]) -> set[str]:
    """The keys of the tensors that names mean; a layer's name means all that is in it."""
    if not exclude:
        return set()
    # every beginning of a key is a name: of a layer, a block, or the tensor itself
    inside: dict[str, set[str]] = {}
    for key in dict.fromkeys(keys):
        parts = key.split(".")
        for count in range(1, len(parts) + 1):
            inside.setdefault(".".join(parts[:count]), set()).add(key)
    found = named(inside, exclude)
    return {key for paths in found.values() for path in paths for key in inside[path]}


def _is_matrix(spec: Any) -> bool:
    return len(spec.shape) >= 2 and spec.dtype.is_floating_point and 0 not in spec.shape


def _bytes(spec: Any) -> int:
    return int(torch.Size(spec.shape).numel()) * int(spec.dtype.itemsize)


def _check_rank(rank: Optional[int], slots: list[Slot]) -> None:
    sizes = (matrix_shape(slot.shape, slot.layout or "matrix")[1:] for slot in slots)
    most = max(map(min, sizes), default=0)
    # of vectors alone no rank is asked
    if rank is not None and slots and rank > most:
        raise AdapterError(
            f"rank (--rank) {rank} is more than any layer holds; the most is {most}. Give at most "
            "that."
        )


def _report_left(
    vectors: Collection[str], updates: Mapping[str, Update], whole: bool, name: str
) -> None:
    if not updates and not (vectors and whole):
        more = " but vectors, which whole (--whole) keeps" if vectors else ""
        raise AdapterError(
            f"{name}: no tensor differs from the base's{more}. Give the checkpoint from after "
            "training."
        )
    if vectors and not whole:
        warn(
            f"{counted(len(vectors), 'tensor')} with a difference but no matrix, left out: "
            f"{listed(vectors)}. Keep them with whole=True (--whole)."
        )
