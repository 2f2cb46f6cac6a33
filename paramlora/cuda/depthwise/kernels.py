"""Triton kernels of a 16-bit convolution on CUDA whose every channel is convolved by itself.

There is nothing to multiply by low-rank factors that a channel's few taps are not as quick to take
whole: `add` forms the kernels ``W + scale · B A`` once, in float32, and the rest computes in
float32 from them, so that nothing is rounded but the output. Planes are the images' channels, in
memory one after the other, of three axes; a program takes `BH` rows by `BW` columns of one. Every
result is deterministic.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["r"])
def add(
    weight, a, b, scale, total,
    channels, taps, r, w_channel, w_tap, a_rank, a_tap, b_channel, b_rank,
    BC: tl.constexpr, BT: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """``total[channels, taps] = W + scale · B A`` in float32, in full precision."""
    c, t = tl.program_id(0) * BC + tl.arange(0, BC), tl.arange(0, BT)
    here = (c[:, None] < channels) & (t[None, :] < taps)
    rows = weight + c[:, None].to(tl.int64) * w_channel + t[None, :] * w_tap
    acc = tl.zeros((BC, BT), tl.float32)
    for start in range(0, r, R):
        rr = start + tl.arange(0, R)
        left, right = b + c[:, None] * b_channel + rr[None, :] * b_rank, a + rr[:, None] * a_rank
        up = tl.load(left, mask=(c[:, None] < channels) & (rr[None, :] < r), other=0.0)
        right += t[None, :] * a_tap
        down = tl.load(right, mask=(rr[:, None] < r) & (t[None, :] < taps), other=0.0)
        acc = tl.dot(up.to(tl.float32), down.to(tl.float32), acc, input_precision="ieee")
    acc = tl.load(rows, mask=here, other=0.0).to(tl.float32) + acc * tl.load(scale).to(tl.float32)
    tl.store(total + c[:, None].to(tl.int64) * taps + t[None, :], acc, mask=here)


@triton.jit
def _block(program, depth, height, width, BH: tl.constexpr, BW: tl.constexpr):
    """The plane of a program, and its slice, rows ``[BH, 1]`` and columns ``[1, BW]`` there."""
    down, across = tl.cdiv(height, BH), tl.cdiv(width, BW)
    h = program // across % down * BH + tl.arange(0, BH)
    w = program % across * BW + tl.arange(0, BW)
    slices = program // (across * down)
    return slices // depth, slices % depth, h[:, None], w[None, :]


@triton.jit
def _read(at, tap, size, step, padding, dilation, BACK: tl.constexpr):
    """Where a tap reads for a result along one axis, and whether there is something; `BACK`: the
    result is a gradient of what is read otherwise."""
    if BACK:
        at += padding - tap * dilation
        return at // step, (at >= 0) & (at % step == 0) & (at // step < size)
    at = at * step + tap * dilation - padding
    return at, (at >= 0) & (at < size)


@triton.jit
def _convolve(
    source, total, bias, result, program, channels,
    in_depth, in_height, in_width, depth, height, width,
    depth_step, height_step, width_step, depth_padding, height_padding, width_padding,
    depth_dilation, height_dilation, width_dilation,
    BIAS: tl.constexpr, BACK: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    BH: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """A block of a plane ``[depth, height, width]`` of the convolution, or where `BACK` of its
    gradient."""
    plane, d, h, w = _block(program, depth, height, width, BH, BW)
    c = plane % channels
    start = source + plane.to(tl.int64) * in_depth * in_height * in_width
    taps = total + c.to(tl.int64) * (KD * KH * KW)
    acc = tl.zeros((BH, BW), tl.float32)
    for kd in tl.static_range(KD):
        dd, in_d = _read(d, kd, in_depth, depth_step, depth_padding, depth_dilation, BACK)
        for kh in tl.static_range(KH):
            hh, in_h = _read(h, kh, in_height, height_step, height_padding, height_dilation, BACK)
            row = start + (dd * in_height + hh) * in_width
            for kw in tl.static_range(KW):
                ww, in_w = _read(w, kw, in_width, width_step, width_padding, width_dilation, BACK)
                value = tl.load(row + ww, mask=in_d & in_h & in_w, other=0.0)
                acc += tl.load(taps + (kd * KH + kh) * KW + kw) * value.to(tl.float32)
    if BIAS:
        acc += tl.load(bias + c).to(tl.float32)
    where = result + plane.to(tl.int64) * depth * height * width + (d * height + h) * width + w
    tl.store(where, acc.to(result.dtype.element_ty), mask=(h < height) & (w < width))


@triton.jit
def _correlate(
    dy, x, part, program, channels,
    in_depth, in_height, in_width, depth, height, width,
    depth_step, height_step, width_step, depth_padding, height_padding, width_padding,
    depth_dilation, height_dilation, width_dilation,
    SPLIT: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    BH: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """A block's share of the kernels' gradients: ``part[blocks of a channel, channels, taps]``; of
    all taps, or where `SPLIT` of one row of them."""
    first = 0
    if SPLIT:
        first = program % (KD * KH)
        program //= KD * KH
    plane, d, h, w = _block(program, depth, height, width, BH, BW)
    image, c = plane // channels, plane % channels
    blocks = depth * tl.cdiv(height, BH) * tl.cdiv(width, BW)
    block = (image * blocks + program % blocks).to(tl.int64)
    where = dy + plane.to(tl.int64) * depth * height * width + (d * height + h) * width + w
    gradient = tl.load(where, mask=(h < height) & (w < width), other=0.0).to(tl.float32)
    start = x + plane.to(tl.int64) * in_depth * in_height * in_width
    sums = part + (block * channels + c) * (KD * KH * KW)
    for at in tl.static_range(1 if SPLIT else KD * KH):
        row = first + at
        dd, in_d = _read(d, row // KH, in_depth, depth_step, depth_padding, depth_dilation, False)
        hh, in_h = _read(
            h, row % KH, in_height, height_step, height_padding, height_dilation, False
        )
        values = start + (dd * in_height + hh) * in_width
        for kw in tl.static_range(KW):
            ww, in_w = _read(w, kw, in_width, width_step, width_padding, width_dilation, False)
            value = tl.load(values + ww, mask=in_d & in_h & in_w, other=0.0)
            product = tl.sum(tl.sum(gradient * value.to(tl.float32), 1), 0)
            tl.store(sums + row * KW + kw, product)


@triton.jit
def forward(
    x, total, bias, y, channels,
    x_depth, x_height, x_width, depth, height, width,
    depth_step, height_step, width_step, depth_padding, height_padding, width_padding,
    depth_dilation, height_dilation, width_dilation,
    BIAS: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    BH: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """``y = conv(x, total) + bias``."""
    _convolve(
        x, total, bias, y, tl.program_id(0), channels,
        x_depth, x_height, x_width, depth, height, width,
        depth_step, height_step, width_step, depth_padding, height_padding, width_padding,
        depth_dilation, height_dilation, width_dilation, BIAS, False, KD, KH, KW, BH, BW,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tiles"])
def backward(
    dy, x, total, dx, part, tiles, channels,
    x_depth, x_height, x_width, depth, height, width,
    depth_step, height_step, width_step, depth_padding, height_padding, width_padding,
    depth_dilation, height_dilation, width_dilation,
    SPLIT: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    BH: tl.constexpr, BW: tl.constexpr, CH: tl.constexpr, CW: tl.constexpr,
):  # fmt: skip
    """In `tiles` programs, which may be none, the gradient of x; in none or all others, of `CH` by
    `CW` results, parts of the kernels'."""
    program = tl.program_id(0)
    if program < tiles:
        _convolve(
            dy, total, total, dx, program, channels,
            depth, height, width, x_depth, x_height, x_width,
            depth_step, height_step, width_step, depth_padding, height_padding, width_padding,
            depth_dilation, height_dilation, width_dilation, False, True, KD, KH, KW, BH, BW,
        )  # fmt: skip
    else:
        _correlate(
            dy, x, part, program - tiles, channels,
            x_depth, x_height, x_width, depth, height, width,
            depth_step, height_step, width_step, depth_padding, height_padding, width_padding,
            depth_dilation, height_dilation, width_dilation, SPLIT, KD, KH, KW, CH, CW,
        )  # fmt: skip


