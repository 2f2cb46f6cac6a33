"""Forward and backward of a 16-bit convolution of single channels on CUDA, in the kernels of
`kernels`; imported only there."""

import math
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from paramlora.cuda.depthwise import kernels
from paramlora.cuda.launch import Launch, along, changed, on_its_device, planned
from paramlora.cuda.native.program import Program, Slot
from paramlora.cuda.operands import Operands, Window, factors_fit, outputs_of, power
from paramlora.cuda.sum.kernels import add
from paramlora.update.geometry import CHANNELS_LAST

_Maybe = Optional[Tensor]
_Sizes = tuple[int, ...]
TILE = 256  # positions of one program that convolves
BLOCK = 512  # and of one that sums a part of the kernels' gradients,
MANY = 16  # of so many taps at most, else of a row of them
_CHANNELS, _RANKS = 16, 32  # of one program of `add` and `divide`, which sums so many at a time:
_SUMMED = 64
_FLOAT = torch.float32
_FORWARDS: dict[Any, Any] = {}
_BACKWARDS: dict[Any, Any] = {}


@on_its_device
def forward(of: Operands, window: Window) -> tuple[Tensor, Tensor]:
    """``conv(x, W + scale · B A) + bias`` with one rounding, and the kernels that `backward` takes,
    where `operands.is_depthwise`.

    Args:
        of: x ``[N, C, ...]``, 16-bit; and a weight ``[C, 1, *kernel]`` of its type.
        window: stride, padding and dilation, a number for each axis.

    Returns:
        ``[N, C, ...]`` in x's memory format, and ``[C, prod(kernel)]`` in float32.
    """
    x, weight, bias, a, b, scale = of
    # a channel's plane must lie by itself: with the channels last each load would be of one number
    if not x.is_contiguous():
        y, total = forward(of._replace(x=x.contiguous()), window)
        return _as_it_lies(y, x), total
    of = of._replace(bias=None if bias is None else bias.contiguous())
    flat, more = weight.flatten(1), scale if of.bias is None else of.bias
    plan, (px, *factors, pmore) = planned_forward(of, window)
    total, y = x.new_empty(flat.shape, dtype=_FLOAT), x.new_empty(plan.result)
    pt = total.data_ptr()
    plan.add((flat, a, b, scale, total), (*factors, pt))
    plan.launch((x, total, more, y), (px, pt, pmore, y.data_ptr()))
    return y, total


@on_its_device
def backward(
    dy: Tensor,
    of: Operands,
    total: Tensor,
    window: Window,
    scaled: bool,
    wanted: tuple[bool, bool, bool],
) -> tuple[_Maybe, _Maybe, _Maybe, _Maybe]:
    """The gradients of `forward`: of x, of its kernels ``[C, prod(kernel)]`` in float32, of A and
    of B.

    Args:
        dy: ``[N, C, ...]``.
        of, window: of the forward.
        total: of the forward.
        scaled: whether the scale is in the last gradient.
        wanted: of x, of the kernels, of the factors.
    """
    x, _, _, a, b, scale = of
    # as in the forward, and once more back: channels last stay what the caller sees
    if not (dy.is_contiguous() and x.is_contiguous()):
        dense = dy.contiguous(), of._replace(x=x.contiguous())
        dx, *others = backward(*dense, total, window, scaled, wanted)
        return dx if dx is None else _as_it_lies(dx, x), *others
    input_too, kernels_too = wanted[0], any(wanted[1:])
    plan, (py, px, pa, pb, ps, pt) = planned_backward(dy, of, total, window, scaled, wanted)
    dx = x.new_empty(x.shape) if input_too else None
    # of what is not wanted no program runs, so that any address will do
    part = x.new_empty(plan.part, dtype=_FLOAT) if kernels_too else total
    out = total if dx is None else dx
    plan.launch((dy, x, total, out, part), (py, px, pt, out.data_ptr(), part.data_ptr()))
    if not kernels_too:
        return dx, None, None, None
    kernels = part.sum(0)  # in order, so that the result is deterministic
    if not wanted[2]:
        return dx, kernels, None, None
    da, db = a.new_empty(a.shape), b.new_empty(b.shape)
    places = (kernels.data_ptr(), pa, pb, ps, da.data_ptr(), db.data_ptr())
    plan.divide((kernels, a, b, scale, da, db), places)
    return dx, kernels, da, db


