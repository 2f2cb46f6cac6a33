"""Low-rank convolution: the dense kernel without its gradient, or a branch of two convolutions."""

from typing import Any, Optional, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from paramlora.functional import cast_for_autocast, differentiable
from paramlora.operators import gradient_of_second

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_Maybe = Optional[Tensor]


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
) -> Tensor:
    """``conv(x, W + scale · B A) + bias`` in 1, 2 or 3 dimensions.

    In 32 and 64 bits the dense kernel is formed, and its gradient is not; in 16 bits, where that
    would round a small update away, a low-rank branch of two convolutions is added.

    Args:
        x: ``[N, C_in, ...]``.
        weight: ``[C_out, C_in / groups, *kernel]``.
        bias: ``[C_out]`` or None.
        lora_A: ``[r, C_in / groups · prod(kernel)]``.
        lora_B: ``[C_out, r]``.
        scale: ``[]``.
        stride, padding, dilation, groups: as for `torch.nn.functional.conv2d`; zeros padding.

    Example:
        >>> x, W = torch.randn(2, 4, 6, 6).double(), torch.randn(8, 4, 3, 3).double()
        >>> A, B = torch.randn(2, 36).double(), torch.randn(8, 2).double()
        >>> where = ((1, 1), (0, 0), (1, 1), 1)
        >>> y = convolution(x, W, None, A, B, torch.tensor(0.5).double(), *where)
        >>> assert torch.allclose(y, F.conv2d(x, W + 0.5 * (B @ A).reshape(W.shape)))
    """
    where = (stride, padding, dilation, groups)
    if torch.is_autocast_enabled(x.device.type):
        x, weight, bias = cast_for_autocast(x.device.type, x, weight, bias)
    n = weight.dim() - 2
    if x.dtype.itemsize > 2 and not torch.compiler.is_compiling():
        return _Convolution.apply(x, weight, bias, lora_A, lora_B, scale, *where)  # type: ignore[no-any-return,no-untyped-call]
    if x.dtype.itemsize > 2:
        dense = weight + ((lora_B * scale) @ lora_A).reshape(weight.shape)
        return CONVOLUTIONS[n - 1](x, dense, bias, *where)
    y = CONVOLUTIONS[n - 1](x, weight, bias, *where)
    return y + branch(x, weight.shape, lora_A, (lora_B * scale), *where)


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
    first, second = kernels_of(down.to(x.dtype), up.to(x.dtype), shape, groups)
    return conv(conv(x, first, None, stride, padding, dilation, groups), second, groups=groups)


def kernels_of(
    down: Tensor, up: Tensor, shape: Sequence[int], groups: int
) -> tuple[Tensor, Tensor]:
    """The factors as kernels: ``[groups · r, C_in / groups, *kernel]`` and ``[C_out, r, 1...]``."""
    first = down.reshape(-1, *shape[1:])
    first = repeat(first, "r ... -> (g r) ...", g=groups) if groups > 1 else first
    return first, up.reshape(*up.shape, *[1] * (len(shape) - 2))


class _Convolution(torch.autograd.Function):
    """Forms the dense kernel, twice, and never its gradient: keeps x alone."""

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
        return conv(x, _kernel(weight, b * scale, a), bias, *where)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, a, b, scale = ctx.saved_tensors
        needs, where = ctx.needs_input_grad, ctx.where
        none = (None,) * len(where)
        if torch.is_grad_enabled():  # the gradient itself will be differentiated
            dense = weight + ((b * scale) @ a).reshape(weight.shape)
            y = CONVOLUTIONS[weight.dim() - 3](x, dense, bias, *where)
            return (*differentiable(y, [x, weight, bias, a, b, scale], needs, dy), *none)
        scaled = b * scale
        masks = (needs[0], needs[1], needs[2])
        dx = dweight = dbias = None
        if any(masks):
            dense = _kernel(weight, scaled, a) if needs[0] else weight
            dx, dweight, dbias = _backward(dy, x, dense, where, masks)
        da = db = dscale = None
        down, up = kernels_of(a, scaled, weight.shape, where[3])
        if needs[3]:
            da = _first_gradient(dy, x, a, down, up, where)
        if needs[4] or needs[5]:
            product = _second_gradient(dy, x, down, up, where)
            db, dscale = gradient_of_second(product.reshape(b.shape), b, scale, 1.0, needs[5])
        return (dx, dweight, dbias, da, db, dscale, *none)


def _kernel(weight: Tensor, scaled: Tensor, a: Tensor) -> Tensor:
    return torch.addmm(weight.reshape(len(weight), -1), scaled, a).view(weight.shape)


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, where: tuple[Any, ...], masks: Sequence[bool]
) -> tuple[_Maybe, _Maybe, _Maybe]:
    stride, padding, dilation, groups = where
    none, sizes = [0] * len(stride), [weight.shape[0]]
    return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
        dy, x, weight, sizes, stride, padding, dilation, False, none, groups, list(masks)
    )


def _first_gradient(
    dy: Tensor, x: Tensor, a: Tensor, down: Tensor, up: Tensor, where: tuple[Any, ...]
) -> Tensor:
    """A's gradient: the kernel gradient of a convolution with r outputs for each group."""
    groups = where[3]
    back = rearrange(up, "(g o) r ... -> (g r) o ...", g=groups)  # 1×1, transposed in each group
    v = CONVOLUTIONS[up.dim() - 3](dy, back, groups=groups)
    _, each, _ = _backward(v, x, down, where, (False, True, False))
    assert each is not None
    return (
        rearrange(each, "(g r) ... -> g r (...)", g=groups).sum(0)
        if groups > 1
        else each.reshape(a.shape)
    )


def _second_gradient(
    dy: Tensor, x: Tensor, down: Tensor, up: Tensor, where: tuple[Any, ...]
) -> Tensor:
    """B's gradient before its scale: the kernel gradient of the 1×1 convolution."""
    n, groups = up.dim() - 2, where[3]
    h = CONVOLUTIONS[n - 1](x, down, None, *where)
    one = ((1,) * n, (0,) * n, (1,) * n, groups)
    _, product, _ = _backward(dy, h, up, one, (False, True, False))
    assert product is not None
    return product
