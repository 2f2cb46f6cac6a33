"""Triton kernels for experts: the rows of each by its own matrices, in one float32 accumulator.

``y_e = x_e w_e + p_e q_e`` of rows that lie sorted by expert, which torch's grouped product would
need two roundings for, or a copy of all weights with the update's below them. Which rows are
whose is read on the device, from where each expert's end: a grid has as many blocks of rows as the
worst division among the experts would need, each block finds its expert, and what is left over does
nothing. So nothing waits for the host, and a CUDA graph serves any division.

`project` computes ``p_e = (mask ∘ x_e) f_eᵀ``, `product` the whole, and `gradients` those of the
factors, ``x_eᵀ v_e`` and ``dy_eᵀ u_e``, each summed in order by one program. A linear layer is the
case of a single expert. Sizes are named as in `paramlora.cuda.linear.kernels`: ``M`` rows, ``N``
columns, ``K`` summed, ``r`` the rank, ``R`` how many numbers the rows of thin products have, ``RB``
and ``E`` powers of two that hold the ranks and one more than the experts.
"""

import triton
import triton.language as tl

from paramlora.cuda.linear.kernels import _place
from paramlora.cuda.masks.kernels import dropped


@triton.jit
def _share(ends, M, experts, E: tl.constexpr):
    """Where each expert's rows start and end, then those that are no expert's, then none."""
    which = tl.arange(0, E)
    high = tl.minimum(tl.load(ends + which, mask=which < experts, other=M), M)
    low = tl.load(ends + which - 1, mask=(which > 0) & (which <= experts), other=0)
    return which, tl.where(which > experts, M, low), high


@triton.jit
def _expert(ends, block, M, experts, E: tl.constexpr, BM: tl.constexpr):
    """The expert of a block of rows, `experts` where they are none's, and its rows: from, to."""
    which, low, high = _share(ends, M, experts, E)
    blocks = tl.cdiv(tl.maximum(high - low, 0), BM)
    until = tl.cumsum(blocks, 0)
    expert = tl.sum((until <= block).to(tl.int32), 0)
    own = which == expert
    first = tl.sum(tl.where(own, low + (block - until + blocks) * BM, 0), 0)
    return expert, first, tl.sum(tl.where(own, high, 0), 0)


