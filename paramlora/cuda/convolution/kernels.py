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
def _places(images, image, channels, P, offs_c, offs_p, LAST: tl.constexpr):
    """Addresses ``[c, p]`` of one of the images."""
    # one image lies within 32 bits, as `plan` sees to; all of them need not
    start = images + tl.cast(image, tl.int64) * channels * P
    if LAST:
        return start + offs_p[None, :] * channels + offs_c[:, None]
    else:
        return start + offs_c[:, None] * P + offs_p[None, :]


@triton.jit
def _inside(offs_c, channels, offs_p, P):
    """Which of a block's channels and positions there are."""
    return (offs_c[:, None] < channels) & (offs_p[None, :] < P)


@triton.jit
def _block(pid, channels, P, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """The image of a program, and its block's channels and positions."""
    blocks, parts = tl.cdiv(P, BLOCK_P), tl.cdiv(channels, BLOCK_C)
    offs_c = pid // blocks % parts * BLOCK_C + tl.arange(0, BLOCK_C)
    return pid // (parts * blocks), offs_c, pid % blocks * BLOCK_P + tl.arange(0, BLOCK_P)


@triton.jit
def _copy(
    source,
    target,
    pid,
    channels,
    more,
    ones,
    P,
    FROM_LAST: tl.constexpr,
    TO_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """A block of images in another format, or with zeros behind their channels up to `more`, but
    for the channel of `ones`."""
    image, offs_c, offs_p = _block(pid, more, P, BLOCK_C, BLOCK_P)
    places = _places(
        images=source,
        image=image,
        channels=channels,
        P=P,
        offs_c=offs_c,
        offs_p=offs_p,
        LAST=FROM_LAST,
    )
    value = tl.load(places, mask=_inside(offs_c, channels, offs_p, P), other=0.0)
    # back to 16 bits, as 1.0 makes it float32
    value = tl.where(offs_c[:, None] == ones, 1.0, value).to(value.dtype)
    places = _places(
        images=target,
        image=image,
        channels=more,
        P=P,
        offs_c=offs_c,
        offs_p=offs_p,
        LAST=TO_LAST,
    )
    tl.store(places, value, mask=_inside(offs_c, more, offs_p, P))


@triton.jit
def _join_row(
    weight,
    b,
    scale,
    bias,
    joined,
    row,
    offs_c,
    offs_p,
    inner,
    added,
    positions,
    r,
    middle,
    stride_bn,
    stride_br,
    BIAS: tl.constexpr,
    LAST: tl.constexpr,
):
    """A block of the row ``[W, scale · B, bias, 0]``, what is added at the `middle` position."""
    rank, channels = offs_c - inner, inner + added  # the former negative in W
    places = _places(
        images=weight,
        image=row,
        channels=inner,
        P=positions,
        offs_c=offs_c,
        offs_p=offs_p,
        LAST=LAST,
    )
    value = tl.load(places, mask=(rank[:, None] < 0) & (offs_p[None, :] < positions), other=0.0)
    if added > 0:  # none is to W's rows of the backward, where B is in v
        source = b + row * stride_bn + rank * stride_br
        more = tl.load(source, mask=(rank >= 0) & (rank < r), other=0.0)
        more = (more.to(tl.float32) * tl.load(scale).to(tl.float32)).to(value.dtype)
        if BIAS:  # where the input has its channel of ones
            more = tl.where(rank == r, tl.load(bias + row), more)
        value = tl.where((rank[:, None] >= 0) & (offs_p[None, :] == middle), more[:, None], value)
    places = _places(
        images=joined,
        image=row,
        channels=channels,
        P=positions,
        offs_c=offs_c,
        offs_p=offs_p,
        LAST=True,
    )
    tl.store(places, value, mask=_inside(offs_c, channels, offs_p, positions))


@triton.jit
def _join_rank(a, down, rank, offs_c, offs_p, inner, added, positions, r, stride_ar, stride_ak):
    """A block of a row of A's kernel, with zeros from the rank r and from the `inner` channel."""
    channels = inner + added
    source = a + rank * stride_ar + (offs_c[:, None] * positions + offs_p[None, :]) * stride_ak
    mask = _inside(offs_c, inner, offs_p, positions)
    value = tl.load(source, mask=mask & (rank < r), other=0.0)
    places = _places(
        images=down,
        image=rank,
        channels=channels,
        P=positions,
        offs_c=offs_c,
        offs_p=offs_p,
        LAST=True,
    )
    mask = _inside(offs_c, channels, offs_p, positions)
    tl.store(places, value.to(down.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["r", "middle"])
def prepare(
    x,
    weight,
    a,
    b,
    scale,
    bias,
    wide,
    joined,
    down,
    out,
    inner,
    added,
    positions,
    P,
    r,
    middle,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    BIAS: tl.constexpr,
    LAST: tl.constexpr,
    WEIGHT_LAST: tl.constexpr,
    R: tl.constexpr,
    WEIGHT_C: tl.constexpr,
    WEIGHT_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """``wide = [x, 0]``, ``joined[out, inner + added, positions]`` and A's kernel ``down[R, inner +
    added, positions]``."""
    pid = tl.program_id(0)
    # of a weight: its rows are what images are of x, so that both are divided alike
    row, offs_c, offs_p = _block(pid, inner + added, positions, WEIGHT_C, WEIGHT_P)
    if row < out:
        _join_row(
            weight=weight,
            b=b,
            scale=scale,
            bias=bias,
            joined=joined,
            row=row,
            offs_c=offs_c,
            offs_p=offs_p,
            inner=inner,
            added=added,
            positions=positions,
            r=r,
            middle=middle,
            stride_bn=stride_bn,
            stride_br=stride_br,
            BIAS=BIAS,
            LAST=WEIGHT_LAST,
        )
    elif row < out + R:
        _join_rank(
            a=a,
            down=down,
            rank=row - out,
            offs_c=offs_c,
            offs_p=offs_p,
            inner=inner,
            added=added,
            positions=positions,
            r=r,
            stride_ar=stride_ar,
            stride_ak=stride_ak,
        )
    else:
        pid -= (out + R) * tl.cdiv(inner + added, WEIGHT_C) * tl.cdiv(positions, WEIGHT_P)
        ones = inner + r if BIAS else -1
        _copy(
            source=x,
            target=wide,
            pid=pid,
            channels=inner,
            more=inner + added,
            ones=ones,
            P=P,
            FROM_LAST=LAST,
            TO_LAST=True,
            BLOCK_C=BLOCK_C,
            BLOCK_P=BLOCK_P,
        )


@triton.jit
def _along(at, size, offset, stride):
    """The output whose middle lies at a position along one axis, and whether there is one."""
    at -= offset  # where the middle of the first output lies
    return at // stride, (at >= 0) & (at % stride == 0) & (at // stride < size)


@triton.jit(do_not_specialize=["r"])
def put(
    t,
    wide,
    channels,
    added,
    P,
    outputs,
    r,
    height,
    width,
    out_depth,
    out_height,
    out_width,
    offset_d,
    offset_h,
    offset_w,
    stride_d,
    stride_h,
    stride_w,
    BIAS: tl.constexpr,
    SAME: tl.constexpr,
    R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """``t[batch, outputs, R]`` into `wide`, behind its channels, where the middle of a kernel lies;
    `SAME`: each output there where the input is."""
    blocks = tl.cdiv(P, BLOCK_P)
    pid = tl.program_id(0)
    image, offs_p = pid // blocks, pid % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_r, o, there = tl.arange(0, R), offs_p, offs_p < P
    if not SAME:  # positions with no output's middle keep the zeros that `prepare` wrote
        d, in_depth = _along(offs_p // (height * width), out_depth, offset_d, stride_d)
        h, in_height = _along(offs_p // width % height, out_height, offset_h, stride_h)
        w, in_width = _along(offs_p % width, out_width, offset_w, stride_w)
        there &= in_depth & in_height & in_width
        o = (d * out_height + h) * out_width + w
    places = _places(
        images=t,
        image=image,
        channels=R,
        P=outputs,
        offs_c=offs_r,
        offs_p=o,
        LAST=True,
    )
    value = tl.load(places, mask=there[None, :])
    if BIAS:  # t's zeros beyond the rank would overwrite the ones
        value = tl.where(offs_r[:, None] == r, 1.0, value).to(value.dtype)
    places = _places(
        images=wide,
        image=image,
        channels=channels + added,
        P=P,
        offs_c=channels + offs_r,
        offs_p=offs_p,
        LAST=True,
    )
    tl.store(places, value, mask=there[None, :])


@triton.jit
def _spread(
    dy,
    b,
    scale,
    wide,
    v,
    pid,
    out,
    added,
    P,
    r,
    stride_bn,
    stride_br,
    INPUT: tl.constexpr,
    LAST: tl.constexpr,
    R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``v = scale · Bᵀ dy`` at some positions, and where `INPUT` ``wide = [dy, v, 0]``."""
    blocks = tl.cdiv(P, BLOCK_P)
    image, offs_p = pid // blocks, pid % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_r, inside, more = tl.arange(0, R), (offs_p < P)[None, :], out + added
    factor = tl.load(scale).to(tl.float32)
    acc = tl.zeros((R, BLOCK_P), tl.float32)
    for start in range(0, out, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        mask = (offs_c[:, None] < out) & inside
        places = _places(
            images=dy,
            image=image,
            channels=out,
            P=P,
            offs_c=offs_c,
            offs_p=offs_p,
            LAST=LAST,
        )
        value = tl.load(places, mask=mask, other=0.0)
        if INPUT:  # dY is in registers: the only read of it serves both
            places = _places(
                images=wide,
                image=image,
                channels=more,
                P=P,
                offs_c=offs_c,
                offs_p=offs_p,
                LAST=True,
            )
            tl.store(places, value, mask=mask)
        places = b + offs_c[None, :] * stride_bn + offs_r[:, None] * stride_br
        thin = tl.load(places, mask=(offs_c[None, :] < out) & (offs_r[:, None] < r), other=0.0)
        acc = tl.dot((factor * thin.to(tl.float32)).to(value.dtype), value, acc)
    value = acc.to(v.dtype.element_ty)
    places = _places(
        images=v,
        image=image,
        channels=R,
        P=P,
        offs_c=offs_r,
        offs_p=offs_p,
        LAST=True,
    )
    tl.store(places, value, mask=inside)
    if INPUT:
        places = _places(
            images=wide,
            image=image,
            channels=more,
            P=P,
            offs_c=out + offs_r,
            offs_p=offs_p,
            LAST=True,
        )
        tl.store(places, value, mask=inside)
        for start in range(R, added, R):  # the channels that `plan.widened` adds beyond the rank
            offs_c = out + start + offs_r
            places = _places(
                images=wide,
                image=image,
                channels=more,
                P=P,
                offs_c=offs_c,
                offs_p=offs_p,
                LAST=True,
            )
            tl.store(places, tl.zeros_like(value), mask=inside & (offs_c[:, None] < more))


@triton.jit
def _part(
    dy,
    t,
    part,
    block,
    group,
    low,
    high,
    out,
    P,
    LAST: tl.constexpr,
    R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """A block of a group's part of ``dy · t``, over the blocks of positions from low to high."""
    offs_c, offs_r = block * BLOCK_O + tl.arange(0, BLOCK_O), tl.arange(0, R)
    blocks = tl.cdiv(P, BLOCK_P)
    acc = tl.zeros((BLOCK_O, R), tl.float32)
    for at in range(low, high):
        image, offs_p = at // blocks, at % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = _inside(offs_c, out, offs_p, P)
        places = _places(
            images=dy,
            image=image,
            channels=out,
            P=P,
            offs_c=offs_c,
            offs_p=offs_p,
            LAST=LAST,
        )
        left = tl.load(places, mask=mask, other=0.0)
        rows = t + (tl.cast(image, tl.int64) * P + offs_p)[:, None] * R + offs_r[None, :]
        acc = tl.dot(left, tl.load(rows, mask=offs_p[:, None] < P, other=0.0), acc)
    # no atomic sum: `back` adds the groups in their order, so that the result is deterministic
    places = part + tl.cast(group, tl.int64) * out * R + offs_c[:, None] * R + offs_r[None, :]
    tl.store(places, acc, mask=offs_c[:, None] < out)


@triton.jit(do_not_specialize=["r", "tiles", "groups", "blocks_per_group", "batch"])
def spread(
    dy,
    t,
    weight,
    a,
    b,
    scale,
    x,
    wide,
    tall,
    x_last,
    v,
    part,
    tiles,
    groups,
    blocks_per_group,
    batch,
    out,
    inner,
    added,
    positions,
    P,
    x_positions,
    r,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    INPUT: tl.constexpr,
    LAST: tl.constexpr,
    WEIGHT_LAST: tl.constexpr,
    R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP_P: tl.constexpr,
    WEIGHT_C: tl.constexpr,
    WEIGHT_P: tl.constexpr,
    INPUT_C: tl.constexpr,
    INPUT_P: tl.constexpr,
):
    """In `tiles` programs ``v[batch, R, P]`` and ``wide = [dy, v, 0]``; in `groups` for each block
    of outputs ``part[groups, out, R]``; where `INPUT` ``tall = [W; A; 0]``; and in the rest
    `x_last`, x with its channels last. Without `INPUT` no wide and no tall."""
    pid = tl.program_id(0)
    sums = groups * tl.cdiv(out, BLOCK_O)
    rows = (out + added) * tl.cdiv(inner, WEIGHT_C) * tl.cdiv(positions, WEIGHT_P) if INPUT else 0
    if pid < tiles:
        _spread(
            dy=dy,
            b=b,
            scale=scale,
            wide=wide,
            v=v,
            pid=pid,
            out=out,
            added=added,
            P=P,
            r=r,
            stride_bn=stride_bn,
            stride_br=stride_br,
            INPUT=INPUT,
            LAST=LAST,
            R=R,
            BLOCK_P=BLOCK_P,
            BLOCK_C=BLOCK_C,
        )
    elif pid < tiles + sums:
        block, group = (pid - tiles) // groups, (pid - tiles) % groups
        high = min(group * blocks_per_group + blocks_per_group, batch * tl.cdiv(P, GROUP_P))
        _part(
            dy=dy,
            t=t,
            part=part,
            block=block,
            group=group,
            low=group * blocks_per_group,
            high=high,
            out=out,
            P=P,
            LAST=LAST,
            R=R,
            BLOCK_O=BLOCK_O,
            BLOCK_P=GROUP_P,
        )
    elif pid < tiles + sums + rows:
        row, offs_c, offs_p = _block(pid - tiles - sums, inner, positions, WEIGHT_C, WEIGHT_P)
        if row < out:  # W alone, without what a forward joins
            _join_row(
                weight=weight,
                b=b,
                scale=scale,
                bias=b,
                joined=tall,
                row=row,
                offs_c=offs_c,
                offs_p=offs_p,
                inner=inner,
                added=0,
                positions=positions,
                r=0,
                middle=0,
                stride_bn=0,
                stride_br=0,
                BIAS=False,
                LAST=WEIGHT_LAST,
            )
        else:
            # zeros from the rank on, as `wide` has behind v: `widened` adds channels for both
            behind = tall + tl.cast(out, tl.int64) * inner * positions
            _join_rank(
                a=a,
                down=behind,
                rank=row - out,
                offs_c=offs_c,
                offs_p=offs_p,
                inner=inner,
                added=0,
                positions=positions,
                r=r,
                stride_ar=stride_ar,
                stride_ak=stride_ak,
            )
    else:
        pid -= tiles + sums + rows
        _copy(
            source=x,
            target=x_last,
            pid=pid,
            channels=inner,
            more=inner,
            ones=-1,
            P=x_positions,
            FROM_LAST=False,
            TO_LAST=True,
            BLOCK_C=INPUT_C,
            BLOCK_P=INPUT_P,
        )


@triton.jit
def _add_parts(
    part,
    db,
    scale,
    pid,
    out,
    groups,
    r,
    SCALED: tl.constexpr,
    R: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A part of B's gradient: the sum of all groups, at once in a block ``[GROUPS, BLOCK]``."""
    at, group = pid * BLOCK + tl.arange(0, BLOCK), tl.arange(0, GROUPS)
    places = part + group[:, None] * (out * R) + at[None, :]
    mask = (group[:, None] < groups) & (at[None, :] < out * R)
    value = tl.sum(tl.load(places, mask=mask, other=0.0), 0)
    if SCALED:
        value *= tl.load(scale).to(tl.float32)
    row, rank = at // R, at % R  # stored without the ranks that pad R
    tl.store(db + row * r + rank, value, mask=(at < out * R) & (rank < r))


@triton.jit(do_not_specialize=["tiles", "rows", "groups", "r"])
def back(
    y,
    result,
    a_last,
    da,
    part,
    db,
    scale,
    tiles,
    rows,
    channels,
    P,
    inner,
    positions,
    out,
    groups,
    r,
    SCALED: tl.constexpr,
    R: tl.constexpr,
    GROUPS: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """In `tiles` programs the images of y with the channels before the positions; for each of
    `rows` ``da[rows, inner · positions]`` of A's kernel with its channels last; and in the rest
    B's gradient ``db[out, r]``."""
    pid = tl.program_id(0)
    size = inner * positions
    blocks = tl.cdiv(size, BLOCK)
    if pid < tiles:
        _copy(
            source=y,
            target=result,
            pid=pid,
            channels=channels,
            more=channels,
            ones=-1,
            P=P,
            FROM_LAST=True,
            TO_LAST=False,
            BLOCK_C=BLOCK_C,
            BLOCK_P=BLOCK_P,
        )
    elif pid < tiles + rows * blocks:
        pid -= tiles
        row, at = pid // blocks, pid % blocks * BLOCK + tl.arange(0, BLOCK)
        start = tl.cast(row, tl.int64) * size
        # writes lie side by side and reads apart: cuDNN has A's channels last, the caller first
        source = a_last + start + at % positions * inner + at // positions
        value = tl.load(source, mask=at < size)
        tl.store(da + start + at, value.to(da.dtype.element_ty), mask=at < size)
    else:
        pid -= tiles + rows * blocks
        _add_parts(
            part=part,
            db=db,
            scale=scale,
            pid=pid,
            out=out,
            groups=groups,
            r=r,
            SCALED=SCALED,
            R=R,
            GROUPS=GROUPS,
            BLOCK=SUMS,
        )
