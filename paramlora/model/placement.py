"""Where the factors of a weight lie that is sharded over a device mesh (tensor parallelism)."""

from typing import Any

from torch import Tensor, nn

from paramlora.errors import TargetError
from paramlora.update.lowrank import LowRank
from paramlora.update.sharded import distribute


def shard_like(update: LowRank, weight: Any, path: str) -> None:
    """Lay the factors out as `weight` is, so that ``B·A`` needs no communication.

    Where the weight is split along its output side so is ``B``, along its input side ``A``, along
    a stack both; the rest is replicated. All processes take the values of the first.

    Raises:
        TargetError: the weight is split along another dimension, or is a sum still to be made.
    """
    from torch.distributed.tensor import Replicate

    pairs = [_placements(update, weight, place, path) for place in weight.placements]
    sides = {"A": [a for a, _ in pairs], "B": [b for _, b in pairs]}
    for name in ("lora_A", "lora_B", "start_A", "start_B"):
        value = getattr(update, name)
        if value is not None:
            laid = distribute(value.detach(), weight, sides[name[-1]])
            setattr(update, name, nn.Parameter(laid) if name.startswith("lora") else laid)
    if isinstance(update.lora_scale, nn.Parameter):
        alone = [Replicate() for _ in weight.placements]
        update.lora_scale = nn.Parameter(distribute(update.lora_scale.detach(), weight, alone))


def _placements(update: LowRank, weight: Tensor, place: Any, path: str) -> tuple[Any, Any]:
    """Those of A and of B along one dimension of the mesh."""
    from torch.distributed.tensor import Replicate, Shard

    if place.is_replicate():
        return Replicate(), Replicate()
    last = weight.dim() - 1
    stack = update.layout == "stack"
    inner, outer = (last, last - 1) if stack else (1, 0)
    if update.layout == "transposed":
        inner, outer = outer, inner
    if place.is_shard(outer):
        return Replicate(), Shard(update.lora_B.dim() - 2)
    if place.is_shard(inner) and (stack or weight.dim() == 2):
        return Shard(update.lora_A.dim() - 1), Replicate()
    if stack and last == 2 and place.is_shard(0):
        return Shard(0), Shard(0)
    raise TargetError(
        f"{path} of shape {list(weight.shape)} is laid out as {place} on its device mesh, which "
        "no layout of A and B matches. Shard it by rows or columns, or attach before sharding."
    )
