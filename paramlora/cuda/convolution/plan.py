"""Forward and backward of a 16-bit convolution on CUDA: cuDNN's convolutions, and between them the
kernels of `kernels`; imported only there.

As in `linear.plan`, all but the tensors is planned once for each kind of operands. A signal is an
image of one row.
"""

import functools
import math
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from paramlora.cuda.convolution import kernels
from paramlora.cuda.device import card
from paramlora.cuda.launch import Launch, along, changed, on_its_device, planned
from paramlora.cuda.launches import WIDEST
from paramlora.cuda.linear.tiles import groups_of
from paramlora.cuda.masks import plan as masks
from paramlora.cuda.native.program import Program, Slot
from paramlora.cuda.operands import (
    DEEP,
    Drop,
    Operands,
    Window,
    factors_fit,
    outputs_of,
    padded,
    power,
)
from paramlora.update.compat import cuda_empty
from paramlora.update.geometry import CHANNELS_LAST

_Maybe = Optional[Tensor]
_gradients = torch.ops.aten.convolution_backward.default
_BLOCK = 1024  # elements of a row of A in one program


class _Image(NamedTuple):
    """A tensor ``[batch, channels, ...]``, a weight, or what else is to be made: strides are found
    once, and `cuda_empty` takes them without torch's way of several calls."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def new(self) -> Tensor:
        return cuda_empty(*self)

    def of(self, t: Tensor) -> Tensor:
        """A tensor of this shape, in this format."""
        # cuDNN's result need not lie as its input does
        return t if t.stride() == self.stride else self.new().copy_(t)


def _first(dtype: torch.dtype, *shape: int) -> _Image:
    return _Image(shape, tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))), dtype)


def _last(dtype: torch.dtype, *shape: int) -> _Image:
    """An image of a shape, with the channels last in memory."""
    channels, rest = shape[1], shape[2:]
    inward = (channels * math.prod(rest[i + 1 :]) for i in range(len(rest)))
    return _Image(shape, (channels * math.prod(rest), 1, *inward), dtype)


def _format(t: Tensor) -> Optional[bool]:
    """Whether channels are the last in memory, or None where it is neither dense format."""
    if t.is_contiguous():
        return False
    last = CHANNELS_LAST.get(t.dim())
    return True if last is not None and t.is_contiguous(memory_format=last) else None


def widened(channels: int, R: int) -> int:
    """Channels of a joined tensor: cuDNN is a third slower at 328 of them than at 384, and at 136
    than at 160 (bfloat16, 3×3, an H200)."""
    block = 64 if channels >= 256 else 32 if channels >= 64 else 8
    return channels + R + -(channels + R) % block


class _Geometry(NamedTuple):
    """The positions along each axis of a convolution in two or three dimensions."""

    sizes: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def outputs(self) -> tuple[int, ...]:
        return outputs_of(self.sizes, self.kernel, (self.stride, self.padding, self.dilation))

    @property
    def firsts(self) -> tuple[int, ...]:
        """Where a kernel's middle lies for the first output."""
        along = zip(self.kernel, self.padding, self.dilation)
        return tuple(k // 2 * d - p for k, p, d in along)

    @property
    def inside(self) -> bool:
        """Whether a kernel's middle never meets the padding."""
        along = zip(self.firsts, self.outputs, self.stride, self.sizes)
        return all(f >= 0 and f + (m - 1) * s < n for f, m, s, n in along)

    @property
    def middle(self) -> int:
        """Which position of a kernel is its middle."""
        middle = 0
        for k in self.kernel:
            middle = middle * k + k // 2
        return middle


def _geometry(x: Tensor, weight: Tensor, window: Window) -> _Geometry:
    sizes, kernel, (stride, padding, dilation) = tuple(x.shape[2:]), tuple(weight.shape[2:]), window
    if len(sizes) == 1:  # torch has channels last only of two axes and of three
        return _Geometry((1, *sizes), (1, *kernel), (1, *stride), (0, *padding), (1, *dilation))
    return _Geometry(sizes, kernel, stride, padding, dilation)


def _block(n: int, most: int) -> int:
    """The size of a block: a power of two, of at least the 16 that tensor cores take."""
    return max(16, min(most, power(n)))


def _copy_blocks(channels: int, P: int, last: bool) -> tuple[int, int]:
    """Channels and positions of a block that is copied; `last`: they stay the last in memory."""
    # a transposed block is square, as one side is contiguous where it is read, the other where it
    # is written
    return _block(channels, 128 if last else 64), _block(P, 32 if last else 64)


def _weight_blocks(channels: int, positions: int) -> tuple[int, int]:
    """Channels and positions of a block of a weight that is copied."""
    # a kernel's positions are few, so most of a block is channels
    most = min(64, power(positions))
    return _block(channels, 1024 // most), most


def _copies(batch: int, channels: int, P: int, block: tuple[int, int]) -> int:
    return batch * -(-channels // block[0]) * -(-P // block[1])


class Forward:
    """The plan of a forward: two convolutions between two or three launches, or with a mask one
    more."""

    def __init__(self, of: Operands, geometry: _Geometry, drop: Optional[Drop]) -> None:
        x, weight, bias, a, b, _ = of
        (batch, inner), out, r, R = x.shape[:2], len(weight), len(a), padded(len(a))
        sizes, kernel, outputs = geometry.sizes, geometry.kernel, geometry.outputs
        P, PO, positions = map(math.prod, (sizes, outputs, kernel))
        channels, device = widened(inner, R), x.get_device()
        last, weight_last = bool(_format(x)), bool(_format(weight))
        self.conv, self.window = getattr(F, f"conv{len(sizes)}d"), geometry[2:]
        low = functools.partial(_last, x.dtype)
        self.wide, self.t = low(batch, channels, *sizes), low(batch, R, *outputs)
        self.joined, self.down = low(out, channels, *kernel), low(R, channels, *kernel)
        added, block = channels - inner, _copy_blocks(channels, P, last)
        of_weight = _weight_blocks(channels, positions)
        # A's kernel has zeros where the channels are that are not the input's
        self.mask: Optional[Launch] = None
        if drop is not None:
            self.mask = masks.of_images(device, self.wide.shape, inner, drop.thresholds[0], False)
        # a channel of ones takes it if one of those that pad the rank is free, else cuDNN adds it
        self.bias_inside = bias is not None and added > r
        grid = _copies(out + R, channels, positions, of_weight)
        grid += _copies(batch, channels, P, block)
        self.prepare = Launch(
            kernels.prepare,
            device,
            grid,
            numbers=dict(
                out=out,
                inner=inner,
                added=added,
                positions=positions,
                P=P,
                r=r,
                middle=geometry.middle,
                **along("stride_a", "rk", a.stride()),
                **along("stride_b", "nr", b.stride()),
            ),
            constants=dict(
                BIAS=self.bias_inside,
                LAST=last,
                WEIGHT_LAST=weight_last,
                R=R,
                **along("WEIGHT_", "CP", of_weight),
                **along("BLOCK_", "CP", block),
            ),
            stages=1,
            warps=4,
        )
        self.put = _put(x, r, added, geometry, self.bias_inside)
        # torch's own result has its channels last where those of x or of the weight are
        self.back: Optional[Launch] = None
        if not (last or weight_last):
            self.y = low(batch, out, *outputs)
            self.result = _first(x.dtype, batch, out, *outputs[2 - x.dim() :])
            self.back = _back(device, (batch, out, PO))

    def __call__(
        self, of: Operands, addresses: tuple[int, ...], seed: _Maybe
    ) -> tuple[Tensor, Tensor, Tensor]:
        (x, weight, more, a, b, scale), (px, pw, pmore, *others) = of.tensors, addresses
        wide, joined, down = self.wide.new(), self.joined.new(), self.down.new()
        pwide = wide.data_ptr()
        self.prepare(
            (x, weight, a, b, scale, more, wide, joined, down),
            (px, pw, *others, pmore, pwide, joined.data_ptr(), down.data_ptr()),
        )
        seen = wide
        if self.mask is not None and seed is not None:
            seen = self.wide.new()
            places = (pwide, pwide, seen.data_ptr(), seed.data_ptr())
            self.mask((wide, wide, seen, seed), places)
        t = self.t.of(self.conv(seen, down, None, *self.window))
        self.put((t, wide), (t.data_ptr(), pwide))
        y = self.conv(wide, joined, None if self.bias_inside else of.bias, *self.window)
        if self.back is None:
            return y, t, down
        y, result = self.y.of(y), self.result.new()
        tensors = (y, result, y, y, y, y, y)  # no rows and no sums: what stands for them is unread
        self.back(tensors, tuple(map(Tensor.data_ptr, tensors)))
        return result, t, down

    def told(self, to: Program, of: Operands) -> tuple[int, int]:
        """What `__call__` does, for C++: the slots of both results."""
        wide, joined, down = (to.reserve(*one) for one in (self.wide, self.joined, self.down))
        more = Slot.SCALE if of.bias is None else Slot.BIAS
        operands = (Slot.X, Slot.WEIGHT, Slot.A, Slot.B, Slot.SCALE, more)
        to.launch(self.prepare, (*operands, wide, joined, down))
        t = to.convolve((wide, down), self.window, self.t.shape, self.t.stride)
        to.launch(self.put, (t, wide))
        bias = -1 if self.bias_inside or of.bias is None else Slot.BIAS
        inputs = (wide, joined, bias)
        if self.back is None:
            return to.convolve(inputs, self.window), t
        y = to.convolve(inputs, self.window, self.y.shape, self.y.stride)
        result = to.reserve(*self.result)
        to.launch(self.back, (y, result, y, y, y, y, y))
        return result, t


def _put(x: Tensor, r: int, added: int, geometry: _Geometry, bias: bool) -> Launch:
    """The launch that puts the thin convolution's outputs into the joined input's channels."""
    sizes, outputs = geometry.sizes, geometry.outputs
    # the kernel has three axes, of which it needs no depth of the input
    flat, P = (1,) * (3 - len(sizes)), math.prod(sizes)
    BP = _block(P, 64)
    return Launch(
        kernels.put,
        x.get_device(),
        len(x) * -(-P // BP),
        numbers=dict(
            channels=x.shape[1],
            added=added,
            P=P,
            outputs=math.prod(outputs),
            r=r,
            **along("", ("height", "width"), (*flat, *sizes)[1:]),
            **along("out_", ("depth", "height", "width"), (*flat, *outputs)),
            **along("offset_", "dhw", (*(0 for _ in flat), *geometry.firsts)),
            **along("stride_", "dhw", (*flat, *geometry.stride)),
        ),
        constants=dict(
            BIAS=bias,
            SAME=outputs == sizes and not any(geometry.firsts),
            R=padded(r),
            BLOCK_P=BP,
        ),
        stages=1,
        warps=4,
    )


def _spread(
    dy: Tensor, of: Operands, geometry: _Geometry, channels: int, joined: bool, relaid: bool
) -> tuple[Launch, int]:
    """The launch ahead of cuDNN's gradients, and into how many groups the positions of B's go.

    Args:
        dy, of: as of `backward`.
        geometry: of x.
        channels: of dy with those that pad the rank, see `widened`.
        joined: whether dy and the weight are joined with the thin ones, for x's gradient.
        relaid: whether x is laid out anew.
    """
    x, weight, _, a, b, _ = of
    (batch, inner), out, device = x.shape[:2], len(weight), x.get_device()
    PX, P, positions = map(math.prod, (geometry.sizes, geometry.outputs, geometry.kernel))
    processors = card(device).processors
    # v takes all channels of some positions at once: of few, smaller blocks fill the device
    BP = _block(P, 128 if batch * -(-P // 128) >= processors else 32)
    GP, block = _block(P, 64), _copy_blocks(inner, PX, False)
    of_weight = _weight_blocks(inner, positions)
    tiles, blocks, units = batch * -(-P // BP), -(-out // DEEP), batch * -(-P // GP)
    groups, each = groups_of(units, blocks, processors)
    grid = tiles + groups * blocks
    grid += _copies(channels, inner, positions, of_weight) if joined else 0
    grid += _copies(batch, inner, PX, block) if relaid else 0
    launch = Launch(
        kernels.spread,
        device,
        grid,
        numbers=dict(
            tiles=tiles,
            groups=groups,
            blocks_per_group=each,
            batch=batch,
            out=out,
            inner=inner,
            added=channels - out,
            positions=positions,
            P=P,
            x_positions=PX,
            r=len(a),
            **along("stride_a", "rk", a.stride()),
            **along("stride_b", "nr", b.stride()),
        ),
        constants=dict(
            INPUT=joined,
            LAST=bool(_format(dy)),
            WEIGHT_LAST=bool(_format(weight)),
            R=padded(len(a)),
            BLOCK_O=DEEP,
            BLOCK_P=BP,
            BLOCK_C=64,
            GROUP_P=GP,
            **along("WEIGHT_", "CP", of_weight),
            **along("INPUT_", "CP", block),
        ),
        stages=1,
        warps=4,
    )
    return launch, groups


def _back(
    device: int,
    image: Optional[tuple[int, int, int]] = None,
    rows: tuple[int, int, int] = (0, 1, 1),
    sums: tuple[int, int, int] = (1, 0, 1),
    scaled: bool = False,
) -> Launch:
    """The launch of `kernels.back`, with nothing to do for what is left out.

    Args:
        device: its index.
        image: batch, channels and positions of what is laid out anew.
        rows: how many of A's kernel, their channels and positions.
        sums: groups whose sums ``[out, r]`` are added, out, and r.
        scaled: whether they are multiplied by the scale.
    """
    (batch, channels, P), (count, inner, positions) = image or (0, 1, 1), rows
    groups, out, r = sums
    block, R, many = _copy_blocks(channels, P, False), padded(r), power(groups)
    tiles, each = _copies(batch, channels, P, block), max(16, 4096 // many)
    return Launch(
        kernels.back,
        device,
        tiles + count * -(-inner * positions // _BLOCK) + -(-out * R // each),
        numbers=dict(
            tiles=tiles,
            rows=count,
            channels=channels,
            P=P,
            inner=inner,
            positions=positions,
            out=out,
            groups=groups,
            r=r,
        ),
        constants=dict(
            SCALED=scaled,
            R=R,
            GROUPS=many,
            SUMS=each,
            **along("BLOCK_", "CP", block),
            BLOCK=_BLOCK,
        ),
        stages=1,
        warps=4,
    )


_FORWARDS: dict[Any, Any] = {}
_BACKWARDS: dict[Any, Any] = {}
_COPY = object()  # instead of a plan: the input must first be laid out anew


@on_its_device
def forward(
    of: Operands, window: Window, drop: Optional[Drop] = None
) -> Optional[tuple[Tensor, Tensor, Tensor]]:
    """``conv(x, W + scale · B A) + bias`` with one rounding, and what `backward` takes.

    Args:
        of: x ``[N, C_in, ...]``, 16-bit; a weight ``[C_out, C_in, *kernel]`` and bias of its type.
        window: stride, padding and dilation, a number for each axis.
        drop: the one mask of the x that A gets, of channels and lines as rows.

    Returns:
        ``[N, C_out, ...]``, ``t[N, R, ...]`` and A's kernel, behind whose channels are zeros; or
        None where the kernels do not serve these operands.
    """
    plan, addresses = planned_forward(of, window, drop)
    if plan is None:
        return None
    if plan is _COPY:
        return forward(of._replace(x=of.x.contiguous()), window, drop)  # type: ignore[no-any-return]
    return plan(of, addresses, None if drop is None else drop.seed)  # type: ignore[no-any-return]


def planned_forward(
    of: Operands, window: Window, drop: Optional[Drop]
) -> tuple[Any, tuple[int, ...]]:
    """The plan of a forward, None where the kernels do not serve it; and the addresses."""
    rest = (of.bias is None, window, None if drop is None else drop.thresholds)
    return planned(_FORWARDS, of.tensors, rest, lambda _: _plan_forward(of, window, drop))


def _plan_forward(of: Operands, window: Window, drop: Optional[Drop]) -> Any:
    x, weight, bias, a, b, scale = of
    if x.dim() != weight.dim() or x.shape[1] != weight.shape[1] or _format(weight) is None:
        return None
    # `put` and `spread` hold all ranks of a block of positions at once
    if not (factors_fit(weight, a, b, scale) and len(a) <= WIDEST and x.numel()):
        return None
    if (weight.dtype, weight.get_device()) != (x.dtype, x.get_device()):
        return None
    if bias is not None:
        like = (torch.Size(weight.shape[:1]), (1,), x.dtype, x.get_device())
        if (bias.shape, bias.stride(), bias.dtype, bias.get_device()) != like:
            return None
    geometry = _geometry(x, weight, window)
    # where a middle meets the padding, no position of `wide` could hold its t
    if min(geometry.outputs) < 1 or not geometry.inside:
        return None
    positions = max(map(math.prod, (geometry.sizes, geometry.outputs, geometry.kernel)))
    # the kernels find places within an image, and within a row of a weight, in 32 bits
    if widened(max(weight.shape[:2]), padded(len(a))) * positions >= 2**31:
        return None
    return _COPY if _format(x) is None else Forward(of, geometry, drop)


class Backward:
    """The plan of a backward: two convolutions' gradients between two launches, or with a mask
    three, as base and update then share no accumulator for x's."""

    def __init__(
        self,
        dy: Tensor,
        of: Operands,
        geometry: _Geometry,
        scaled: bool,
        wanted: tuple[bool, bool],
        drop: Optional[Drop],
    ) -> None:
        (x, weight, _, a, *_), (input_too, a_too) = of, wanted
        (batch, inner), out, r, R = x.shape[:2], len(weight), len(a), padded(len(a))
        sizes, kernel, outputs = geometry.sizes, geometry.kernel, geometry.outputs
        channels, device, x_last = widened(out, R), x.get_device(), bool(_format(x))
        self.input_too, self.a_too, joined = input_too, a_too, input_too and drop is None
        # the gradient of A reads x, that of x but its shape, and where dy is not laid out anew its
        # format; and lies as x does
        self.relaid = (a_too or drop is not None) and not x_last
        self.returned = input_too and not x_last
        # of cuDNN: no bias, the window, not transposed, so no padding of an output, one group
        self.window = ([0], *geometry[2:], False, [0] * len(sizes), 1)
        low, wide = functools.partial(_last, x.dtype), torch.float32
        self.wide, self.tall = low(batch, channels, *outputs), low(channels, inner, *kernel)
        self.v, self.down = low(batch, R, *outputs), low(R, inner, *kernel)
        self.x, self.dx = low(batch, inner, *sizes), _first(x.dtype, *x.shape)
        self.masks: Optional[tuple[Launch, Launch]] = None  # of x, and of what is added to its dx
        if drop is not None:
            least = drop.thresholds[0]
            seen, added = (
                masks.of_images(device, self.x.shape, inner, least, add) for add in (False, True)
            )
            self.masks = seen, added
        self.da, self.db = _first(a.dtype, *a.shape), _first(wide, out, r)
        self.spread, groups = _spread(dy, of, geometry, channels, joined, self.relaid)
        self.part = _first(wide, groups, out, R)
        image = (batch, inner, math.prod(sizes)) if self.returned else None
        rows = (r if a_too else 0, inner, math.prod(kernel))
        self.back = _back(device, image, rows, (groups, out, r), scaled)

    def __call__(
        self,
        dy: Tensor,
        of: Operands,
        t: Tensor,
        addresses: tuple[int, ...],
        dropped: Optional[tuple[Tensor, Tensor]],
    ) -> tuple[_Maybe, _Maybe, Tensor]:
        x, weight, _, a, b, scale = of
        v, part = self.v.new(), self.part.new()
        # what is not wanted is v: an address that nothing is read from or written to
        joined = self.input_too and self.masks is None
        wide, tall = (self.wide.new(), self.tall.new()) if joined else (v, v)
        x_last = self.x.new() if self.relaid or x.dim() == 3 else x
        made = (wide, tall, x_last, v, part)
        places = map(Tensor.data_ptr, made)
        self.spread((dy, t, weight, a, b, scale, x, *made), (*addresses, *places))
        dx: Any = None
        da: _Maybe = None
        y, result, a_last, a_first = v, v, v, v
        if joined:
            dx, _, _ = _gradients(wide, x_last, tall, *self.window, [True, False, False])
        elif self.input_too and dropped is not None:
            dx = self._apart(dy, weight, x_last, v, *dropped)
        if self.returned:
            y, result = self.x.of(dx), self.dx.new()
            dx = result
        if self.a_too:
            if dropped is not None:
                x_last = self._masked(x_last, dropped[1])
            down = self.down.new()  # of which cuDNN reads the shape alone
            _, a_last, _ = _gradients(v, x_last, down, *self.window, [False, True, False])
            a_last, da = self.down.of(a_last), self.da.new()
            a_first = da
        db = self.db.new()
        tensors = (y, result, a_last, a_first, part, db, scale)
        self.back(tensors, tuple(map(Tensor.data_ptr, tensors)))
        return dx, da, db

    def _apart(
        self, dy: Tensor, weight: Tensor, x: Tensor, v: Tensor, down: Tensor, seed: Tensor
    ) -> Tensor:
        """``conv_backward(dy, W) + mask ∘ conv_backward(v, A)``, the sum rounded once."""
        if dy.dim() == 3:  # a signal, which is an image of one row here
            dy, weight = dy[:, :, None], weight[:, :, None]
        # of the joined kernel's channels those of the input
        kernels = (dy, weight), (v, down[:, : x.shape[1]])
        base, low = (
            self.x.of(_gradients(y, x, kernel, *self.window, [True, False, False])[0])
            for y, kernel in kernels
        )
        self._launch(1, (low, base, base, seed))
        return base

    def _masked(self, x: Tensor, seed: Tensor) -> Tensor:
        seen = self.x.new()
        self._launch(0, (x, x, seen, seed))
        return seen

    def _launch(self, which: int, tensors: tuple[Tensor, ...]) -> None:
        """Launch one of the masks' kernels."""
        if self.masks is not None:
            self.masks[which](tensors, tuple(map(Tensor.data_ptr, tensors)))

    def told(self, to: Program, of: Operands) -> tuple[int, int, int]:
        """What `__call__` does where all is wanted, for C++: the slots of the gradients."""
        made = (self.v, self.part, self.wide, self.tall)
        v, part, wide, tall = (to.reserve(*one) for one in made)
        relaid = self.relaid or of.x.dim() == 3
        x_last = to.reserve(*self.x) if relaid else Slot.X
        operands = (Slot.DY, Slot.KEPT, Slot.WEIGHT, Slot.A, Slot.B, Slot.SCALE, Slot.X)
        to.launch(self.spread, (*operands, wide, tall, x_last, v, part))
        _, stride, padding, dilation, *_ = self.window
        window = stride, padding, dilation
        laid = (self.x.shape, self.x.stride) if self.returned else ()
        y = dx = to.gradient((wide, x_last, tall), window, False, *laid)
        if self.returned:
            dx = to.reserve(*self.dx)
        down = to.reserve(*self.down)  # of which cuDNN reads the shape alone
        laid = (self.down.shape, self.down.stride)
        a_last = to.gradient((v, x_last, down), window, True, *laid)
        da, db = to.reserve(*self.da), to.reserve(*self.db)
        to.launch(self.back, (y, dx, a_last, da, part, db, Slot.SCALE))
        return dx, da, db


@on_its_device
def backward(
    dy: Tensor,
    of: Operands,
    t: Tensor,
    scaled: bool,
    wanted: tuple[bool, bool],
    window: Window,
    drop: Optional[Drop] = None,
    down: _Maybe = None,
) -> tuple[_Maybe, _Maybe, Tensor]:
    """The gradients of `forward`: of x, and of A, if wanted, and in float32 of B.

    Args:
        dy: ``[N, C_out, ...]``.
        of, window, drop: of the forward.
        t: of the forward; and where it dropped inputs `down`, A's kernel.
        scaled: whether the scale is in the last gradient.
        wanted: of x, of A.
    """
    plan, addresses = planned_backward(dy, of, t, scaled, wanted, window, drop)
    if plan is _COPY:
        dy, x = (im if _format(im) is not None else im.contiguous() for im in (dy, of.x))
        t, of = _last(t.dtype, *t.shape).of(t), of._replace(x=x)
        return backward(dy, of, t, scaled, wanted, window, drop, down)  # type: ignore[no-any-return]
    dropped = None if drop is None else (down, drop.seed)
    return plan(dy, of, t, addresses, dropped)  # type: ignore[no-any-return]


def planned_backward(
    dy: Tensor,
    of: Operands,
    t: Tensor,
    scaled: bool,
    wanted: tuple[bool, bool],
    window: Window,
    drop: Optional[Drop],
) -> tuple[Any, tuple[int, ...]]:
    """The plan of a `backward`, and the addresses of its tensors."""
    tensors = dy, t, of.weight, of.a, of.b, of.scale, of.x
    how = scaled, wanted, window, None if drop is None else drop.thresholds

    def plan_of(_: Any) -> Any:
        geometry = _geometry(of.x, of.weight, window)
        _check_gradient(dy, of, t, window, geometry)
        # a hook on saved tensors may have laid t anywhere
        laid = t.stride() == _last(t.dtype, *t.shape).stride
        if not laid or _format(dy) is None or _format(of.x) is None:
            return _COPY
        return Backward(dy, of, geometry, scaled, wanted, drop)

    return planned(_BACKWARDS, tensors, how, plan_of)


def _check_gradient(
    dy: Tensor, of: Operands, t: Tensor, window: Window, geometry: _Geometry
) -> None:
    """Refuse what somebody moved or replaced since the forward: the kernels would read past it."""
    x, weight, _, a, b, scale = of
    together = (dy, x, weight, a, b, t, scale)
    outputs = outputs_of(x.shape[2:], weight.shape[2:], window)
    shapes = dy.shape == (len(x), len(weight), *outputs) and factors_fit(weight, a, b, scale)
    shapes = shapes and t.shape == (len(x), padded(len(a)), *geometry.outputs)
    types = {im.dtype for im in (dy, x, weight, t)} == {x.dtype} and _format(weight) is not None
    if not (shapes and types) or len({im.get_device() for im in together}) > 1:
        named = "the gradient, the input, the weight, A, B, A's output and the scale"
        raise changed(named, together)
