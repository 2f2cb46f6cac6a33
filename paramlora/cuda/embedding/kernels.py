"""Triton kernels for a look-up and its update: 16-bit CUDA, one float32 sum, rounded once."""

import triton
import triton.language as tl

from paramlora.cuda.linear.kernels import (
    SPAN,
    Drop,
    Matrix,
    Signals,
    _after,
    _counts,
    _gradients,
)


@triton.jit
def _looked_up(kept, M, dim, R: tl.constexpr):
    """Of `look_up`: the thin rows, the counts of the gradients' blocks, their number, the scale."""
    counts, blocks, _ = _counts(kept, M, 0, dim, dim, R, False)
    scaled = (counts + blocks).to(tl.pointer_type(tl.float32), bitcast=True)
    return _after(kept, dim, R), counts, blocks, scaled


@triton.jit(do_not_specialize=["padding"])
def look_up(
    rows, weight, a, b, scale, y, kept, strength, padding,
    M, num, dim, r, each, stride_wm, stride_wd, stride_ar, stride_am, stride_bd, stride_br,
    STAGES: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``y[M, dim] = weight[rows] + thin @ up`` of an embedding, and all of `kept`: ``up[R, dim]``,
    the scaled ``b.T``; ``thin[M, R] = a[:, rows].T``, zero where rows are `padding`; the counts of
    the gradients' blocks; the scale in float32.

    A program computes `each` columns of `BLOCK_M` rows. An index out of range stops the device as
    in torch's own look-up: no thread passes the assertion before all have.
    """
    groups = tl.cdiv(dim, each)
    strip, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    offs_m, offs_r, offs_d = (
        strip * BLOCK_M + tl.arange(0, BLOCK_M),
        tl.arange(0, R),
        tl.arange(0, BLOCK_D),
    )
    inside, ranks = offs_m[:, None] < M, offs_r < r
    row = tl.load(rows + offs_m, mask=offs_m < M, other=0).to(tl.int64)
    tl.device_assert((row >= 0) & (row < num), "embedding: an index is out of range")
    row = row[:, None]
    column = a + offs_r[None, :].to(tl.int64) * stride_ar + row * stride_am
    thin = tl.load(column, mask=inside & ranks[None, :], other=0.0).to(y.dtype.element_ty)
    thins, counts, blocks, place = _looked_up(kept, M, dim, R)
    offs_m = offs_m[:, None].to(tl.int64)
    if group == 0:
        tl.store(
            thins + offs_m * R + offs_r[None, :], tl.where(row == padding, 0.0, thin), mask=inside
        )
    scaled = strength * tl.load(scale).to(tl.float32)
    low, high = group * each, min(dim, group * each + each)
    for start in tl.range(
        low, high, BLOCK_D, num_stages=STAGES
    ):  # so that also base is loaded ahead
        at = start + offs_d[None, :]
        here = at < dim
        base = tl.load(
            weight + row * stride_wm + at.to(tl.int64) * stride_wd, mask=inside & here, other=0.0
        )
        factors = b + offs_r[:, None] * stride_br + at * stride_bd
        up = tl.load(factors, mask=ranks[:, None] & here, other=0.0).to(tl.float32)
        up = (up * scaled).to(y.dtype.element_ty)
        if strip == 0:
            tl.store(kept + offs_r[:, None] * dim + at, up, mask=here)
        total = base.to(tl.float32) + tl.dot(thin, up)
        tl.store(y + offs_m * dim + at, total.to(y.dtype.element_ty), mask=inside & here)
    if tl.program_id(0) == 0:
        tl.store(place, scaled)
        for start in range(0, blocks, BLOCK_D):
            tl.store(
                counts + start + offs_d,
                tl.zeros((BLOCK_D,), tl.int32),
                mask=start + offs_d < blocks,
            )


@triton.jit
def _thin_gradient(
    dy, up, v, strip, M, dim, r,
    WHOLE: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows `strip` of ``v[M, r] = dy[M, dim] @ up[R, dim].T``, in float32."""
    offs_m, offs_r, offs_d = (
        strip * BLOCK_M + tl.arange(0, BLOCK_M),
        tl.arange(0, R),
        tl.arange(0, BLOCK_D),
    )
    inside, row = offs_m[:, None] < M, offs_m[:, None].to(tl.int64)
    left, right = dy + row * dim + offs_d[None, :], up + offs_r[None, :] * dim + offs_d[:, None]
    acc = tl.zeros((BLOCK_M, R), tl.float32)
    for start in range(0, dim, BLOCK_D):
        if WHOLE:
            acc = tl.dot(tl.load(left, mask=inside, other=0.0), tl.load(right), acc)
        else:
            here = offs_d < dim - start
            tile = tl.load(left, mask=inside & here[None, :], other=0.0)
            acc = tl.dot(tile, tl.load(right, mask=here[:, None], other=0.0), acc)
        left += BLOCK_D
        right += BLOCK_D
    tl.store(v + row * r + offs_r[None, :], acc, mask=inside & (offs_r[None, :] < r))


@triton.jit(do_not_specialize=["strips", "r", "groups", "each"])
def look_up_backward(
    dy, kept, v, part, db, strips, M, dim, r, groups, each,
    SCALED: tl.constexpr, WHOLE: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """In `strips` programs that may be none ``v[M, r] = dy @ up.T``, of whose rows the gradient of
    A is the sums; in none or all others the gradient of B, as of a layer without inputs."""
    pid = tl.program_id(0)
    if pid < strips:
        _thin_gradient(
            dy=dy,
            up=kept,
            v=v,
            strip=pid,
            M=M,
            dim=dim,
            r=r,
            WHOLE=WHOLE,
            R=R,
            BLOCK_M=BLOCK_M,
            BLOCK_D=BLOCK_D,
        )
    else:
        thin, counts, _, scaled = _looked_up(kept, M, dim, R)
        wide = Matrix(dy, 0, dim, 1)
        _gradients(
            wide, wide, thin, thin, part, db, db, scaled, 1.0, Signals(counts, 0, 0), counts,
            pid - strips, M, 0, dim, r, M, groups, each, Drop(kept, kept, kept, 0, False),
            LOCAL=False, EARLY=False, SCALED=SCALED, EVEN=True, R=R, HEIGHT=SPAN,
            BLOCK_M=BLOCK_ROWS,
        )  # fmt: skip
