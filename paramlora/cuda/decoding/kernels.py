"""Triton kernels for few rows, each with an update of its own: what takes the time is to read the
weight and the factors, each of them once.

`partial` divides one grid between tiles of ``x w`` and the thin products ``u = A_i x`` of single
rows, all over a part of what is summed. `finish` adds the parts in order, and ``s·B_i u`` in
float32, and rounds once; it has loaded its part of ``B_i`` before `partial` ends (programmatic
dependent launch). Nothing is copied for it: ``table[4, updates]`` holds the addresses of the
updates' A, Bᵀ's transpose B, scales and strengths. Each row is multiplied by its own update alone.

Sizes: ``M`` rows, ``P`` of which lie one behind the other and take one update; ``N`` columns, ``K``
summed, ``RB`` a power of two that holds the ranks, ``RANK`` the rank where all have the same, or 0.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _held(table, which, like):
    """The address of one update's tensor, which lies as `like` does in type and alignment."""
    return tl.multiple_of(tl.load(table + which).to(like.dtype), 16)


@triton.jit
def _rank(starts, own, RANK: tl.constexpr):
    """The rank of an update."""
    if RANK:
        return RANK
    return tl.load(starts + own + 1) - tl.load(starts + own)


@triton.jit
def _wide(
    x, w, part, tile, split, M, N, K, x_row, w_row, each,
    WHOLE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of ``x[M, K] w[N, K]ᵀ`` over one part of K."""
    rm, rn, rk = tl.arange(0, BM), tile * BN + tl.arange(0, BN), tl.arange(0, BK)
    low = split * each
    high = tl.minimum(K, low + each)
    tl.assume(low < high)
    acc = tl.zeros((BM, BN), tl.float32)
    left = x + rm[:, None].to(tl.int64) * x_row + (low + rk)[None, :]
    right = w + (rn % N)[None, :].to(tl.int64) * w_row + (low + rk)[:, None]
    for k in range(low, high, BK):
        if WHOLE:
            row = tl.load(left, mask=rm[:, None] < M, other=0.0)
            acc = tl.dot(row, tl.load(right), acc)
        else:
            inside = rk < high - k
            row = tl.load(left, mask=(rm[:, None] < M) & inside[None, :], other=0.0)
            acc = tl.dot(row, tl.load(right, mask=inside[:, None], other=0.0), acc)
        left += BK
        right += BK
    where = part + (split * M + rm)[:, None].to(tl.int64) * N + rn[None, :]
    tl.store(where, acc, mask=(rm[:, None] < M) & (rn[None, :] < N))


@triton.jit
def partial(
    x, w, part, thin, taken, starts, table, factor, M, N, K, updates, P, x_row, w_row, each,
    SPLITS: tl.constexpr, WHOLE: tl.constexpr, EARLY: tl.constexpr, RANK: tl.constexpr,
    RB: tl.constexpr, DEEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``thin[SPLITS, M, RB]`` of ``A_i x``, a program a part for each row, none of no update, and
    then ``part[SPLITS, M, N]`` of ``x w``, one for each tile."""
    if EARLY:
        gdc_launch_dependents()
    split, row = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS
    if row < M:  # first: a program of theirs ends long before a tile's, which takes its place
        own = tl.load(taken + row // P)
        if own < updates:
            a, r = _held(table, own, factor), _rank(starts, own, RANK)
            rr, rk = tl.arange(0, RB), tl.arange(0, DEEP)
            acc = tl.zeros((RB, DEEP), tl.float32)
            low = split * each
            high = tl.minimum(K, low + each)
            for k in range(low, high, DEEP):
                inside = k + rk < high
                given = tl.load(x + tl.cast(row, tl.int64) * x_row + k + rk, mask=inside, other=0.0)
                where = a + rr[:, None] * K + (k + rk)[None, :]
                down = tl.load(where, mask=(rr[:, None] < r) & inside[None, :], other=0.0)
                acc += down.to(tl.float32) * given.to(tl.float32)[None, :]
            tl.store(thin + (split * M + row) * RB + rr, tl.sum(acc, 1))
    else:
        tile = row - M
        _wide(
            x, w, part, tile, split, M, N, K, x_row, w_row, each, WHOLE, BM, BN, BK,
        )  # fmt: skip


@triton.jit
def finish(
    part, thin, y, bias, taken, starts, table, factor, scale, gain, M, N, updates, P,
    BIAS: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr, RANK: tl.constexpr,
    RB: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Some columns of a row of ``y[M, N] = Σ part + s_i B_i Σ thin + bias``."""
    columns = tl.cdiv(N, BN)
    row = tl.program_id(0) // columns
    rn, rr = tl.program_id(0) % columns * BN + tl.arange(0, BN), tl.arange(0, RB)
    own = tl.load(taken + row // P)
    mine = own < updates
    own = tl.minimum(own, updates - 1)
    b, r = _held(table, updates + own, factor), _rank(starts, own, RANK)
    where = b + rn[:, None] * r + rr[None, :]
    up = tl.load(where, mask=(rn[:, None] < N) & (rr[None, :] < r) & mine, other=0.0)
    s = tl.load(tl.load(table + 2 * updates + own).to(scale.dtype)).to(tl.float32)
    s *= tl.load(tl.load(table + 3 * updates + own).to(gain.dtype)).to(tl.float32)
    if EARLY:
        gdc_wait()
    u = tl.zeros((RB,), tl.float32)
    for split in tl.static_range(SPLITS):
        u += tl.load(thin + (split * M + row) * RB + rr, mask=(rr < r) & mine, other=0.0)
    acc = tl.sum(up.to(tl.float32) * (s * u)[None, :], 1)
    for split in tl.static_range(SPLITS):
        where = part + tl.cast(split * M + row, tl.int64) * N + rn
        acc += tl.load(where, mask=rn < N, other=0.0)
    if BIAS:
        acc += tl.load(bias + rn, mask=rn < N, other=0.0).to(tl.float32)
    where = y + tl.cast(row, tl.int64) * N + rn
    tl.store(where, acc.to(y.dtype.element_ty), mask=rn < N)
