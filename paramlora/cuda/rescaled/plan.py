"""DoRA's norms and rescaled outputs on CUDA, in the kernels; imported only there."""

from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, float32

from paramlora.cuda.device import card
from paramlora.cuda.launch import Launch, along, on_its_device, planned
from paramlora.cuda.linear import plan as linear
from paramlora.cuda.operands import Operands, Rescale, padded
from paramlora.cuda.rescaled import kernels

_PLANS: dict[Any, Any] = {}


@on_its_device
def forward(of: Operands, by: Rescale) -> Optional[tuple[Optional[Tensor], ...]]:
    """``y = z · m/‖·‖ + bias`` of ``z = x (W + scale · B A)ᵀ``, rounded once.

    Args:
        of: as of `linear.plan.forward`, with a contiguous bias or none.
        by: what z is multiplied by.

    Returns:
        y, what `linear.plan.backward` takes of its forward, and z, or None where it is not kept; or
        None where the kernels do not serve these operands.
    """
    captured = torch.cuda.is_current_stream_capturing()
    if rescales_inside(linear.planned_forward(of, False, None, captured, by)[0]):
        return linear.forward(of, rescale=by)  # type: ignore[no-any-return]
    z, kept = linear.forward(of._replace(bias=None))  # served as the plan of both is
    y = rescale(z.view(-1, z.shape[-1]), by.m, by.norm, of.bias).view(z.shape)
    return y, kept, z if by.keeps else None


def rescales_inside(found: Any) -> bool:
    """Whether the low-rank layer's own launch is to rescale what it sums, of a plan of both, not a
    launch behind it.

    By pointers a tile that is stored twice has its places in registers meanwhile, which leaves half
    as many programs to each processor: 32 microseconds for 24 in two launches (16384 × 320 to 320
    on an H200), where by the tensor memory engine it is 109 for 122 (of 1280).
    """
    return type(found) is not linear.Forward or found.single is None or found.tiles.tiling.tma


@on_its_device
def lengths(weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """``‖W + scale·BA‖`` of each row, ``[out]`` in float32.

    Args:
        weight: ``[out, in]`` of 16 bits, any strides.
        a: ``[r, in]``; b: ``[out, r]``; any strides and types.
        scale: ``[]``.
    """
    norm = weight.new_empty(len(weight), dtype=float32)
    launch, addresses = planned_lengths(weight, a, b, scale, norm)
    launch((weight, a, b, scale, norm), addresses)
    return norm


def planned_lengths(
    weight: Tensor, a: Tensor, b: Tensor, scale: Tensor, norm: Tensor
) -> tuple[Launch, tuple[int, ...]]:
    """The launch of `lengths`, which writes into `norm`, and all addresses."""

    def made(_: Any) -> Launch:
        (N, K), RB = weight.shape, padded(len(a))
        on = card(weight.get_device())
        # of few rows each program takes fewer, so that more of them run
        BN = 16 if -(-N // 16) <= on.processors else 32
        # a tile of W is what is read: the more ranks share its memory, the fewer columns
        BK = {16: 256, 32: 128}.get(RB, 128 if on.hopper else 64)
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
            stages=3 if RB <= 64 or on.hopper else 2,  # fits the shared memory of every device
            warps=8,
        )

    return planned(_PLANS, (weight, a, b, scale, norm), ("lengths",), made)


@on_its_device
def rescale(z: Tensor, m: Tensor, norm: Tensor, bias: Optional[Tensor]) -> Tensor:
    """``z · m/‖·‖ + bias``, rounded once.

    Args:
        z: ``[rows, out]``, contiguous, of 16 bits.
        m: ``[out]``; norm: ``[out]`` in float32; bias: ``[out]``; contiguous.
    """
    y, more = z.new_empty(z.shape), norm if bias is None else bias
    launch, addresses = planned_rescale(z, m, norm, bias)
    launch((z, m, norm, more, y), (*addresses, y.data_ptr()))
    return y


def planned_rescale(
    z: Tensor, m: Tensor, norm: Tensor, bias: Optional[Tensor]
) -> tuple[Launch, tuple[int, ...]]:
    """The launch of `rescale`, and all addresses but the result's."""

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

    # without a bias the kernel still wants some address, and reads nothing there
    tensors = (z, m, norm, norm if bias is None else bias)
    return planned(_PLANS, tensors, ("rescale", bias is not None), made)


@on_its_device
def rescale_backward(dy: Tensor, z: Tensor, m: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of z, and of m in float32.

    Args:
        dy: ``[rows, out]``; the others as of `rescale`.
    """
    dy = dy if dy.stride(1) == 1 else dy.contiguous()  # as of a sum, whose gradient is expanded
    found, addresses = planned_backward(dy, z, m, norm)
    dz, parts = z.new_empty(z.shape), z.new_empty((found.groups, len(m)), dtype=float32)
    places = (*addresses, dz.data_ptr(), parts.data_ptr())
    found.launch((dy, z, m, norm, dz, parts), places)
    return dz, parts[0] if found.groups == 1 else parts.sum(0)


class _Backward(NamedTuple):
    """The plan of `rescale_backward`, whose programs sum groups of rows apart."""

    launch: Launch
    groups: int


def planned_backward(
    dy: Tensor, z: Tensor, m: Tensor, norm: Tensor
) -> tuple[_Backward, tuple[int, ...]]:
    """The plan of `rescale_backward` of a dy with contiguous rows, and the addresses."""

    def made(_: Any) -> _Backward:
        (M, N), BM, BN = z.shape, 32, 128
        # whole blocks of rows for each program, and some programs for each processor
        groups = max(1, min(-(-M // BM), -(-4 * card(z.get_device()).processors // -(-N // BN))))
        each = -(-M // (groups * BM)) * BM
        groups = -(-M // each)
        launch = Launch(
            kernels.rescale_backward,
            z.get_device(),
            groups * -(-N // BN),
            numbers=dict(M=M, N=N, rows_per_group=each, stride_dym=dy.stride(0)),
            constants=dict(BLOCK_M=BM, BLOCK_N=BN),
            stages=2,
            warps=4,
        )
        return _Backward(launch, groups)

    return planned(_PLANS, (dy, z, m, norm), ("backward",), made)
