"""DoRA's norms and rescaled outputs on CUDA, in the kernels; imported only there."""

from typing import Any, Optional

from torch import Tensor, float32

from paramlora.cuda.device import card
from paramlora.cuda.launch import Launch, on_its_device, planned
from paramlora.cuda.operands import padded
from paramlora.cuda.rescaled import kernels

_PLANS: dict[Any, Any] = {}


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
        (N, K), r = weight.shape, len(a)
        RB = padded(r)
        BN, BK = 32, {16: 256, 32: 128}.get(RB, 64)
        stages = 3 if RB <= 64 else 2  # fits the shared memory of every device
        numbers = (N, K, r, *weight.stride(), *a.stride(), *b.stride())
        device = weight.get_device()
        return Launch(kernels.lengths, device, -(-N // BN), numbers, (RB, BN, BK), stages, 8)

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
        grid, constants = -(-M // BM) * -(-N // BN), (bias is not None, BM, BN)
        return Launch(kernels.rescale, z.get_device(), grid, (M, N), constants, 1, 8)

    launch, addresses = planned(_PLANS, tensors, ("rescale", bias is not None), made)
    launch(tensors, addresses)
    return y


@on_its_device
def rescale_backward(dy: Tensor, z: Tensor, m: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of z, and of m in float32.

    Args:
        dy: ``[rows, out]``; the others as of `rescale`.
    """
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    (M, N), BM, BN = z.shape, 32, 128
    # whole blocks of rows for each program, and some programs for each processor
    groups = max(1, min(-(-M // BM), -(-8 * card(z.get_device()).processors // -(-N // BN))))
    each = -(-M // (groups * BM)) * BM
    groups = -(-M // each)
    dz, part = z.new_empty(z.shape), z.new_empty((groups, N), dtype=float32)
    tensors = (dy, z, m, norm, dz, part)

    def made(_: Any) -> Launch:
        grid, numbers = groups * -(-N // BN), (M, N, each, dy.stride(0))
        return Launch(kernels.rescale_backward, z.get_device(), grid, numbers, (BM, BN), 2, 4)

    launch, addresses = planned(_PLANS, tensors, ("backward",), made)
    launch(tensors, addresses)
    return dz, part[0] if groups == 1 else part.sum(0)
