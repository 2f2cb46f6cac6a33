"""The size of an update against the weight that it updates."""

from typing import Any, Optional

import torch
from torch import Tensor, nn

from paramlora.errors import AdapterError
from paramlora.model.attach import base_of, updates_of
from paramlora.model.layer_class import parametrized
from paramlora.model.quantised import dense
from paramlora.update.attached import AttachedUpdate, answer
from paramlora.update.sharded import gathered, is_sharded
from paramlora.update.sum import folded


@torch.no_grad()
def relative_size(module: nn.Module, update: AttachedUpdate) -> Optional[float]:
    """``‖W' - W‖ / ‖W‖`` at the strength that the update has, Frobenius norms.

    0 where the update changes nothing, and infinite where it changes a weight of zeros; None of
    what changes no weight of numbers. All processes of a sharded model call it.
    """
    base = _base(module, update)
    size = _size(update, base)
    if size is None or size == 0:
        return None if size is None else 0.0
    return (size / _norm(base)).item()


def _base(module: nn.Module, update: AttachedUpdate) -> Tensor:
    """The weight that an update of this layer acts on, as numbers."""
    held = [(name, one) for name, of in updates_of(module) for one in of]
    (name,) = [name for name, one in held if one is update]
    # ours alone: the stored weight, unpacked where it is quantised
    if all(isinstance(one, AttachedUpdate) for its, one in held if its == name):
        return dense(module, base_of(module, name).detach())
    # under a weight norm, the weight is what that computes: here, since others may call the model
    plist: Any = parametrized(module)[name]
    count = 0 if plist.is_tensor else plist.ntensors
    value = [getattr(plist, f"original{n}") for n in range(count)] or [plist.original]
    # our updates are passed over: the norm is against the weight without them
    for rule in plist:
        value = value if isinstance(rule, AttachedUpdate) else [rule(*value)]
    return value[0].detach()  # type: ignore[no-any-return]


def _size(update: AttachedUpdate, base: Tensor) -> "Tensor | None":
    """How much the update changes its weight by; None of what changes no weight of numbers."""
    try:
        update.check_mergeable("")
        term = answer(update, "term")
    except AdapterError:
        return None
    if not base.is_floating_point():  # a count of batches
        return None
    known: "Tensor | None" = term.norm()
    if known is not None:
        return known
    # in a wide type: a small update beside a large weight is a difference of near numbers
    before = base.to(_wide(base))
    if is_sharded(base) and not update.lies_along():
        before = gathered(before)
        return _norm(folded(before, [answer(update, "gathered_term")]) - before)
    return _norm(update(before) - before)


def _norm(tensor: Tensor) -> Tensor:
    return gathered(torch.linalg.vector_norm(tensor, dtype=_wide(tensor))).to(torch.float64)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
