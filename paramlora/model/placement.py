"""Where an update's tensors lie whose weight is sharded over a device mesh (tensor parallelism)."""

from typing import Any

from torch import Tensor, nn

from paramlora.errors import TargetError
from paramlora.update.attached import AttachedUpdate
from paramlora.update.kinds import Part
from paramlora.update.sharded import distribute


def shard_like(update: AttachedUpdate, weight: Any, path: str) -> None:
    """Lay an update's tensors out as `weight` is, so that ``B·A`` needs no communication.

    Where the weight is split along its output side so is ``B``, along its input side ``A``, along
    a stack both; what has the weight's own dimensions is split as that is, where it has more than
    one element; the rest is replicated. All processes take the values of the first.

    Raises:
        TargetError: the weight is split along another dimension, or is a sum still to be made.
    """
    # only the kind knows along what they run
    if "own" in update.parts.values():
        raise TargetError(
            f'{path} lies on several processes, where an update of the kind "{update.method}" has '
            "no parts to lie with it. Attach before sharding, or use another kind."
        )
    sides = [_side(update, weight, place, path) for place in weight.placements]
    for name, part in {**update.parts, **update.hidden}.items():
        value = getattr(update, name, None)
        trains = isinstance(value, nn.Parameter)
        # a number that does not train is the same everywhere, and stays a plain tensor
        if value is None or (part == "number" and not trains):
            continue
        laid = [
            _along(part, value, place, side, weight.dim())
            for place, side in zip(weight.placements, sides)
        ]
        # the values of the first process: each had started by its own random numbers
        own = distribute(value.detach(), weight, laid)
        setattr(update, name, nn.Parameter(own) if trains else own)


def _along(part: Part, value: Tensor, place: Any, side: str, dims: int) -> Any:
    """How one tensor lies along one dimension of the mesh."""
    # here: torch.distributed takes a second to import
    from torch.distributed.tensor import Replicate, Shard

    if side == "none" or part == "number":
        return Replicate()
    if part == "weight":
        dim = place.dim % dims
        # magnitudes have one element along the sides over which they are norms
        return Replicate() if value.shape[dim] == 1 else Shard(dim)
    if side == "stack":
        return Shard(0)
    if side != part:
        return Replicate()
    # A is [r, in] and B is [out, r]: the side that is not the rank
    return Shard(value.dim() - (1 if part == "input" else 2))


def _side(update: AttachedUpdate, weight: Tensor, place: Any, path: str) -> str:
    """Which side of the weight is split along one dimension of the mesh."""
    if place.is_replicate():
        return "none"
    # of a matrix inputs are behind, of a stack the last
    last = weight.dim() - 1
    stack = update.layout == "stack"
    inner, outer = (last, last - 1) if stack else (1, 0)
    if update.layout == "transposed":
        inner, outer = outer, inner
    if place.is_shard(outer):
        return "output"
    # a kernel's inputs lie in several dimensions, along which A is one
    if place.is_shard(inner) and (stack or weight.dim() == 2):
        return "input"
    # with more dimensions in front the factors have one for all of them
    if stack and last == 2 and place.is_shard(0):
        return "stack"
    raise TargetError(
        f"{path} of shape {list(weight.shape)} is laid out as {place} on its device mesh, which "
        "no layout of A and B matches. Shard it by rows or columns, or attach before sharding."
    )
