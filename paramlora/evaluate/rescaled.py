"""DoRA beside a known layer: the low-rank layer's output, rescaled by outputs (Liu et al. 2024,
arXiv:2402.09353, equation 5). Tensors only."""

from typing import Any, Optional

import torch
from torch import Tensor

from paramlora.cuda.operands import padded, served
from paramlora.evaluate.functional import differentiable, untold, without_autocast
from paramlora.update.compat import applied, is_batched, recorded
from paramlora.update.dora import output_norms

_Maybe = Optional[Tensor]
_HIGHEST = 128  # rank whose factors the kernel of the norms holds in registers


def norms_of(weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """`output_norms`, in 16 bits on CUDA in one launch, which reads the weight once."""
    ours = served(weight) and 0 < len(a) and padded(len(a)) <= _HIGHEST and weight.numel() > 0
    near = {t.get_device() for t in (a, b, scale)} == {weight.get_device()}
    if not (ours and near) or untold() or recorded():
        return output_norms(weight, a, b, scale)
    from paramlora.cuda.rescaled import plan

    found: Tensor = plan.lengths(*(t.detach() for t in (weight, a, b, scale)))
    return found


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
    wide = magnitude.dim() == 1 and served(z) and z.is_contiguous() and z.numel() > 0
    typed = bias is None or bias.is_contiguous()
    if (
        wide
        and typed
        and not inside
        and magnitude.is_contiguous()
        and not untold()
        and not recorded()
    ):
        return applied(_Rescaled, z, magnitude, norm, bias)
    return _by_definition(z, magnitude, norm, bias, inside)


def _by_definition(
    z: Tensor, magnitude: Tensor, norm: Tensor, bias: _Maybe, inside: bool = False
) -> Tensor:
    factor = magnitude.to(norm.dtype) / torch.where(norm == 0, 1, norm)
    if bias is not None and inside:
        bias = bias * (1 - factor)
    y = z * factor
    return (y if bias is None else y + bias).to(z.dtype)


class _Rescaled(torch.autograd.Function):
    """`rescaled` in the kernels; keeps z."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, magnitude: Tensor, norm: Tensor, bias: _Maybe) -> Tensor:
        from paramlora.cuda.rescaled import plan

        ctx.save_for_backward(z, magnitude, norm)
        y: Tensor = plan.rescale(z.view(-1, z.shape[-1]), magnitude, norm, bias)
        return y.view(z.shape)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        (z, magnitude, norm), needs = ctx.saved_tensors, ctx.needs_input_grad
        dbias = dy.flatten(0, -2).sum(0) if needs[3] else None
        if torch.is_grad_enabled() or is_batched(dy):

            def again(z: Tensor, magnitude: Tensor) -> Tensor:
                return _by_definition(z, magnitude, norm, None)

            return *differentiable(again, (z, magnitude), needs[:2], dy), None, dbias
        from paramlora.cuda.rescaled import plan

        flat = z.view(-1, z.shape[-1])
        dz, dm = plan.rescale_backward(dy.reshape(flat.shape), flat, magnitude, norm)
        return dz.view(z.shape), dm.to(magnitude.dtype), None, dbias
