"""Forward and backward of a 16-bit convolution on CUDA: cuDNN's convolutions, and between them the
kernels of `conv_kernels`; imported only there.

As in `fused`, all but the tensors is planned once for each kind of operands. A signal is an image
of one row.
"""

import math
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from paramlora import conv_kernels
from paramlora.launch import Launch, bound
from paramlora.served import DEEP, factors_fit, padded
from paramlora.tiles import PROCESSORS, WIDEST

_Maybe = Optional[Tensor]
_Where = tuple[tuple[int, ...], ...]  # stride, padding, dilation
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_BLOCK = 1024  # elements of a weight's row in one program


class _Image(NamedTuple):
    """A tensor ``[batch, channels, ...]`` or a weight; made by its strides, quicker than by its
    shape and format."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def new(self, like: Tensor) -> Tensor:
        return like.new_empty_strided(self.shape, self.stride)

    def of(self, t: Tensor) -> Tensor:
        """The same, in this format."""
        return t if t.stride() == self.stride else self.new(t).copy_(t)


def _first(shape: tuple[int, ...]) -> _Image:
    return _Image(shape, tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))))


def _last(shape: tuple[int, ...]) -> _Image:
    """With the channels last in memory."""
    channels, rest = shape[1], shape[2:]
    inward = (channels * math.prod(rest[i + 1 :]) for i in range(len(rest)))
    return _Image(shape, (channels * math.prod(rest), 1, *inward))


def _format(t: Tensor) -> Optional[bool]:
    """Whether channels are the last in memory, or None where it is neither dense format."""
    if t.is_contiguous():
        return False
    last = _LAST.get(t.dim())
    return True if last is not None and t.is_contiguous(memory_format=last) else None


def widened(channels: int, R: int) -> int:
    """Channels of a joined tensor: cuDNN is a third slower at 328 of them than at 384, and at 136
    than at 160 (bfloat16, 3×3, an H200)."""
    block = 64 if channels >= 256 else 32 if channels >= 64 else 8
    return channels + R + -(channels + R) % block


class _Geometry(NamedTuple):
    """Of a convolution in two or three dimensions: positions along each axis."""

    sizes: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def outputs(self) -> tuple[int, ...]:
        return tuple((free + s) // s for free, s in zip(self._free(), self.stride))

    @property
    def output_padding(self) -> tuple[int, ...]:
        """Of the transposed convolution that leads back to `sizes`."""
        return tuple(free % s for free, s in zip(self._free(), self.stride))

    def _free(self) -> list[int]:
        along = zip(self.sizes, self.kernel, self.padding, self.dilation)
        return [n + 2 * p - d * (k - 1) - 1 for n, k, p, d in along]

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


def _geometry(x: Tensor, weight: Tensor, where: _Where) -> _Geometry:
    sizes, kernel, (stride, padding, dilation) = tuple(x.shape[2:]), tuple(weight.shape[2:]), where
    if len(sizes) == 1:
        return _Geometry((1, *sizes), (1, *kernel), (1, *stride), (0, *padding), (1, *dilation))
    return _Geometry(sizes, kernel, stride, padding, dilation)


def _power(n: int, most: int) -> int:
    """Of a block: a power of two, of at least the 16 that tensor cores take."""
    return max(16, min(most, 1 << (n - 1).bit_length()))


def _copy_blocks(channels: int, P: int, last: bool) -> tuple[int, int]:
    """Channels and positions of a block that is copied; `last`: they stay the last in memory."""
    return _power(channels, 128 if last else 64), _power(P, 32 if last else 64)


def _copies(batch: int, channels: int, P: int, block: tuple[int, int]) -> int:
    return batch * -(-channels // block[0]) * -(-P // block[1])


class _Back(NamedTuple):
    """The launch of `conv_kernels.back`, for an image and A's gradient or one of them."""

    launch: Launch

    def __call__(self, y: Tensor, result: Tensor, a_last: Tensor, da: Tensor) -> None:
        tensors = (y, result, a_last, da)
        self.launch(tensors, tuple(t.data_ptr() for t in tensors))


