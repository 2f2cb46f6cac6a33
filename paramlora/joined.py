"""Forward and backward of a 16-bit convolution on CUDA: cuDNN's convolutions, and between them the
kernels that prepare their operands in one launch each; imported only there.

As in `fused`, all but the tensors is planned once for each kind of operands.
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
    """A tensor ``[batch, channels, ...]``, or a weight likewise, whose channels are the last in
    memory where `last`; made by its strides, quicker than by shape and format."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    last: bool

    def new(self, like: Tensor) -> Tensor:
        return like.new_empty_strided(self.shape, self.stride)


def _image(shape: tuple[int, ...], last: bool) -> _Image:
    channels, rest = shape[1], shape[2:]
    inward = [math.prod(rest[i + 1 :]) for i in range(len(rest))]
    whole = math.prod(rest) * channels
    if last:
        return _Image(shape, (whole, 1, *(channels * step for step in inward)), True)
    return _Image(shape, (whole, math.prod(rest), *inward), False)


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


def _middle(kernel: tuple[int, ...]) -> int:
    """Which position of a kernel is its middle."""
    middle = 0
    for k in kernel:
        middle = middle * k + k // 2
    return middle


def _firsts(kernel: tuple[int, ...], where: _Where) -> list[int]:
    """The position of x that a kernel's middle meets for the first output, along each axis."""
    return [k // 2 * d - p for k, p, d in zip(kernel, where[1], where[2])]


def _outputs(sizes: tuple[int, ...], kernel: tuple[int, ...], where: _Where) -> list[int]:
    along = zip(sizes, kernel, *where)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in along]


def _pixels(positions: int, most: int) -> int:
    """A block of positions: a power of two, of at least the 16 that tensor cores take."""
    return max(16, min(most, 1 << (positions - 1).bit_length()))


