"""16-bit CUDA: the way to the kernels, eagerly and as custom operators that compilers and export
see whole; and what they share with other devices."""

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from paramlora.cuda.operands import kept_size, padded, served
from paramlora.update import narrow

_Maybe = Optional[Tensor]


def forward(
    x: Tensor,
    weight: Tensor,
    bias: _Maybe,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    strength: float = 1.0,
    image: bool = False,
) -> Optional[tuple[Tensor, Tensor]]:
    """``y`` and what `backward` takes of it, or None where the kernels do not serve the operands.

    `image`: x is ``[batch, P, in]``, y lies in memory as it does.
    """
    if not served(x):
        return None
    from paramlora.cuda.linear import plan

    if x.dtype != torch.float16:
        return plan.forward(x, weight, bias, a, b, scale, strength, image)
    scaled = b.float() * (scale.float() * strength)
    a, scaled, g = narrow.in_range(x, a, scaled, weight.shape[1])
    result = plan.forward(x, weight, bias, a, scaled, torch.ones_like(g), 1.0, image)
    if result is None:
        return None
    return result[0], torch.cat([result[1], g.view(1).view(torch.float16)])  # behind all of `kept`


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    strength: float,
    kept: Tensor,
    wanted: tuple[bool, bool, bool],
    image: bool = False,
) -> tuple[_Maybe, _Maybe, _Maybe, _Maybe]:
    """The gradients of x, A, B and the scale; `wanted`: of x, of the factors, of the scale."""
    if not any(wanted):
        return None, None, None, None
    from paramlora.cuda.linear import plan

    input_too, factors_too, scale_too = wanted
    factors_too = factors_too or scale_too
    if x.dtype == torch.float16:
        wanted = input_too, factors_too, scale_too
        return _backward_in_range(dy, x, weight, a, b, scale, strength, kept, wanted, image)
    inside = None if scale_too else scale
    dx, da, db = plan.backward(
        dy, x, weight, kept, len(a), inside, strength, input_too, factors_too, image
    )
    dscale = None
    if da is None or db is None:
        return dx, None, None, None
    if scale_too:
        db, dscale = gradient_of_second(db, b, scale, strength, True)
    if a.dtype != da.dtype or b.dtype != db.dtype:
        da, db = da.to(a.dtype), db.to(b.dtype)
    return dx, da, db, dscale


def _backward_in_range(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    strength: float,
    kept: Tensor,
    wanted: tuple[bool, bool, bool],
    image: bool,
) -> tuple[_Maybe, _Maybe, _Maybe, _Maybe]:
    """`backward` of float16: the gradient has a range of its own, so the factors are cast anew."""
    from paramlora.cuda.linear import plan

    (out, fan_in), r, R = weight.shape, len(a), padded(len(a))
    scaled = b.float() * (scale.float() * strength)
    up, down, h = narrow.in_range(dy, scaled, a, out)
    g, kept = kept[-2:].clone().view(torch.float32)[0], kept.clone()
    kept[: R * fan_in].view(R, fan_in)[:r] = down
    kept[R * fan_in : R * (fan_in + out)].view(R, out)[:r] = up.t()
    dx, da, db = plan.backward(dy, x, weight, kept, r, None, 1.0, *wanted[:2], image)
    if da is None or db is None:
        return dx, None, None, None
    db, dscale = gradient_of_second(db / g, b, scale, strength, wanted[2])
    return dx, (da / h).to(a.dtype), db, dscale


def convolved(
    x: Tensor,
    weight: Tensor,
    bias: _Maybe,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    where: tuple[tuple[int, ...], ...],
) -> Optional[tuple[Tensor, Tensor]]:
    """A convolution's ``y`` and what `convolved_backward` takes of it, or None; `where`: stride,
    padding and dilation."""
    if not served(x):
        return None
    from paramlora.cuda.convolution import plan

    return plan.forward(x, weight, bias, a, b, scale, where)


def convolved_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    kept: Tensor,
    wanted: Sequence[bool],
    where: tuple[tuple[int, ...], ...],
) -> tuple[_Maybe, _Maybe, _Maybe, _Maybe]:
    """The gradients of x, A, B and the scale that are `wanted`."""
    if not any(wanted):
        return None, None, None, None
    from paramlora.cuda.convolution import plan

    input_too, a_too, _, scale_too = wanted
    factors = (a, b, kept, scale)
    dx, da, db = plan.backward(dy, x, weight, *factors, not scale_too, input_too, a_too, where)
    if scale_too:
        return dx, da, *gradient_of_second(db, b, scale, 1.0, True)
    return dx, da, db if db.dtype == b.dtype else db.to(b.dtype), None


def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: _Maybe,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    where: tuple[tuple[int, ...], ...],
) -> tuple[Tensor, Tensor]:
    """``y`` and what `depthwise_backward` takes of it, where `operands.is_depthwise`; see
    `depthwise.plan.forward`."""
    from paramlora.cuda.depthwise import plan

    return plan.forward(x, weight, bias, a, b, scale, where)


def depthwise_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    kept: Tensor,
    wanted: Sequence[bool],
    where: tuple[tuple[int, ...], ...],
) -> tuple[_Maybe, _Maybe, _Maybe, _Maybe, _Maybe]:
    """The gradients of x, the weight, A, B and the scale that are `wanted`."""
    if not any(wanted):
        return None, None, None, None, None
    from paramlora.cuda.depthwise import plan

    input_too, weight_too, a_too, b_too, scale_too = wanted
    masks = input_too, weight_too, a_too or b_too or scale_too
    dx, kernels, da, db = plan.backward(
        dy, x, weight, a, b, scale, kept, where, not scale_too, masks
    )
    dweight = dscale = None
    if kernels is not None and weight_too:
        dweight = kernels.to(weight.dtype).view_as(weight)
    if db is not None and scale_too:
        db, dscale = gradient_of_second(db, b, scale, 1.0, True)
    return dx, dweight, da, db, dscale


