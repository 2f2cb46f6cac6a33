"""Triton kernels for experts: the rows of each by its own matrices, in one float32 accumulator.

``y_e = x_e w_e + p_e q_e`` of rows that lie sorted by expert, which torch's grouped product would
need two roundings for, or a copy of all weights with the update's below them. Which rows are
whose is read on the device, from where each expert's end: a grid has as many blocks of rows as the
worst division among the experts would need, each block finds its expert, and what is left over does
nothing. So nothing waits for the host, and a CUDA graph serves any division.

`project` computes ``p_e = (mask ∘ x_e) f_eᵀ``, `product` the whole, and `gradients` those of the
factors, ``x_eᵀ v_e`` and ``dy_eᵀ u_e``, each summed in order by one program. A linear layer is the
case of a single expert. Where the rows of each expert take different updates, the groups are the
pairs of both, sorted: the factors are a group's own, and ``groups_per_matrix`` share a matrix.
Sizes are named as in `paramlora.cuda.linear.kernels`: ``M`` rows, ``N`` columns, ``K`` summed,
``r`` the rank, ``R`` how many numbers the rows of thin products have, ``BLOCK_R`` and ``E`` powers
of two that hold the ranks and one more than the experts.
"""

import triton
import triton.language as tl

from paramlora.cuda.linear.kernels import _place
from paramlora.cuda.masks.kernels import dropped


@triton.jit
def _share(ends, M, experts, E: tl.constexpr):
    """Where each expert's rows start and end, then those that are no expert's, then none."""
    which = tl.arange(0, E)
    # by one block of E numbers: ends are few, and a search would wait for one load after another
    high = tl.minimum(tl.load(ends + which, mask=which < experts, other=M), M)
    low = tl.load(ends + which - 1, mask=(which > 0) & (which <= experts), other=0)
    return which, tl.where(which > experts, M, low), high


@triton.jit
def _expert(ends, block, M, experts, E: tl.constexpr, BLOCK_M: tl.constexpr):
    """The expert of a block of rows, `experts` where they are none's, and its rows: from, to."""
    which, low, high = _share(ends, M, experts, E)
    blocks = tl.cdiv(tl.maximum(high - low, 0), BLOCK_M)
    until = tl.cumsum(blocks, 0)
    # each expert's blocks start with its own first row, so that no block meets two
    expert = tl.sum((until <= block).to(tl.int32), 0)
    own = which == expert
    first = tl.sum(tl.where(own, low + (block - until + blocks) * BLOCK_M, 0), 0)
    return expert, first, tl.sum(tl.where(own, high, 0), 0)