@triton.jit(do_not_specialize=["r", "blocks"])
def divide(
    kernels, a, b, scale, da, db, blocks,
    channels, taps, r, a_rank, a_tap, b_channel, b_rank,
    SCALED: tl.constexpr, BC: tl.constexpr, WC: tl.constexpr, BT: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The factors' gradients from the kernels' ``[channels, taps]``: in `blocks` programs
    ``db[channels, r] = scale · kernels Aᵀ``, the scale where `SCALED`; in the rest, `R` ranks each,
    ``da[r, taps] = scale · Bᵀ kernels``."""
    program, factor = tl.program_id(0), tl.load(scale).to(tl.float32)
    t, rr = tl.arange(0, BT), tl.arange(0, R)
    inside = (t < taps)[None, :]
    if program < blocks:
        c = program * BC + tl.arange(0, BC)
        rows = (c < channels)[:, None]
        kernel = tl.load(kernels + c[:, None] * taps + t[None, :], mask=rows & inside, other=0.0)
        for start in range(0, r, R):
            ranks = start + rr
            place, exists = a + ranks[None, :] * a_rank + t[:, None] * a_tap, ranks[None, :] < r
            down = tl.load(place, mask=exists & (t < taps)[:, None], other=0.0).to(tl.float32)
            value = tl.dot(kernel, down, input_precision="ieee")
            value = value * factor if SCALED else value
            target = db + c[:, None].to(tl.int64) * r + ranks[None, :]
            tl.store(target, value.to(db.dtype.element_ty), mask=rows & exists)
    else:
        ranks = (program - blocks) * R + rr
        acc = tl.zeros((R, BT), tl.float32)
        for start in range(0, channels, WC):
            cc = start + tl.arange(0, WC)
            place = b + cc[None, :] * b_channel + ranks[:, None] * b_rank
            exists = (ranks[:, None] < r) & (cc < channels)[None, :]
            up = tl.load(place, mask=exists, other=0.0).to(tl.float32)
            rows = kernels + cc[:, None] * taps + t[None, :]
            kernels_here = tl.load(rows, mask=(cc < channels)[:, None] & inside, other=0.0)
            acc = tl.dot(up, kernels_here, acc, input_precision="ieee")
        target = da + ranks[:, None] * taps + t[None, :]
        acc *= factor
        tl.store(target, acc.to(da.dtype.element_ty), mask=(ranks[:, None] < r) & inside)
