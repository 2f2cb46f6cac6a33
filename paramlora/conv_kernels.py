"""Triton kernels around the convolutions of a 16-bit layer on CUDA, which cuDNN computes.

One accumulator must take both products, or a small update is rounded away. So both go into one
convolution: ``[W, B]`` of ``[x, t]``, where ``t = conv(x, A)`` joins the input as more channels and
B is the middle of their kernel; and for the gradient of the input ``[W; A]`` transposed of
``[dY, v]``, where ``v = scale · Bᵀ dY``. `prepare` and `beside` make what the forward's two
convolutions take; `spread` what the backward's two take, and the gradient of B. Every result is
deterministic.

Images are ``[batch, channels, P positions]``; in memory the channels come last where `LAST`, else
the positions do. A weight is ``[out, inner, positions]`` likewise. ``R`` is the padded rank. `kept`
goes from a forward to its backwards: ``scale · Bᵀ[R, out]``, ``t[batch · P, R]``, and the counts of
`kernels.store_sums`. `added` channels are the ranks and, up to what cuDNN is quick at, zeros.
"""

import triton
import triton.language as tl

from paramlora import served
from paramlora.kernels import store_sums

DEEP = tl.constexpr(served.DEEP)


@triton.jit
def _inner(at, channels, positions, LAST: tl.constexpr):
    """Channel and position of the elements `at` of a weight's row."""
    if LAST:
        return at % channels, at // channels
    else:
        return at // positions, at % positions


@triton.jit
def _join_row(
    weight, b, scale, joined, row, at, inner, added, positions, r, middle, b_dim, b_rank,
    LAST: tl.constexpr,
):  # fmt: skip
    """A part of the row ``[W, scale · B, 0]``, B at the `middle` position."""
    channels = inner + added
    channel, position = _inner(at, channels, positions, LAST)
    rank, here = channel - inner, at < channels * positions
    inside = position * inner + channel if LAST else at
    source = weight + tl.cast(row, tl.int64) * inner * positions + inside
    value = tl.load(source, mask=here & (rank < 0), other=0.0)
    if added > 0:
        update = here & (rank >= 0) & (rank < r) & (position == middle)
        more = tl.load(b + row * b_dim + rank * b_rank, mask=update, other=0.0).to(tl.float32)
        factor = tl.load(scale).to(tl.float32)
        value = (value.to(tl.float32) + factor * more).to(value.dtype)
    tl.store(joined + tl.cast(row, tl.int64) * channels * positions + at, value, mask=here)


@triton.jit
def _join_rank(
    a, down, rank, at, inner, positions, r, a_rank, a_in, LAST: tl.constexpr
):  # fmt: skip
    """A part of the row of A's kernel, zeros from the rank r on."""
    channel, position = _inner(at, inner, positions, LAST)
    here = at < inner * positions
    source = a + rank * a_rank + (channel * positions + position) * a_in
    value = tl.load(source, mask=here & (rank < r), other=0.0)
    target = down + tl.cast(rank, tl.int64) * inner * positions + at
    tl.store(target, value.to(down.dtype.element_ty), mask=here)


@triton.jit
def _counts(kept, out, rows, R: tl.constexpr):
    """The counts of `store_sums` in `kept`."""
    end = kept + tl.cast(out + rows, tl.int64) * R
    return end.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit(do_not_specialize=["r", "middle", "rows"])
