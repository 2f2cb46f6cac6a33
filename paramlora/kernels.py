"""Triton kernels for 16-bit CUDA: both products in one float32 accumulator, rounded once.

A frozen product that is rounded before the low-rank one is added loses about half of an update of
relative size 1e-3. cuBLAS rounds in between even in ``addmm`` (measured on an H200), so the large
product is computed here, in the accumulator that also takes the low-rank one. Partial sums are
added in a fixed order: every result is deterministic.

Sizes are named as in a matrix product, ``M`` rows (tokens), ``N`` columns, ``K`` summed, and ``R``
is the padded rank. `paramlora.launch` chooses the tiles.
"""

import triton
import triton.language as tl


@triton.jit
def _place(tile, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of a tile, in groups of rows that share the weight's columns in L2."""
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = tile // (GROUP * columns) * GROUP
    height = min(rows - first, GROUP)
    inside = tile % (GROUP * columns)
    return first + inside % height, inside // height


@triton.jit
def _low_rank(acc, p, q, rm, rn, M, N, R: tl.constexpr, STEP: tl.constexpr):
    """``acc + p @ q`` for one tile, from ``p[M, R]`` and ``q[R, N]`` in memory."""
    for start in tl.static_range(0, R, STEP):
        rr = start + tl.arange(0, STEP)
        left = tl.load(p + rm[:, None] * R + rr[None, :], mask=rm[:, None] < M, other=0.0)
        right = tl.load(q + rr[:, None] * N + rn[None, :], mask=rn[None, :] < N, other=0.0)
        acc = tl.dot(left, right, acc)
    return acc


@triton.jit
def _low_rank_of_sum(acc, total, p, q, rm, rn, first, M, N, R: tl.constexpr):
    """``acc + total @ q``; the first column of tiles also stores the rounded `total` in p."""
    rr = tl.arange(0, R)
    left = total.to(p.dtype.element_ty)
    if first:
        tl.store(p + rm[:, None] * R + rr[None, :], left, mask=rm[:, None] < M)
    right = tl.load(q + rr[:, None] * N + rn[None, :], mask=rn[None, :] < N, other=0.0)
    return tl.dot(left, right, acc)


@triton.jit
def matmul_tma(
    x, w, f, y, p, q, bias, M, N, K,
    FUSED: tl.constexpr, BIAS: tl.constexpr, ROWS_OUT: tl.constexpr, R: tl.constexpr,
    STEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``y = x @ w + p @ q + bias``; loads by the tensor memory engine, see `launch.matmul`."""
    row, column = _place(tl.program_id(0), M, N, BM, BN, GROUP)
    rm, rn = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    total = tl.zeros((BM, R), tl.float32)
    if not FUSED:
        acc = _low_rank(acc, p, q, rm, rn, M, N, R, STEP)
    for k in range(0, K, BK):
        left = x.load([row * BM, k])
        if ROWS_OUT:
            acc = tl.dot(left, w.load([column * BN, k]).T, acc)
        else:
            acc = tl.dot(left, w.load([k, column * BN]), acc)
        if FUSED:
            total = tl.dot(left, f.load([0, k]).T, total)
    if FUSED:
        acc = _low_rank_of_sum(acc, total, p, q, rm, rn, column == 0, M, N, R)
    if BIAS:
        acc += tl.load(bias + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    halves = tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1))
    lower, upper = tl.split(halves)  # one store of half the width leaves room for a third stage
    y.store([row * BM, column * BN], lower.to(y.dtype))
    y.store([row * BM, column * BN + BN // 2], upper.to(y.dtype))


@triton.jit
def matmul(
    x, w, f, y, p, q, bias, M, N, K, x_row, w_k, w_n,
    FUSED: tl.constexpr, BIAS: tl.constexpr, WHOLE_K: tl.constexpr, R: tl.constexpr,
    STEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The same with pointers: any strides and sizes, and a cheaper launch."""
    row, column = _place(tl.program_id(0), M, N, BM, BN, GROUP)
    rm, rn, rk = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    total = tl.zeros((BM, R), tl.float32)
    if not FUSED:
        acc = _low_rank(acc, p, q, rm, rn, M, N, R, STEP)
    left = x + (rm % M)[:, None].to(tl.int64) * x_row + rk[None, :]
    right = w + rk[:, None].to(tl.int64) * w_k + (rn % N)[None, :].to(tl.int64) * w_n
    thin = f + tl.arange(0, R)[None, :] * K + rk[:, None]
    for k in range(0, K, BK):
        if WHOLE_K:
            tile = tl.load(left)
            acc = tl.dot(tile, tl.load(right), acc)
            if FUSED:
                total = tl.dot(tile, tl.load(thin), total)
        else:
            inside = rk < K - k
            tile = tl.load(left, mask=inside[None, :], other=0.0)
            acc = tl.dot(tile, tl.load(right, mask=inside[:, None], other=0.0), acc)
            if FUSED:
                total = tl.dot(tile, tl.load(thin, mask=inside[:, None], other=0.0), total)
        left += BK
        right += BK * w_k
        thin += BK
    if FUSED:
        acc = _low_rank_of_sum(acc, total, p, q, rm, rn, column == 0, M, N, R)
    if BIAS:
        acc += tl.load(bias + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    out = y + rm[:, None].to(tl.int64) * N + rn[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), mask=(rm[:, None] < M) & (rn[None, :] < N))


@triton.jit
def pack(
    a, b, scale, a_out, b_out, strength, fan_in, out, r, a_rank, a_in, b_dim, b_rank,
    R: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The factors cast once, rank first and padded with zeros; the scale goes into B's."""
    block, rr, rd = tl.program_id(0), tl.arange(0, R), tl.arange(0, BD)
    blocks = tl.cdiv(fan_in, BD)
    if block < blocks:
        rd += block * BD
        valid = (rr[:, None] < r) & (rd[None, :] < fan_in)
        value = tl.load(a + rr[:, None] * a_rank + rd[None, :] * a_in, mask=valid, other=0.0)
        where = a_out + rr[:, None] * fan_in + rd[None, :]
        tl.store(where, value.to(a_out.dtype.element_ty), mask=rd[None, :] < fan_in)
    else:
        rd += (block - blocks) * BD
        valid = (rr[:, None] < r) & (rd[None, :] < out)
        value = tl.load(b + rr[:, None] * b_rank + rd[None, :] * b_dim, mask=valid, other=0.0)
        value = value.to(tl.float32) * (strength * tl.load(scale).to(tl.float32))
        where = b_out + rr[:, None] * out + rd[None, :]
        tl.store(where, value.to(b_out.dtype.element_ty), mask=rd[None, :] < out)


@triton.jit
def project(
    x, f, p, M, K, x_row,
    WHOLE_K: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``p[M, R] = x[M, K] @ f[R, K].T``: one read of x."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rk, rr = tl.arange(0, BK), tl.arange(0, R)
    acc = tl.zeros((BM, R), tl.float32)
    left = x + rm[:, None].to(tl.int64) * x_row + rk[None, :]
    thin = f + rr[None, :] * K + rk[:, None]
    for k in range(0, K, BK):
        if WHOLE_K:
            tile = tl.load(left, mask=rm[:, None] < M, other=0.0)
            acc = tl.dot(tile, tl.load(thin), acc)
        else:
            inside = rk < K - k
            tile = tl.load(left, mask=(rm[:, None] < M) & inside[None, :], other=0.0)
            acc = tl.dot(tile, tl.load(thin, mask=inside[:, None], other=0.0), acc)
        left += BK
        thin += BK
    tl.store(p + rm[:, None] * R + rr[None, :], acc.to(p.dtype.element_ty), mask=rm[:, None] < M)


@triton.jit
def _gradients(
    acc, rd, valid, da, db, scale, strength, fan_in, r, SCALED: tl.constexpr, R: tl.constexpr
):
    """Stores rows `rd` of ``[da.T; db]``: ``da[r, fan_in]``, and ``db[out, r]`` times the scale."""
    rr = tl.arange(0, R)
    ranks, inner = rr[None, :] < r, rd[:, None] < fan_in
    where = da + rr[None, :].to(tl.int64) * fan_in + rd[:, None]
    tl.store(where, acc, mask=ranks & inner & valid[:, None])
    if SCALED:
        acc *= strength * tl.load(scale).to(tl.float32)
    where = db + (rd[:, None] - fan_in).to(tl.int64) * r + rr[None, :]
    tl.store(where, acc, mask=ranks & (rd[:, None] >= fan_in) & valid[:, None])


@triton.jit
def outer(
    x, v, dy, u, part, da, db, scale, strength, M, fan_in, out, r, x_row, dy_row, rows,
    WHOLE: tl.constexpr, SCALED: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``x.T @ v`` and ``dy.T @ u`` over groups of rows: ``part[group, fan_in + out, R]``, or where
    one group is the whole, the gradients themselves as in `reduce`."""
    block, group = tl.program_id(0), tl.program_id(1)
    blocks = tl.cdiv(fan_in, BD)
    inner = block < blocks
    # a select, not a branch, keeps what the compiler knows of the pointers' alignment
    wide, thin = tl.where(inner, x, dy), tl.where(inner, v, u)
    size, row = tl.where(inner, fan_in, out), tl.where(inner, x_row, dy_row)
    block -= tl.where(inner, 0, blocks)
    rd, rm, rr = block * BD + tl.arange(0, BD), tl.arange(0, BM), tl.arange(0, R)
    acc = tl.zeros((BD, R), tl.float32)
    for m in range(group * rows, min(M, group * rows + rows), BM):
        mm = m + rm
        left = tl.load(
            wide + mm[None, :].to(tl.int64) * row + rd[:, None],
            mask=(mm[None, :] < M) & (rd[:, None] < size),
            other=0.0,
        )
        right = tl.load(thin + mm[:, None] * R + rr[None, :], mask=mm[:, None] < M, other=0.0)
        acc = tl.dot(left, right, acc)
    if WHOLE:
        rd += tl.where(inner, 0, fan_in)
        valid = rd < tl.where(inner, fan_in, fan_in + out)
        _gradients(acc, rd, valid, da, db, scale, strength, fan_in, r, SCALED, R)
    else:
        part += group.to(tl.int64) * (fan_in + out) * R + tl.where(inner, 0, fan_in) * R
        tl.store(part + rd[:, None].to(tl.int64) * R + rr[None, :], acc, mask=rd[:, None] < size)


@triton.jit
def reduce(
    part, da, db, scale, strength, fan_in, out, r, groups,
    SCALED: tl.constexpr, R: tl.constexpr, BD: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Adds the groups in a fixed order, and stores the gradients."""
    rd, rr, rg = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, R), tl.arange(0, BG)
    total = fan_in + out
    acc = tl.zeros((BD, R), tl.float32)
    for first in range(0, groups, BG):
        group = first + rg[:, None, None]  # several at once, or their latencies would add up
        where = part + (group * total + rd[None, :, None]).to(tl.int64) * R + rr[None, None, :]
        valid = (group < groups) & (rd[None, :, None] < total)
        acc += tl.sum(tl.load(where, mask=valid, other=0.0), axis=0)
    _gradients(acc, rd, rd < total, da, db, scale, strength, fan_in, r, SCALED, R)
