"""A weight with a low-rank update added, on CUDA; imported only there."""

from typing import Any

from torch import Tensor

from paramlora.cuda.launch import Launch, along, on_its_device, planned
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
        return Launch(
            kernels.add,
            weight.get_device(),
            -(-rows // _TILE) * -(-columns // _TILE),
            numbers=dict(
                M=rows,
                N=columns,
                r=len(a),
                **along("stride_w", "mn", weight.stride()),
                **along("stride_a", "rn", a.stride()),
                **along("stride_b", "mr", b.stride()),
            ),
            constants=dict(BLOCK_M=_TILE, BLOCK_N=_TILE, R=_RANKS),
            stages=1,
            warps=4,
        )

    launch, addresses = planned(_PLANS, tensors, (), made)
    launch(tensors, addresses)
    return total
