"""Low-rank updates of a batch whose rows take different ones: grouped products, no loop.

Each row is multiplied by its own update and by nothing else, so that what is not finite in one row
reaches neither another row nor another update's gradient. Tensors only.
"""

from collections.abc import Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from paramlora.evaluate.functional import cast, cast_for_autocast, untold
from paramlora.update import narrow
from paramlora.update.choice import Choice
from paramlora.update.compat import applied
from paramlora.update.contexts import autocast_of

_Maybe = Optional[Tensor]
_LONG = 16  # positions of a row from which it is a block of its own


def joined(factors: Sequence[_Maybe], ranks: Sequence[int], dim: int) -> Tensor:
    """The factors of all adapters one after the other, and one rank of zeros.

    Args:
        factors: of each adapter, None where it does not act.
        ranks: of each.
        dim: in which the ranks lie: 0 of ``[r, in]``, 1 of ``[out, r]``.
    """
    like = next(factor for factor in factors if factor is not None)
    side, zero = like.shape[1 - dim], like.new_zeros(1, 1)
    parts = [zero if f is None else f for f in (*factors, None)]
    sizes = [(r, side) if dim == 0 else (side, r) for r in (*ranks, 1)]
    every = [one.expand(size) if one is zero else one for one, size in zip(parts, sizes)]
    return torch.cat(every, dim)


def linear(
    x: Tensor, weight: _Maybe, bias: _Maybe, down: Tensor, up: Tensor, rows: Choice
) -> Tensor:
    """``x (W + B_i A_i)ᵀ + bias`` where ``i`` is each row's.

    Args:
        x: ``[N, ..., in]``.
        weight: ``[out, in]``, any strides; None for the updates' part alone.
        bias: ``[out]`` or None.
        down: ``[ranks, in]``, the ``A`` of all adapters, see `joined`.
        up: ``[ranks, out]``, their ``Bᵀ`` with their scales.
        rows: which each row takes.

    Returns:
        ``[N, ..., out]``. In 16 bits the update is added before the only rounding, but for what is
        compiled.

    Example:
        >>> x, W, A, B = (torch.randn(*s).double() for s in ((3, 4), (5, 4), (2, 4), (5, 2)))
        >>> rows = Choice(("a",), (2,), torch.tensor([0, 1, 0]), 0)
        >>> y = linear(x, W, None, joined([A], [2], 0), joined([B], [2], 1).t(), rows)
        >>> assert torch.allclose(y[0], x[0] @ (W + B @ A).T) and torch.allclose(y[1], x[1] @ W.T)
    """
    device = autocast_of(x)
    if device is not None:
        x, weight, bias = cast_for_autocast(device, x, weight, bias)
        with torch.autocast(device, enabled=False):
            return linear(x, weight, bias, down, up, rows)
    thin = grouped(x.reshape(len(x), -1, x.shape[-1]), rows, down, up)
    thin = thin.reshape(*x.shape[:-1], up.shape[-1])
    if weight is None:
        return thin
    if x.dtype.itemsize > 2 or untold():
        return F.linear(x, weight, bias) + thin
    flat = applied(_Onto, thin.flatten(0, -2), x.flatten(0, -2), weight, bias)
    return flat.view(thin.shape)


def grouped(x: Tensor, rows: Choice, down: _Maybe, up: Tensor) -> Tensor:
    """Each row times its own ``A_iᵀ``, if `down` is given, and ``B_iᵀ``, in x's type; float16, of
    whose range it knows nothing, in float32.

    Args:
        x: ``[N, positions, in]``, or without `down` ``[N, positions, r]``.
        rows: which each row takes.
        down, up: as of `linear`.
    """
    if x.dtype == torch.float16:
        return grouped(x.float(), rows, down, up).to(x.dtype)
    places, picks, positions = rows.places, rows.block_picks, x.shape[1]
    if places is None or picks is None or positions >= _LONG:
        return _times(x, rows.picks, down, up)
    packed = x.new_zeros(len(picks) * rows.block, *x.shape[1:]).index_copy(0, places, x)
    y = _times(packed.view(len(picks), rows.block * positions, -1), picks, down, up)
    return y.view(-1, positions, y.shape[-1]).index_select(0, places)


def _times(x: Tensor, picks: Tensor, down: _Maybe, up: Tensor) -> Tensor:
    thin = x if down is None else x @ picked(down, picks, x.dtype).mT
    return thin @ picked(up, picks, x.dtype)


