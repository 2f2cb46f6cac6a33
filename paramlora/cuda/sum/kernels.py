"""The Triton kernel that forms ``W + scale · B A``, of which nothing is rounded but the result."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["r"])
def add(
    weight,
    a,
    b,
    scale,
    total,
    M,
    N,
    r,
    stride_wm,
    stride_wn,
    stride_ar,
    stride_an,
    stride_bm,
    stride_br,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    R: tl.constexpr,
):
    """A tile of ``total[rows, columns] = W + scale · B A``, summed in float32 and rounded once to
    total's type, some ranks at a time; total is contiguous."""
    across = tl.cdiv(N, BLOCK_N)
    offs_m = tl.program_id(0) // across * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    # read ahead of the factors, as it takes longest to come
    where = weight + offs_m[:, None].to(tl.int64) * stride_wm + offs_n[None, :] * stride_wn
    before, times = tl.load(where, mask=mask, other=0.0), tl.load(scale).to(tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, r, R):
        offs_r = start + tl.arange(0, R)
        left = b + offs_m[:, None] * stride_bm + offs_r[None, :] * stride_br
        right = a + offs_r[:, None] * stride_ar + offs_n[None, :] * stride_an
        up = tl.load(left, mask=(offs_m[:, None] < M) & (offs_r[None, :] < r), other=0.0)
        down = tl.load(right, mask=(offs_r[:, None] < r) & (offs_n[None, :] < N), other=0.0)
        # as in `update.sum`, the number goes into a factor: the product alone may be out of range
        up = up.to(tl.float32) * times
        # "ieee" is float32 where TF32 would round the factors
        acc = tl.dot(up, down.to(tl.float32), acc, input_precision="ieee")
    acc += before.to(tl.float32)
    tl.store(total + offs_m[:, None].to(tl.int64) * N + offs_n[None, :], acc, mask=mask)