def look_up(
    rows: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    padding: int,
    strength: float,
) -> tuple[Tensor, Tensor]:
    """``y`` and what `look_up_backward` takes of it, where `operands.looks_up`; see
    `embedding.plan.forward`."""
    from paramlora.cuda.embedding import plan

    if weight.dtype != torch.float16:
        return plan.forward(rows, weight, a, b, scale, padding, strength)
    scaled = b.float() * (scale.float() * strength)
    a, scaled, g = narrow.in_range(None, a, scaled, 1)
    y, kept = plan.forward(rows, weight, a, scaled, torch.ones_like(g), padding, 1.0)
    return y, torch.cat([kept, g.view(1).view(torch.float16)])


def look_up_backward(
    dy: Tensor,
    rows: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    padding: int,
    strength: float,
    kept: Tensor,
    wanted: tuple[bool, bool, bool],
) -> tuple[_Maybe, _Maybe, _Maybe]:
    """The gradients of A, B and the scale that are `wanted`."""
    a_too, b_too, scale_too = wanted
    if not any(wanted):
        return None, None, None
    from paramlora.cuda.embedding import plan

    (r, num), low = a.shape, dy.dtype == torch.float16
    if low:
        g, kept = kept[-2:].clone().view(torch.float32)[0], kept[:-2]
    v, db = plan.backward(dy, kept, r, not (scale_too or low), a_too, b_too or scale_too)
    da = dscale = None
    if low:  # the range of their factors, see `look_up`
        v, db = v if v is None else v * g, db if db is None else db / g
    if v is not None:
        da = sum_by_row(v, rows, num, padding, False).t()
        da = da if da.dtype == a.dtype else da.to(a.dtype)
    if db is not None and (scale_too or low):
        db, dscale = gradient_of_second(db, b, scale, strength, scale_too)
    if db is not None and db.dtype != b.dtype:
        db = db.to(b.dtype)
    return da, db, dscale


# for every index the sum of the gradients that it got, in a fixed order
sum_by_row = torch.ops.aten.embedding_dense_backward.default


def scaled_down(b: Tensor, scale: Tensor, strength: float, dtype: torch.dtype) -> Tensor:
    b = narrow.wide(b) * (scale if strength == 1 else scale * strength)
    return b if b.dtype == dtype else b.to(dtype)  # which takes as long as a launch to do nothing


def gradient_of_second(
    product: Tensor, b: Tensor, scale: Tensor, strength: float, scale_too: bool
) -> tuple[Tensor, _Maybe]:
    """The gradients of B and of the scale, from ``dYᵀ·x·Aᵀ``."""
    own = torch.float32 if b.dtype == torch.float16 else b.dtype
    product = product if product.dtype == own else product.to(own)
    dscale = ((product * b).sum() * strength).to(scale.dtype) if scale_too else None
    return scaled_down(product, scale, strength, b.dtype), dscale


def needed(needs: Any) -> tuple[bool, bool, bool]:
    return needs[0], needs[3] or needs[4], needs[5]


@torch.library.custom_op("paramlora::linear", mutates_args=(), device_types="cuda")
def _linear_op(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], a: Tensor, b: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    result = forward(x, weight, bias, a, b, scale)
    if result is None:
        raise ValueError("paramlora::linear: the operands differ in size, type or device")
    return result


@_linear_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: _Maybe, a: Tensor, b: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    (M, K), N = x.shape, weight.shape[0]
    more = 2 if x.dtype == torch.float16 else 0  # a power of two, see `forward`
    return x.new_empty(M, N), x.new_empty(kept_size(M, N, K, len(a)) + more)


@torch.library.custom_op("paramlora::linear_backward", mutates_args=(), device_types="cuda")
def _linear_backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    kept: Tensor,
    input_too: bool,
    factors_too: bool,
    scale_too: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wanted = (input_too, factors_too, scale_too)
    grads = backward(dy, x, weight, a, b, scale, 1.0, kept, wanted)
    dx, da, db, dscale = (x.new_empty(0) if g is None else g for g in grads)
    return dx, da, db, dscale


@_linear_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    kept: Tensor,
    input_too: bool,
    factors_too: bool,
    scale_too: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    factors = factors_too or scale_too
    wanted = ((x, input_too), (a, factors), (b, factors), (scale, scale_too))
    # each its own, also those that are left out: none may be the other's alias
    dx, da, db, dscale = (t.new_empty(t.shape) if want else x.new_empty(0) for t, want in wanted)
    return dx, da, db, dscale


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, a, b, scale = inputs
    ctx.save_for_backward(x, weight, a, b, scale, output[1])


def _linear_op_backward(ctx: Any, dy: Tensor, _: Any) -> Any:
    x, weight, a, b, scale, kept = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = needed(needs)
    grads = torch.ops.paramlora.linear_backward(dy, x, weight, a, b, scale, kept, *wanted)
    dx, da, db, dscale = (
        g if need else None for g, need in zip(grads, (needs[0], needs[3], needs[4], needs[5]))
    )
    dweight = dy.t() @ x if needs[1] else None
    return dx, dweight, dy.sum(0) if needs[2] else None, da, db, dscale


_linear_op.register_autograd(_linear_op_backward, setup_context=_keep)
