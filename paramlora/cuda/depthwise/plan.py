"""Forward and backward of a 16-bit convolution of single channels on CUDA, in the kernels of
`kernels`; imported only there."""

import functools
import math
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from paramlora.cuda.depthwise import kernels
from paramlora.cuda.launch import Launch, changed, on_its_device
from paramlora.cuda.operands import Operands, Window, factors_fit, outputs_of, power

_Maybe = Optional[Tensor]
_Sizes = tuple[int, ...]
TILE = 256  # positions of one program that convolves
BLOCK = 512  # and of one that sums a part of the kernels' gradients,
MANY = 16  # of so many taps at most, else of a row of them
_CHANNELS, _RANKS = 16, 32  # of one program of `add` and `divide`, which sums so many at a time:
_SUMMED = 64
_FLOAT = torch.float32


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
    if not x.is_contiguous():
        y, total = forward(of._replace(x=x.contiguous()), window)
        return _as_it_lies(y, x), total
    flat, more = weight.flatten(1), None if bias is None else bias.contiguous()
    inputs = (x, flat, a, b, scale) if more is None else (x, flat, a, b, scale, more)
    plan = _plan_forward(
        x.get_device(), x.shape, weight.shape, len(a), window, more is None,
        flat.stride(), a.stride(), b.stride(), _kinds(inputs),
    )  # fmt: skip
    total = x.new_empty(flat.shape, dtype=_FLOAT)
    y = x.new_empty(plan.result)
    places = (x.data_ptr(), total.data_ptr(), y.data_ptr())
    addresses = (flat.data_ptr(), a.data_ptr(), b.data_ptr(), scale.data_ptr(), places[1])
    plan.add((flat, a, b, scale, total), addresses)
    more = total if more is None else more
    plan.launch((x, total, more, y), (*places[:2], more.data_ptr(), places[2]))
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
    x, weight, _, a, b, scale = of
    result = (*x.shape[:2], *outputs_of(x.shape[2:], weight.shape[2:], window))
    together = (dy, x, weight, a, b, total, scale)
    sizes = dy.shape == result and total.numel() == weight.numel()
    if not (sizes and factors_fit(weight, a, b, scale)) or len(set(map(_device, together))) > 1:
        named = "the gradient, the input, the weight, A, B, their sum and the scale"
        raise changed(named, together)
    if not (dy.is_contiguous() and x.is_contiguous()):
        dense = dy.contiguous(), of._replace(x=x.contiguous())
        dx, *others = backward(*dense, total, window, scaled, wanted)
        return dx if dx is None else _as_it_lies(dx, x), *others
    inputs, input_too, kernels_too = (dy, x, a, b, scale, total), wanted[0], any(wanted[1:])
    plan = _plan_backward(
        x.get_device(), x.shape, dy.shape, weight.shape, len(a), window, scaled, input_too,
        kernels_too, a.stride(), b.stride(), _kinds(inputs),
    )  # fmt: skip
    py, px, pa, pb, ps, pt = (t.data_ptr() for t in inputs)
    dx = x.new_empty(x.shape) if input_too else None
    part = x.new_empty(plan.part, dtype=_FLOAT) if kernels_too else total
    out = total if dx is None else dx
    plan.launch((dy, x, total, out, part), (py, px, pt, out.data_ptr(), part.data_ptr()))
    if not kernels_too:
        return dx, None, None, None
    kernels = part.sum(0)
    if not wanted[2]:
        return dx, kernels, None, None
    da, db = a.new_empty(a.shape), b.new_empty(b.shape)
    places = (kernels.data_ptr(), pa, pb, ps, da.data_ptr(), db.data_ptr())
    plan.divide((kernels, a, b, scale, da, db), places)
    return dx, kernels, da, db


def _device(t: Tensor) -> int:
    return t.get_device()


def _kinds(tensors: tuple[Tensor, ...]) -> tuple[object, ...]:
    """What a launch is compiled for: the types, and which addresses 16 bytes do not divide."""
    odd = [t.data_ptr() & 15 for t in tensors]
    return (*(t.dtype for t in tensors), *(odd if any(odd) else ()))


