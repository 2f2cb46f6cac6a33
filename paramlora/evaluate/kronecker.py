"""LoKr beside a linear layer: the product with a Kronecker product (Yeh et al. 2023,
arXiv:2309.14859, section 3.2). Tensors only."""

from collections.abc import Mapping
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from paramlora.cuda.operands import served
from paramlora.cuda.operators import scaled_down
from paramlora.evaluate import choose, functional
from paramlora.evaluate.choose import Way
from paramlora.evaluate.functional import as_rows, differentiable, untold
from paramlora.update.compat import applied, is_batched, recorded
from paramlora.update.contexts import autocast_of, without_autocast
from paramlora.update.lokr import factors, kron, low_rank, rank_of_product

_Maybe = Optional[Tensor]


def linear(
    x: Tensor, weight: Tensor, bias: _Maybe, parts: Mapping[str, Tensor], scale: Tensor
) -> Tensor:
    r"""``x (W + scale · w_1 ⊗ w_2)ᵀ + bias``.

    With ``x`` as ``[b, d]`` and the output as ``[a, c]`` the second term is ``w_1 x w_2ᵀ``. Where
    the kernels serve it, the Kronecker product is of a low rank (see `low_rank`) and rows are many,
    it is a low-rank layer's.

    Args:
        x: ``[..., b·d]``, of the weight's type, or of any under autocast.
        weight: ``[a·c, b·d]``, any strides.
        bias: ``[a·c]`` or None.
        parts: of ``w_1`` ``[a, b]`` and ``w_2`` ``[c, d]``, by LyCORIS's names (see `Lokr`).
        scale: ``[]``.

    Returns:
        ``[..., a·c]``. In 16 bits the two products are added before their only rounding, but for
        what is compiled.

    Example:
        >>> x, w, one, two = (torch.randn(s).double() for s in ((5, 6), (8, 6), (2, 3), (4, 2)))
        >>> y = linear(x, w, None, {"lokr_w1": one, "lokr_w2": two}, torch.tensor(0.5).double())
        >>> assert torch.allclose(y, x @ (w + 0.5 * torch.kron(one, two)).T)
    """
    device = autocast_of(x)
    if device is not None:
        x, weight, bias = functional.cast_for_autocast(device, x, weight, bias)
        with torch.autocast(device, enabled=False):
            return linear(x, weight, bias, parts, scale)
    # the largest number of float16 is soon reached; and factors of 16 bits beside a weight of more
    # have products of the weight's type
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    low = dtype.itemsize
    # products of factors that are not whole must not be rounded in between
    parts = {n: t.to(dtype) if t.dtype.itemsize < low else t for n, t in parts.items()}
    rank, rows = rank_of_product(parts) if served(x) else 0, x.shape[:-1].numel()
    way = choose.kronecker(x.dtype, rows, weight.shape, rank, untold() or recorded())
    if way is Way.LOW_RANK:
        return functional.linear(x, weight, bias, *low_rank(parts), scale)
    first, second = factors(parts)
    first = scaled_down(first, scale, 1.0, dtype)
    second = functional.cast(second, dtype)
    if way is Way.SUM:
        # one sum, and a plain product, whose gradient autograd knows
        return F.linear(x, weight + kron(first, second), bias)
    if way is Way.PLAIN:
        return _by_definition(x, weight, bias, first, second)
    return applied(_Linear, x, weight, bias, first, second)


def _by_definition(
    x: Tensor, weight: Tensor, bias: _Maybe, first: Tensor, second: Tensor
) -> Tensor:
    split = torch.unflatten(functional.cast(x, second.dtype), -1, (first.shape[1], -1))
    # [..., b, c], then [..., a, c]: first mixes blocks, second acts within each
    y = torch.matmul(first, torch.matmul(split, second.t())).flatten(-2)
    return functional.cast(F.linear(x, weight, bias) + y, x.dtype)


class _Linear(torch.autograd.Function):
    """A linear layer with ``w_1 ⊗ w_2`` of two whole factors, scaled; keeps x and ``x w_2ᵀ``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: _Maybe, first: Tensor, second: Tensor
    ) -> Tensor:
        rows, (a, b) = as_rows(x), first.shape
        # each size in full: torch infers none of a batch without rows
        thin = functional.cast(rows, second.dtype).reshape(len(rows) * b, second.shape[1])
        u = (thin @ second.t()).view(len(rows), b, len(second))  # [N, b, c]
        y = _added(rows, weight.t(), first.expand(len(rows), a, b), u, bias)
        ctx.save_for_backward(x, weight, first, second, u)
        # of 16 bits the sum is a view of the product that it was added to
        return y if x.dim() == 2 and not y._is_view() else functional.unflattened(y, x)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, first, second, u = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dbias = as_rows(dy).sum(0) if needs[2] else None
        if torch.is_grad_enabled() or is_batched(dy):

            def again(x: Tensor, weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
                return _by_definition(x, weight, None, first, second)

            inputs, wanted = (x, weight, first, second), (*needs[:2], *needs[3:])
            dx, dweight, *others = differentiable(again, inputs, wanted, dy)
            return dx, dweight, dbias, *others
        rows, dy, (a, b) = as_rows(x), as_rows(dy), first.shape
        count, (c, d) = len(rows), second.shape
        own = functional.cast(dy, first.dtype).reshape(count, a, c)
        dx = dfirst = dsecond = None
        if needs[0] or needs[4]:
            v = torch.bmm(first.t().expand(count, b, a), own).view(count * b, c)
            if needs[0]:
                dx = _added(dy, weight, v, second).view(x.shape)
            if needs[4]:
                dsecond = v.t() @ functional.cast(rows, v.dtype).reshape(count * b, d)
        if needs[3]:
            dfirst = functional.cast(torch.bmm(own, u.mT).sum(0), first.dtype)
        return dx, dy.t() @ rows if needs[1] else None, dbias, dfirst, dsecond


def _added(x: Tensor, w: Tensor, left: Tensor, right: Tensor, bias: _Maybe = None) -> Tensor:
    """``x @ w`` with ``left @ right`` laid out as it, and the bias; in 16 bits added before their
    only rounding, as `functional.both` does."""
    batched = left.dim() == 3
    if x.dtype.itemsize > 2:
        y = torch.mm(x, w) if bias is None else torch.addmm(bias, x, w)
        shaped = y.view(*left.shape[:-1], right.shape[-1])
        # into y through its view: shaped as left @ right lies
        shaped.baddbmm_(left, right) if batched else shaped.addmm_(left, right)
        return y
    low = (torch.bmm(left, right) if batched else torch.mm(left, right)).view(len(x), w.shape[1])
    # on a CPU one float32 accumulator takes both; float16's low is in float32 already
    if not x.is_cuda and low.dtype == x.dtype:
        y = low.addmm_(x, w)
        return y if bias is None else y.add_(bias)
    if choose.by_cublas(x):
        y = torch.mm(x, w, out_dtype=torch.float32)
    else:  # ROCm has no `out_dtype`, and a CPU's float16 no range
        y = torch.mm(x.float(), w.float())
    y = y.add_(low)
    return (y if bias is None else y.add_(bias)).to(x.dtype)
