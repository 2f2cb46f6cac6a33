"""Triton kernels for an embedding ``(W + scale · (B A)ᵀ)[ids]``: `add` in its forward, and the
gradient of A in its backward, by `project`, `scatter` and `collect`.

That gradient adds up the rows ``v = scale · dy B`` of each index. They are added as whole numbers,
which give the same sum in any order, so that no index has to be sorted: of the largest ``|v|``, the
peak, 61 bits hold as many of its like as there are rows, and what is cut off a small number is at
most 2⁻⁴⁶ of the peak (of 16384 rows). A row that is not finite is added in float32, all others of
that call with it.

Sizes: ``M`` indices, ``N`` numbers of a row of the table, ``num`` rows of it, ``r`` the rank, ``R``
the padded rank, ``bits`` so that ``M <= 2**bits``.
"""

import triton
import triton.language as tl

_INFINITE = tl.constexpr(0x7F800000)  # float32's bits, from which on no number is finite


@triton.jit
def _ids(indices, offs_m, M, num):
    """Indices, and which of them are there; torch's own look-up tells of those that are not."""
    ids = tl.load(indices + offs_m, mask=offs_m < M, other=-1).to(tl.int64)
    return ids, (ids >= 0) & (ids < num)


@triton.jit
def add(
    y,
    indices,
    a,
    b,
    scale,
    u,
    strength,
    M,
    N,
    num,
    r,
    stride_ar,
    stride_an,
    stride_bn,
    stride_br,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``y[M, N] += u @ (strength · scale · B).T``, rounded once, of ``u[M, R] = A[:, ids].T``,
    which the programs of the first columns store."""
    columns = tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = tl.program_id(0) // columns, tl.program_id(0) % columns
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, R)
    ids, there = _ids(indices, offs_m, M, num)
    where = a + ids[:, None] * stride_an + offs_r[None, :].to(tl.int64) * stride_ar
    low = tl.load(where, mask=there[:, None] & (offs_r < r)[None, :], other=0.0)
    low = low.to(tl.float32).to(y.dtype.element_ty)
    if pid_n == 0:
        kept = u + offs_m[:, None].to(tl.int64) * R + offs_r[None, :]
        tl.store(kept, low, mask=(offs_m < M)[:, None])
    where = b + offs_n[None, :].to(tl.int64) * stride_bn + offs_r[:, None].to(tl.int64) * stride_br
    up = tl.load(where, mask=(offs_n < N)[None, :] & (offs_r < r)[:, None], other=0.0)
    up = up.to(tl.float32) * (tl.load(scale).to(tl.float32) * strength)
    where = y + offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
    inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tile = tl.load(where, mask=inside, other=0.0).to(tl.float32)
    tile = tl.dot(low, up.to(y.dtype.element_ty), tile)
    tl.store(where, tile.to(y.dtype.element_ty), mask=inside)


@triton.jit
def project(
    dy,
    b,
    scale,
    v,
    peak,
    strength,
    M,
    N,
    r,
    stride_dym,
    stride_bn,
    stride_br,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``v[M, R] = dy @ (strength · scale · B)``, and the bits of the largest ``|v|``."""
    offs_m, offs_r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, R)
    factor = tl.load(scale).to(tl.float32) * strength
    total = tl.zeros((BLOCK_M, R), tl.float32)
    for n in range(0, N, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        where = dy + offs_m[:, None].to(tl.int64) * stride_dym + offs_n[None, :]
        left = tl.load(where, mask=(offs_m < M)[:, None] & (offs_n < N)[None, :], other=0.0)
        where = b + offs_n[:, None].to(tl.int64) * stride_bn
        where += offs_r[None, :].to(tl.int64) * stride_br
        up = tl.load(where, mask=(offs_n < N)[:, None] & (offs_r < r)[None, :], other=0.0)
        total = tl.dot(left, (up.to(tl.float32) * factor).to(left.dtype), total)
    where = v + offs_m[:, None].to(tl.int64) * R + offs_r[None, :]
    tl.store(where, total, mask=(offs_m < M)[:, None])
    # without the sign they are in the order of the numbers, those that are not finite behind
    bits = total.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(peak, tl.max(tl.max(bits, 1), 0).to(tl.int64), sem="relaxed")


@triton.jit
def _power(bits, highest):
    """The exponent of 2 by which a number below the peak is multiplied to be a whole one."""
    return 61 - bits - (tl.maximum(highest >> 23, 1) - 126)


@triton.jit
def _two_to(exponent):
    """``2**exponent`` in float64."""
    return ((exponent + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["bits"])
def scatter(v, indices, peak, sums, M, num, bits, R: tl.constexpr, BLOCK_M: tl.constexpr):
    """``sums[num, R]`` of the rows of v by their index, which were zero; see above."""
    offs_m, offs_r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, R)
    ids, there = _ids(indices, offs_m, M, num)
    where = v + offs_m[:, None].to(tl.int64) * R + offs_r[None, :]
    value = tl.load(where, mask=there[:, None], other=0.0)
    place = ids[:, None] * R + offs_r[None, :]
    highest = tl.load(peak)
    if highest < _INFINITE:
        whole = tl.floor(value.to(tl.float64) * _two_to(_power(bits, highest)) + 0.5)
        tl.atomic_add(sums + place, whole.to(tl.int64), mask=there[:, None], sem="relaxed")
    else:
        wide = sums.to(tl.pointer_type(tl.float32), bitcast=True)
        tl.atomic_add(wide + 2 * place, value, mask=there[:, None], sem="relaxed")


@triton.jit(do_not_specialize=["bits"])
def collect(
    sums,
    peak,
    da,
    num,
    r,
    bits,
    stride_ar,
    stride_an,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``da[r, num]``, the numbers that whole ones stand for."""
    offs_n, offs_r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, R)
    place = offs_n[:, None].to(tl.int64) * R + offs_r[None, :]
    inside = (offs_n < num)[:, None]
    highest = tl.load(peak)
    if highest < _INFINITE:
        whole = tl.load(sums + place, mask=inside, other=0)
        value = (whole.to(tl.float64) * _two_to(-_power(bits, highest))).to(tl.float32)
    else:
        wide = sums.to(tl.pointer_type(tl.float32), bitcast=True)
        value = tl.load(wide + 2 * place, mask=inside, other=0.0)
    # transposed, as A lies in memory
    where = da + offs_r[:, None].to(tl.int64) * stride_ar
    where += offs_n[None, :].to(tl.int64) * stride_an
    inside = (offs_r < r)[:, None] & (offs_n < num)[None, :]
    tl.store(where, tl.trans(value).to(da.dtype.element_ty), mask=inside)
