"""16-bit CUDA: the way to the kernels, eagerly and as custom operators that compilers and export
see whole; and what they share with other devices."""

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from paramlora.cuda.device import serves
from paramlora.cuda.operands import (
    Drop,
    Operands,
    Rescale,
    Wanted,
    Window,
    factors_fit,
    kept_size,
    padded,
    served,
    switched_on,
)
from paramlora.update import narrow
from paramlora.update.geometry import FLOATS
from paramlora.update.sum import Term

_Maybe = Optional[Tensor]
Gradients = tuple[_Maybe, _Maybe, _Maybe, _Maybe]


def forward(
    of: Operands, strength: float = 1.0, image: bool = False, drop: Optional[Drop] = None
) -> Optional[tuple[Tensor, Tensor]]:
    """``y`` and what `backward` takes of it, or None where the kernels do not serve the operands.

    `image`: x is ``[batch, P, in]``, y lies in memory as it does. `drop`: the mask of the x that
    the factors get.
    """
    if not served(of.x):
        return None
    from paramlora.cuda.linear import plan  # imports Triton, which may not be there

    if of.x.dtype != torch.float16:
        return plan.forward(of, strength, image, drop)  # type: ignore[no-any-return]
    # u = x @ A.T may pass float16's 65504 though y does not: A takes a power of two, B its inverse
    inside, g = _in_range(of, strength)
    return _with_power(plan.forward(inside, 1.0, image, drop), g)  # type: ignore[no-any-return]


def rescaled(of: Operands, by: Rescale) -> Optional[tuple[_Maybe, ...]]:
    """``y = z · m/‖·‖ + bias`` of `forward`'s z without a bias, what `backward` takes, and z if it
    is kept; or None where the kernels do not serve the operands."""
    if not served(of.x):
        return None
    from paramlora.cuda.rescaled import plan

    if of.x.dtype != torch.float16:
        return plan.forward(of, by)  # type: ignore[no-any-return]
    inside, g = _in_range(of, 1.0)
    return _with_power(plan.forward(inside, by), g)  # type: ignore[no-any-return]


def _in_range(of: Operands, strength: float) -> tuple[Operands, Tensor]:
    """Operands whose factors float16 holds, with the scale and the strength in B; and their power
    of two, see `narrow.in_range`."""
    a, b, g = narrow.in_range(of.x, of.a, _scaled(of, strength), of.weight.shape[1])
    return of._replace(a=a, b=b, scale=torch.ones_like(g)), g


def _scaled(of: Operands, strength: float) -> Tensor:
    """B with its scale in float32."""
    return of.b.float() * (of.scale.float() * strength)


def _with_power(result: Optional[tuple[Tensor, ...]], g: Tensor) -> Any:
    """A forward's result, with the power of two behind all of `kept`."""
    if result is None:
        return None
    # float32 in two numbers of 16 bits: `kept` is the one tensor that goes to the backward, and the
    # device alone knows the power
    y, kept, *rest = result
    return y, torch.cat([kept, g.view(1).view(torch.float16)]), *rest


def backward(
    dy: Tensor,
    of: Operands,
    strength: float,
    kept: Tensor,
    wanted: Wanted,
    image: bool = False,
    drop: Optional[Drop] = None,
) -> Gradients:
    """The gradients of x, A, B and the scale; of the factors both or none."""
    if not (wanted.x or wanted.factors):
        return None, None, None, None
    from paramlora.cuda.linear import plan

    in_range = of.x.dtype == torch.float16
    # the gradient of the scale is a sum over B's from before it is scaled, which in float16 still
    # has a power of two to lose
    scaled, pair = not (wanted.scale or in_range), (wanted.x, wanted.factors)
    own, g, h = strength, None, None
    if in_range:
        kept, g, h = _kept_in_range(dy, of, strength, kept)
        own = 1.0  # the factors in `kept` hold the strength
    dx, da, db = plan.backward(dy, of, kept, own, scaled, pair, image, drop)
    if da is None or db is None:
        return dx, None, None, None
    if in_range:
        da, db = da / h, db / g
    return dx, _typed(da, of.a.dtype), *_second(db, of, strength, scaled, wanted)


def _second(
    db: Tensor, of: Operands, strength: float, scaled: bool, wanted: Wanted
) -> tuple[Tensor, _Maybe]:
    """The gradients of B and of the scale; `scaled`: B's is ready but for its type."""
    if scaled:
        return _typed(db, of.b.dtype), None
    return gradient_of_second(db, of.b, of.scale, strength, wanted.scale)


