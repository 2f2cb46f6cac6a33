"""Triton kernels around the convolutions of a 16-bit layer on CUDA, which cuDNN computes.

One accumulator must take both products, or a small update is rounded away. So both go into one
convolution: ``[W, scale · B]`` of ``[x, t]``, where ``t = conv(x, A)`` joins the input as more
channels and B is the middle of their kernel; and for the gradient of the input, ``[W; A]``
transposed of ``[dY, v]``, where ``v = scale · Bᵀ dY``.

Tensor cores take channels that are the last in memory. cuDNN lays out anew whatever comes in
another format, each operand of each convolution by itself, so the kernels do that on their way:

1. `prepare`: ``wide = [x, 0]``, the joined weight and A's kernel;
2. cuDNN: t; `put`: t into wide; cuDNN: y; `back`: y in the caller's format;
3. in the backward `spread`: ``wide = [dY, v, 0]`` and v by one read of dY, the joined weight, parts
   of B's gradient, and x for cuDNN; cuDNN: the gradients of x and A; `back`: all three as the
   caller has them.

The kernels are deterministic; cuDNN is as torch's settings ask of it. Images are ``[batch,
channels, P positions]``, in memory with the channels last where `LAST`; weights are ``[out, inner,
positions]`` likewise. What is made for cuDNN always has them last. ``R`` is the padded rank;
`added` channels are the ranks and, up to what cuDNN is quick at, zeros. The first of these, if
there is one, is 1 where there is a bias, which so is added before the rounding, and without a pass
of its own.
"""

import triton
import triton.language as tl


@triton.jit
def _places(images, image, channels, P, c, p, LAST: tl.constexpr):
    """Addresses ``[c, p]`` of one of the images."""
    start = images + tl.cast(image, tl.int64) * channels * P
    if LAST:
        return start + p[None, :] * channels + c[:, None]
    else:
        return start + c[:, None] * P + p[None, :]


@triton.jit
def _block(program, channels, P, BC: tl.constexpr, BP: tl.constexpr):
    """The image of a program, and its block's channels and positions."""
    blocks, parts = tl.cdiv(P, BP), tl.cdiv(channels, BC)
    c = program // blocks % parts * BC + tl.arange(0, BC)
    return program // (parts * blocks), c, program % blocks * BP + tl.arange(0, BP)


