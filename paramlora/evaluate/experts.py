"""Low-rank updates of stacks of expert matrices: grouped products, and never a dense sum.

``y_e = x_e W_eᵀ + s·(x_e A_eᵀ) B_eᵀ`` (Hu et al. 2021, arXiv:2106.09685, equation 3, for each
expert) of rows that lie sorted by expert, without the gradient of the dense weights. Tensors only.
"""

from collections.abc import Iterator
from typing import Any, Optional

import torch
from torch import Tensor
from torch.compiler import is_compiling

from paramlora.cuda.operators import gradient_of_second, scaled_down
from paramlora.evaluate.functional import (
    cast,
    cast_for_autocast,
    differentiable,
    input_of,
    kept_input,
    without_autocast,
)
from paramlora.update import narrow
from paramlora.update.compat import applied, grouped_product, is_batched, recorded
from paramlora.update.contexts import autocast_of

_Maybe = Optional[Tensor]
_ALIGNED = 8  # numbers of 16 bits that the grouped product of a device takes at a time


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Tensor,
    strength: float = 1.0,
) -> Tensor:
    """``x_e (W_e + strength · scale · B_e A_e)ᵀ`` of each expert's rows.

    Args:
        x: ``[rows, in]``, sorted by expert.
        weight: ``[experts, out, in]``, any strides.
        ends: ``[experts]``, where each expert's rows end; what lies behind the last is no
            expert's, and its output has no meaning.
        lora_A: ``[experts, r, in]``; cast down to the input's type.
        lora_B: ``[experts, out, r]``, likewise.
        scale: ``[]``.
        strength: a number on top of it.

    Returns:
        ``[rows, out]``. In 16 bits the two products are added before their only rounding.

    Example:
        >>> x, W = torch.randn(5, 4).double(), torch.randn(2, 3, 4).double()
        >>> A, B, s = torch.randn(2, 2, 4).double(), torch.randn(2, 3, 2).double(), torch.ones(())
        >>> y = grouped_linear(x, W, torch.tensor([2, 5]), A, B, s / 2)
        >>> assert torch.allclose(y[2:], x[2:] @ (W + 0.5 * B @ A)[1].T)
    """
    device = autocast_of(x)
    if device is not None:
        x, weight = cast_for_autocast(device, x, weight)
        with torch.autocast(device, enabled=False):
            return grouped_linear(x, weight, ends, lora_A, lora_B, scale, strength)
    x = cast(x, weight.dtype)  # which the plain product does too
    if is_compiling() or recorded():
        op: Any = torch.ops.paramlora.grouped_linear
        y, _ = op(x, weight, ends, lora_A, lora_B, scale * strength)
        return y  # type: ignore[no-any-return]
    return applied(_Grouped, x, weight, ends, lora_A, lora_B, scale, strength)


def grouped_by_definition(
    x: Tensor, weight: Tensor, ends: Tensor, lora_A: Tensor, lora_B: Tensor, scale: Tensor
) -> Tensor:
    """The same in plain operations, for gradients of gradients: a loop over the experts."""
    up = narrow.wide(lora_B) * scale
    parts = [x.new_zeros(0, weight.shape[1])]
    for e, rows in _runs(ends):
        dense = weight[e] + cast(up[e] @ narrow.wide(lora_A[e]), weight.dtype)
        parts.append(x[rows] @ dense.t())
    y = torch.cat(parts)
    return torch.cat([y, y.new_zeros(len(x) - len(y), y.shape[1])])


