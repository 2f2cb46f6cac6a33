"""Triton kernels around the convolutions of a 16-bit layer on CUDA, which cuDNN computes.

One accumulator must take both products, or a small update is rounded away. So both go into one
convolution: ``[W, scale · B]`` of ``[x, t]``, where ``t = conv(x, A)`` joins the input as more
channels and B is the middle of their kernel; and for the gradient of the input, ``[W; A]``
transposed of ``[dY, v]``, where ``v = scale · Bᵀ dY``.

Tensor cores take channels that are the last in memory. cuDNN lays out anew whatever comes in
another format, each operand of each convolution by itself, so the kernels do that on their way:

1. `prepare`: ``wide = [x, 0]``, the joined weight, A's kernel, and Bᵀ for the backward;
2. cuDNN: t; `put`: t into wide; cuDNN: y; `back`: y in the caller's format;
3. in the backward `spread`: ``wide = [dY, v, 0]`` and v by one read of dY, the joined weight, the
   gradient of B, and x for cuDNN; cuDNN: the gradients of x and A; `back`: both as the caller has
   them.

Every result is deterministic. Images are ``[batch, channels, P positions]``, in memory with the
channels last where `LAST`; weights are ``[out, inner, positions]`` likewise. What is made for cuDNN
always has them last. ``R`` is the padded rank; `added` channels are the ranks and, up to what cuDNN
is quick at, zeros. `kept` goes from a forward to its backwards: ``scale · Bᵀ[R, out]`` and the
counts of `kernels.store_sums`.
"""

import triton
import triton.language as tl

from paramlora import served
from paramlora.kernels import store_sums

DEEP = tl.constexpr(served.DEEP)


@triton.jit
def _join_row(
    weight, b, scale, joined, row, at, inner, added, positions, r, middle, b_dim, b_rank,
    LAST: tl.constexpr,
):  # fmt: skip
    """A part of the row ``[W, scale · B, 0]``, B at the `middle` position."""
    channels = inner + added
    channel, position = at % channels, at // channels
    rank, here = channel - inner, position < positions
    inside = position * inner + channel if LAST else channel * positions + position
    source = weight + tl.cast(row, tl.int64) * inner * positions + inside
    value = tl.load(source, mask=here & (rank < 0), other=0.0)
    if added > 0:
        update = here & (rank >= 0) & (rank < r) & (position == middle)
        more = tl.load(b + row * b_dim + rank * b_rank, mask=update, other=0.0).to(tl.float32)
        factor = tl.load(scale).to(tl.float32)
        value = (value.to(tl.float32) + factor * more).to(value.dtype)
    tl.store(joined + tl.cast(row, tl.int64) * channels * positions + at, value, mask=here)


@triton.jit
def _join_rank(a, down, rank, at, inner, added, positions, r, a_rank, a_in):
    """A part of the row of A's kernel, with zeros from the rank r and from the `inner` channel."""
    channels = inner + added
    channel, position = at % channels, at // channels
    here = position < positions
    source = a + rank * a_rank + (channel * positions + position) * a_in
    value = tl.load(source, mask=here & (rank < r) & (channel < inner), other=0.0)
    target = down + tl.cast(rank, tl.int64) * channels * positions + at
    tl.store(target, value.to(down.dtype.element_ty), mask=here)


@triton.jit
def _counts(kept, out, R: tl.constexpr):
    """The counts of `store_sums` in `kept`."""
    return (kept + out * R).to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def _places(images, image, channels, P, c, p, LAST: tl.constexpr):
    """Addresses ``[c, p]`` of one of the images."""
    start = images + tl.cast(image, tl.int64) * channels * P
    if LAST:
        return start + p[None, :] * channels + c[:, None]
    else:
        return start + c[:, None] * P + p[None, :]


