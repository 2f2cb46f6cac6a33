"""DoRA's norms and rescaled outputs on CUDA, in the kernels; imported only there."""

from typing import Any, Optional

import torch
from torch import Tensor, float32

from paramlora.cuda.device import card
from paramlora.cuda.launch import Launch, along, on_its_device, planned
from paramlora.cuda.linear import plan as linear
from paramlora.cuda.operands import Operands, padded
from paramlora.cuda.rescaled import kernels

_PLANS: dict[Any, Any] = {}


@on_its_device
def forward(of: Operands, m: Tensor, norm: Tensor) -> Optional[tuple[Tensor, Tensor, Tensor]]:
    """``y = z · m/‖·‖ + bias`` of ``z = x (W + scale · B A)ᵀ``, rounded once, and z.

    Args:
        of: as of `linear.plan.forward`, with a contiguous bias or none.
        m: ``[out]``; norm: ``[out]`` in float32; contiguous.

    Returns:
        y, z and what `linear.plan.backward` takes of its forward; or None where the kernels do not
        serve these operands.
    """
    bare, captured = of._replace(bias=None), torch.cuda.is_current_stream_capturing()
    found, addresses = linear.planned_forward(bare, False, None, captured)
    # no launch of its own writes y where the product has one that can: z is in registers there
    if type(found) is linear.Forward and found.single is None:
        return _in_the_product(found, of, addresses, m, norm)
    result = linear.forward(bare)
    if result is None:
        return None
    z, kept = result
    return rescale(z.view(-1, z.shape[-1]), m, norm, of.bias).view(z.shape), z, kept


def _in_the_product(
    found: linear.Forward, of: Operands, addresses: tuple[int, ...], m: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`forward` where the low-rank layer's product has a launch of its own: it stores z and y."""
    (x, weight, bias, *_), tiles = of, found.tiles
    y, z, kept = found.result.new(x), found.result.new(x), x.new_empty(found.size)
    pu, pq = found.thin(of, 1.0, kept, kept, addresses)
    tensors = (x, weight, y, z, kept, kept, kept if bias is None else bias, m, norm)

    def made(_: Any) -> Launch:
        return Launch(
            kernels.product,
            x.get_device(),
            tiles.grid,
            numbers=tiles.numbers("x", "y"),
            constants=dict(EARLY=tiles.early, BIAS=bias is not None, **tiles.constants),
            stages=tiles.tiling.stages,
            warps=tiles.tiling.warps,
            early=tiles.early,
            layouts=(*tiles.layouts, *tiles.layouts[2:]),  # y and z alike
        )

    launch, places = planned(_PLANS, tensors, ("product", bias is None, *tiles.kind), made)
    launch(tensors, (*places[:4], pq, pu, *places[6:]))  # the parts' addresses for those of `kept`
    return y, z, kept


@on_its_device
def lengths(weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """``‖W + scale·BA‖`` of each row, ``[out]`` in float32.

    Args:
        weight: ``[out, in]`` of 16 bits, any strides.
        a: ``[r, in]``; b: ``[out, r]``; any strides and types.
        scale: ``[]``.
    """
    norm = weight.new_empty(len(weight), dtype=float32)
    tensors = (weight, a, b, scale, norm)

    def made(_: Any) -> Launch:
        (N, K), RB = weight.shape, padded(len(a))
        # a tile of W is what is read: the more ranks share its memory, the fewer columns
        BN, BK = 32, {16: 256, 32: 128}.get(RB, 64)
        return Launch(
            kernels.lengths,
            weight.get_device(),
            -(-N // BN),
            numbers=dict(
                N=N,
                K=K,
                r=len(a),
                **along("stride_w", "nk", weight.stride()),
                **along("stride_a", "rk", a.stride()),
                **along("stride_b", "nr", b.stride()),
            ),
            constants=dict(BLOCK_R=RB, BLOCK_N=BN, BLOCK_K=BK),
            stages=3 if RB <= 64 else 2,  # fits the shared memory of every device
            warps=8,
        )

    launch, addresses = planned(_PLANS, tensors, ("lengths",), made)
    launch(tensors, addresses)
    return norm


@on_its_device
def rescale(z: Tensor, m: Tensor, norm: Tensor, bias: Optional[Tensor]) -> Tensor:
    """``z · m/‖·‖ + bias``, rounded once.

    Args:
        z: ``[rows, out]``, contiguous, of 16 bits.
        m: ``[out]``; norm: ``[out]`` in float32; bias: ``[out]``; contiguous.
    """
    y = z.new_empty(z.shape)
    tensors = (z, m, norm, norm if bias is None else bias, y)

    def made(_: Any) -> Launch:
        (M, N), BM, BN = z.shape, 16, 256
        return Launch(
            kernels.rescale,
            z.get_device(),
            -(-M // BM) * -(-N // BN),
            numbers=dict(M=M, N=N),
            constants=dict(BIAS=bias is not None, BLOCK_M=BM, BLOCK_N=BN),
            stages=1,
            warps=8,
        )

    launch, addresses = planned(_PLANS, tensors, ("rescale", bias is not None), made)
    launch(tensors, addresses)
    return y


@on_its_device
def rescale_backward(dy: Tensor, z: Tensor, m: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of z, and of m in float32.

    Args:
        dy: ``[rows, out]``; the others as of `rescale`.
    """
    dy = dy if dy.stride(1) == 1 else dy.contiguous()  # as of a sum, whose gradient is expanded
    (M, N), BM, BN = z.shape, 32, 128
    # whole blocks of rows for each program, and some programs for each processor
    groups = max(1, min(-(-M // BM), -(-4 * card(z.get_device()).processors // -(-N // BN))))
    each = -(-M // (groups * BM)) * BM
    groups = -(-M // each)
    dz, part = z.new_empty(z.shape), z.new_empty((groups, N), dtype=float32)
    tensors = (dy, z, m, norm, dz, part)

    def made(_: Any) -> Launch:
        return Launch(
            kernels.rescale_backward,
            z.get_device(),
            groups * -(-N // BN),
            numbers=dict(M=M, N=N, rows_per_group=each, stride_dym=dy.stride(0)),
            constants=dict(BLOCK_M=BM, BLOCK_N=BN),
            stages=2,
            warps=4,
        )

    launch, addresses = planned(_PLANS, tensors, ("backward",), made)
    launch(tensors, addresses)
    return dz, part[0] if groups == 1 else part.sum(0)