def picked(factors: Tensor, picks: Tensor, dtype: torch.dtype) -> Tensor:
    """``[N, r, side]``, the ranks that each row picks among those of all."""
    return cast(factors, dtype).index_select(0, picks.flatten()).view(*picks.shape, -1)


class _Onto(torch.autograd.Function):
    """``x Wᵀ + thin + bias`` in 16 bits with one rounding: the small product comes first, where one
    float32 accumulator takes both, and the bias last, so that a large one does not drown it."""

    @staticmethod
    def forward(ctx: Any, thin: Tensor, x: Tensor, weight: Tensor, bias: _Maybe) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, weight)
        if x.is_cuda and torch.version.hip is None:  # cuBLAS rounds in between
            y = torch.mm(x, weight.t(), out_dtype=torch.float32).add_(thin)
            return (y if bias is None else y.add_(bias)).to(x.dtype)
        y = torch.addmm(thin, x, weight.t())
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x, weight), needs = ctx.saved_tensors, ctx.needs_input_grad
        device = autocast_of(dy)
        if device is not None:
            with torch.autocast(device, enabled=False):
                return _Onto.backward(ctx, dy)
        dx = dy @ weight if needs[1] else None
        dweight = dy.t() @ x if needs[2] else None
        return dy, dx, dweight, dy.sum(0) if needs[3] else None


def embedding(
    tokens: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    rows: Choice,
    padding_idx: Optional[int] = None,
) -> Tensor:
    """``(W + (B_i A_i)ᵀ)[tokens]`` where ``i`` is each row's.

    Args:
        tokens: indices ``[N, ...]``.
        weight: ``[num, dim]``.
        down: ``[ranks, num]``, the ``A`` of all adapters, see `joined`.
        up: ``[ranks, dim]``, their ``Bᵀ`` with their scales.
        rows: which each row takes.
        padding_idx: the row of the table that gets no gradient, from the end where negative.
    """
    device = autocast_of(weight)
    if device is not None:  # which leaves a look-up in the table's own type
        with torch.autocast(device, enabled=False):
            return embedding(tokens, weight, down, up, rows, padding_idx)
    base = narrow.wide(F.embedding(tokens, weight, padding_idx))
    flat = tokens.reshape(len(tokens), -1)
    # [N, positions, r]: a column of the row's own factor for each token
    thin = cast(down[rows.picks[:, None], flat[..., None]], base.dtype)
    update = grouped(thin, rows, None, cast(up, base.dtype)).view(base.shape)
    if padding_idx is not None:
        padded = (tokens == padding_idx % len(weight))[..., None]
        update = torch.where(padded, update.detach(), update)
    return cast(base + update, weight.dtype)


def convolution(
    x: Tensor,
    shape: Sequence[int],
    down: Tensor,
    up: Tensor,
    rows: Choice,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """The updates' part of a convolution: one of as many groups as there are rows.

    Args:
        x: ``[N, C_in, ...]``.
        shape: of the weight, ``[C_out, C_in / groups, *kernel]``.
        down: ``[ranks, C_in / groups · prod(kernel)]``, the ``A`` of all adapters, see `joined`.
        up: ``[ranks, C_out]``, their ``Bᵀ`` with their scales.
        rows: which each row takes.
        stride, padding, dilation, groups: of the layer.
    """
    device = autocast_of(x)
    if device is not None:
        (x,) = cast_for_autocast(device, x)
        with torch.autocast(device, enabled=False):
            return convolution(x, shape, down, up, rows, stride, padding, dilation, groups)
    if x.dtype == torch.float16:
        y = convolution(x.float(), shape, down, up, rows, stride, padding, dilation, groups)
        return y.to(x.dtype)
    n, count, kernel = len(x), len(shape) - 2, shape[2:]
    first = picked(down, rows.picks, x.dtype)  # [N, r, in]
    first = first[:, None].expand(-1, groups, -1, -1).reshape(-1, shape[1], *kernel)
    second = picked(up, rows.picks, x.dtype).mT  # [N, out, r]
    second = second.reshape(-1, second.shape[-1], *[1] * count)
    # [1, (N channels), ...]: a row's channels meet its own kernels alone
    y = narrow.Stage(stride, padding, dilation, n * groups)(x.reshape(1, -1, *x.shape[2:]), first)
    y = narrow.Stage((1,) * count, (0,) * count, (1,) * count, n * groups)(y, second)
    return y.reshape(n, -1, *y.shape[2:])