@triton.jit
def _copy(
    source, target, program, channels, more, P,
    FROM_LAST: tl.constexpr, TO_LAST: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """A block of images in another format, or with zeros behind their channels up to `more`."""
    blocks, parts = tl.cdiv(P, BP), tl.cdiv(more, BC)
    image, part, block = program // (parts * blocks), program // blocks % parts, program % blocks
    c, p = part * BC + tl.arange(0, BC), block * BP + tl.arange(0, BP)
    where = _places(source, image, channels, P, c, p, FROM_LAST)
    value = tl.load(where, mask=(c[:, None] < channels) & (p[None, :] < P), other=0.0)
    where = _places(target, image, more, P, c, p, TO_LAST)
    tl.store(where, value, mask=(c[:, None] < more) & (p[None, :] < P))


@triton.jit(do_not_specialize=["r", "middle"])
def prepare(
    x, weight, a, b, scale, wide, joined, down, kept,
    out, inner, added, positions, P, r, middle, a_rank, a_in, b_dim, b_rank,
    LAST: tl.constexpr, WEIGHT_LAST: tl.constexpr, R: tl.constexpr, BC: tl.constexpr,
    BP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``wide = [x, 0]``, ``joined[out, inner + added, positions]``, A's kernel ``down[R, inner +
    added, positions]``, and `kept`."""
    blocks = tl.cdiv((inner + added) * positions, BLOCK)
    program = tl.program_id(0)
    row, block = program // blocks, program % blocks
    at = block * BLOCK + tl.arange(0, BLOCK)
    if row < out:
        _join_row(
            weight, b, scale, joined, row, at,
            inner, added, positions, r, middle, b_dim, b_rank, WEIGHT_LAST,
        )  # fmt: skip
        if block == 0:
            rr = tl.arange(0, R)
            value = tl.load(b + row * b_dim + rr * b_rank, mask=rr < r, other=0.0).to(tl.float32)
            value *= tl.load(scale).to(tl.float32)
            tl.store(kept + rr * out + row, value.to(kept.dtype.element_ty))
            if row % DEEP == 0:
                tl.store(_counts(kept, out, R) + row // DEEP, 0)
    elif row < out + R:
        _join_rank(a, down, row - out, at, inner, added, positions, r, a_rank, a_in)
    else:
        program -= (out + R) * blocks
        _copy(x, wide, program, inner, inner + added, P, LAST, True, BC, BP)


@triton.jit
def _along(at, size, first, step):
    """The output whose middle lies at a position along one axis, and whether there is one."""
    at -= first
    return at // step, (at >= 0) & (at % step == 0) & (at // step < size)


@triton.jit
def put(
    t, wide, channels, added, P, outputs, height, width, out_depth, out_height, out_width,
    depth_first, height_first, width_first, depth_step, height_step, width_step,
    SAME: tl.constexpr, R: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """``t[batch, outputs, R]`` into `wide`, behind its channels, where the middle of a kernel lies;
    `SAME`: each output there where the input is."""
    blocks = tl.cdiv(P, BP)
    image, p = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BP + tl.arange(0, BP)
    rr, o, there = tl.arange(0, R), p, p < P
    if not SAME:
        d, in_depth = _along(p // (height * width), out_depth, depth_first, depth_step)
        h, in_height = _along(p // width % height, out_height, height_first, height_step)
        w, in_width = _along(p % width, out_width, width_first, width_step)
        there &= in_depth & in_height & in_width
        o = (d * out_height + h) * out_width + w
    value = tl.load(_places(t, image, R, outputs, rr, o, True), mask=there[None, :])
    where = _places(wide, image, channels + added, P, channels + rr, p, True)
    tl.store(where, value, mask=there[None, :])


@triton.jit
def _spread(
    dy, f, wide, v, program, out, added, P, INPUT: tl.constexpr, LAST: tl.constexpr,
    R: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``v = f @ dy`` at some positions, and where `INPUT` ``wide = [dy, v, 0]``."""
    blocks = tl.cdiv(P, BP)
    image, p = program // blocks, program % blocks * BP + tl.arange(0, BP)
    rr, inside, more = tl.arange(0, R), (p < P)[None, :], out + added
    acc = tl.zeros((R, BP), tl.float32)
    for start in range(0, out, BC):
        c = start + tl.arange(0, BC)
        here = (c[:, None] < out) & inside
        value = tl.load(_places(dy, image, out, P, c, p, LAST), mask=here, other=0.0)
        if INPUT:
            tl.store(_places(wide, image, more, P, c, p, True), value, mask=here)
        thin = tl.load(f + rr[:, None] * out + c[None, :], mask=c[None, :] < out, other=0.0)
        acc = tl.dot(thin, value, acc)
    value = acc.to(v.dtype.element_ty)
    tl.store(_places(v, image, R, P, rr, p, True), value, mask=inside)
    if INPUT:
        tl.store(_places(wide, image, more, P, out + rr, p, True), value, mask=inside)
        for start in range(R, added, R):
            c = out + start + rr
            where = _places(wide, image, more, P, c, p, True)
            tl.store(where, tl.zeros_like(value), mask=inside & (c[:, None] < more))


@triton.jit
def _gradient(
    dy, t, part, db, scale, count, block, group, groups, low, high, out, r, P,
    LAST: tl.constexpr, SCALED: tl.constexpr, R: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """A block of ``db[out, r] = dy · t`` over the blocks of positions from low to high."""
    c, rr, blocks = block * DEEP + tl.arange(0, DEEP), tl.arange(0, R), tl.cdiv(P, BP)
    acc = tl.zeros((DEEP, R), tl.float32)
    for at in range(low, high):
        image, p = at // blocks, at % blocks * BP + tl.arange(0, BP)
        here = (c[:, None] < out) & (p[None, :] < P)
        left = tl.load(_places(dy, image, out, P, c, p, LAST), mask=here, other=0.0)
        rows = t + (tl.cast(image, tl.int64) * P + p)[:, None] * R + rr[None, :]
        acc = tl.dot(left, tl.load(rows, mask=p[:, None] < P, other=0.0), acc)
    store_sums(
        acc, c, c < out, part, count, group, groups, db, db, scale, 1.0, 0, out, r, SCALED, R
    )


@triton.jit(do_not_specialize=["r", "tiles", "groups", "each", "batch"])
def spread(
    dy, kept, t, weight, a, x, wide, tall, x_last, v, db, part, scale,
    tiles, groups, each, batch, out, inner, added, positions, P, x_positions, r, a_rank, a_in,
    INPUT: tl.constexpr, SCALED: tl.constexpr, LAST: tl.constexpr, WEIGHT_LAST: tl.constexpr,
    R: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, GP: tl.constexpr, XP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """In `tiles` programs ``v[batch, R, P]`` and ``wide = [dy, v, 0]``; in `groups` for each block
    of outputs the gradient of B; where `INPUT` ``tall = [W; A; 0]``; and in the rest `x_last`, x
    with its channels last. Without `INPUT` no wide and no tall."""
    program = tl.program_id(0)
    blocks = tl.cdiv(out, DEEP)
    parts = tl.cdiv(inner * positions, BLOCK)
    rows = (out + added) * parts if INPUT else 0
    if program < tiles:
        _spread(dy, kept, wide, v, program, out, added, P, INPUT, LAST, R, BP, BC)
    elif program < tiles + groups * blocks:
        block, group = (program - tiles) // groups, (program - tiles) % groups
        high = min(group * each + each, batch * tl.cdiv(P, GP))
        _gradient(
            dy, t, part, db, scale, _counts(kept, out, R) + block,
            block, group, groups, group * each, high, out, r, P, LAST, SCALED, R, GP,
        )  # fmt: skip
    elif program < tiles + groups * blocks + rows:
        program -= tiles + groups * blocks
        row, at = program // parts, program % parts * BLOCK + tl.arange(0, BLOCK)
        if row < out:
            _join_row(
                weight, weight, scale, tall, row, at, inner, 0, positions, 0, 0, 0, 0, WEIGHT_LAST
            )
        else:
            behind = tall + tl.cast(out, tl.int64) * inner * positions
            _join_rank(a, behind, row - out, at, inner, 0, positions, r, a_rank, a_in)
    else:
        program -= tiles + groups * blocks + rows
        _copy(x, x_last, program, inner, inner, x_positions, False, True, BC, XP)


@triton.jit(do_not_specialize=["tiles"])
def back(
    y, result, a_last, da, tiles, channels, P, inner, positions,
    BC: tl.constexpr, BP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """In `tiles` programs the images of y with the channels before the positions; in the rest
    ``da[r, inner · positions]`` of A's kernel with its channels last."""
    program = tl.program_id(0)
    if program < tiles:
        _copy(y, result, program, channels, channels, P, True, False, BC, BP)
    else:
        program -= tiles
        size = inner * positions
        parts = tl.cdiv(size, BLOCK)
        rank, at = program // parts, program % parts * BLOCK + tl.arange(0, BLOCK)
        start = tl.cast(rank, tl.int64) * size
        source = a_last + start + at % positions * inner + at // positions
        value = tl.load(source, mask=at < size)
        tl.store(da + start + at, value.to(da.dtype.element_ty), mask=at < size)