def _typed(t: Tensor, dtype: torch.dtype) -> Tensor:
    # without the call of `to`, which takes as long as a launch to do nothing
    return t if t.dtype == dtype else t.to(dtype)


def _kept_in_range(
    dy: Tensor, of: Operands, strength: float, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`kept` of a forward in float16 with the factors cast anew, as a gradient has a range of its
    own; and the powers of two that are in the gradients of B and of A."""
    (out, fan_in), r, R = of.weight.shape, len(of.a), padded(len(of.a))
    up, down, h = narrow.in_range(dy, _scaled(of, strength), of.a, out)
    g, kept = kept[-2:].clone().view(torch.float32)[0], kept.clone()
    # the layout that `linear.kernels` tells: A [R, in], then Bᵀ [R, out], padded with zeros
    kept[: R * fan_in].view(R, fan_in)[:r] = down
    kept[R * fan_in : R * (fan_in + out)].view(R, out)[:r] = up.t()
    return kept, g, h


def convolved(
    of: Operands, window: Window, drop: Optional[Drop] = None
) -> Optional[tuple[Tensor, Tensor, Tensor]]:
    """A convolution's ``y`` and what `convolved_backward` takes of it, or None; `window`: stride,
    padding and dilation."""
    if not served(of.x):
        return None
    from paramlora.cuda.convolution import plan

    return plan.forward(of, window, drop)  # type: ignore[no-any-return]


def convolved_backward(
    dy: Tensor,
    of: Operands,
    kept: Tensor,
    wanted: Wanted,
    window: Window,
    drop: Optional[Drop] = None,
    down: _Maybe = None,
) -> Gradients:
    """The gradients of x, A, B and the scale that are `wanted`; `down`: A's kernel as the forward
    gave it, wanted where it dropped inputs."""
    if not (wanted.x or wanted.factors):
        return None, None, None, None
    from paramlora.cuda.convolution import plan

    # B's gradient is always found: it shares a pass over dy with v
    scaled = not wanted.scale
    both = wanted.x, wanted.a
    dx, da, db = plan.backward(dy, of, kept, scaled, both, window, drop, down)
    return dx, da, *_second(db, of, 1.0, scaled, wanted)


def depthwise(of: Operands, window: Window) -> tuple[Tensor, Tensor]:
    """``y`` and what `depthwise_backward` takes of it, where `operands.is_depthwise`; see
    `depthwise.plan.forward`."""
    from paramlora.cuda.depthwise import plan

    return plan.forward(of, window)  # type: ignore[no-any-return]


def depthwise_backward(
    dy: Tensor, of: Operands, kept: Tensor, wanted: Wanted, window: Window
) -> tuple[_Maybe, _Maybe, _Maybe, _Maybe, _Maybe]:
    """The gradients of x, the weight, A, B and the scale that are `wanted`."""
    if not (wanted.x or wanted.weight or wanted.factors):
        return None, None, None, None, None
    from paramlora.cuda.depthwise import plan

    masks = wanted.x, wanted.weight, wanted.factors
    dx, kernels, da, db = plan.backward(dy, of, kept, window, not wanted.scale, masks)
    dweight = dscale = None
    if kernels is not None and wanted.weight:
        dweight = kernels.to(of.weight.dtype).view_as(of.weight)
    if db is not None and wanted.scale:
        db, dscale = gradient_of_second(db, of.b, of.scale, 1.0, True)
    return dx, dweight, da, db, dscale


def summed(base: Tensor, terms: Sequence[Term]) -> Optional[Tensor]:
    """A new tensor that is a weight with its updates' terms, rounded once; or None where the
    kernel does not serve them: it adds one low-rank update to a contiguous weight of 16 bits."""
    if len(terms) != 1 or not (served(base) and base.is_contiguous()):
        return None
    product = terms[0].product()
    if product is None:
        return None
    tensors = base.detach().flatten(1), *product
    for t in tensors:
        # subclasses, such as quantised weights, have no numbers at their address
        if type(t) is not Tensor or t.dtype not in FLOATS:
            return None
    if not factors_fit(*tensors):
        return None
    from paramlora.cuda.sum import plan

    return plan.added(*tensors).view(base.shape)  # type: ignore[no-any-return]


def masked(x: Tensor, seed: Tensor, which: int, start: int, threshold: int) -> _Maybe:
    """``mask ∘ x`` as `masks.plan.masked` has it, or None where the kernels do not serve x."""
    index = x.get_device()
    if not (x.is_cuda and switched_on() and x.dtype in FLOATS and serves(index)):
        return None
    # places are numbers of 32 bits
    if seed.get_device() != index or seed.dtype != torch.int64 or x.numel() >= 2**31:
        return None
    from paramlora.cuda.masks import plan

    return plan.masked(x, seed, which, start, threshold)  # type: ignore[no-any-return]


def scaled_down(b: Tensor, scale: Tensor, strength: float, dtype: torch.dtype) -> Tensor:
    """``strength · scale · B`` in a type, rounded once."""
    return _typed(narrow.of_factor(b) * (scale if strength == 1 else scale * strength), dtype)


def gradient_of_second(
    product: Tensor, b: Tensor, scale: Tensor, strength: float, scale_too: bool
) -> tuple[Tensor, _Maybe]:
    """The gradients of B and of the scale, from ``dYᵀ·x·Aᵀ``."""
    # float16 would overflow where the scaled gradient is finite
    product = _typed(product, torch.float32 if b.dtype == torch.float16 else b.dtype)
    dscale = ((product * b).sum() * strength).to(scale.dtype) if scale_too else None
    return scaled_down(product, scale, strength, b.dtype), dscale


@torch.library.custom_op("paramlora::linear", mutates_args=(), device_types="cuda")
def _linear_op(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    rates: Optional[Sequence[float]] = None,
    seed: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor]:
    result = forward(Operands(x, weight, bias, a, b, scale), drop=_drop(rates, seed))
    if result is None:
        # an operator cannot give None; whoever calls it asks `has_kernel` and `fits` first
        raise ValueError("paramlora::linear: the operands differ in size, type or device")
    return result


def _drop(rates: Optional[Sequence[float]], seed: _Maybe) -> Optional[Drop]:
    return None if seed is None else Drop(tuple(rates or ()), seed)


@_linear_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: _Maybe,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    rates: Optional[Sequence[float]] = None,
    seed: _Maybe = None,
) -> tuple[Tensor, Tensor]:
    (M, K), N = x.shape, weight.shape[0]
    more = 2 if x.dtype == torch.float16 else 0  # a power of two, see `_with_power`
    size = kept_size(M, N, K, len(a), len(rates or ()))
    return x.new_empty(M, N), x.new_empty(size + more)


@torch.library.custom_op("paramlora::linear_backward", mutates_args=(), device_types="cuda")
def _linear_backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    kept: Tensor,
    wanted: list[bool],
    rates: Optional[Sequence[float]] = None,
    seed: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    input_too, factors_too, scale_too = wanted
    # the factors' gradients share one launch: both or none
    asked = Wanted(input_too, False, False, factors_too, factors_too, scale_too)
    of = Operands(x, weight, None, a, b, scale)
    grads = backward(dy, of, 1.0, kept, asked, drop=_drop(rates, seed))
    # an operator's schema gives tensors, so that what is not wanted is one without numbers
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
    wanted: list[bool],
    rates: Optional[Sequence[float]] = None,
    seed: _Maybe = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    input_too, factors_too, scale_too = wanted
    factors = factors_too or scale_too  # as `Wanted.factors`: the scale's is found on their way
    pairs = ((x, input_too), (a, factors), (b, factors), (scale, scale_too))
    # each its own, also those that are left out: none may be the other's alias
    dx, da, db, dscale = (t.new_empty(t.shape) if want else x.new_empty(0) for t, want in pairs)
    return dx, da, db, dscale


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, a, b, scale, ctx.rates, seed = inputs
    # output[1] is `kept`; rates are floats, which save_for_backward does not take
    ctx.save_for_backward(x, weight, a, b, scale, output[1], seed)


def _linear_op_backward(ctx: Any, dy: Tensor, _: Any) -> Any:
    x, weight, a, b, scale, kept, seed = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[3] or needs[4], needs[5]]
    op: Any = torch.ops.paramlora.linear_backward
    grads = op(dy, x, weight, a, b, scale, kept, wanted, ctx.rates, seed)
    dx, da, db, dscale = (
        g if need else None for g, need in zip(grads, (needs[0], needs[3], needs[4], needs[5]))
    )
    # of a base that is trained too: no kernel of ours finds it
    dweight = dy.t() @ x if needs[1] else None
    return dx, dweight, dy.sum(0) if needs[2] else None, da, db, dscale, None, None


_linear_op.register_autograd(_linear_op_backward, setup_context=_keep)