@triton.jit
def project(
    x, f, p, ends, seed, M, K, experts, x_row, f_expert, f_rank, f_k, r, R, threshold,
    DROP: tl.constexpr, WHOLE_K: tl.constexpr, E: tl.constexpr, RB: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A block of ``p[M, R] = (mask ∘ x[M, K]) f[e, r, K]ᵀ``, zeros beyond the rank."""
    expert, first, end = _expert(ends, tl.program_id(0), M, experts, E, BM)
    if (expert < experts) & (first < end):
        tl.assume(K > 0)
        rm, rk, rr = first + tl.arange(0, BM), tl.arange(0, BK), tl.arange(0, RB)
        acc = tl.zeros((BM, RB), tl.float32)
        left = x + rm[:, None].to(tl.int64) * x_row + rk[None, :]
        thin = f + tl.cast(expert, tl.int64) * f_expert
        thin += rr[None, :].to(tl.int64) * f_rank + rk[:, None].to(tl.int64) * f_k
        rows, ranks = rm[:, None] < end, rr[None, :] < r
        for k in range(0, K, BK):
            if WHOLE_K:
                tile = tl.load(left, mask=rows, other=0.0)
                factor = tl.load(thin, mask=ranks, other=0.0)
            else:
                inside = rk < K - k
                tile = tl.load(left, mask=rows & inside[None, :], other=0.0)
                factor = tl.load(thin, mask=ranks & inside[:, None], other=0.0)
            if DROP:
                tile = tl.where(dropped(seed, rm, k + rk, threshold), 0.0, tile).to(tile.dtype)
            acc = tl.dot(tile, factor, acc)
            left += BK
            thin += tl.cast(f_k, tl.int64) * BK
        where = p + rm[:, None].to(tl.int64) * R + rr[None, :]
        tl.store(where, acc.to(p.dtype.element_ty), mask=rows & (rr[None, :] < R))


@triton.jit
def _wide(
    x, w, expert, first, end, column, N, K, x_row, w_expert, w_k, w_n,
    TMA: tl.constexpr, ROWS_OUT: tl.constexpr, WHOLE_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of ``x[M, K] @ w[e, K, N]`` in float32.

    Where `TMA`, x and w are descriptors, of ``[M, K]`` and of ``[E N, K]`` where `ROWS_OUT`, else
    of ``[E K, N]``: what they load of other experts meets rows or columns that nobody stores.
    """
    acc = tl.zeros((BM, BN), tl.float32)
    if TMA:
        for k in range(0, K, BK):
            left = x.load([first, k])
            if ROWS_OUT:
                acc = tl.dot(left, w.load([expert * N + column * BN, k]).T, acc)
            else:
                acc = tl.dot(left, w.load([expert * K + k, column * BN]), acc)
    else:
        rm, rk = first + tl.arange(0, BM), tl.arange(0, BK)
        rn = (column * BN + tl.arange(0, BN)) % N
        rows = rm[:, None] < end
        left = x + rm[:, None].to(tl.int64) * x_row + rk[None, :]
        right = w + tl.cast(expert, tl.int64) * w_expert
        right += rk[:, None].to(tl.int64) * w_k + rn[None, :].to(tl.int64) * w_n
        for k in range(0, K, BK):
            if WHOLE_K:
                acc = tl.dot(tl.load(left, mask=rows, other=0.0), tl.load(right), acc)
            else:
                inside = rk < K - k
                tile = tl.load(left, mask=rows & inside[None, :], other=0.0)
                acc = tl.dot(tile, tl.load(right, mask=inside[:, None], other=0.0), acc)
            left += BK
            right += tl.cast(w_k, tl.int64) * BK
    return acc


@triton.jit
def _low_rank(
    acc, p, q, seed, rm, rn, end, N, r, R, q_rank, q_n, threshold,
    DROP: tl.constexpr, RB: tl.constexpr,
):  # fmt: skip
    """``acc + mask ∘ (p @ q)`` for one tile, from ``p[M, R]`` and ``q[r, N]`` in memory."""
    STEP: tl.constexpr = min(RB, 32)
    low = tl.zeros_like(acc) if DROP else acc
    for start in tl.static_range(0, RB, STEP):
        rr = start + tl.arange(0, STEP)
        where = p + rm[:, None].to(tl.int64) * R + rr[None, :]
        left = tl.load(where, mask=(rm[:, None] < end) & (rr[None, :] < r), other=0.0)
        where = q + rr[:, None].to(tl.int64) * q_rank + rn[None, :].to(tl.int64) * q_n
        right = tl.load(where, mask=(rr[:, None] < r) & (rn[None, :] < N), other=0.0)
        low = tl.dot(left, right, low)
    if DROP:
        low = acc + tl.where(dropped(seed, rm, rn, threshold), 0.0, low)
    return low


@triton.jit
def product(
    x, w, p, q, y, ends, seed, bias, M, N, K, experts, x_row, w_expert, w_k, w_n,
    q_expert, q_rank, q_n, bias_expert, r, R, threshold,
    BIAS: tl.constexpr, DROP: tl.constexpr, TMA: tl.constexpr, ROWS_OUT: tl.constexpr,
    WHOLE_K: tl.constexpr, E: tl.constexpr, RB: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of ``y[M, N] = x w_e + mask ∘ (p q_e) + bias_e``; zero in rows that are none's."""
    columns = tl.cdiv(N, BN)
    block, column = _place(tl.program_id(0), tl.num_programs(0) // columns, columns, GROUP)
    expert, first, end = _expert(ends, block, M, experts, E, BM)
    if first < end:
        rm, rn = first + tl.arange(0, BM), column * BN + tl.arange(0, BN)
        where = y + rm[:, None].to(tl.int64) * N + rn[None, :]
        inside = (rm[:, None] < end) & (rn[None, :] < N)
        if expert < experts:
            tl.assume(K > 0)  # else ptxas makes every tensor core instruction wait for the last
            acc = _wide(
                x, w, expert, first, end, column, N, K, x_row, w_expert, w_k, w_n,
                TMA, ROWS_OUT, WHOLE_K, BM, BN, BK,
            )  # fmt: skip
            q += tl.cast(expert, tl.int64) * q_expert
            acc = _low_rank(acc, p, q, seed, rm, rn, end, N, r, R, q_rank, q_n, threshold, DROP, RB)
            if BIAS:
                own = bias + tl.cast(expert, tl.int64) * bias_expert + rn
                acc += tl.load(own, mask=rn < N, other=0.0).to(tl.float32)[None, :]
            tl.store(where, acc.to(y.dtype.element_ty), mask=inside)
        else:
            tl.store(where, tl.zeros((BM, BN), y.dtype.element_ty), mask=inside)


@triton.jit
def gradients(
    x, v, dy, u, da, db, ends, seed, M, fan_in, out, experts, r, R, x_row, dy_row, inner, parts,
    threshold, DROP: tl.constexpr, E: tl.constexpr, RB: tl.constexpr, DEEP: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    """A block of ``da[part, e, r, in] = v_eᵀ (mask ∘ x_e)``, the first `inner` of them, or of
    ``db[part, e, out, r] = dy_eᵀ u_e``, over one of the parts of an expert's rows."""
    blocks = tl.num_programs(0) // (experts * parts)
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // (blocks * experts)
    expert = tl.program_id(0) // blocks % experts
    which, low, high = _share(ends, M, experts, E)
    first = tl.sum(tl.where(which == expert, low, 0), 0)
    end = tl.sum(tl.where(which == expert, high, 0), 0)
    each = tl.cdiv(tl.maximum(end - first, 0), parts * BM) * BM
    first += part * each
    end = tl.minimum(end, first + each)
    is_a = block < inner
    # a select, not a branch, keeps what the compiler knows of the pointers' alignment
    wide, thin = tl.where(is_a, x, dy), tl.where(is_a, v, u)
    size, row = tl.where(is_a, fan_in, out), tl.where(is_a, x_row, dy_row)
    rd = (block - tl.where(is_a, 0, inner)) * DEEP + tl.arange(0, DEEP)
    rm, rr = tl.arange(0, BM), tl.arange(0, RB)
    acc = tl.zeros((DEEP, RB), tl.float32)
    for m in range(first, end, BM):
        mm = m + rm
        where = wide + mm[None, :].to(tl.int64) * row + rd[:, None]
        left = tl.load(where, mask=(mm[None, :] < end) & (rd[:, None] < size), other=0.0)
        if DROP:
            gone = tl.trans(dropped(seed, mm, rd, threshold)) & is_a
            left = tl.where(gone, 0.0, left).to(left.dtype)
        where = thin + mm[:, None].to(tl.int64) * R + rr[None, :]
        right = tl.load(where, mask=(mm[:, None] < end) & (rr[None, :] < r), other=0.0)
        acc = tl.dot(left, right, acc)
    inside = (rd[:, None] < size) & (rr[None, :] < r)
    matrix = tl.cast(part * experts + expert, tl.int64) * r
    if is_a:
        where = da + (matrix + rr[None, :]) * fan_in + rd[:, None]
    else:
        where = db + matrix * out + rd[:, None].to(tl.int64) * r + rr[None, :]
    tl.store(where, acc, mask=inside)