def _back(
    device: int, image: Optional[tuple[int, int, int]], weight: tuple[int, int, int]
) -> Optional[_Back]:
    """For ``[batch, channels, P]``, and r rows of so many channels and positions."""
    batch, channels, P = image or (0, 1, 1)
    r, inner, positions = weight
    block = _copy_blocks(channels, P, False)
    tiles = _copies(batch, channels, P, block)
    grid = tiles + r * -(-inner * positions // _BLOCK)
    numbers = (tiles, channels, P, inner, positions)
    constants = (*block, _BLOCK)
    return (
        _Back(Launch(conv_kernels.back, device, grid, numbers, constants, 1, 4)) if grid else None
    )


class _Forward:
    """The plan of a forward: two convolutions between two or three launches."""

    def __init__(
        self, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, geometry: _Geometry
    ) -> None:
        (batch, inner), out, (r, _), R = x.shape[:2], len(weight), a.shape, padded(len(a))
        sizes, kernel, outputs = geometry.sizes, geometry.kernel, geometry.outputs
        P, PO, positions = math.prod(sizes), math.prod(outputs), math.prod(kernel)
        channels, device = widened(inner, R), x.get_device()
        last, weight_last = bool(_format(x)), bool(_format(weight))
        self.conv, self.where = getattr(F, f"conv{len(sizes)}d"), geometry[2:]
        self.wide, self.t = _last((batch, channels, *sizes)), _last((batch, R, *outputs))
        self.joined, self.down = _last((out, channels, *kernel)), _last((R, channels, *kernel))
        self.size = R * out + 2 * -(-out // DEEP)
        factors, added = (*a.stride(), *b.stride()), channels - inner
        block = _copy_blocks(channels, P, last)
        numbers = (out, inner, added, positions, P, r, geometry.middle, *factors)
        grid = (out + R) * -(-channels * positions // _BLOCK) + _copies(batch, channels, P, block)
        constants: tuple[Any, ...] = (last, weight_last, R, *block, _BLOCK)
        self.prepare = Launch(conv_kernels.prepare, device, grid, numbers, constants, 1, 4)
        flat = (1,) * (3 - len(sizes))
        axes = (*flat, *sizes)[1:], (*flat, *outputs), (*(0 for _ in flat), *geometry.firsts)
        numbers = (inner, added, P, PO, *axes[0], *axes[1], *axes[2], *flat, *geometry.stride)
        same = outputs == sizes and not any(geometry.firsts)
        BP = _power(P, 64)
        constants = (same, R, BP)
        self.put = Launch(conv_kernels.put, device, batch * -(-P // BP), numbers, constants, 1, 4)
        self.y = _last((batch, out, *outputs))
        self.result = _first((batch, out, *outputs[len(sizes) + 2 - x.dim() :]))
        image = None if last or weight_last else (batch, out, PO)
        self.back = _back(device, image, (0, 1, 1))

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: _Maybe,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        addresses: tuple[int, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        joined, down, kept = self.joined.new(x), self.down.new(x), x.new_empty(self.size)
        wide = self.wide.new(x)
        made = (wide, joined, down, kept)
        places = tuple(t.data_ptr() for t in made)
        self.prepare((x, weight, a, b, scale, *made), addresses + places)
        t = self.t.of(self.conv(wide, down, None, *self.where))
        self.put((t, wide), (t.data_ptr(), places[0]))
        y = self.conv(wide, joined, bias, *self.where)
        if self.back is None:
            return y, t, kept
        y, result = self.y.of(y), self.result.new(y)
        self.back(y, result, y, y)
        return result, t, kept


_FORWARDS: dict[Any, Any] = {}
_BACKWARDS: dict[Any, Any] = {}
_COPY = object()  # instead of a plan: the input must first be laid out anew


def forward(
    x: Tensor, weight: Tensor, bias: _Maybe, a: Tensor, b: Tensor, scale: Tensor, where: _Where
) -> Optional[tuple[Tensor, Tensor, Tensor]]:
    """``conv(x, W + scale · B A) + bias`` with one rounding, and what `backward` takes.

    Args:
        x: ``[N, C_in, ...]``, 16-bit.
        weight: ``[C_out, C_in, *kernel]``, of x's type.
        bias: ``[C_out]`` or None.
        a: ``[r, C_in · prod(kernel)]``.
        b: ``[C_out, r]``.
        scale: ``[]``.
        where: stride, padding and dilation, a number for each axis.

    Returns:
        ``[N, C_out, ...]``, ``t[N, R, ...]`` and `kept`, or None where the kernels do not serve
        these operands.
    """
    device = x.get_device()
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return forward(x, weight, bias, a, b, scale, where)
    px, pw, ps = x.data_ptr(), weight.data_ptr(), scale.data_ptr()
    pa, pb = a.data_ptr(), b.data_ptr()
    odd = (px | pw | pa | pb | ps) & 15
    key = (
        x.shape, x.stride(), x.dtype, weight.shape, weight.stride(), weight.dtype,
        a.shape, a.stride(), a.dtype, b.shape, b.stride(), b.dtype, scale.dtype, where,
        device, weight.get_device(), a.get_device(), b.get_device(), scale.get_device(),
        odd and tuple(p & 15 for p in (px, pw, pa, pb, ps)),
    )  # fmt: skip
    plan = _FORWARDS.get(key, _FORWARDS)
    if plan is _FORWARDS:
        bound(_FORWARDS)
        plan = _FORWARDS[key] = _plan_forward(x, weight, a, b, scale, where)
    if plan is None:
        return None
    if plan is _COPY:
        return forward(x.contiguous(), weight, bias, a, b, scale, where)
    return plan(x, weight, bias, a, b, scale, (px, pw, pa, pb, ps))  # type: ignore[no-any-return]


def _plan_forward(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: Tensor, where: _Where
) -> Any:
    together = weight.dtype == x.dtype and weight.get_device() == x.get_device()
    if not (together and factors_fit(weight, a, b, scale) and len(a) <= WIDEST and x.numel()):
        return None
    if x.dim() != weight.dim() or x.shape[1] != weight.shape[1] or _format(weight) is None:
        return None
    geometry = _geometry(x, weight, where)
    if min(geometry.outputs) < 1 or not geometry.inside:
        return None
    positions = max(math.prod(of) for of in (geometry.sizes, geometry.outputs, geometry.kernel))
    if widened(max(weight.shape[:2]), padded(len(a))) * positions >= 2**31:
        return None
    return _COPY if _format(x) is None else _Forward(x, weight, a, b, geometry)


class _Backward:
    """The plan of a backward: two convolutions' gradients between two launches."""

    def __init__(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        a: Tensor,
        geometry: _Geometry,
        scaled: bool,
        input_too: bool,
        a_too: bool,
    ) -> None:
        (batch, inner), out, (r, _), R = x.shape[:2], len(weight), a.shape, padded(len(a))
        sizes, kernel, outputs = geometry.sizes, geometry.kernel, geometry.outputs
        PX, P, positions = math.prod(sizes), math.prod(outputs), math.prod(kernel)
        channels, device = widened(out, R), x.get_device()
        last, x_last, weight_last = (bool(_format(t)) for t in (dy, x, weight))
        self.input_too, self.a_too = input_too, a_too
        self.transposed, self.where = getattr(F, f"conv_transpose{len(sizes)}d"), geometry[2:]
        self.back_where = (*geometry[2:4], geometry.output_padding, 1, geometry.dilation)
        self.wide, self.tall = _last((batch, channels, *outputs)), _last((channels, inner, *kernel))
        self.t, self.x, self.down = (
            _last(of) for of in ((batch, R, *outputs), (batch, inner, *sizes), (R, inner, *kernel))
        )
        self.relaid = a_too and not x_last
        most = 128 if batch * -(-P // 128) >= PROCESSORS else 32
        BP, GP, block = _power(P, most), _power(P, 64), _copy_blocks(inner, PX, False)
        tiles, blocks, units = batch * -(-P // BP), -(-out // DEEP), batch * -(-P // GP)
        groups = max(1, min(-(-units // 4), -(-PROCESSORS // blocks)))
        each = -(-units // groups)
        groups = -(-units // each)
        self.sums = groups * out * R if groups > 1 else 0
        grid = tiles + groups * blocks
        grid += channels * -(-inner * positions // _BLOCK) if input_too else 0
        grid += _copies(batch, inner, PX, block) if self.relaid else 0
        numbers = (
            tiles, groups, each, batch, out, inner, channels - out, positions, P, PX, r, *a.stride()
        )  # fmt: skip
        constants = (input_too, scaled, last, weight_last, R, BP, block[0], GP, block[1], _BLOCK)
        self.launch = Launch(conv_kernels.spread, device, grid, numbers, constants, 3, 4)
        self.db = _first((out, r))
        self.da, self.dx = _first(tuple(a.shape)), None if x_last else _first(tuple(x.shape))
        image = (batch, inner, PX) if input_too and not x_last else None
        self.back = _back(device, image, (r if a_too else 0, inner, positions))

    def __call__(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        a: Tensor,
        t: Tensor,
        kept: Tensor,
        scale: _Maybe,
        addresses: tuple[int, ...],
    ) -> tuple[_Maybe, _Maybe, Tensor]:
        v = self.t.new(x)
        db = x.new_empty_strided(*self.db, dtype=torch.float32)
        part = x.new_empty(self.sums, dtype=torch.float32) if self.sums else db
        wide, tall = (self.wide.new(x), self.tall.new(x)) if self.input_too else (v, v)
        x_last = self.x.new(x) if self.relaid else x
        py, px, pw, pa, pt, pk, ps = addresses
        made = (wide, tall, x_last, v, db, part)
        places = [t.data_ptr() for t in made]
        self.launch(
            (dy, kept, t, weight, a, x, *made, db if scale is None else scale),
            (py, pk, pt, pw, pa, px, *places, ps or places[4]),
        )
        dx = self.transposed(wide, tall, None, *self.back_where) if self.input_too else None
        a_last = da = v
        if self.a_too:
            # of A's kernel its shape alone counts here
            _, a_last, _ = torch.ops.aten.convolution_backward.default(
                v, x_last, self.down.new(x), [0], *self.where, False, [0] * len(self.where[0]), 1,
                [False, True, False],
            )  # fmt: skip
            a_last, da = self.down.of(a_last), a.new_empty_strided(*self.da)
        if self.back is not None:
            y, result = v, v
            if dx is not None and self.dx is not None:
                y, result = self.x.of(dx), self.dx.new(x)
                dx = result
            self.back(y, result, a_last, da)
        return dx, da if self.a_too else None, db


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    t: Tensor,
    kept: Tensor,
    scale: _Maybe,
    input_too: bool,
    a_too: bool,
    where: _Where,
) -> tuple[_Maybe, _Maybe, Tensor]:
    """The gradients of `forward`: of x, and of A, if wanted, and in float32 of B.

    Args:
        dy: ``[N, C_out, ...]``.
        x, weight, a, where: of the forward.
        t, kept: of the forward.
        scale: ``[]``, or None to leave the last gradient unscaled.
        input_too, a_too: what is wanted.
    """
    device = x.get_device()
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return backward(dy, x, weight, a, t, kept, scale, input_too, a_too, where)
    py, px, pw, pa = dy.data_ptr(), x.data_ptr(), weight.data_ptr(), a.data_ptr()
    pt, pk, ps = t.data_ptr(), kept.data_ptr(), 0 if scale is None else scale.data_ptr()
    if (pt | pk) & 15:  # a hook on saved tensors may have laid them anywhere
        t, kept = t.clone(), kept.clone()
        pt, pk = t.data_ptr(), kept.data_ptr()
    odd = (py | px | pw | pa | ps) & 15
    key = (
        dy.shape, dy.stride(), dy.dtype, x.shape, x.stride(), x.dtype, weight.shape,
        weight.stride(), weight.dtype, a.shape, a.stride(), a.dtype, t.shape, t.stride(), t.dtype,
        kept.shape, kept.dtype, scale is None or (scale.dtype, scale.get_device()), input_too,
        a_too, where, device, dy.get_device(), weight.get_device(), a.get_device(),
        t.get_device(), kept.get_device(),
        odd and tuple(p & 15 for p in (py, px, pw, pa, ps)),
    )  # fmt: skip
    plan = _BACKWARDS.get(key)
    if plan is None:
        bound(_BACKWARDS)
        plan = _plan_backward(dy, x, weight, a, t, kept, scale, input_too, a_too, where)
        _BACKWARDS[key] = plan
    if plan is _COPY:
        dy, x = (of if _format(of) is not None else of.contiguous() for of in (dy, x))
        t = _last(tuple(t.shape)).of(t)
        return backward(dy, x, weight, a, t, kept, scale, input_too, a_too, where)
    addresses = (py, px, pw, pa, pt, pk, ps)
    return plan(dy, x, weight, a, t, kept, scale, addresses)  # type: ignore[no-any-return]


def _plan_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    t: Tensor,
    kept: Tensor,
    scale: _Maybe,
    input_too: bool,
    a_too: bool,
    where: _Where,
) -> Any:
    together = [dy, x, weight, a, t, kept] if scale is None else [dy, x, weight, a, t, kept, scale]
    geometry, R, out = _geometry(x, weight, where), padded(len(a)), len(weight)
    outputs, lead = geometry.outputs[len(geometry.outputs) + 2 - dy.dim() :], (len(x), out)
    shapes = dy.shape == (*lead, *outputs) and t.shape == (len(x), R, *geometry.outputs)
    sizes = len(kept) == R * out + 2 * -(-out // DEEP) and a.shape[1] * out == weight.numel()
    types = {dy.dtype, x.dtype, weight.dtype, t.dtype, kept.dtype} == {x.dtype}
    devices = len({of.get_device() for of in together}) == 1
    if not (shapes and sizes and types and devices) or _format(weight) is None:
        described = ", ".join(f"{of.dtype} {list(of.shape)} on {of.device}" for of in together)
        raise ValueError(
            f"the gradient, the input, the weight, A, what the forward kept and the scale do not "
            f"belong together ({described}): did one of them change after the forward? Run the "
            f"forward again"
        )
    if _format(dy) is None or _format(x) is None or t.stride() != _last(tuple(t.shape)).stride:
        return _COPY
    return _Backward(dy, x, weight, a, geometry, scale is not None, input_too, a_too)