class _Forward:
    """The plan of a forward: two launches and two convolutions."""

    def __init__(self, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, where: _Where) -> None:
        (batch, inner, *sizes), (out, _, *kernel) = x.shape, weight.shape
        outputs = _outputs(tuple(sizes), tuple(kernel), where)
        r, R, P, PO = len(a), padded(len(a)), math.prod(sizes), math.prod(outputs)
        added, positions, device = widened(inner, R) - inner, math.prod(kernel), x.get_device()
        last, weight_last = bool(_format(x)), bool(_format(weight))
        self.conv = getattr(F, f"conv{len(kernel)}d")
        self.joined = _image((out, inner + added, *kernel), weight_last)
        self.down = _image((R, inner, *kernel), weight_last)
        self.wide = _image((batch, inner + added, *sizes), last)
        self.t = _image((batch, R, *outputs), last or weight_last)
        self.size = R * (out + batch * PO) + 2 * -(-out // DEEP)
        self.before_u = x.element_size() * R * out
        factors = (*a.stride(), *b.stride())
        numbers = (out, inner, added, positions, r, _middle(tuple(kernel)), *factors, batch * PO)
        grid = (out + R) * -(-(inner + added) * positions // _BLOCK)
        constants: tuple[Any, ...] = (weight_last, R, _BLOCK)
        self.prepare = Launch(conv_kernels.prepare, device, grid, numbers, constants, 1, 4)
        deep = 3 - len(sizes)  # axes of one position, to make three
        flat, ones, firsts = [0] * deep, [1] * deep, _firsts(tuple(kernel), where)
        axes = (*ones, *sizes)[1:], (*ones, *outputs), (*flat, *firsts), (*ones, *where[0])
        numbers = (inner, added, P, PO, *axes[0], *axes[1], *axes[2], *axes[3])
        BC, BP = (128, _pixels(P, 32)) if last else (32, _pixels(P, 128))
        same = outputs == sizes and not any(firsts)
        constants = (last, self.t.last, same, R, BC, BP)
        grid = batch * (-(-inner // BC) + 1) * -(-P // BP)
        self.beside = Launch(conv_kernels.beside, device, grid, numbers, constants, 1, 4)

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: _Maybe,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        where: _Where,
        addresses: tuple[int, ...],
    ) -> tuple[Tensor, Tensor]:
        px, pw, pa, pb, ps = addresses
        joined, down, kept = self.joined.new(weight), self.down.new(weight), x.new_empty(self.size)
        pk = kept.data_ptr()
        self.prepare(
            (weight, a, b, scale, joined, down, kept),
            (pw, pa, pb, ps, joined.data_ptr(), down.data_ptr(), pk),
        )
        t = self.conv(x, down, None, *where)
        if t.stride() != self.t.stride:
            t = self.t.new(t).copy_(t)
        wide = self.wide.new(x)
        self.beside(
            (x, t, wide, kept), (px, t.data_ptr(), wide.data_ptr(), pk + self.before_u)
        )  # fmt: skip
        return self.conv(wide, joined, bias, *where), kept


_FORWARDS: dict[Any, Any] = {}
_BACKWARDS: dict[Any, Any] = {}


def forward(
    x: Tensor,
    weight: Tensor,
    bias: _Maybe,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    where: _Where,
) -> Optional[tuple[Tensor, Tensor]]:
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
        ``[N, C_out, ...]`` and `kept`, or None where the kernels do not serve these operands.
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
    return plan(x, weight, bias, a, b, scale, where, (px, pw, pa, pb, ps))  # type: ignore[no-any-return]


_COPY = object()  # instead of a plan: the input must first be laid out anew


def _plan_forward(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: Tensor, where: _Where
) -> Any:
    sizes, kernel = tuple(x.shape[2:]), tuple(weight.shape[2:])
    together = weight.dtype == x.dtype and weight.get_device() == x.get_device()
    if not (together and factors_fit(weight, a, b, scale) and len(a) <= WIDEST):
        return None
    if x.dim() != weight.dim() or x.shape[1] != weight.shape[1] or _format(weight) is None:
        return None
    outputs = _outputs(sizes, kernel, where)
    lasts = [f + (n - 1) * s for f, n, s in zip(_firsts(kernel, where), outputs, where[0])]
    # where a kernel's middle meets the padding, t has no place beside x
    outside = min(_firsts(kernel, where)) < 0 or any(e >= n for e, n in zip(lasts, sizes))
    largest = widened(max(weight.shape[:2]), padded(len(a))) * max(map(math.prod, (sizes, kernel)))
    if outside or min(outputs) < 1 or not x.numel() or largest >= 2**31:
        return None
    return _COPY if _format(x) is None else _Forward(x, weight, a, b, where)


class _Backward:
    """The plan of a backward: a launch and two convolutions' gradients."""

    def __init__(
        self, dy: Tensor, x: Tensor, weight: Tensor, a: Tensor, scaled: bool, input_too: bool
    ) -> None:
        (batch, out, *sizes), (_, inner, *kernel) = dy.shape, weight.shape
        r, R, P, device = len(a), padded(len(a)), math.prod(sizes), x.get_device()
        last, x_last, weight_last = (bool(_format(t)) for t in (dy, x, weight))
        self.input_too, self.r, self.out = input_too, r, out
        self.factor_shape = a.shape
        added, positions = widened(out, R) - out, math.prod(kernel)
        self.wide = _image((batch, out + added, *sizes), x_last or weight_last)
        self.tall = _image((out + added, inner, *kernel), weight_last)
        self.v = _image((batch, R, *sizes), x_last)
        self.down = (R, inner, *kernel)
        most = 128 if batch * -(-P // 128) >= PROCESSORS else 32
        BP, GP = _pixels(P, most), _pixels(P, 64)
        tiles, blocks, units = batch * -(-P // BP), -(-out // DEEP), batch * -(-P // GP)
        groups = max(1, min(-(-units // 4), -(-PROCESSORS // blocks)))
        each = -(-units // groups)
        groups = -(-units // each)
        self.sums = groups * out * R if groups > 1 else 0
        rows = (out + added) * -(-inner * positions // _BLOCK) if input_too else 0
        numbers = (tiles, groups, each, batch, out, inner, added, positions, P, r, *a.stride())
        constants = (
            input_too, scaled, last, self.wide.last, x_last, weight_last, R, BP, 64, GP, _BLOCK
        )  # fmt: skip
        grid = tiles + groups * blocks + rows
        self.launch = Launch(conv_kernels.spread, device, grid, numbers, constants, 3, 4)

    def __call__(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        a: Tensor,
        kept: Tensor,
        scale: _Maybe,
        a_too: bool,
        where: _Where,
        addresses: tuple[int, ...],
    ) -> tuple[_Maybe, _Maybe, Tensor]:
        py, pw, pa, ps, pk = addresses
        v = self.v.new(x)
        db = x.new_empty_strided((self.out, self.r), (self.r, 1), dtype=torch.float32)
        part = x.new_empty(self.sums, dtype=torch.float32) if self.sums else db
        wide, tall = (self.wide.new(x), self.tall.new(x)) if self.input_too else (v, v)
        tensors = (dy, kept, weight, a, wide, tall, v, db, part, db if scale is None else scale)
        made = tuple(t.data_ptr() for t in tensors[4:9])
        self.launch(tensors, (py, pk, pw, pa, *made, ps or made[3]))
        dx = _backward(wide, x, tall, where, [True, False, False])[0] if self.input_too else None
        if not a_too:
            return dx, None, db
        # of A's kernel its shape alone counts here
        da = _backward(v, x, x.new_empty(self.down), where, [False, True, False])[1]
        return dx, da[: self.r].reshape(self.factor_shape), db


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, where: _Where, masks: list[bool]
) -> tuple[Any, Any, Any]:
    stride, padding, dilation = where
    return torch.ops.aten.convolution_backward.default(  # type: ignore[no-any-return]
        dy, x, weight, [0], stride, padding, dilation, False, [0] * len(stride), 1, masks
    )


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
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
        kept: of the forward.
        scale: ``[]``, or None to leave the last gradient unscaled.
        input_too, a_too: what is wanted.
    """
    device = x.get_device()
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return backward(dy, x, weight, a, kept, scale, input_too, a_too, where)
    py, pw, pa, pk = dy.data_ptr(), weight.data_ptr(), a.data_ptr(), kept.data_ptr()
    ps = 0 if scale is None else scale.data_ptr()
    if pk & 15:  # a hook on saved tensors may have laid it anywhere
        kept = kept.clone()
        pk = kept.data_ptr()
    odd = (py | pw | pa | ps) & 15
    key = (
        dy.shape, dy.stride(), dy.dtype, x.shape, x.stride(), x.dtype, weight.shape,
        weight.stride(), weight.dtype, a.shape, a.stride(), a.dtype, kept.shape,
        scale is None or (scale.dtype, scale.get_device()), input_too,
        device, dy.get_device(), weight.get_device(), a.get_device(), kept.get_device(),
        odd and tuple(p & 15 for p in (py, pw, pa, ps)),
    )  # fmt: skip
    plan = _BACKWARDS.get(key)
    if plan is None:
        bound(_BACKWARDS)
        plan = _BACKWARDS[key] = _plan_backward(dy, x, weight, a, kept, scale, input_too)
    if plan is _COPY:
        dy, x = (t if _format(t) is not None else t.contiguous() for t in (dy, x))
        return backward(dy, x, weight, a, kept, scale, input_too, a_too, where)
    addresses = (py, pw, pa, ps, pk)
    return plan(dy, x, weight, a, kept, scale, a_too, where, addresses)  # type: ignore[no-any-return]


def _plan_backward(
    dy: Tensor, x: Tensor, weight: Tensor, a: Tensor, kept: Tensor, scale: _Maybe, input_too: bool
) -> Any:
    together = (dy, x, weight, a, kept) if scale is None else (dy, x, weight, a, kept, scale)
    sizes = dy.shape[:2] == (len(x), len(weight)) and a.shape[1] * len(weight) == weight.numel()
    types = dy.dtype == x.dtype == weight.dtype == kept.dtype and _format(weight) is not None
    if not (sizes and types) or len({t.get_device() for t in together}) > 1:
        described = ", ".join(f"{t.dtype} {list(t.shape)} on {t.device}" for t in together)
        raise ValueError(
            f"the gradient, the input, the weight, A and the scale do not belong together "
            f"({described}): did one of them change after the forward? Run the forward again"
        )
    if _format(dy) is None or _format(x) is None:
        return _COPY
    return _Backward(dy, x, weight, a, scale is not None, input_too)