def prepare(
    weight, a, b, scale, joined, down, kept,
    out, inner, added, positions, r, middle, a_rank, a_in, b_dim, b_rank, rows,
    LAST: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``joined[out, inner + added, positions]`` and ``down[R, inner, positions]``, A's kernel; of
    `kept` B and the counts."""
    blocks = tl.cdiv((inner + added) * positions, BLOCK)
    row = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    at = block * BLOCK + tl.arange(0, BLOCK)
    if row < out:
        _join_row(
            weight, b, scale, joined, row, at,
            inner, added, positions, r, middle, b_dim, b_rank, LAST,
        )  # fmt: skip
        if block == 0:
            rr = tl.arange(0, R)
            value = tl.load(b + row * b_dim + rr * b_rank, mask=rr < r, other=0.0).to(tl.float32)
            value *= tl.load(scale).to(tl.float32)
            tl.store(kept + rr * out + row, value.to(kept.dtype.element_ty))
            if row % DEEP == 0:
                tl.store(_counts(kept, out, rows, R) + row // DEEP, 0)
    else:
        _join_rank(a, down, row - out, at, inner, positions, r, a_rank, a_in, LAST)


@triton.jit
def _places(images, image, channels, P, c, p, LAST: tl.constexpr):
    """Addresses ``[c, p]`` of one of the images."""
    start = images + tl.cast(image, tl.int64) * channels * P
    if LAST:
        return start + p[None, :] * channels + c[:, None]
    else:
        return start + c[:, None] * P + p[None, :]


@triton.jit
def _copy(source, target, image, channels, more, P, c, p, LAST: tl.constexpr):
    """Channels c at positions p of an image into one of `more` channels."""
    here = (c[:, None] < channels) & (p[None, :] < P)
    value = tl.load(_places(source, image, channels, P, c, p, LAST), mask=here)
    tl.store(_places(target, image, more, P, c, p, LAST), value, mask=here)


@triton.jit
def _add(
    value, target, image, channels, added, P, p, LAST: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """``value[R, p]`` behind the channels of an image, and zeros behind it."""
    rr, more = tl.arange(0, R), channels + added
    here = (p < P)[None, :]
    tl.store(_places(target, image, more, P, channels + rr, p, LAST), value, mask=here)
    zeros = tl.zeros_like(value)
    for start in range(R, added, R):
        c = channels + start + rr
        where = _places(target, image, more, P, c, p, LAST)
        tl.store(where, zeros, mask=here & (c[:, None] < more))


@triton.jit
def _along(at, size, first, step):
    """The output whose middle lies at a position along one axis, and whether there is one."""
    at -= first
    return at // step, (at >= 0) & (at % step == 0) & (at // step < size)


@triton.jit
def beside(
    x, t, wide, u,
    channels, added, P, outputs, height, width, out_depth, out_height, out_width,
    depth_first, height_first, width_first, depth_step, height_step, width_step,
    LAST: tl.constexpr, T_LAST: tl.constexpr, SAME: tl.constexpr, R: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """``wide = [x, t, 0]``, in which ``t[batch, R, outputs]`` lies where the middle of a kernel
    does, and ``u[batch · outputs, R]``, t with its ranks last; `SAME`: all lie where they did."""
    blocks, parts = tl.cdiv(P, BP), tl.cdiv(channels, BC) + 1
    program = tl.program_id(0)
    image, part, block = program // (parts * blocks), program // blocks % parts, program % blocks
    p = block * BP + tl.arange(0, BP)
    if part > 0:
        c = (part - 1) * BC + tl.arange(0, BC)
        _copy(x, wide, image, channels, channels + added, P, c, p, LAST)
    else:
        rr, o, there = tl.arange(0, R), p, p < P
        if not SAME:
            d, in_depth = _along(p // (height * width), out_depth, depth_first, depth_step)
            h, in_height = _along(p // width % height, out_height, height_first, height_step)
            w, in_width = _along(p % width, out_width, width_first, width_step)
            there &= in_depth & in_height & in_width
            o = (d * out_height + h) * out_width + w
        where = _places(t, image, R, outputs, rr, o, T_LAST)
        value = tl.load(where, mask=there[None, :], other=0.0)
        _add(value, wide, image, channels, added, P, p, LAST, R)
        row = tl.cast(image, tl.int64) * outputs + o
        tl.store(u + row[None, :] * R + rr[:, None], value, mask=there[None, :])


@triton.jit
def _spread(
    dy, f, wide, v, image, p, out, added, P,
    INPUT: tl.constexpr, LAST: tl.constexpr, WIDE_LAST: tl.constexpr, V_LAST: tl.constexpr,
    R: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``v = f @ dy`` at some positions, and where `INPUT` ``wide = [dy, v, 0]``: one read of dy."""
    rr, inside = tl.arange(0, R), (p < P)[None, :]
    acc = tl.zeros((R, BP), tl.float32)
    for start in range(0, out, BC):
        c = start + tl.arange(0, BC)
        here = (c[:, None] < out) & inside
        value = tl.load(_places(dy, image, out, P, c, p, LAST), mask=here, other=0.0)
        if INPUT:
            tl.store(_places(wide, image, out + added, P, c, p, WIDE_LAST), value, mask=here)
        thin = tl.load(f + rr[:, None] * out + c[None, :], mask=c[None, :] < out, other=0.0)
        acc = tl.dot(thin, value, acc)
    value = acc.to(v.dtype.element_ty)
    tl.store(_places(v, image, R, P, rr, p, V_LAST), value, mask=inside)
    if INPUT:
        _add(value, wide, image, out, added, P, p, WIDE_LAST, R)


@triton.jit
def _gradient(
    dy, u, part, db, scale, count, block, group, groups, low, high, out, r, P,
    LAST: tl.constexpr, SCALED: tl.constexpr, R: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """A block of ``db[out, r] = dy · u`` over the blocks of positions from low to high."""
    c, rr, blocks = block * DEEP + tl.arange(0, DEEP), tl.arange(0, R), tl.cdiv(P, BP)
    acc = tl.zeros((DEEP, R), tl.float32)
    for at in range(low, high):
        image, p = at // blocks, at % blocks * BP + tl.arange(0, BP)
        here = (c[:, None] < out) & (p[None, :] < P)
        left = tl.load(_places(dy, image, out, P, c, p, LAST), mask=here, other=0.0)
        rows = tl.cast(image, tl.int64) * P + p
        where = u + rows[:, None] * R + rr[None, :]
        acc = tl.dot(left, tl.load(where, mask=p[:, None] < P, other=0.0), acc)
    store_sums(
        acc, c, c < out, part, count, group, groups, db, db, scale, 1.0, 0, out, r, SCALED, R
    )


@triton.jit(do_not_specialize=["r", "tiles", "groups", "each", "batch"])
def spread(
    dy, kept, weight, a, wide, tall, v, db, part, scale,
    tiles, groups, each, batch, out, inner, added, positions, P, r, a_rank, a_in,
    INPUT: tl.constexpr, SCALED: tl.constexpr, LAST: tl.constexpr, WIDE_LAST: tl.constexpr,
    V_LAST: tl.constexpr, WEIGHT_LAST: tl.constexpr, R: tl.constexpr, BP: tl.constexpr,
    BC: tl.constexpr, GP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """In `tiles` programs ``v[batch, R, P]`` and ``wide = [dy, v, 0]``; in `groups` for each block
    of outputs the gradient of B; and in the rest ``tall = [W; A; 0]``."""
    program = tl.program_id(0)
    blocks = tl.cdiv(out, DEEP)
    if program < tiles:
        many = tl.cdiv(P, BP)
        p = program % many * BP + tl.arange(0, BP)
        _spread(
            dy, kept, wide, v, program // many, p, out, added, P,
            INPUT, LAST, WIDE_LAST, V_LAST, R, BP, BC,
        )  # fmt: skip
    elif program < tiles + groups * blocks:
        block, group = (program - tiles) // groups, (program - tiles) % groups
        count = _counts(kept, out, batch * P, R) + block
        high = min(group * each + each, batch * tl.cdiv(P, GP))
        _gradient(
            dy, kept + tl.cast(out, tl.int64) * R, part, db, scale, count,
            block, group, groups, group * each, high, out, r, P, LAST, SCALED, R, GP,
        )  # fmt: skip
    else:
        program -= tiles + groups * blocks
        parts = tl.cdiv(inner * positions, BLOCK)
        row, at = program // parts, program % parts * BLOCK + tl.arange(0, BLOCK)
        if row < out:
            _join_row(
                weight, weight, scale, tall, row, at,
                inner, 0, positions, 0, 0, 0, 0, WEIGHT_LAST,
            )  # fmt: skip
        else:
            behind = tall + tl.cast(out, tl.int64) * inner * positions
            _join_rank(a, behind, row - out, at, inner, positions, r, a_rank, a_in, WEIGHT_LAST)
