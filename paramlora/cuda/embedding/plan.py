"""Look-ups in a bfloat16 table with a low-rank update on CUDA, in the kernels; imported only
there."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from paramlora.cuda.embedding import kernels
from paramlora.cuda.launch import Launch, along, on_its_device, planned
from paramlora.cuda.operands import padded

_PLANS: dict[Any, Any] = {}


@on_its_device
def add(y: Tensor, ids: Tensor, a: Tensor, b: Tensor, scale: Tensor, strength: float) -> Tensor:
    """Add ``strength · scale · (B A)ᵀ[ids]`` to rows of a table, rounded once.

    Args:
        y: ``[M, dim]``, contiguous, of 16 bits; the rows, which it is added to.
        ids: ``[M]``, contiguous; which rows they are.
        a: ``[r, num]``; b: ``[dim, r]``; any strides and types.
        scale: ``[]``.

    Returns:
        A's columns ``[M, R]`` of these rows, R the padded rank, of y's type.
    """
    u = y.new_empty((len(ids), padded(len(a))))

    def made(_: Any) -> Launch:
        (M, N), (r, num), BM, BN = y.shape, a.shape, 64, _width(padded(len(a)))
        return Launch(
            kernels.add,
            y.get_device(),
            -(-M // BM) * -(-N // BN),
            numbers=dict(M=M, N=N, num=num, r=r, **_of_a(a), **_of_b(b)),
            constants=dict(R=padded(r), BLOCK_M=BM, BLOCK_N=BN),
            stages=1,
            warps=4,
        )

    launch, places = planned(_PLANS, (y, ids, a, b, scale), ("add",), made)
    launch((y, ids, a, b, scale, u), (*places, u.data_ptr()), (float(strength),))
    return u


class _Gradient(NamedTuple):
    """The plan of `gradient`."""

    project: Launch
    scatter: Launch
    collect: Launch


@on_its_device
def gradient(
    dy: Tensor, ids: Tensor, a: Tensor, b: Tensor, scale: Tensor, strength: float
) -> Tensor:
    """The gradient of A, ``strength · scale · (dy B)ᵀ`` added up by indices, of A's type; the same
    to the bit each time, but where one of the numbers is not finite.

    Args:
        dy: ``[M, dim]``, of 16 bits, with contiguous rows.
        ids, a, b, scale, strength: as of `add`.
    """
    num, R, M = a.shape[1], padded(len(a)), len(ids)
    v = dy.new_empty((M, R), dtype=torch.float32)
    # the sums, and behind them the bits of the peak
    sums, da = dy.new_zeros(num * R + 1, dtype=torch.int64), torch.empty_like(a)
    plan, (py, pids, _, pb, ps) = planned(
        _PLANS, (dy, ids, a, b, scale), ("gradient",), lambda _: _plan(dy, a, da, b)
    )
    pv, psums = v.data_ptr(), sums.data_ptr()
    peak = psums + 8 * num * R
    plan.project((dy, b, scale, v, sums), (py, pb, ps, pv, peak), (float(strength),))
    plan.scatter((v, ids, sums, sums), (pv, pids, peak, psums))
    plan.collect((sums, sums, da), (psums, peak, da.data_ptr()))
    return da


def _plan(dy: Tensor, a: Tensor, da: Tensor, b: Tensor) -> _Gradient:
    (M, N), (r, num), R, device = dy.shape, a.shape, padded(len(a)), dy.get_device()
    BM, BN, lines = 32, _width(R), 2048 // R
    bits = (M - 1).bit_length()
    project = Launch(
        kernels.project,
        device,
        -(-M // BM),
        numbers=dict(M=M, N=N, r=r, stride_dym=dy.stride(0), **_of_b(b)),
        constants=dict(R=R, BLOCK_M=BM, BLOCK_N=BN),
        stages=2,
        warps=4,
    )
    scatter = Launch(
        kernels.scatter,
        device,
        -(-M // lines),
        numbers=dict(M=M, num=num, bits=bits),
        constants=dict(R=R, BLOCK_M=lines),
        stages=1,
        warps=4,
    )
    collect = Launch(
        kernels.collect,
        device,
        -(-num // lines),
        numbers=dict(num=num, r=r, bits=bits, **_of_a(da)),
        constants=dict(R=R, BLOCK=lines),
        stages=1,
        warps=4,
    )
    return _Gradient(project, scatter, collect)


def _width(R: int) -> int:
    """Numbers of a row that a program takes at a time, so that B's of them fit every device."""
    return 128 if R <= 64 else 64


def _of_a(a: Tensor) -> dict[str, int]:
    return along("stride_a", "rn", a.stride())


def _of_b(b: Tensor) -> dict[str, int]:
    return along("stride_b", "nr", b.stride())
