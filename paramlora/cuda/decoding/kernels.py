"""Triton kernels for few rows, each with an update of its own: what takes the time is to read the
weight and the factors, each of them once.

`partial` divides one grid between tiles of ``x w`` and the thin products ``u = A_i x`` of single
rows, all over a part of what is summed. `finish` adds the parts in order, and ``s·B_i u`` in
float32, and rounds once; it has loaded its part of ``B_i`` before `partial` ends (programmatic
dependent launch). Nothing is copied for it: ``table[4, updates]`` holds the addresses of the
updates' A, Bᵀ's transpose B, scales and strengths. Each row is multiplied by its own update alone.

Sizes: ``M`` rows, ``P`` of which lie one behind the other and take one update; ``N`` columns, ``K``
summed, ``BLOCK_R`` a power of two that holds the ranks, ``RANK`` the rank where all have the same,
or 0.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _held(table, which, like):
    """The address of one update's tensor, which lies as `like` does in type and alignment."""
    return tl.multiple_of(tl.load(table + which).to(like.dtype), 16)


@triton.jit
def _rank(held, own, RANK: tl.constexpr):
    """The rank of an update."""
    if RANK:
        return RANK
    return tl.load(held + own)


@triton.jit
def _wide(
    x,
    w,
    part,
    pid_n,
    pid_k,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    k_per_split,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of ``x[M, K] w[N, K]ᵀ`` over one part of K."""
    offs_m, offs_n = tl.arange(0, BLOCK_M), pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    low = pid_k * k_per_split
    high = tl.minimum(K, low + k_per_split)
    tl.assume(low < high)  # else ptxas makes every tensor core instruction wait for the last
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    left = x + offs_m[:, None].to(tl.int64) * stride_xm + (low + offs_k)[None, :]
    # columns beyond the last are read again in place of a mask, and not stored
    right = w + (offs_n % N)[None, :].to(tl.int64) * stride_wn + (low + offs_k)[:, None]
    for k in range(low, high, BLOCK_K):
        if EVEN_K:
            row = tl.load(left, mask=offs_m[:, None] < M, other=0.0)
            acc = tl.dot(row, tl.load(right), acc)
        else:
            inside = offs_k < high - k
            row = tl.load(left, mask=(offs_m[:, None] < M) & inside[None, :], other=0.0)
            acc = tl.dot(row, tl.load(right, mask=inside[:, None], other=0.0), acc)
        left += BLOCK_K
        right += BLOCK_K
    where = part + (pid_k * M + offs_m)[:, None].to(tl.int64) * N + offs_n[None, :]
    tl.store(where, acc, mask=(offs_m[:, None] < M) & (offs_n[None, :] < N))


@triton.jit
def partial(
    x,
    w,
    part,
    thin,
    taken,
    held,
    table,
    factor,
    M,
    N,
    K,
    updates,
    P,
    stride_xm,
    stride_wn,
    k_per_split,
    SPLIT_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    EARLY: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``thin[SPLIT_K, M, BLOCK_R]`` of ``A_i x``, a program a part for each row, none of no update,
    and then ``part[SPLIT_K, M, N]`` of ``x w``, one for each tile."""
    if EARLY:
        gdc_launch_dependents()
    pid_k, row = tl.program_id(0) % SPLIT_K, tl.program_id(0) // SPLIT_K
    if row < M:  # first: a program of theirs ends long before a tile's, which takes its place
        own = tl.load(taken + row // P)
        if own < updates:
            a, r = _held(table, own, factor), _rank(held, own, RANK)
            offs_r, offs_k = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
            acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
            low = pid_k * k_per_split
            high = tl.minimum(K, low + k_per_split)
            for k in range(low, high, BLOCK_D):
                inside = k + offs_k < high
                where = x + tl.cast(row, tl.int64) * stride_xm + k + offs_k
                given = tl.load(where, mask=inside, other=0.0)
                where = a + offs_r[:, None] * K + (k + offs_k)[None, :]
                down = tl.load(where, mask=(offs_r[:, None] < r) & inside[None, :], other=0.0)
                # no `tl.dot`, which takes 16 rows of one update where there is one
                acc += down.to(tl.float32) * given.to(tl.float32)[None, :]
            tl.store(thin + (pid_k * M + row) * BLOCK_R + offs_r, tl.sum(acc, 1))
    else:
        tile = row - M
        _wide(
            x=x,
            w=w,
            part=part,
            pid_n=tile,
            pid_k=pid_k,
            M=M,
            N=N,
            K=K,
            stride_xm=stride_xm,
            stride_wn=stride_wn,
            k_per_split=k_per_split,
            EVEN_K=EVEN_K,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
        )


@triton.jit
def finish(
    part,
    thin,
    y,
    bias,
    taken,
    held,
    table,
    factor,
    scale,
    gain,
    M,
    N,
    updates,
    P,
    BIAS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EARLY: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Some columns of a row of ``y[M, N] = Σ part + s_i B_i Σ thin + bias``."""
    columns = tl.cdiv(N, BLOCK_N)
    row = tl.program_id(0) // columns
    offs_n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    own = tl.load(taken + row // P)
    mine = own < updates
    own = tl.minimum(own, updates - 1)  # a row of no update has another's addresses, all masked
    b, r = _held(table, updates + own, factor), _rank(held, own, RANK)
    where = b + offs_n[:, None] * r + offs_r[None, :]
    up = tl.load(where, mask=(offs_n[:, None] < N) & (offs_r[None, :] < r) & mine, other=0.0)
    # zeros too, as the other's, times the zeros of B and u, might be no numbers
    where = tl.load(table + 2 * updates + own).to(scale.dtype)
    s = tl.load(where, mask=mine, other=0.0).to(tl.float32)
    where = tl.load(table + 3 * updates + own).to(gain.dtype)
    s *= tl.load(where, mask=mine, other=0.0).to(tl.float32)
    if EARLY:  # all above is no work of `partial`, which has not ended yet
        gdc_wait()
    u = tl.zeros((BLOCK_R,), tl.float32)
    for split in tl.static_range(SPLIT_K):
        there = (offs_r < r) & mine
        u += tl.load(thin + (split * M + row) * BLOCK_R + offs_r, mask=there, other=0.0)
    acc = tl.sum(up.to(tl.float32) * (s * u)[None, :], 1)
    for split in tl.static_range(SPLIT_K):
        where = part + tl.cast(split * M + row, tl.int64) * N + offs_n
        acc += tl.load(where, mask=offs_n < N, other=0.0)
    if BIAS:
        acc += tl.load(bias + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
    where = y + tl.cast(row, tl.int64) * N + offs_n
    tl.store(where, acc.to(y.dtype.element_ty), mask=offs_n < N)
