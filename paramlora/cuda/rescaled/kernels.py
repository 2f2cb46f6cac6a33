"""Triton kernels for DoRA beside a linear layer: what plain LoRA's kernels do not compute.

`lengths` computes ``‖W + scale·BA‖`` of each output, `rescale` ``y = z · m/‖·‖ + bias`` of the
low-rank layer's output ``z``, and `rescale_backward` both gradients of that in one pass. Sizes:
``M`` rows, ``N`` outputs, ``K`` inputs, ``r`` the rank, ``RB`` a power of two that holds it.
"""

import triton
import triton.language as tl


@triton.jit
def lengths(
    w, a, b, scale, norm, N, K, r, w_n, w_k, a_r, a_k, b_n, b_r,
    RB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``norm[N]`` of some rows of ``W + scale·BA``, of which one tile at a time is in registers:
    it is read once, and nothing cancels as in the sum of three terms."""
    rn, rr = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, RB)
    rows, ranks = rn < N, rr < r
    factor = b + rn[:, None].to(tl.int64) * b_n + rr[None, :].to(tl.int64) * b_r
    up = tl.load(factor, mask=rows[:, None] & ranks[None, :], other=0.0).to(tl.float32)
    up *= tl.load(scale).to(tl.float32)
    total = tl.zeros((BN, BK), tl.float32)  # summed at the end: no step waits for another thread
    for k in range(0, K, BK):
        rk = k + tl.arange(0, BK)
        where = a + rr[:, None].to(tl.int64) * a_r + rk[None, :].to(tl.int64) * a_k
        down = tl.load(where, mask=ranks[:, None] & (rk < K)[None, :], other=0.0).to(tl.float32)
        where = w + rn[:, None].to(tl.int64) * w_n + rk[None, :].to(tl.int64) * w_k
        tile = tl.load(where, mask=rows[:, None] & (rk < K)[None, :], other=0.0).to(tl.float32)
        tile = tl.dot(up, down, tile)
        total += tile * tile
    tl.store(norm + rn, tl.sqrt(tl.sum(total, 1)), mask=rows)


@triton.jit
def _factor(m, norm, rn, N):
    """``m / ‖·‖``, 0 where both are, and what a gradient of m is divided by."""
    length = tl.load(norm + rn, mask=rn < N, other=1.0)
    length = tl.where(length == 0.0, 1.0, length)
    return tl.load(m + rn, mask=rn < N, other=0.0).to(tl.float32) / length, length


@triton.jit
def rescale(
    z, m, norm, bias, y, M, N, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile of ``y[M, N] = z · m/‖·‖ + bias``, rounded once."""
    columns = tl.cdiv(N, BN)
    rm = tl.program_id(0) // columns * BM + tl.arange(0, BM)
    rn = tl.program_id(0) % columns * BN + tl.arange(0, BN)
    factor, _ = _factor(m, norm, rn, N)
    where = rm[:, None].to(tl.int64) * N + rn[None, :]
    inside = (rm < M)[:, None] & (rn < N)[None, :]
    tile = tl.load(z + where, mask=inside, other=0.0).to(tl.float32) * factor[None, :]
    if BIAS:
        tile += tl.load(bias + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y + where, tile.to(y.dtype.element_ty), mask=inside)


@triton.jit
def rescale_backward(
    dy, z, m, norm, dz, part, M, N, each, dy_row,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``dz = dy · m/‖·‖`` and, of each of the parts of the rows, ``Σ dy · z / ‖·‖``."""
    columns = tl.cdiv(N, BN)
    group = tl.program_id(0) // columns
    rn = tl.program_id(0) % columns * BN + tl.arange(0, BN)
    factor, length = _factor(m, norm, rn, N)
    total = tl.zeros((BM, BN), tl.float32)  # summed at the end: no step waits for another thread
    for first in range(group * each, tl.minimum(M, group * each + each), BM):
        rm = first + tl.arange(0, BM)
        inside = (rm < M)[:, None] & (rn < N)[None, :]
        where = dy + rm[:, None].to(tl.int64) * dy_row + rn[None, :]
        gradient = tl.load(where, mask=inside, other=0.0).to(tl.float32)
        where = rm[:, None].to(tl.int64) * N + rn[None, :]
        output = tl.load(z + where, mask=inside, other=0.0).to(tl.float32)
        total += gradient * output
        gradient *= factor[None, :]
        tl.store(dz + where, gradient.to(dz.dtype.element_ty), mask=inside)
    where = part + tl.cast(group, tl.int64) * N + rn
    tl.store(where, tl.sum(total, 0) / length, mask=rn < N)
