"""Triton kernels for a look-up and its update: 16-bit CUDA, one float32 sum, rounded once."""

import triton
import triton.language as tl

from paramlora.cuda.linear.kernels import SPAN, _after, _counts, _gradients


@triton.jit
def _looked_up(kept, M, dim, R: tl.constexpr):
    """Of `look_up`: the thin rows, the counts of the gradients' blocks, their number, the scale."""
    counts, blocks, _ = _counts(kept, M, 0, dim, R)
    scaled = (counts + blocks).to(tl.pointer_type(tl.float32), bitcast=True)
    return _after(kept, dim, R), counts, blocks, scaled


@triton.jit(do_not_specialize=["padding"])
def look_up(
    rows, weight, a, b, scale, y, kept, strength, padding,
    M, num, dim, r, each, w_row, w_dim, a_rank, a_row, b_dim, b_rank,
    STAGES: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``y[M, dim] = weight[rows] + thin @ up`` of an embedding, and all of `kept`: ``up[R, dim]``,
    the scaled ``b.T``; ``thin[M, R] = a[:, rows].T``, zero where rows are `padding`; the counts of
    the gradients' blocks; the scale in float32.

    A program computes `each` columns of `BM` rows. An index out of range stops the device as in
    torch's own look-up: no thread passes the assertion before all have.
    """
    groups = tl.cdiv(dim, each)
    strip, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    rm, rr, rd = strip * BM + tl.arange(0, BM), tl.arange(0, R), tl.arange(0, BD)
    inside, ranks = rm[:, None] < M, rr < r
    row = tl.load(rows + rm, mask=rm < M, other=0).to(tl.int64)
    tl.device_assert((row >= 0) & (row < num), "embedding: an index is out of range")
    row = row[:, None]
    column = a + rr[None, :].to(tl.int64) * a_rank + row * a_row
    thin = tl.load(column, mask=inside & ranks[None, :], other=0.0).to(y.dtype.element_ty)
    thins, counts, blocks, place = _looked_up(kept, M, dim, R)
    rm = rm[:, None].to(tl.int64)
    if group == 0:
        tl.store(thins + rm * R + rr[None, :], tl.where(row == padding, 0.0, thin), mask=inside)
    scaled = strength * tl.load(scale).to(tl.float32)
    low, high = group * each, min(dim, group * each + each)
    for start in tl.range(low, high, BD, num_stages=STAGES):  # so that also base is loaded ahead
        at = start + rd[None, :]
        here = at < dim
        base = tl.load(
            weight + row * w_row + at.to(tl.int64) * w_dim, mask=inside & here, other=0.0
        )
        factors = b + rr[:, None] * b_rank + at * b_dim
        up = tl.load(factors, mask=ranks[:, None] & here, other=0.0).to(tl.float32)
        up = (up * scaled).to(y.dtype.element_ty)
        if strip == 0:
            tl.store(kept + rr[:, None] * dim + at, up, mask=here)
        total = base.to(tl.float32) + tl.dot(thin, up)
        tl.store(y + rm * dim + at, total.to(y.dtype.element_ty), mask=inside & here)
    if tl.program_id(0) == 0:
        tl.store(place, scaled)
        for start in range(0, blocks, BD):
            tl.store(counts + start + rd, tl.zeros((BD,), tl.int32), mask=start + rd < blocks)


@triton.jit
def _thin_gradient(
    dy, up, v, strip, M, dim, r,
    WHOLE: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Rows `strip` of ``v[M, r] = dy[M, dim] @ up[R, dim].T``, in float32."""
    rm, rr, rd = strip * BM + tl.arange(0, BM), tl.arange(0, R), tl.arange(0, BD)
    inside, row = rm[:, None] < M, rm[:, None].to(tl.int64)
    left, right = dy + row * dim + rd[None, :], up + rr[None, :] * dim + rd[:, None]
    acc = tl.zeros((BM, R), tl.float32)
    for start in range(0, dim, BD):
        if WHOLE:
            acc = tl.dot(tl.load(left, mask=inside, other=0.0), tl.load(right), acc)
        else:
            here = rd < dim - start
            tile = tl.load(left, mask=inside & here[None, :], other=0.0)
            acc = tl.dot(tile, tl.load(right, mask=here[:, None], other=0.0), acc)
        left += BD
        right += BD
    tl.store(v + row * r + rr[None, :], acc, mask=inside & (rr[None, :] < r))


@triton.jit(do_not_specialize=["strips", "r", "groups", "each"])
def look_up_backward(
    dy, kept, v, part, db, strips, M, dim, r, groups, each,
    SCALED: tl.constexpr, WHOLE: tl.constexpr, R: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, GM: tl.constexpr,
):  # fmt: skip
    """In `strips` programs that may be none ``v[M, r] = dy @ up.T``, of whose rows the gradient of
    A is the sums; in none or all others the gradient of B, as of a layer without inputs."""
    program = tl.program_id(0)
    if program < strips:
        _thin_gradient(dy, kept, v, program, M, dim, r, WHOLE, R, BM, BD)
    else:
        thin, counts, _, scaled = _looked_up(kept, M, dim, R)
        _gradients(
            dy, dy, thin, thin, part, db, db, scaled, 1.0, counts, 0, counts, program - strips,
            M, 0, dim, r, M, 0, dim, 1, 0, dim, 1, groups, each,
            False, False, SCALED, True, R, SPAN, GM,
        )  # fmt: skip
