"""Triton kernels for 16-bit CUDA: both products in one float32 accumulator, rounded once.

A frozen product that is rounded before the low-rank one is added loses about half of an update of
relative size 1e-3. cuBLAS rounds in between even in ``addmm`` (measured on an H200), so the large
product is computed here, in the accumulator that also takes the low-rank one. Partial sums are
added in a fixed order: every result is deterministic.

Imported only when a 16-bit CUDA tensor comes; everything works without Triton. Sizes are named as
in a matrix product, ``M`` rows (tokens), ``N`` columns, ``K`` summed, and ``R`` the padded rank.
"""

from typing import NamedTuple, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

WIDEST = 64  # above this rank the thin products go to cuBLAS, which is efficient there


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
def _matmul_tma(
    x, w, f, y, p, q, bias, M, N, K,
    FUSED: tl.constexpr, BIAS: tl.constexpr, ROWS_OUT: tl.constexpr, R: tl.constexpr,
    STEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``y = x @ w + p @ q + bias``; loads by the tensor memory engine, see `matmul`."""
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
def _matmul(
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
def _pack(
    a, b, scale, strength, a_out, b_out, fan_in, out, r, a_rank, a_in, b_out_stride, b_rank,
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
        value = tl.load(
            b + rr[:, None] * b_rank + rd[None, :] * b_out_stride, mask=valid, other=0.0
        )
        value = value.to(tl.float32) * (strength * tl.load(scale).to(tl.float32))
        where = b_out + rr[:, None] * out + rd[None, :]
        tl.store(where, value.to(b_out.dtype.element_ty), mask=rd[None, :] < out)


@triton.jit
def _project(
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
def _outer(
    x, v, dy, u, part, M, fan_in, out, x_row, dy_row, rows,
    R: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``x.T @ v`` and ``dy.T @ u`` over groups of rows: ``part[group, fan_in + out, R]``."""
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
    part += group.to(tl.int64) * (fan_in + out) * R + tl.where(inner, 0, fan_in) * R
    tl.store(part + rd[:, None].to(tl.int64) * R + rr[None, :], acc, mask=rd[:, None] < size)


@triton.jit
def _reduce(
    part, da, db, scale, strength, fan_in, out, r, groups,
    SCALED: tl.constexpr, R: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Adds the groups in order: ``da[r, fan_in]``, and ``db[out, r]`` times the scale."""
    rd, rr = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, R)
    total = fan_in + out
    acc = tl.zeros((BD, R), tl.float32)
    for group in range(groups):
        where = part + (group * total + rd[:, None]).to(tl.int64) * R + rr[None, :]
        acc += tl.load(where, mask=rd[:, None] < total, other=0.0)
    ranks = rr[None, :] < r
    inner = rd[:, None] < fan_in
    tl.store(da + rr[None, :].to(tl.int64) * fan_in + rd[:, None], acc, mask=ranks & inner)
    if SCALED:
        acc *= strength * tl.load(scale).to(tl.float32)
    where = db + (rd[:, None] - fan_in).to(tl.int64) * r + rr[None, :]
    tl.store(where, acc, mask=ranks & (rd[:, None] >= fan_in) & (rd[:, None] < total))


class Tiling(NamedTuple):
    """The tile of a product, Triton's stages and warps, and which kernel computes it."""

    BM: int
    BN: int
    BK: int
    GROUP: int
    stages: int
    warps: int
    tma: bool


def tiling(M: int, N: int, K: int, aligned: bool) -> Tiling:
    """The table of choices, measured on an H200 with torch 2.11 (see benchmarks/RESULTS.md)."""
    if not aligned:
        return (
            Tiling(64, 64, 64, 8, 4, 4, False) if M <= 512 else Tiling(128, 128, 64, 8, 3, 8, False)
        )
    if M <= 512:
        return Tiling(64, 64, 128, 8, 3, 4, True)
    if M <= 2048 and N <= 2048:
        return Tiling(64, 256, 64, 8, 4, 4, True)
    if N <= 512:
        few = Tiling(128, 128, 64, 8, 3, 8, False)
        return few if K <= 512 else Tiling(128, 128, 64, 8, 4, 4, True)
    if triton.cdiv(M, 128) * triton.cdiv(N, 256) >= 90:
        return Tiling(128, 256, 64, 16, 3, 8, True)
    return Tiling(64, 128, 64, 8, 4, 4, True)


def fuses(M: int, N: int, R: int) -> bool:
    """Whether `matmul` computes p inside: R more columns for each column of tiles, against a
    launch and a read of x; measured like `tiling`."""
    return R <= 16 and (M <= 512 or N <= 1024 or (M <= 2048 and N <= 2048))


def padded(r: int) -> int:
    """The rank that tensor cores take: a power of two of at least 16."""
    return max(16, 1 << (r - 1).bit_length())


def pack(
    lora_A: Tensor, lora_B: Tensor, scale: Tensor, strength: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``A[R, in]`` and ``strength · scale · B.T[R, out]`` in `dtype`, padded with zeros."""
    (r, fan_in), out = lora_A.shape, lora_B.shape[0]
    R = padded(r)
    a = torch.empty(R, fan_in, dtype=dtype, device=lora_A.device)
    b = torch.empty(R, out, dtype=dtype, device=lora_A.device)
    BD = max(16, 2048 // R)
    grid = (triton.cdiv(fan_in, BD) + triton.cdiv(out, BD),)
    _pack[grid](
        lora_A, lora_B, scale, strength, a, b, fan_in, out, r,
        *lora_A.stride(), *lora_B.stride(), R=R, BD=BD, num_warps=4,
    )  # fmt: skip
    return a, b


def matmul(
    x: Tensor, w: Tensor, f: Tensor, q: Tensor, bias: Optional[Tensor] = None
) -> tuple[Tensor, Tensor]:
    """``y = x @ w + p @ q + bias`` with one rounding, and ``p = x @ f.T``.

    Args:
        x: ``[M, K]``, 16-bit, rows contiguous.
        w: ``[K, N]``, 16-bit, any strides of which one is 1.
        f: ``[R, K]`` of `pack`.
        q: ``[R, N]`` of `pack`.
        bias: ``[N]``.

    Returns:
        ``y[M, N]`` and ``p[M, R]``.
    """
    (M, K), N, R = x.shape, w.shape[1], f.shape[0]
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if M == 0:
        return y, x.new_empty(0, R)
    strides = (x.stride(0), *w.stride())
    aligned = (
        all(n % 8 == 0 for n in (K, N, *strides) if n != 1)
        and x.data_ptr() % 16 == 0
        and w.data_ptr() % 16 == 0
    )
    tile = tiling(M, N, K, aligned)
    fused = fuses(M, N, R)
    p = torch.empty(M, R, dtype=x.dtype, device=x.device) if fused else project(x, f)
    grid = (triton.cdiv(M, tile.BM) * triton.cdiv(N, tile.BN),)
    rest = (p, q, bias if bias is not None else p, M, N, K)
    flags = dict(FUSED=fused, BIAS=bias is not None, R=R, STEP=min(R, 32))
    sizes = dict(BM=tile.BM, BN=tile.BN, BK=tile.BK, GROUP=tile.GROUP)
    options = dict(num_stages=tile.stages, num_warps=tile.warps)
    if tile.tma:
        rows_out = w.stride(0) == 1
        base, block = (w.t(), [tile.BN, tile.BK]) if rows_out else (w, [tile.BK, tile.BN])
        _matmul_tma[grid](
            TensorDescriptor.from_tensor(x, [tile.BM, tile.BK]),
            TensorDescriptor.from_tensor(base, block),
            TensorDescriptor.from_tensor(f, [R if fused else 16, tile.BK]),
            TensorDescriptor.from_tensor(y, [tile.BM, tile.BN // 2]),
            *rest, ROWS_OUT=rows_out, **flags, **sizes, **options,
        )  # fmt: skip
    else:
        _matmul[grid](
            x, w, f, y, *rest, *strides, WHOLE_K=K % tile.BK == 0, **flags, **sizes, **options
        )
    return y, p


def project(x: Tensor, f: Tensor) -> Tensor:
    """``x[M, K] @ f[R, K].T``, in x's type."""
    (M, K), R = x.shape, f.shape[0]
    if R > WIDEST or M == 0:
        return x @ f.t()
    p = torch.empty(M, R, dtype=x.dtype, device=x.device)
    BM, BK = (64, 128) if M >= 8192 else (32, 128) if M >= 2048 else (16, 256)
    _project[(triton.cdiv(M, BM),)](
        x, f, p, M, K, x.stride(0),
        WHOLE_K=K % BK == 0, R=R, BM=BM, BK=BK, num_stages=4, num_warps=4,
    )  # fmt: skip
    return p


def outer(
    x: Tensor,
    v: Tensor,
    dy: Tensor,
    u: Tensor,
    r: int,
    scale: Optional[Tensor] = None,
    strength: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The factors' gradients in float32: ``(v.T @ x)[r, in]``, ``scale · (dy.T @ u)[out, r]``.

    Without a scale the second is left unscaled.
    """
    (M, fan_in), out, R = x.shape, dy.shape[1], v.shape[1]
    if R > WIDEST or M == 0:
        da = torch.mm(v[:, :r].t(), x, out_dtype=torch.float32)
        db = torch.mm(dy.t(), u[:, :r], out_dtype=torch.float32)
        return da, db if scale is None else db * (scale * strength)
    da = torch.empty(r, fan_in, dtype=torch.float32, device=x.device)
    db = torch.empty(out, r, dtype=torch.float32, device=x.device)
    BD, BM = 128, 64
    blocks = triton.cdiv(fan_in, BD) + triton.cdiv(out, BD)
    groups = max(1, min(triton.cdiv(M, 4 * BM), triton.cdiv(528, blocks)))
    rows = triton.cdiv(triton.cdiv(M, groups), BM) * BM
    part = torch.empty(groups, fan_in + out, R, dtype=torch.float32, device=x.device)
    _outer[(blocks, groups)](
        x, v, dy, u, part, M, fan_in, out, x.stride(0), dy.stride(0), rows,
        R=R, BM=BM, BD=BD, num_stages=4, num_warps=4,
    )  # fmt: skip
    _reduce[(triton.cdiv(fan_in + out, 32),)](
        part, da, db, scale if scale is not None else part, strength, fan_in, out, r, groups,
        SCALED=scale is not None, R=R, BD=32, num_warps=4,
    )  # fmt: skip
    return da, db
