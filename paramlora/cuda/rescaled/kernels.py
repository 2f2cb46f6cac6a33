"""Triton kernels for DoRA beside a linear layer: what plain LoRA's kernels do not compute.

`lengths` computes ``‖W + scale·BA‖`` of each output, `rescale` ``y = z · m/‖·‖ + bias`` of an
output ``z`` that is there already, and `rescale_backward` both gradients of it in one pass. Sizes:
``M`` rows, ``N`` outputs, ``K`` inputs, ``r`` the rank, ``BLOCK_R`` a power of two that holds it.
"""

import triton
import triton.language as tl

from paramlora.cuda.linear.kernels import _factor


@triton.jit
def lengths(
    w,
    a,
    b,
    scale,
    norm,
    N,
    K,
    r,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``norm[N]`` of some rows of ``W + scale·BA``, of which one tile at a time is in registers:
    it is read once, and nothing cancels as in the sum of three terms."""
    offs_n, offs_r = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    rows, ranks = offs_n < N, offs_r < r
    factor = b + offs_n[:, None].to(tl.int64) * stride_bn + offs_r[None, :].to(tl.int64) * stride_br
    # B stays in registers while all of A passes by
    up = tl.load(factor, mask=rows[:, None] & ranks[None, :], other=0.0).to(tl.float32)
    up *= tl.load(scale).to(tl.float32)
    # summed at the end: no step waits for another thread
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    inside = tl.arange(0, BLOCK_K)
    of_w = w + offs_n[:, None].to(tl.int64) * stride_wn + inside[None, :].to(tl.int64) * stride_wk
    ahead = tl.load(of_w, mask=rows[:, None] & (inside < K)[None, :], other=0.0)
    for k in range(0, K, BLOCK_K):
        offs_k = k + inside
        where = a + offs_r[:, None].to(tl.int64) * stride_ar
        where += offs_k[None, :].to(tl.int64) * stride_ak
        down = tl.load(where, mask=ranks[:, None] & (offs_k < K)[None, :], other=0.0).to(tl.float32)
        # one step ahead: Triton loads early what a product multiplies, but not what it adds to
        tile, of_w = ahead.to(tl.float32), of_w + tl.cast(BLOCK_K, tl.int64) * stride_wk
        ahead = tl.load(of_w, mask=rows[:, None] & (offs_k + BLOCK_K < K)[None, :], other=0.0)
        # TF32 rounds the update alone, to a share of 5e-4 of it: W is what is added to
        tile = tl.dot(up, down, tile)
        total += tile * tile
    tl.store(norm + offs_n, tl.sqrt(tl.sum(total, 1)), mask=rows)


@triton.jit
def rescale(
    z,
    m,
    norm,
    bias,
    y,
    M,
    N,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of ``y[M, N] = z · m/‖·‖ + bias``, rounded once."""
    columns = tl.cdiv(N, BLOCK_N)
    offs_m = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    times, _ = _factor(m, norm, offs_n, N)
    where = offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
    inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tile = tl.load(z + where, mask=inside, other=0.0).to(tl.float32) * times[None, :]
    if BIAS:
        tile += tl.load(bias + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y + where, tile.to(y.dtype.element_ty), mask=inside)


@triton.jit
def rescale_backward(
    dy,
    z,
    m,
    norm,
    dz,
    part,
    M,
    N,
    rows_per_group,
    stride_dym,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``dz = dy · m/‖·‖`` and, of each of the parts of the rows, ``Σ dy · z / ‖·‖``."""
    columns = tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // columns
    offs_n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    times, length = _factor(m, norm, offs_n, N)
    # summed at the end: no step waits for another thread
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    low, high = group * rows_per_group, tl.minimum(M, group * rows_per_group + rows_per_group)
    for first in range(low, high, BLOCK_M):
        offs_m = first + tl.arange(0, BLOCK_M)
        inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        where = dy + offs_m[:, None].to(tl.int64) * stride_dym + offs_n[None, :]
        gradient = tl.load(where, mask=inside, other=0.0).to(tl.float32)
        where = offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
        output = tl.load(z + where, mask=inside, other=0.0).to(tl.float32)
        total += gradient * output
        gradient *= times[None, :]
        tl.store(dz + where, gradient.to(dz.dtype.element_ty), mask=inside)
    # by the length once a column, not once a number; no atomics, which would add in any order
    where = part + tl.cast(group, tl.int64) * N + offs_n
    tl.store(where, tl.sum(total, 0) / length, mask=offs_n < N)
