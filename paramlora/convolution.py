"""Low-rank convolution: a dense kernel that is not kept, or a branch of two convolutions."""

from math import prod
from typing import Any, Optional, Sequence

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor
from torch.compiler import is_compiling

from paramlora.functional import (
    cast,
    cast_for_autocast,
    denser,
    differentiable,
    gradient_of_second,
    scaled,
)

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_Maybe = Optional[Tensor]
SMALL = 2**23  # multiplications below which a CPU's autograd function costs more than it saves


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: _Maybe,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    strength: float = 1.0,
) -> Tensor:
    """``conv(x, W + strength · scale · B A) + bias`` in 1, 2 or 3 dimensions.

    A low-rank branch of two convolutions is added in 16 bits, where a dense kernel would round a
    small update away, and where positions are few (`denser`); else the dense kernel is formed. In
    groups, where a branch repeats its first kernel for each, the update is a kernel of its own.

    Args:
        x: ``[N, C_in, ...]``.
        weight: ``[C_out, C_in / groups, *kernel]``.
        bias: ``[C_out]`` or None.
        lora_A: ``[r, C_in / groups · prod(kernel)]``.
        lora_B: ``[C_out, r]``.
        scale: ``[]``.
        stride, padding, dilation, groups: as for `torch.nn.functional.conv2d`; zeros padding.
        strength: a number on top of `scale`.

    Example:
        >>> x, W = torch.randn(2, 4, 6, 6).double(), torch.randn(8, 4, 3, 3).double()
        >>> A, B = torch.randn(2, 36).double(), torch.randn(8, 2).double()
        >>> where = ((1, 1), (0, 0), (1, 1), 1)
        >>> y = convolution(x, W, None, A, B, torch.tensor(0.5).double(), *where)
        >>> assert torch.allclose(y, F.conv2d(x, W + 0.5 * (B @ A).reshape(W.shape)))
    """
    if strength != 1:
        scale = scale * strength
    device = "cpu" if x.is_cpu else x.device.type
    if torch.is_autocast_enabled(device):
        x, weight, bias = cast_for_autocast(device, x, weight, bias)
    shape, size = weight.shape, weight.numel()
    conv = CONVOLUTIONS[len(shape) - 3]
    tokens = x.numel() // (x.shape[1] * prod(stride)) if x.numel() else 0
    dense = (
        x.dtype.itemsize > 2  # a branch repeats its first kernel for every group
        if groups > 1
        else denser(tokens, size // shape[0], shape[0], x.dtype)
    )
    if dense:
        few = x.is_cpu and tokens * size < SMALL
        if few or is_compiling():
            up, down = scaled(lora_B, scale, 1.0, x.dtype), cast(lora_A, x.dtype)
            kernel = _kernel(weight, up, down)
            return conv(x, kernel, bias, stride, padding, dilation, groups)
        return _Convolution.apply(  # type: ignore[no-any-return,no-untyped-call]
            x, weight, bias, lora_A, lora_B, scale, stride, padding, dilation, groups
        )
    where = (stride, padding, dilation, groups)
    y = conv(x, weight, bias, *where)
    if groups > 1:  # the update by itself keeps as much of it as a branch, for the layer's own cost
        delta = ((lora_B * scale) @ lora_A).to(x.dtype).reshape(shape)
        return y + conv(x, delta, None, *where)
    return y + branch(x, shape, lora_A, lora_B * scale, *where)


def branch(
    x: Tensor,
    shape: Sequence[int],
    down: Tensor,
    up: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """The update alone: ``down`` with the layer's kernel, repeated for each group, then 1×1 ``up``.

    Args:
        x: ``[N, C_in, ...]``.
        shape: of the weight, ``[C_out, C_in / groups, *kernel]``.
        down: ``[r, C_in / groups · prod(kernel)]``.
        up: ``[C_out, r]``.
        stride, padding, dilation, groups: of the layer.
    """
    conv = CONVOLUTIONS[len(shape) - 3]
    first, second = kernels_of(down.to(x.dtype), up.to(x.dtype), shape[2:], groups)
    return conv(conv(x, first, None, stride, padding, dilation, groups), second, groups=groups)


def kernels_of(
    down: Tensor, up: Tensor, kernel: Sequence[int], groups: int
) -> tuple[Tensor, Tensor]:
    """The factors as kernels: ``[groups · r, C_in / groups, *kernel]`` and ``[C_out, r, 1...]``."""
    first = down.reshape(len(down), -1, *kernel)
    return each_group(first, groups), up.reshape(*up.shape, *[1] * len(kernel))


def each_group(weight: Tensor, groups: int) -> Tensor:
    """A kernel repeated for each group."""
    return repeat(weight, "first ... -> (groups first) ...", groups=groups)


class _Convolution(torch.autograd.Function):
    """Forms the dense kernel, twice, and keeps x alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: _Maybe,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        *where: Any,
    ) -> Tensor:
        ctx.where = where
        ctx.save_for_backward(x, weight, bias, a, b, scale)
        conv = CONVOLUTIONS[weight.dim() - 3]
        up, down = scaled(b, scale, 1.0, x.dtype), cast(a, x.dtype)
        return conv(x, _kernel(weight, up, down), bias, *where)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, a, b, scale = ctx.saved_tensors
        needs, where = ctx.needs_input_grad, ctx.where
        none = (None,) * len(where)
        up, down = scaled(b, scale, 1.0, x.dtype), cast(a, x.dtype)
        if torch.is_grad_enabled():  # the gradient itself will be differentiated
            y = CONVOLUTIONS[weight.dim() - 3](x, _kernel(weight, up, down), bias, *where)
            return (*differentiable(y, [x, weight, bias, a, b, scale], needs, dy), *none)
        whole = needs[1] or x.is_cpu or where[3] > 1
        dx = kernel = dbias = None
        if needs[0] or whole or needs[2]:
            dense = _kernel(weight, up, down) if needs[0] else weight
            dx, kernel, dbias = _backward(dy, x, dense, where, (needs[0], whole, needs[2]))
        wanted = needs[3], needs[4] or needs[5]
        if kernel is not None:
            da, product = _from_kernel(kernel.reshape(len(kernel), -1), down, up, wanted)
        else:
            da, product = _from_thin(dy, x, down, up, weight.shape, where, wanted)
        db = dscale = None
        if product is not None:
            db, dscale = gradient_of_second(product, b, scale, 1.0, needs[5])
        da = None if da is None else cast(da, a.dtype)
        return (dx, kernel if needs[1] else None, dbias, da, db, dscale, *none)


def _from_kernel(
    kernel: Tensor, down: Tensor, up: Tensor, wanted: tuple[bool, bool]
) -> tuple[_Maybe, _Maybe]:
    """The gradients of A and, before its scale, of B, from the dense kernel's: cheaper than four
    thin convolutions on a CPU, which runs them badly, and in groups."""
    return (
        up.t() @ kernel if wanted[0] else None,
        kernel @ down.t() if wanted[1] else None,
    )


def _from_thin(
    dy: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    shape: Sequence[int],
    where: tuple[Any, ...],
    wanted: tuple[bool, bool],
) -> tuple[_Maybe, _Maybe]:
    """The same without the dense kernel's gradient; for one group."""
    conv, n = CONVOLUTIONS[len(shape) - 3], len(shape) - 2
    da: _Maybe = None
    inner, outer = kernels_of(down, up, shape[2:], 1)
    if wanted[0]:
        v = conv(dy, outer.transpose(0, 1))
        _, first, _ = _backward(v, x, inner, where, (False, True, False))
        da = None if first is None else first.reshape(down.shape)
    if not wanted[1]:
        return da, None
    one = ((1,) * n, (0,) * n, (1,) * n, 1)
    _, second, _ = _backward(dy, conv(x, inner, None, *where), outer, one, (False, True, False))
    return da, None if second is None else second.reshape(up.shape)


def _kernel(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    shape = weight.shape
    return torch.addmm(weight.reshape(shape[0], -1), up, down).view(shape)


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, where: tuple[Any, ...], masks: Sequence[bool]
) -> tuple[_Maybe, _Maybe, _Maybe]:
    stride, padding, dilation, groups = where
    none, sizes = [0] * len(stride), [weight.shape[0]]
    return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
        dy, x, weight, sizes, stride, padding, dilation, False, none, groups, list(masks)
    )