@triton.jit
def _copy(
    source, target, program, channels, more, ones, P,
    FROM_LAST: tl.constexpr, TO_LAST: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """A block of images in another format, or with zeros behind their channels up to `more`, but
    for the channel of `ones`."""
    image, c, p = _block(program, more, P, BC, BP)
    where = _places(source, image, channels, P, c, p, FROM_LAST)
    value = tl.load(where, mask=(c[:, None] < channels) & (p[None, :] < P), other=0.0)
    value = tl.where(c[:, None] == ones, 1.0, value).to(value.dtype)
    where = _places(target, image, more, P, c, p, TO_LAST)
    tl.store(where, value, mask=(c[:, None] < more) & (p[None, :] < P))


@triton.jit
def _join_row(
    weight, b, scale, bias, joined, row, c, p, inner, added, positions, r, middle, b_dim, b_rank,
    BIAS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """A block of the row ``[W, scale · B, bias, 0]``, what is added at the `middle` position."""
    rank, channels = c - inner, inner + added
    where = _places(weight, row, inner, positions, c, p, LAST)
    value = tl.load(where, mask=(rank[:, None] < 0) & (p[None, :] < positions), other=0.0)
    if added > 0:
        more = tl.load(b + row * b_dim + rank * b_rank, mask=(rank >= 0) & (rank < r), other=0.0)
        more = (more.to(tl.float32) * tl.load(scale).to(tl.float32)).to(value.dtype)
        if BIAS:
            more = tl.where(rank == r, tl.load(bias + row), more)
        value = tl.where((rank[:, None] >= 0) & (p[None, :] == middle), more[:, None], value)
    where = _places(joined, row, channels, positions, c, p, True)
    tl.store(where, value, mask=(c[:, None] < channels) & (p[None, :] < positions))


@triton.jit
def _join_rank(a, down, rank, c, p, inner, added, positions, r, a_rank, a_in):
    """A block of a row of A's kernel, with zeros from the rank r and from the `inner` channel."""
    channels = inner + added
    source = a + rank * a_rank + (c[:, None] * positions + p[None, :]) * a_in
    here = (c[:, None] < inner) & (p[None, :] < positions)
    value = tl.load(source, mask=here & (rank < r), other=0.0)
    where = _places(down, rank, channels, positions, c, p, True)
    here = (c[:, None] < channels) & (p[None, :] < positions)
    tl.store(where, value.to(down.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["r", "middle"])
def prepare(
    x, weight, a, b, scale, bias, wide, joined, down,
    out, inner, added, positions, P, r, middle, a_rank, a_in, b_dim, b_rank,
    BIAS: tl.constexpr, LAST: tl.constexpr, WEIGHT_LAST: tl.constexpr, R: tl.constexpr,
    WC: tl.constexpr, WP: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """``wide = [x, 0]``, ``joined[out, inner + added, positions]`` and A's kernel ``down[R, inner +
    added, positions]``."""
    program = tl.program_id(0)
    row, c, k = _block(program, inner + added, positions, WC, WP)
    if row < out:
        _join_row(
            weight, b, scale, bias, joined, row, c, k,
            inner, added, positions, r, middle, b_dim, b_rank, BIAS, WEIGHT_LAST,
        )  # fmt: skip
    elif row < out + R:
        _join_rank(a, down, row - out, c, k, inner, added, positions, r, a_rank, a_in)
    else:
        program -= (out + R) * tl.cdiv(inner + added, WC) * tl.cdiv(positions, WP)
        ones = inner + r if BIAS else -1
        _copy(x, wide, program, inner, inner + added, ones, P, LAST, True, BC, BP)


@triton.jit
def _along(at, size, first, step):
    """The output whose middle lies at a position along one axis, and whether there is one."""
    at -= first
    return at // step, (at >= 0) & (at % step == 0) & (at // step < size)


@triton.jit(do_not_specialize=["r"])
def put(
    t, wide, channels, added, P, outputs, r, height, width, out_depth, out_height, out_width,
    depth_first, height_first, width_first, depth_step, height_step, width_step,
    BIAS: tl.constexpr, SAME: tl.constexpr, R: tl.constexpr, BP: tl.constexpr,
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
    if BIAS:
        value = tl.where(rr[:, None] == r, 1.0, value).to(value.dtype)
    where = _places(wide, image, channels + added, P, channels + rr, p, True)
    tl.store(where, value, mask=there[None, :])


@triton.jit
def _spread(
    dy, b, scale, wide, v, program, out, added, P, r, b_dim, b_rank,
    INPUT: tl.constexpr, LAST: tl.constexpr, R: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``v = scale · Bᵀ dy`` at some positions, and where `INPUT` ``wide = [dy, v, 0]``."""
    blocks = tl.cdiv(P, BP)
    image, p = program // blocks, program % blocks * BP + tl.arange(0, BP)
    rr, inside, more = tl.arange(0, R), (p < P)[None, :], out + added
    factor = tl.load(scale).to(tl.float32)
    acc = tl.zeros((R, BP), tl.float32)
    for start in range(0, out, BC):
        c = start + tl.arange(0, BC)
        here = (c[:, None] < out) & inside
        value = tl.load(_places(dy, image, out, P, c, p, LAST), mask=here, other=0.0)
        if INPUT:
            tl.store(_places(wide, image, more, P, c, p, True), value, mask=here)
        where = b + c[None, :] * b_dim + rr[:, None] * b_rank
        thin = tl.load(where, mask=(c[None, :] < out) & (rr[:, None] < r), other=0.0)
        acc = tl.dot((factor * thin.to(tl.float32)).to(value.dtype), value, acc)
    value = acc.to(v.dtype.element_ty)
    tl.store(_places(v, image, R, P, rr, p, True), value, mask=inside)
    if INPUT:
        tl.store(_places(wide, image, more, P, out + rr, p, True), value, mask=inside)
        for start in range(R, added, R):
            c = out + start + rr
            where = _places(wide, image, more, P, c, p, True)
            tl.store(where, tl.zeros_like(value), mask=inside & (c[:, None] < more))


@triton.jit
def _part(
    dy, t, part, block, group, low, high, out, P,
    LAST: tl.constexpr, R: tl.constexpr, BO: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """A block of a group's part of ``dy · t``, over the blocks of positions from low to high."""
    c, rr, blocks = block * BO + tl.arange(0, BO), tl.arange(0, R), tl.cdiv(P, BP)
    acc = tl.zeros((BO, R), tl.float32)
    for at in range(low, high):
        image, p = at // blocks, at % blocks * BP + tl.arange(0, BP)
        here = (c[:, None] < out) & (p[None, :] < P)
        left = tl.load(_places(dy, image, out, P, c, p, LAST), mask=here, other=0.0)
        rows = t + (tl.cast(image, tl.int64) * P + p)[:, None] * R + rr[None, :]
        acc = tl.dot(left, tl.load(rows, mask=p[:, None] < P, other=0.0), acc)
    where = part + tl.cast(group, tl.int64) * out * R + c[:, None] * R + rr[None, :]
    tl.store(where, acc, mask=c[:, None] < out)


@triton.jit(do_not_specialize=["r", "tiles", "groups", "each", "batch"])
def spread(
    dy, t, weight, a, b, scale, x, wide, tall, x_last, v, part,
    tiles, groups, each, batch, out, inner, added, positions, P, x_positions, r,
    a_rank, a_in, b_dim, b_rank,
    INPUT: tl.constexpr, LAST: tl.constexpr, WEIGHT_LAST: tl.constexpr, R: tl.constexpr,
    BO: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, GP: tl.constexpr, WC: tl.constexpr,
    WP: tl.constexpr, XC: tl.constexpr, XP: tl.constexpr,
):  # fmt: skip
    """In `tiles` programs ``v[batch, R, P]`` and ``wide = [dy, v, 0]``; in `groups` for each block
    of outputs ``part[groups, out, R]``; where `INPUT` ``tall = [W; A; 0]``; and in the rest
    `x_last`, x with its channels last. Without `INPUT` no wide and no tall."""
    program = tl.program_id(0)
    sums = groups * tl.cdiv(out, BO)
    rows = (out + added) * tl.cdiv(inner, WC) * tl.cdiv(positions, WP) if INPUT else 0
    if program < tiles:
        _spread(
            dy, b, scale, wide, v, program, out, added, P, r, b_dim, b_rank, INPUT, LAST, R, BP, BC
        )
    elif program < tiles + sums:
        block, group = (program - tiles) // groups, (program - tiles) % groups
        high = min(group * each + each, batch * tl.cdiv(P, GP))
        _part(dy, t, part, block, group, group * each, high, out, P, LAST, R, BO, GP)
    elif program < tiles + sums + rows:
        row, c, k = _block(program - tiles - sums, inner, positions, WC, WP)
        if row < out:
            _join_row(
                weight, b, scale, b, tall, row, c, k, inner, 0, positions, 0, 0, 0, 0,
                False, WEIGHT_LAST,
            )  # fmt: skip
        else:
            behind = tall + tl.cast(out, tl.int64) * inner * positions
            _join_rank(a, behind, row - out, c, k, inner, 0, positions, r, a_rank, a_in)
    else:
        program -= tiles + sums + rows
        _copy(x, x_last, program, inner, inner, -1, x_positions, False, True, XC, XP)


@triton.jit
def _add_parts(
    part, db, scale, program, out, groups, r,
    SCALED: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A part of B's gradient: the sum of all groups."""
    at, group = program * BLOCK + tl.arange(0, BLOCK), tl.arange(0, GROUPS)
    where = part + group[:, None] * (out * R) + at[None, :]
    here = (group[:, None] < groups) & (at[None, :] < out * R)
    value = tl.sum(tl.load(where, mask=here, other=0.0), 0)
    if SCALED:
        value *= tl.load(scale).to(tl.float32)
    row, rank = at // R, at % R
    tl.store(db + row * r + rank, value, mask=(at < out * R) & (rank < r))


@triton.jit(do_not_specialize=["tiles", "rows", "groups", "r"])
def back(
    y, result, a_last, da, part, db, scale,
    tiles, rows, channels, P, inner, positions, out, groups, r,
    SCALED: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr, SUMS: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """In `tiles` programs the images of y with the channels before the positions; for each of
    `rows` ``da[rows, inner · positions]`` of A's kernel with its channels last; and in the rest
    B's gradient ``db[out, r]``."""
    program = tl.program_id(0)
    size = inner * positions
    blocks = tl.cdiv(size, BLOCK)
    if program < tiles:
        _copy(y, result, program, channels, channels, -1, P, True, False, BC, BP)
    elif program < tiles + rows * blocks:
        program -= tiles
        row, at = program // blocks, program % blocks * BLOCK + tl.arange(0, BLOCK)
        start = tl.cast(row, tl.int64) * size
        source = a_last + start + at % positions * inner + at // positions
        value = tl.load(source, mask=at < size)
        tl.store(da + start + at, value.to(da.dtype.element_ty), mask=at < size)
    else:
        program -= tiles + rows * blocks
        _add_parts(part, db, scale, program, out, groups, r, SCALED, R, GROUPS, SUMS)
