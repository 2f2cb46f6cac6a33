"""Triton kernels of a 16-bit convolution on CUDA whose every channel is convolved by itself.

There is nothing to multiply by low-rank factors that a channel's few taps are not as quick to take
whole: `sum.kernels.add` forms the kernels ``W + scale · B A`` once, in float32, and the rest
computes in float32 from them, so that nothing is rounded but the output. Planes are the images'
channels, in memory one after the other, of three axes; a program takes `BLOCK_H` rows by `BLOCK_W`
columns of one. Every result is deterministic.
"""

import triton
import triton.language as tl


@triton.jit
def _block(pid, depth, height, width, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """The plane of a program, and its slice, rows ``[BH, 1]`` and columns ``[1, BW]`` there."""
    down, across = tl.cdiv(height, BLOCK_H), tl.cdiv(width, BLOCK_W)
    h = pid // across % down * BLOCK_H + tl.arange(0, BLOCK_H)
    w = pid % across * BLOCK_W + tl.arange(0, BLOCK_W)
    slices = pid // (across * down)
    return slices // depth, slices % depth, h[:, None], w[None, :]


@triton.jit
def _read(at, tap, AXIS: tl.constexpr, sizes, window, BACK: tl.constexpr):
    """Where a tap reads for a result along one axis, and whether there is something; `BACK`: the
    result is a gradient of what is read otherwise."""
    strides, paddings, dilations = window
    size, stride, padding, dilation = sizes[AXIS], strides[AXIS], paddings[AXIS], dilations[AXIS]
    if BACK:
        at += padding - tap * dilation
        # between two steps lie positions that no result reads by this tap
        return at // stride, (at >= 0) & (at % stride == 0) & (at // stride < size)
    at = at * stride + tap * dilation - padding
    return at, (at >= 0) & (at < size)


@triton.jit
def _convolve(
    source,
    total,
    bias,
    result,
    pid,
    channels,
    inputs,
    sizes,
    window,
    BIAS: tl.constexpr,
    BACK: tl.constexpr,
    KD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """A block of a plane ``[depth, height, width]`` of the convolution, or where `BACK` of its
    gradient."""
    in_depth, in_height, in_width = inputs
    depth, height, width = sizes
    plane, d, h, w = _block(
        pid=pid,
        depth=depth,
        height=height,
        width=width,
        BLOCK_H=BLOCK_H,
        BLOCK_W=BLOCK_W,
    )
    c = plane % channels
    # in 64 bits up to the plane, within which 32 reach
    start = source + plane.to(tl.int64) * in_depth * in_height * in_width
    taps = total + c.to(tl.int64) * (KD * KH * KW)
    acc = tl.zeros((BLOCK_H, BLOCK_W), tl.float32)
    # unrolled, since a tap's place and its number are the same for all of the block
    for kd in tl.static_range(KD):
        dd, in_d = _read(at=d, tap=kd, AXIS=0, sizes=inputs, window=window, BACK=BACK)
        for kh in tl.static_range(KH):
            hh, in_h = _read(at=h, tap=kh, AXIS=1, sizes=inputs, window=window, BACK=BACK)
            row = start + (dd * in_height + hh) * in_width
            for kw in tl.static_range(KW):
                ww, in_w = _read(at=w, tap=kw, AXIS=2, sizes=inputs, window=window, BACK=BACK)
                value = tl.load(row + ww, mask=in_d & in_h & in_w, other=0.0)
                acc += tl.load(taps + (kd * KH + kh) * KW + kw) * value.to(tl.float32)
    if BIAS:
        acc += tl.load(bias + c).to(tl.float32)
    places = result + plane.to(tl.int64) * depth * height * width + (d * height + h) * width + w
    tl.store(places, acc.to(result.dtype.element_ty), mask=(h < height) & (w < width))


@triton.jit
def _correlate(
    dy,
    x,
    part,
    pid,
    channels,
    inputs,
    sizes,
    window,
    SPLIT: tl.constexpr,
    KD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """A block's share of the kernels' gradients: ``part[blocks of a channel, channels, taps]``; of
    all taps, or where `SPLIT` of one row of them."""
    # each share has a place of its own, to be summed in order: atomics would add in any
    first = 0
    if SPLIT:
        first = pid % (KD * KH)
        pid //= KD * KH
    in_depth, in_height, in_width = inputs
    depth, height, width = sizes
    plane, d, h, w = _block(
        pid=pid,
        depth=depth,
        height=height,
        width=width,
        BLOCK_H=BLOCK_H,
        BLOCK_W=BLOCK_W,
    )
    image, c = plane // channels, plane % channels
    blocks = depth * tl.cdiv(height, BLOCK_H) * tl.cdiv(width, BLOCK_W)
    # the blocks of all images of a channel: torch's sum is over the first axis
    block = (image * blocks + pid % blocks).to(tl.int64)
    places = dy + plane.to(tl.int64) * depth * height * width + (d * height + h) * width + w
    # the gradient stays in registers for all taps, each of which reads x shifted
    gradient = tl.load(places, mask=(h < height) & (w < width), other=0.0).to(tl.float32)
    start = x + plane.to(tl.int64) * in_depth * in_height * in_width
    sums = part + (block * channels + c) * (KD * KH * KW)
    for at in tl.static_range(1 if SPLIT else KD * KH):
        row = first + at
        dd, in_d = _read(at=d, tap=row // KH, AXIS=0, sizes=inputs, window=window, BACK=False)
        hh, in_h = _read(at=h, tap=row % KH, AXIS=1, sizes=inputs, window=window, BACK=False)
        values = start + (dd * in_height + hh) * in_width
        for kw in tl.static_range(KW):
            ww, in_w = _read(at=w, tap=kw, AXIS=2, sizes=inputs, window=window, BACK=False)
            value = tl.load(values + ww, mask=in_d & in_h & in_w, other=0.0)
            product = tl.sum(tl.sum(gradient * value.to(tl.float32), 1), 0)
            tl.store(sums + row * KW + kw, product)


@triton.jit
def forward(
    x,
    total,
    bias,
    y,
    channels,
    x_depth,
    x_height,
    x_width,
    depth,
    height,
    width,
    stride_d,
    stride_h,
    stride_w,
    padding_d,
    padding_h,
    padding_w,
    dilation_d,
    dilation_h,
    dilation_w,
    BIAS: tl.constexpr,
    KD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """``y = conv(x, total) + bias``."""
    window = (
        (stride_d, stride_h, stride_w),
        (padding_d, padding_h, padding_w),
        (dilation_d, dilation_h, dilation_w),
    )
    _convolve(
        source=x,
        total=total,
        bias=bias,
        result=y,
        pid=tl.program_id(0),
        channels=channels,
        inputs=(x_depth, x_height, x_width),
        sizes=(depth, height, width),
        window=window,
        BIAS=BIAS,
        BACK=False,
        KD=KD,
        KH=KH,
        KW=KW,
        BLOCK_H=BLOCK_H,
        BLOCK_W=BLOCK_W,
    )


@triton.jit(do_not_specialize=["tiles"])
def backward(
    dy,
    x,
    total,
    dx,
    part,
    tiles,
    channels,
    x_depth,
    x_height,
    x_width,
    depth,
    height,
    width,
    stride_d,
    stride_h,
    stride_w,
    padding_d,
    padding_h,
    padding_w,
    dilation_d,
    dilation_h,
    dilation_w,
    SPLIT: tl.constexpr,
    KD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PART_H: tl.constexpr,
    PART_W: tl.constexpr,
):
    """In `tiles` programs, which may be none, the gradient of x; in none or all others, of
    `PART_H` by `PART_W` results, parts of the kernels'."""
    pid, inputs, sizes = tl.program_id(0), (x_depth, x_height, x_width), (depth, height, width)
    window = (
        (stride_d, stride_h, stride_w),
        (padding_d, padding_h, padding_w),
        (dilation_d, dilation_h, dilation_w),
    )
    if pid < tiles:
        _convolve(
            source=dy,
            total=total,
            bias=total,
            result=dx,
            pid=pid,
            channels=channels,
            inputs=sizes,
            sizes=inputs,
            window=window,
            BIAS=False,
            BACK=True,
            KD=KD,
            KH=KH,
            KW=KW,
            BLOCK_H=BLOCK_H,
            BLOCK_W=BLOCK_W,
        )
    else:
        _correlate(
            dy=dy,
            x=x,
            part=part,
            pid=pid - tiles,
            channels=channels,
            inputs=inputs,
            sizes=sizes,
            window=window,
            SPLIT=SPLIT,
            KD=KD,
            KH=KH,
            KW=KW,
            BLOCK_H=PART_H,
            BLOCK_W=PART_W,
        )


@triton.jit(do_not_specialize=["r", "blocks"])
def divide(
    kernels,
    a,
    b,
    scale,
    da,
    db,
    blocks,
    channels,
    taps,
    r,
    stride_ar,
    stride_at,
    stride_bc,
    stride_br,
    SCALED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SUM_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    R: tl.constexpr,
):
    """The factors' gradients from the kernels' ``[channels, taps]``: in `blocks` programs
    ``db[channels, r] = scale · kernels Aᵀ``, the scale where `SCALED`; in the rest, `R` ranks each,
    ``da[r, taps] = scale · Bᵀ kernels``."""
    pid, factor = tl.program_id(0), tl.load(scale).to(tl.float32)
    t, offs_r = tl.arange(0, BLOCK_T), tl.arange(0, R)
    inside = (t < taps)[None, :]
    if pid < blocks:
        c = pid * BLOCK_C + tl.arange(0, BLOCK_C)
        rows = (c < channels)[:, None]
        kernel = tl.load(kernels + c[:, None] * taps + t[None, :], mask=rows & inside, other=0.0)
        for start in range(0, r, R):
            ranks = start + offs_r
            places = a + ranks[None, :] * stride_ar + t[:, None] * stride_at
            exists = ranks[None, :] < r
            down = tl.load(places, mask=exists & (t < taps)[:, None], other=0.0).to(tl.float32)
            value = tl.dot(kernel, down, input_precision="ieee")
            value = value * factor if SCALED else value
            target = db + c[:, None].to(tl.int64) * r + ranks[None, :]
            tl.store(target, value.to(db.dtype.element_ty), mask=rows & exists)
    else:  # ranks by taps are few, so that one program sums all channels, in order
        ranks = (pid - blocks) * R + offs_r
        acc = tl.zeros((R, BLOCK_T), tl.float32)
        for start in range(0, channels, SUM_C):
            cc = start + tl.arange(0, SUM_C)
            places = b + cc[None, :] * stride_bc + ranks[:, None] * stride_br
            exists = (ranks[:, None] < r) & (cc < channels)[None, :]
            up = tl.load(places, mask=exists, other=0.0).to(tl.float32)
            rows = kernels + cc[:, None] * taps + t[None, :]
            kernels_here = tl.load(rows, mask=(cc < channels)[:, None] & inside, other=0.0)
            acc = tl.dot(up, kernels_here, acc, input_precision="ieee")
        target = da + ranks[:, None] * taps + t[None, :]
        acc *= factor
        tl.store(target, acc.to(da.dtype.element_ty), mask=(ranks[:, None] < r) & inside)
