"""A weight with a low-rank update added, on CUDA; imported only there."""

from typing import Any

from torch import Tensor

from paramlora.cuda.launch import Launch, on_its_device, planned
from paramlora.cuda.sum import kernels

_PLANS: dict[Any, Any] = {}
_TILE, _RANKS = 64, 16  # rows and columns of a program, and ranks that it sums at a time


@on_its_device
def added(weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """``W + scale · B A``, summed in float32 and rounded once to the type of W.

    Args:
        weight: ``[rows, columns]`` of 16 bits, contiguous.
        a: ``[r, columns]``; b: ``[rows, r]``; any strides and types.
        scale: ``[]``.
    """
    total = weight.new_empty(weight.shape)
    tensors = (weight, a, b, scale, total)

    def made(_: Any) -> Launch:
        rows, columns = weight.shape
        numbers = (rows, columns, len(a), *weight.stride(), *a.stride(), *b.stride())
        grid, constants = -(-rows // _TILE) * -(-columns // _TILE), (_TILE, _TILE, _RANKS)
        return Launch(kernels.add, weight.get_device(), grid, numbers, constants, 1, 4)

    launch, addresses = planned(_PLANS, tensors, (), made)
    launch(tensors, addresses)
    return total