@triton.jit
def project(
    x,
    f,
    p,
    ends,
    seed,
    M,
    K,
    experts,
    stride_xm,
    stride_fe,
    stride_fr,
    stride_fk,
    r,
    R,
    threshold,
    DROP: tl.constexpr,
    EVEN_K: tl.constexpr,
    E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A block of ``p[M, R] = (mask ∘ x[M, K]) f[e, r, K]ᵀ``, zeros beyond the rank."""
    expert, first, end = _expert(
        ends=ends,
        block=tl.program_id(0),
        M=M,
        experts=experts,
        E=E,
        BLOCK_M=BLOCK_M,
    )
    if (expert < experts) & (first < end):
        tl.assume(K > 0)  # see `product`
        offs_m, offs_k = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
        offs_r = tl.arange(0, BLOCK_R)
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        left = x + offs_m[:, None].to(tl.int64) * stride_xm + offs_k[None, :]
        thin = f + tl.cast(expert, tl.int64) * stride_fe
        thin += offs_r[None, :].to(tl.int64) * stride_fr + offs_k[:, None].to(tl.int64) * stride_fk
        rows, ranks = offs_m[:, None] < end, offs_r[None, :] < r
        for k in range(0, K, BLOCK_K):
            if EVEN_K:
                tile = tl.load(left, mask=rows, other=0.0)
                factor = tl.load(thin, mask=ranks, other=0.0)
            else:
                inside = offs_k < K - k
                tile = tl.load(left, mask=rows & inside[None, :], other=0.0)
                factor = tl.load(thin, mask=ranks & inside[:, None], other=0.0)
            if DROP:
                gone = dropped(seed, offs_m, k + offs_k, threshold)
                tile = tl.where(gone, 0.0, tile).to(tile.dtype)
            acc = tl.dot(tile, factor, acc)
            left += BLOCK_K
            thin += tl.cast(stride_fk, tl.int64) * BLOCK_K
        where = p + offs_m[:, None].to(tl.int64) * R + offs_r[None, :]
        tl.store(where, acc.to(p.dtype.element_ty), mask=rows & (offs_r[None, :] < R))


@triton.jit
def _wide(
    x,
    w,
    expert,
    first,
    end,
    pid_n,
    N,
    K,
    stride_xm,
    stride_we,
    stride_wk,
    stride_wn,
    TMA: tl.constexpr,
    ROWS_OUT: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of ``x[M, K] @ w[e, K, N]`` in float32.

    Where `TMA`, x and w are descriptors, of ``[M, K]`` and of ``[E N, K]`` where `ROWS_OUT`, else
    of ``[E K, N]``: what they load of other experts meets rows or columns that nobody stores.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TMA:
        for k in range(0, K, BLOCK_K):
            left = x.load([first, k])
            if ROWS_OUT:
                acc = tl.dot(left, w.load([expert * N + pid_n * BLOCK_N, k]).T, acc)
            else:
                acc = tl.dot(left, w.load([expert * K + k, pid_n * BLOCK_N]), acc)
    else:
        offs_m, offs_k = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
        # columns beyond the last are read again in place of a mask, and not stored
        offs_n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)) % N
        rows = offs_m[:, None] < end
        left = x + offs_m[:, None].to(tl.int64) * stride_xm + offs_k[None, :]
        right = w + tl.cast(expert, tl.int64) * stride_we
        right += offs_k[:, None].to(tl.int64) * stride_wk + offs_n[None, :].to(tl.int64) * stride_wn
        for k in range(0, K, BLOCK_K):
            if EVEN_K:
                acc = tl.dot(tl.load(left, mask=rows, other=0.0), tl.load(right), acc)
            else:
                inside = offs_k < K - k
                tile = tl.load(left, mask=rows & inside[None, :], other=0.0)
                acc = tl.dot(tile, tl.load(right, mask=inside[:, None], other=0.0), acc)
            left += BLOCK_K
            right += tl.cast(stride_wk, tl.int64) * BLOCK_K
    return acc


@triton.jit
def product(
    x,
    w,
    p,
    q,
    y,
    ends,
    seed,
    bias,
    M,
    N,
    K,
    experts,
    groups_per_matrix,
    stride_xm,
    stride_we,
    stride_wk,
    stride_wn,
    stride_qe,
    stride_qr,
    stride_qn,
    stride_be,
    r,
    R,
    threshold,
    BIAS: tl.constexpr,
    DROP: tl.constexpr,
    TMA: tl.constexpr,
    ROWS_OUT: tl.constexpr,
    EVEN_K: tl.constexpr,
    E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of ``y[M, N] = x w_e + mask ∘ (p q_e) + bias_e``; zero in rows that are none's."""
    num_pid_n = tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = _place(tl.program_id(0), tl.num_programs(0) // num_pid_n, num_pid_n, GROUP_M)
    expert, first, end = _expert(ends=ends, block=pid_m, M=M, experts=experts, E=E, BLOCK_M=BLOCK_M)
    if first < end:  # the grid is that of the worst division, so that some have nothing to do
        offs_m, offs_n = first + tl.arange(0, BLOCK_M), pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        where = y + offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
        inside = (offs_m[:, None] < end) & (offs_n[None, :] < N)
        if expert < experts:
            tl.assume(K > 0)  # else ptxas makes every tensor core instruction wait for the last
            matrix = expert // groups_per_matrix  # of a group of rows, whose factors are its own
            acc = _wide(
                x=x,
                w=w,
                expert=matrix,
                first=first,
                end=end,
                pid_n=pid_n,
                N=N,
                K=K,
                stride_xm=stride_xm,
                stride_we=stride_we,
                stride_wk=stride_wk,
                stride_wn=stride_wn,
                TMA=TMA,
                ROWS_OUT=ROWS_OUT,
                EVEN_K=EVEN_K,
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
                BLOCK_K=BLOCK_K,
            )
            factor = q + tl.cast(expert, tl.int64) * stride_qe
            STEP: tl.constexpr = min(BLOCK_R, 32)
            low = tl.zeros_like(acc) if DROP else acc
            for start in tl.static_range(0, BLOCK_R, STEP):
                offs_r = start + tl.arange(0, STEP)
                at = p + offs_m[:, None].to(tl.int64) * R + offs_r[None, :]
                valid = (offs_m[:, None] < end) & (offs_r[None, :] < r)
                left = tl.load(at, mask=valid, other=0.0)
                at = factor + offs_r[:, None].to(tl.int64) * stride_qr
                at += offs_n[None, :].to(tl.int64) * stride_qn
                valid = (offs_r[:, None] < r) & (offs_n[None, :] < N)
                low = tl.dot(left, tl.load(at, mask=valid, other=0.0), low)
            if DROP:  # masks the update's term alone, which so needs a sum of its own
                low = acc + tl.where(dropped(seed, offs_m, offs_n, threshold), 0.0, low)
            acc = low
            if BIAS:
                own = bias + tl.cast(matrix, tl.int64) * stride_be + offs_n
                acc += tl.load(own, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
            tl.store(where, acc.to(y.dtype.element_ty), mask=inside)
        else:  # memory that is not written holds anything
            tl.store(where, tl.zeros((BLOCK_M, BLOCK_N), y.dtype.element_ty), mask=inside)


@triton.jit
def _part(ends, M, experts, expert, part, parts, E: tl.constexpr, BLOCK_M: tl.constexpr):
    """The first row of one of the parts of an expert's rows, whole blocks each, and its end."""
    which, low, high = _share(ends, M, experts, E)
    first = tl.sum(tl.where(which == expert, low, 0), 0)
    end = tl.sum(tl.where(which == expert, high, 0), 0)
    each = tl.cdiv(tl.maximum(end - first, 0), parts * BLOCK_M) * BLOCK_M
    first += part * each
    return first, tl.minimum(end, first + each)


@triton.jit
def gradients(
    x,
    v,
    dy,
    u,
    da,
    db,
    ends,
    seed,
    M,
    fan_in,
    out,
    experts,
    r,
    R,
    stride_xm,
    stride_dym,
    inner,
    parts,
    threshold,
    DROP: tl.constexpr,
    E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A block of ``da[part, e, r, in] = v_eᵀ (mask ∘ x_e)``, the first `inner` of them, or of
    ``db[part, e, out, r] = dy_eᵀ u_e``, over one of the parts of an expert's rows."""
    blocks = tl.num_programs(0) // (experts * parts)
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // (blocks * experts)
    expert = tl.program_id(0) // blocks % experts
    first, end = _part(
        ends=ends,
        M=M,
        experts=experts,
        expert=expert,
        part=part,
        parts=parts,
        E=E,
        BLOCK_M=BLOCK_M,
    )
    is_a = block < inner
    # a select, not a branch, keeps what the compiler knows of the pointers' alignment
    wide, thin = tl.where(is_a, x, dy), tl.where(is_a, v, u)
    size, row = tl.where(is_a, fan_in, out), tl.where(is_a, stride_xm, stride_dym)
    offs_d = (block - tl.where(is_a, 0, inner)) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_m, offs_r = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    for m in range(first, end, BLOCK_M):
        mm = m + offs_m
        where = wide + mm[None, :].to(tl.int64) * row + offs_d[:, None]
        left = tl.load(where, mask=(mm[None, :] < end) & (offs_d[:, None] < size), other=0.0)
        if DROP:  # dy is not masked, but goes through the same select
            gone = tl.trans(dropped(seed, mm, offs_d, threshold)) & is_a
            left = tl.where(gone, 0.0, left).to(left.dtype)
        where = thin + mm[:, None].to(tl.int64) * R + offs_r[None, :]
        right = tl.load(where, mask=(mm[:, None] < end) & (offs_r[None, :] < r), other=0.0)
        acc = tl.dot(left, right, acc)
    inside = (offs_d[:, None] < size) & (offs_r[None, :] < r)
    matrix = tl.cast(part * experts + expert, tl.int64) * r
    if is_a:
        where = da + (matrix + offs_r[None, :]) * fan_in + offs_d[:, None]
    else:
        where = db + matrix * out + offs_d[:, None].to(tl.int64) * r + offs_r[None, :]
    # in float32, also of an expert without rows: what its loop has not added are zeros
    tl.store(where, acc, mask=inside)
