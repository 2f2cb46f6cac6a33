"""DoRA of a known layer: the low-rank layer's output, rescaled by outputs (Liu et al. 2024,
arXiv:2402.09353, equation 5). Tensors only."""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from paramlora.cuda import operators
from paramlora.cuda.operands import Operands, Rescale, Wanted, has_kernel, padded, served
from paramlora.evaluate import choose, functional
from paramlora.evaluate.choose import Way
from paramlora.evaluate.functional import as_rows, differentiable, untold
from paramlora.update.compat import applied, is_batched, recorded
from paramlora.update.contexts import autocast_of, without_autocast
from paramlora.update.dora import output_norms

_Maybe = Optional[Tensor]


def norms_of(weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """`output_norms`, in 16 bits on CUDA in one launch, which reads the weight once."""
    if _way_of_norms(weight, a, b, scale) is Way.PLAIN:
        return output_norms(weight, a, b, scale)
    from paramlora.cuda.rescaled import plan

    found: Tensor = plan.lengths(weight, a, b, scale)
    return found


def _way_of_norms(weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Way:
    ours = served(weight) and 0 < len(a) and weight.numel() > 0
    # the kernel gets bare addresses: all must lie on one device
    ours = ours and {t.get_device() for t in (a, b, scale)} == {weight.get_device()}
    return choose.norms(ours, padded(len(a)), untold() or recorded())


def is_in_kernels(of: Operands, magnitude: Tensor) -> bool:
    """Whether the kernels find a layer's norms and rescale its outputs, if they serve it at all."""
    norms = _way_of_norms(of.weight, of.a, of.b, of.scale)
    return norms is Way.KERNELS and _is_typed(magnitude, of.bias)


def linear(
    x: Tensor, weight: Tensor, bias: _Maybe, a: Tensor, b: Tensor, scale: Tensor, magnitude: Tensor
) -> Tensor:
    r"""``x (m · V/‖V‖)ᵀ + bias`` with ``V = W + scale · B A``; the norm gets no gradient.

    Args:
        x: ``[..., in]``, of the weight's type, or of any under autocast.
        weight: ``[out, in]``, any strides.
        bias: ``[out]`` or None.
        a, b: ``[r, in]`` and ``[out, r]``; cast down to the input's type.
        scale: ``[]``.
        magnitude: ``out`` numbers.

    Returns:
        ``[..., out]``; 0 where a magnitude and its norm both are.

    Example:
        >>> x, w, a, b, m = (torch.rand(s).double() for s in ((5, 4), (3, 4), (2, 4), (3, 2), (3,)))
        >>> total = w + 0.5 * b @ a
        >>> y = linear(x, w, None, a, b, torch.tensor(0.5).double(), m)
        >>> assert torch.allclose(y, x @ (m[:, None] * total / total.norm(dim=1, keepdim=True)).T)
    """
    if not is_compiling():
        y = functional.in_cpp(x, weight, bias, a, b, scale, 1.0, None, magnitude)
        if y is not None:
            return y
    device = autocast_of(x)
    if device is not None:
        x, weight, bias = functional.cast_for_autocast(device, x, weight, bias)
        if not has_kernel(x, weight):  # which autocast has no part in
            with torch.autocast(device, enabled=False):
                return linear(x, weight, bias, a, b, scale, magnitude)
    if x.dtype == torch.float16 and not served(x):  # beyond its range a sum may be, before it is
        x, weight = x.float(), weight.float()  # rescaled
        # and back once, behind the rescaling, where the numbers are in range again
        bias = None if bias is None else bias.float()
        return linear(x, weight, bias, a, b, scale, magnitude).half()
    way = functional.way_of(x, weight, bias, a, b, scale, is_compiling())
    way = choose.rescaled(way, untold() or recorded())
    if way is Way.PLAIN:
        inside = weight.dtype.itemsize > 2  # in 16 bits a large bias drowns what is rounded
        z = functional.linear(x, weight, bias if inside else None, a, b, scale)
        norm = norms_of(weight, a, b, scale)
        return rescaled(z, magnitude.reshape(-1), norm, bias, inside)
    if way is Way.SUM:
        up = operators.scaled_down(b, scale, 1.0, x.dtype)
        total = functional.summed(weight, up, functional.cast(a, x.dtype))
        # no gradient through the norm: section 4.3 of the paper
        norm = torch.linalg.vector_norm(total.detach(), dim=1, keepdim=True)
        return F.linear(x, total * _factor(magnitude, norm)[0], bias)
    return applied(_Linear, x, weight, bias, a, b, scale, magnitude, way)


def _factor(magnitude: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """What each output is multiplied by, and the norm that it was divided by, 1 in place of 0."""
    # m and norm are 0 together in a fresh row of zeros, and 0/1 gives the 0 that 0/0 would not
    own, length = functional.cast(magnitude, norm.dtype), norm.masked_fill(norm == 0, 1)
    return (own if own.shape == norm.shape else own.reshape(norm.shape)) / length, length


class _Linear(torch.autograd.Function):
    """`linear` in one node of autograd; keeps what a low-rank layer keeps, and its output from
    before the rescaling for the magnitude."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: _Maybe,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        magnitude: Tensor,
        way: Way,
    ) -> Tensor:
        ctx.strength, ctx.dense, ctx.inside = 1.0, way is Way.DENSE, False
        # inside: False of the kernels, which add a bias behind; else `_product` settles it
        result: Any = None
        u, factor = None, None
        if way is Way.KERNELS and _is_typed(magnitude, bias):
            norm = norms_of(weight, a, b, scale)
            by = Rescale(magnitude, norm, ctx.needs_input_grad[6])
            result = operators.rescaled(Operands(x, weight, bias, a, b, scale), by)
        ctx.kernel = result is not None
        if result is not None:
            functional.start_cpp()  # as of a layer that is not rescaled
            y, u, z = result
            y, z = as_rows(y), None if z is None else as_rows(z)
        else:
            z, u, norm = _product(ctx, as_rows(x), weight, bias, a, b, scale)
            factor, norm = _factor(magnitude, norm)
            y = _times(z, factor, bias, ctx.inside)
        # x, bias, A, B and the scale stand where `kept_input` looks; the magnitude is needs[6]
        held = functional.kept_input(ctx, x)
        # of the kernels it is also what the input's gradient is computed from
        u = u if ctx.kernel or held is not None else None
        more = u, z if ctx.needs_input_grad[6] else None
        inner = bias if ctx.inside else None
        ctx.save_for_backward(held, weight, a, b, scale, *more, magnitude, norm, factor, inner)
        return y if x.dim() == 2 else functional.unflattened(y, x)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        held, weight, a, b, scale, u, z, magnitude, norm, factor, inner = ctx.saved_tensors
        needs, x = ctx.needs_input_grad, functional.input_of(ctx, held, weight)
        dbias = as_rows(dy).sum(0) if needs[2] else None
        # many gradients at once: `_times` writes into `out`, which a batched tensor does not take
        plain = is_batched(dy) or functional.in_plain_operations(ctx.kernel, dy)
        if torch.is_grad_enabled() or plain:

            def again(x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
                y = functional.linear_by_definition(x, weight, None, *rest[:-1])
                return _by_definition(y, rest[-1].reshape(-1), norm, None)

            inputs, wanted = (x, weight, a, b, scale, magnitude), (*needs[:2], *needs[3:7])
            dx, dweight, *others = differentiable(again, inputs, wanted, dy)
            return dx, dweight, dbias, *others, None
        dz, dm = _unscaled(as_rows(dy), z, magnitude, norm, factor, inner)
        of = Operands(x, weight, None, a, b, scale)
        if ctx.kernel:
            shaped = dz if dy.dim() == 2 else dz.view(dy.shape)
            dx, da, db, dscale = operators.backward(shaped, of, 1.0, u, Wanted(*needs[:6]))
        else:
            dx, da, db, dscale = functional.gradients(ctx, dz, of, u)
        # the weight's own product lies before the rescaling, so its gradient is dz's
        dweight = dz.t() @ as_rows(x) if needs[1] else None
        return dx, dweight, dbias, da, db, dscale, dm, None


def gradients_of_native(
    dy: Tensor,
    of: Operands,
    kept: Tensor,
    wanted: tuple[bool, ...],
    magnitude: Tensor,
    norm: Tensor,
    z: Tensor,
) -> tuple[_Maybe, ...]:
    """The gradients of x, A, B and the magnitude after `linear` in C++.

    `wanted`: of x, the weight, the bias, A, B, the scale and the magnitude.
    """
    x, weight, _, a, b, scale = of
    rows = as_rows(z)
    held = (x, weight, a, b, scale, kept, rows, magnitude, norm, None, None)
    dx, _, _, da, db, _, dm, _ = _Linear.backward(functional.Kept(held, wanted), dy)
    return dx, da, db, dm


def _product(
    ctx: Any, x: Tensor, weight: Tensor, bias: _Maybe, a: Tensor, b: Tensor, scale: Tensor
) -> tuple[Tensor, _Maybe, Tensor]:
    """The low-rank layer's output of rows in torch's operations, its thin product, and the norms;
    `ctx.inside` tells whether the bias is in it."""
    # in 16 bits a large bias drowns what is rounded; it is added behind
    ctx.inside = bias is not None and weight.dtype.itemsize > 2
    down, up, ctx.power = functional.narrowed(x, a, b, scale, 1.0)
    inner = bias if ctx.inside else None
    if ctx.dense:
        total = functional.summed(weight, up, down)
        # of the sum that is there already; the other way never forms it, see `output_norms`
        return F.linear(x, total, inner), None, torch.linalg.vector_norm(total, dim=1)
    u = x @ down.t()
    return functional.both(x, weight.t(), u, up.t(), inner), u, output_norms(weight, a, b, scale)


def _unscaled(
    dy: Tensor, z: _Maybe, magnitude: Tensor, norm: Tensor, factor: _Maybe, inner: _Maybe
) -> tuple[Tensor, _Maybe]:
    """The gradients of what was rescaled, and of the magnitude where z was kept for it.

    Args:
        dy: ``[rows, out]``, or with what comes behind the outputs as magnitude and norm have it.
        z: as many, or None.
        factor: what torch's operations rescaled by; None of the kernels.
        inner: the bias that is in z.
    """
    # the kernels computed the forward, and both gradients are one pass over z
    if factor is None and z is not None:
        from paramlora.cuda.rescaled import plan

        dz, dm = plan.rescale_backward(dy, z, magnitude, norm)
        return dz, functional.cast(dm, magnitude.dtype).view(magnitude.shape)
    if factor is None:
        factor, norm = _factor(magnitude, norm)
    dz = _times(dy, factor, None, False)
    if z is None:
        return dz, None
    # in the norm's type: of 16 bits a sum over the rows would lose what it adds
    dm = (functional.cast(dy, norm.dtype) * z).sum_to_size(norm.shape)
    # dm is of z without its bias; the sum of dy stands for the bias's share
    dm = dm if inner is None else dm - inner * dy.sum_to_size(norm.shape)
    return dz, functional.cast(dm / norm, magnitude.dtype).view(magnitude.shape)


def _is_typed(magnitude: Tensor, bias: _Maybe) -> bool:
    """Whether magnitude and bias are contiguous: the kernels get their addresses alone."""
    return magnitude.is_contiguous() and (bias is None or bias.is_contiguous())


def rescaled(
    z: Tensor, magnitude: Tensor, norm: Tensor, bias: _Maybe, inside: bool = False
) -> Tensor:
    """``z · m/‖·‖ + bias``, rounded once to z's type; 0 where m and the norm both are.

    Args:
        z: ``[..., out]``, the output of the low-rank layer.
        magnitude: ``[out]``, or with ones behind it for what comes after the outputs in z.
        norm: as many, which gets no gradient.
        bias: as many, or None.
        inside: z has the bias already: where the norm is m, z is then the result to the last bit.

    Example:
        >>> z, m, norm = torch.ones(2, 3), torch.tensor([2.0, 0.0, 3.0]), torch.tensor([4.0, 0, 1])
        >>> rescaled(z, m, norm, None)[0].tolist()
        [0.5, 0.0, 3.0]
    """
    if untold() or recorded():
        return _by_definition(z, magnitude, norm, bias, inside)
    return applied(_Rescaled, z, magnitude, norm, bias, inside)


def _by_definition(
    z: Tensor, magnitude: Tensor, norm: Tensor, bias: _Maybe, inside: bool = False
) -> Tensor:
    """`rescaled` in operations that autograd follows."""
    factor = magnitude.to(norm.dtype) / torch.where(norm == 0, 1, norm)
    # z·f already has bias·f, and bias·(1 - f) makes the bias whole
    if bias is not None and inside:
        bias = bias * (1 - factor)
    y = z * factor
    return functional.cast(y if bias is None else y + bias, z.dtype)


def _times(z: Tensor, factor: Tensor, bias: _Maybe, inside: bool) -> Tensor:
    """``z · factor + bias`` in one pass, unseen by autograd; of a z that has the bias, so that a
    factor of 1 leaves all bits."""
    # bias + f·(z - bias), which for f = 1 torch computes as z itself
    if bias is not None and inside and z.dtype == factor.dtype == bias.dtype:
        return torch.lerp(bias, z, factor)
    if bias is not None and inside:
        bias = bias * (1 - factor)
    # `out` of z's type: torch multiplies in the wider of both and rounds once
    y = None if z.dtype == factor.dtype else torch.empty_like(z)
    if bias is None:
        return torch.mul(z, factor, out=y)
    return torch.addcmul(bias, z, factor, out=y)


class _Rescaled(torch.autograd.Function):
    """`rescaled` in one node of autograd; keeps z."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, magnitude: Tensor, norm: Tensor, bias: _Maybe, inside: bool
    ) -> Tensor:
        ctx.inside, factor = inside and bias is not None, None
        # of convolutions and embeddings the norm has dimensions behind, which the kernel does not
        # know
        ours = magnitude.dim() == 1 and served(z) and z.is_contiguous() and z.numel() > 0
        if ours and not inside and _is_typed(magnitude, bias):
            from paramlora.cuda.rescaled import plan

            y: Tensor = plan.rescale(z.view(-1, z.shape[-1]), magnitude, norm, bias)
            y = functional.unflattened(y, z)
        else:
            factor, norm = _factor(magnitude, norm)
            y = _times(z, factor, bias, inside)
        # the kernel's backward reads z for both gradients
        kept = z if ctx.needs_input_grad[1] or factor is None else None
        ctx.save_for_backward(kept, magnitude, norm, factor, bias)
        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        z, magnitude, norm, factor, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled() or is_batched(dy):

            def again(z: Tensor, magnitude: Tensor, *inner: Tensor) -> Tensor:
                return _by_definition(z, magnitude, norm, inner[0] if inner else None, ctx.inside)

            z = torch.empty_like(dy) if z is None else z  # of which only the magnitude's is made
            # None is no argument of `differentiable`: the bias comes only where there is one
            inputs = (z, magnitude) if bias is None else (z, magnitude, bias)
            wanted = needs[:2] if bias is None else (*needs[:2], needs[3])
            dz, dm, *more = differentiable(again, inputs, wanted, dy)
            return dz, dm, None, more[0] if more else None, None
        dbias = None
        if needs[3]:
            dbias = dy.sum_to_size(bias.shape)
            # the bias is inside of z too, which has taken f of its gradient
            dbias = dbias - dbias * factor if ctx.inside else dbias
        if factor is None:
            flat = z.view(-1, z.shape[-1])
            dz, dm = _unscaled(dy.reshape(flat.shape), flat, magnitude, norm, None, None)
            return dz.view(z.shape), dm, None, dbias, None
        dz, dm = _unscaled(dy, z, magnitude, norm, factor, bias if ctx.inside else None)
        return dz, dm, None, dbias, None