def _as_it_lies(t: Tensor, like: Tensor) -> Tensor:
    """With its channels last in memory, if those of `like` are."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(t.dim())
    if last is None or not like.is_contiguous(memory_format=last):
        return t
    return t.contiguous(memory_format=last)


def _three(sizes: _Sizes, fill: int = 1) -> _Sizes:
    return (*(fill for _ in range(3 - len(sizes))), *sizes)


def _axes(window: Window) -> _Sizes:
    stride, padding, dilation = window
    return (*_three(stride), *_three(padding, 0), *_three(dilation))


class _Tiles:
    """Blocks of rows and columns of the planes ``[N, C, ...]``."""

    def __init__(self, shape: _Sizes, most: int) -> None:
        self.sizes = depth, height, width = _three(shape[2:])
        self.columns = min(power(width), most)
        self.rows = min(power(height), most // self.columns)
        self.blocks = depth * -(-height // self.rows) * -(-width // self.columns)
        self.grid = shape[0] * shape[1] * self.blocks


class _Forward(NamedTuple):
    result: _Sizes
    add: Launch
    launch: Launch


# A launch keeps to the types and alignments that it was first given, so they tell plans apart.
@functools.lru_cache(4096)
def _plan_forward(
    device: int,
    shape: _Sizes,
    weight: _Sizes,
    r: int,
    window: Window,
    plain: bool,
    w_stride: _Sizes,
    a_stride: _Sizes,
    b_stride: _Sizes,
    kinds: tuple[object, ...],
) -> _Forward:
    result = (*shape[:2], *outputs_of(shape[2:], weight[2:], window))
    channels, taps = shape[1], math.prod(weight[2:])
    numbers = (channels, taps, r, *w_stride, *a_stride, *b_stride)
    constants: _Sizes = (_CHANNELS, max(16, power(taps)), _RANKS)
    grid = -(-channels // _CHANNELS)
    add = Launch(kernels.add, device, grid, numbers, constants, 1, 4)
    tiles = _Tiles(result, TILE)
    numbers = (channels, *_three(shape[2:]), *tiles.sizes, *_axes(window))
    constants = (not plain, *_three(weight[2:]), tiles.rows, tiles.columns)
    launch = Launch(kernels.forward, device, tiles.grid, numbers, constants, 1, 1)
    return _Forward(result, add, launch)


class _Backward(NamedTuple):
    part: _Sizes
    launch: Launch
    divide: Launch


@functools.lru_cache(4096)
def _plan_backward(
    device: int,
    shape: _Sizes,
    gradient: _Sizes,
    weight: _Sizes,
    r: int,
    window: Window,
    scaled: bool,
    input_too: bool,
    kernels_too: bool,
    a_stride: _Sizes,
    b_stride: _Sizes,
    kinds: tuple[object, ...],
) -> _Backward:
    channels, kernel, taps = shape[1], _three(weight[2:]), math.prod(weight[2:])
    tiles, blocks = _Tiles(shape, TILE), _Tiles(gradient, BLOCK)
    split = taps > MANY and taps > kernel[2]
    first = tiles.grid if input_too else 0
    grid = blocks.grid * (taps // kernel[2] if split else 1) if kernels_too else 0
    numbers = (first, channels, *tiles.sizes, *blocks.sizes, *_axes(window))
    constants = (split, *kernel, tiles.rows, tiles.columns, blocks.rows, blocks.columns)
    launch = Launch(kernels.backward, device, first + grid, numbers, constants, 1, 1)
    programs, ranks = -(-channels // _CHANNELS), max(16, min(_RANKS, power(r)))
    numbers = (programs, channels, taps, r, *a_stride, *b_stride)
    constants = (scaled, _CHANNELS, _SUMMED, max(16, power(taps)), ranks)
    grid = programs + -(-r // ranks)
    divide = Launch(kernels.divide, device, grid, numbers, constants, 1, 4)
    return _Backward((shape[0] * blocks.blocks, channels, taps), launch, divide)