def _as_it_lies(t: Tensor, like: Tensor) -> Tensor:
    """A tensor with its channels last in memory, if those of `like` are."""
    last = CHANNELS_LAST.get(t.dim())
    if last is None or not like.is_contiguous(memory_format=last):
        return t
    return t.contiguous(memory_format=last)


def _three(sizes: _Sizes, fill: int = 1) -> _Sizes:
    """A number for each of three axes, the first of which a signal or an image has not."""
    return (*(fill for _ in range(3 - len(sizes))), *sizes)


def _axes(window: Window) -> dict[str, int]:
    stride, padding, dilation = window
    return dict(
        **along("stride_", "dhw", _three(stride)),
        **along("padding_", "dhw", _three(padding, 0)),
        **along("dilation_", "dhw", _three(dilation)),
    )


def _sizes(prefix: str, sizes: _Sizes) -> dict[str, int]:
    return along(prefix, ("depth", "height", "width"), _three(sizes))


class _Tiles:
    """Blocks of rows and columns of the planes ``[N, C, ...]``."""

    def __init__(self, shape: _Sizes, most: int) -> None:
        self.sizes = depth, height, width = _three(shape[2:])
        # as wide as the plane, so that a tile's reads are contiguous; rows fill the rest
        self.columns = min(power(width), most)
        self.rows = min(power(height), most // self.columns)
        self.blocks = depth * -(-height // self.rows) * -(-width // self.columns)
        self.grid = shape[0] * shape[1] * self.blocks


class _Forward(NamedTuple):
    result: _Sizes
    add: Launch
    launch: Launch

    def told(self, to: Program, of: Operands) -> tuple[int, int]:
        """What `forward` does, for C++: the slots of both results."""
        sizes = (len(of.weight), of.weight[0].numel())
        total = to.reserve(*_dense(sizes), _FLOAT)
        y = to.reserve(*_dense(self.result), of.x.dtype)
        to.launch(self.add, (Slot.WEIGHT, Slot.A, Slot.B, Slot.SCALE, total))
        more = Slot.SCALE if of.bias is None else Slot.BIAS
        to.launch(self.launch, (Slot.X, total, more, y))
        return y, total


def _dense(shape: _Sizes) -> tuple[_Sizes, _Sizes]:
    """A shape, and the strides of contiguous memory."""
    return shape, tuple(math.prod(shape[i:]) for i in range(1, len(shape) + 1))


def planned_forward(of: Operands, window: Window) -> tuple[_Forward, _Sizes]:
    """The plan of a `forward` of a contiguous x and bias, and the addresses of x, the flat weight,
    A, B, the scale, and the bias or what stands in for it."""
    flat, more = of.weight.flatten(1), of.scale if of.bias is None else of.bias
    tensors = (of.x, flat, of.a, of.b, of.scale, more)
    rest = (of.weight.shape, window, of.bias is None)
    return planned(_FORWARDS, tensors, rest, lambda _: _plan_forward(of, flat, window))


def _plan_forward(of: Operands, flat: Tensor, window: Window) -> _Forward:
    x, a, b, shape, kernel = of.x, of.a, of.b, of.x.shape, of.weight.shape[2:]
    result = (*shape[:2], *outputs_of(shape[2:], kernel, window))
    channels, taps, device = shape[1], math.prod(kernel), x.get_device()
    first = Launch(
        add,
        device,
        -(-channels // _CHANNELS),
        numbers=dict(
            M=channels,
            N=taps,
            r=len(a),
            **along("stride_w", "mn", flat.stride()),
            **along("stride_a", "rn", a.stride()),
            **along("stride_b", "mr", b.stride()),
        ),
        constants=dict(BLOCK_M=_CHANNELS, BLOCK_N=max(16, power(taps)), R=_RANKS),
        stages=1,
        warps=4,
    )
    tiles = _Tiles(result, TILE)
    launch = Launch(
        kernels.forward,
        device,
        tiles.grid,
        numbers=dict(
            channels=channels,
            **_sizes("x_", shape[2:]),
            **_sizes("", tiles.sizes),
            **_axes(window),
        ),
        constants=dict(
            BIAS=of.bias is not None,
            **along("K", "DHW", _three(kernel)),
            BLOCK_H=tiles.rows,
            BLOCK_W=tiles.columns,
        ),
        stages=1,
        warps=1,
    )
    return _Forward(result, first, launch)


class _Backward(NamedTuple):
    part: _Sizes
    launch: Launch
    divide: Launch

    def told(self, to: Program, of: Operands) -> tuple[int, int, int]:
        """What `backward` does for the gradients of x and the factors, for C++: their slots."""
        x, a, b = of.x, of.a, of.b
        dx = to.reserve(*_dense(tuple(x.shape)), x.dtype)
        part = to.reserve(*_dense(self.part), _FLOAT)
        to.launch(self.launch, (Slot.DY, Slot.X, Slot.KEPT, dx, part))
        kernels = to.sum(part)
        da, db = (to.reserve(*_dense(tuple(one.shape)), one.dtype) for one in (a, b))
        to.launch(self.divide, (kernels, Slot.A, Slot.B, Slot.SCALE, da, db))
        return dx, da, db


def planned_backward(
    dy: Tensor,
    of: Operands,
    total: Tensor,
    window: Window,
    scaled: bool,
    wanted: tuple[bool, bool, bool],
) -> tuple[_Backward, _Sizes]:
    """The plan of a `backward` of contiguous images, and the addresses of dy, x, A, B, the scale
    and the sum."""
    kinds = wanted[0], any(wanted[1:])
    inputs = (dy, of.x, of.a, of.b, of.scale, total)

    def plan_of(_: Any) -> _Backward:
        _check_gradient(dy, of, total, window)
        launch, part = _gradients(dy, of, window, *kinds)
        return _Backward(part, launch, _divide(of, scaled))

    rest = (of.weight.shape, window, scaled, *kinds)
    return planned(_BACKWARDS, inputs, rest, plan_of)


def _check_gradient(dy: Tensor, of: Operands, total: Tensor, window: Window) -> None:
    """Refuse what somebody moved or replaced since the forward: the kernels would read past it."""
    x, weight, _, a, b, scale = of
    result = (*x.shape[:2], *outputs_of(x.shape[2:], weight.shape[2:], window))
    together = (dy, x, weight, a, b, total, scale)
    sizes = dy.shape == result and total.numel() == weight.numel()
    near = len({t.get_device() for t in together}) == 1
    if not (sizes and near and factors_fit(weight, a, b, scale)):
        named = "the gradient, the input, the weight, A, B, their sum and the scale"
        raise changed(named, together)


def _gradients(
    dy: Tensor, of: Operands, window: Window, input_too: bool, kernels_too: bool
) -> tuple[Launch, _Sizes]:
    """The launch of the gradients of x and of the kernels, and the shape of the latter's parts."""
    shape, channels = of.x.shape, of.x.shape[1]
    kernel, taps = _three(of.weight.shape[2:]), of.weight[0].numel()
    tiles, blocks = _Tiles(shape, TILE), _Tiles(dy.shape, BLOCK)
    # of many taps a program takes a row, as its loop over them is unrolled
    split = taps > MANY and taps > kernel[2]
    first = tiles.grid if input_too else 0
    grid = blocks.grid * (taps // kernel[2] if split else 1) if kernels_too else 0
    launch = Launch(
        kernels.backward,
        of.x.get_device(),
        first + grid,
        numbers=dict(
            tiles=first,
            channels=channels,
            **_sizes("x_", tiles.sizes),
            **_sizes("", blocks.sizes),
            **_axes(window),
        ),
        constants=dict(
            SPLIT=split,
            **along("K", "DHW", kernel),
            BLOCK_H=tiles.rows,
            BLOCK_W=tiles.columns,
            PART_H=blocks.rows,
            PART_W=blocks.columns,
        ),
        stages=1,
        warps=1,
    )
    return launch, (shape[0] * blocks.blocks, channels, taps)


def _divide(of: Operands, scaled: bool) -> Launch:
    """The launch of the factors' gradients, from the kernels'."""
    a, b, channels, taps = of.a, of.b, len(of.weight), of.weight[0].numel()
    r, programs = len(a), -(-channels // _CHANNELS)
    ranks = max(16, min(_RANKS, power(r)))
    return Launch(
        kernels.divide,
        of.x.get_device(),
        programs + -(-r // ranks),
        numbers=dict(
            blocks=programs,
            channels=channels,
            taps=taps,
            r=r,
            **along("stride_a", "rt", a.stride()),
            **along("stride_b", "cr", b.stride()),
        ),
        constants=dict(
            SCALED=scaled,
            BLOCK_C=_CHANNELS,
            SUM_C=_SUMMED,
            BLOCK_T=max(16, power(taps)),
            R=ranks,
        ),
        stages=1,
        warps=4,
    )