def _runs(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and these."""
    start = 0
    for e, end in enumerate(ends.tolist()):
        if end > start:
            yield e, slice(start, end)
            start = end


def _on_device(x: Tensor, *sizes: int) -> bool:
    """Whether a device's grouped product serves, which then waits for no sizes."""
    serves = x.is_cuda and x.dtype == torch.bfloat16 and torch.version.hip is None
    return serves and grouped_product is not None and not any(n % _ALIGNED for n in sizes)


def _padded(factor: Tensor) -> Tensor:
    """A thin stack ``[experts, r, n]`` with zeros up to the ranks that are taken at a time."""
    return torch.nn.functional.pad(factor, (0, 0, 0, -factor.shape[1] % _ALIGNED))


def _both(
    x: Tensor, weight: Tensor, ends: Tensor, first: Tensor, second: Tensor
) -> tuple[Tensor, Tensor]:
    """``x_e W_e + (x_e first_eᵀ) second_e`` in one accumulator, and the thin product.

    Args:
        x: ``[rows, in]``.
        weight: ``[experts, in, out]``.
        first: ``[experts, r, in]``.
        second: ``[experts, r, out]``.
    """
    if _on_device(x, *weight.shape[1:]):
        first, second = _padded(first), _padded(second)
        u = grouped_product(x, first.mT, offs=ends)
        # both products as one, of longer rows: torch's own would round one of two before adding
        total = torch.cat([weight, second], 1)
        return grouped_product(torch.cat([x, u], 1), total, offs=ends), u
    u, y = x.new_zeros(len(x), first.shape[1]), x.new_zeros(len(x), weight.shape[2])
    for e, rows in _runs(ends):
        torch.mm(x[rows], first[e].t(), out=u[rows])
        _sum_of_products(x[rows], weight[e], u[rows], second[e], y[rows])
    return y, u


def _sum_of_products(x: Tensor, w: Tensor, u: Tensor, v: Tensor, y: Tensor) -> None:
    """``y = x @ w + u @ v``; in 16 bits the smaller product comes first, as in `functional`."""
    if x.dtype.itemsize > 2:
        torch.mm(x, w, out=y).addmm_(u, v)
    elif x.is_cuda and torch.version.hip is None:  # cuBLAS rounds in between
        y.copy_(torch.mm(x, w, out_dtype=torch.float32).addmm_(u.float(), v.float()))
    else:
        torch.mm(u, v, out=y).addmm_(x, w)


def _sums(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """``left_eᵀ @ right_e`` over each expert's rows: ``[experts, left's, right's]``."""
    if _on_device(left, left.shape[1], right.shape[1]):
        product: Tensor = grouped_product(left.t(), right, offs=ends)
        return product
    total = left.new_zeros(len(ends), left.shape[1], right.shape[1])
    for e, rows in _runs(ends):
        if left.dtype == torch.float16:  # sums of many products leave its range
            total = total.float()
            total[e] = narrow.outer(left[rows], right[rows])
        else:
            torch.mm(left[rows].t(), right[rows], out=total[e])
    return total


def _narrowed(
    x: Tensor, a: Tensor, b: Tensor, reach: int, scale: Tensor, strength: float
) -> tuple[Tensor, Tensor, _Maybe]:
    """A, and B with its scale, in x's type; in float16 with a power of two, see `narrow`."""
    if x.dtype != torch.float16:
        return cast(a, x.dtype), scaled_down(b, scale, strength, x.dtype), None
    down, up, g = narrow.in_range(x, a, b.float() * (scale.float() * strength), reach)
    return down.half(), up.half(), g


def _forward(
    x: Tensor, weight: Tensor, ends: Tensor, a: Tensor, b: Tensor, scale: Tensor, strength: float
) -> tuple[Tensor, Tensor]:
    """``y`` and the thin product that `_backward` takes."""
    down, up, _ = _narrowed(x, a, b, x.shape[1], scale, strength)
    return _both(x, weight.mT, ends, down, up.mT)


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    strength: float,
    u: Tensor,
    wanted: "tuple[bool, ...] | list[bool]",
) -> tuple[_Maybe, _Maybe, _Maybe, _Maybe]:
    """The gradients of x, A, B and the scale that are `wanted`."""
    dx = da = db = dscale = None
    dy, r = dy.contiguous(), a.shape[1]
    if wanted[0] or wanted[1]:
        scaled = narrow.wide(b) * (scale if strength == 1 else scale * strength)
        one = torch.ones((), dtype=scaled.dtype, device=b.device)
        up, down, h = _narrowed(dy, scaled, a, dy.shape[1], one, 1.0)
        dx, v = _both(dy, weight, ends, up.mT, down)
        if wanted[1]:
            da = _sums(v, x, ends)[:, :r]
            da = cast(da if h is None else da / h, a.dtype)
    if wanted[2] or wanted[3]:
        product = _sums(dy, u, ends)[..., :r]
        _, _, g = _narrowed(x, a, b, x.shape[1], scale, strength)
        product = product if g is None else product / g
        db, dscale = gradient_of_second(product, b, scale, strength, wanted[3])
    return dx if wanted[0] else None, da, db if wanted[2] else None, dscale


class _Grouped(torch.autograd.Function):
    """Keeps x by reference, and the thin product."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        ends: Tensor,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        strength: float,
    ) -> Tensor:
        ctx.strength = strength
        y, u = _forward(x, weight, ends, a, b, scale, strength)
        held = kept_input(ctx, x)
        ctx.save_for_backward(held, weight, ends, a, b, scale, None if held is None else u)
        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        held, weight, ends, a, b, scale, u = ctx.saved_tensors
        needs, x = ctx.needs_input_grad, input_of(ctx, held, weight)
        wanted = (needs[0], *needs[3:6])
        if torch.is_grad_enabled() or is_batched(dy):

            def again(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
                return grouped_by_definition(x, weight, ends, a, b, scale * ctx.strength)

            inputs = (x, weight, a, b, scale)
            dx, dweight, *others = differentiable(again, inputs, (*needs[:2], *needs[3:6]), dy)
            return dx, dweight, None, *others, None
        dx, *others = _backward(dy, x, weight, ends, a, b, scale, ctx.strength, u, wanted)
        dweight = _sums(dy, x, ends).to(weight.dtype) if needs[1] else None
        return dx, dweight, None, *others, None


@torch.library.custom_op("paramlora::grouped_linear", mutates_args=())
def _op(
    x: Tensor, weight: Tensor, ends: Tensor, a: Tensor, b: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    return _forward(x, weight, ends, a, b, scale, 1.0)


def _thin(x: Tensor, weight: Tensor, a: Tensor) -> Tensor:
    """Memory for the thin product: ranks are padded where a device's product serves."""
    r = a.shape[1]
    return x.new_empty(len(x), r - r % -_ALIGNED if _on_device(x, *weight.shape[1:]) else r)


@_op.register_fake
def _(
    x: Tensor, weight: Tensor, ends: Tensor, a: Tensor, b: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), weight.shape[1]), _thin(x, weight, a)


@torch.library.custom_op("paramlora::grouped_linear_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    u: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = _backward(dy, x, weight, ends, a, b, scale, 1.0, u, wanted[1:])
    dense = _sums(dy, x, ends).to(weight.dtype) if wanted[0] else None
    found = [x.new_empty(0) if g is None else g.contiguous() for g in (dense, *grads)]
    return found[0], found[1], found[2], found[3], found[4]


@_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    u: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = [
        t.new_empty(t.shape) if want else x.new_empty(0)
        for t, want in zip((weight, x, a, b, scale), wanted)
    ]
    return found[0], found[1], found[2], found[3], found[4]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _op_backward(ctx: Any, dy: Tensor, _: Any) -> Any:
    x, weight, ends, a, b, scale, u = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = [needs[1], needs[0], *needs[3:6]]
    op: Any = torch.ops.paramlora.grouped_linear_backward
    grads = op(dy, x, weight, ends, a, b, scale, u, wanted)
    dweight, dx, *others = (g if want else None for g, want in zip(grads, wanted))
    return dx, dweight, None, *others


_op.register_autograd(_op_backward, setup_context=_keep)
