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
from paramlora.update.compat import applied
from paramlora.update.contexts import autocast_of
from paramlora.update.rows import Rows

_Maybe = Optional[Tensor]
_LONG = 16  # positions of a row from which it is a block of its own


def stacked(factors: Sequence[_Maybe]) -> Tensor:
    """``[len(factors) + 1, r, side]``: each filled up with zeros to the largest rank, and the last
    all zeros.

    Args:
        factors: ``[r, side]`` of each adapter, None where it has none.
    """
    held = [factor for factor in factors if factor is not None]
    like, rank = held[0], max(len(factor) for factor in held)
    zero, side = like.new_zeros(1, 1), like.shape[-1]
    parts: list[Tensor] = []
    for factor in (*factors, None):
        there = 0 if factor is None else len(factor)
        parts += [] if factor is None else [factor]
        parts += [] if there == rank else [zero.expand(rank - there, side)]
    return torch.cat(parts).view(len(factors) + 1, rank, side)


def linear(x: Tensor, weight: _Maybe, bias: _Maybe, down: Tensor, up: Tensor, rows: Rows) -> Tensor:
    """``x (W + B_i A_i)ᵀ + bias`` where ``i`` is each row's.

    Args:
        x: ``[N, ..., in]``.
        weight: ``[out, in]``, any strides; None for the updates' part alone.
        bias: ``[out]`` or None.
        down: ``[n + 1, r, in]``, see `stacked`.
        up: ``[n + 1, r, out]``, ``Bᵀ`` with its scale.
        rows: which each row takes.

    Returns:
        ``[N, ..., out]``. In 16 bits the update is added before the only rounding, but for what is
        compiled.

    Example:
        >>> x, W, A, B = (torch.randn(*s).double() for s in ((3, 4), (5, 4), (2, 4), (5, 2)))
        >>> A, B, rows = stacked([A]), stacked([B.t()]), Rows(("a",), torch.tensor([0, 1, 0]), 0)
        >>> y, plain = linear(x, W, None, A, B, rows), x @ W.T
        >>> assert torch.equal(y[1], plain[1]) and not torch.equal(y[0], plain[0])
    """
    device = autocast_of(x)
    if device is not None:
        x, weight, bias = cast_for_autocast(device, x, weight, bias)
        with torch.autocast(device, enabled=False):
            return linear(x, weight, bias, down, up, rows)
    thin = grouped(x.reshape(len(x), -1, x.shape[-1]), rows, down.mT, up)
    thin = thin.reshape(*x.shape[:-1], up.shape[-1])
    if weight is None:
        return thin
    if x.dtype.itemsize > 2 or untold():
        return F.linear(x, weight, bias) + thin
    flat = applied(_Onto, thin.flatten(0, -2), x.flatten(0, -2), weight, bias)
    return flat.view(thin.shape)


def grouped(x: Tensor, rows: Rows, *stacks: Tensor) -> Tensor:
    """Each row times its own matrix of each stack, in x's type; float16, whose range it does not
    heed, in float32.

    Args:
        x: ``[N, positions, in]``.
        rows: which each row takes.
        stacks: ``[n + 1, in, out]``, the first one's ``out`` the second one's ``in``.
    """
    if x.dtype == torch.float16:
        return grouped(x.float(), rows, *stacks).to(x.dtype)
    places, owners, positions = rows.places, rows.owners, x.shape[1]
    if places is None or owners is None or positions >= _LONG:
        return _chained(x, rows.index, stacks)
    packed = x.new_zeros(len(owners) * rows.block, *x.shape[1:]).index_copy(0, places, x)
    y = _chained(packed.view(len(owners), rows.block * positions, -1), owners, stacks)
    return y.view(-1, positions, y.shape[-1]).index_select(0, places)


def _chained(x: Tensor, each: Tensor, stacks: Sequence[Tensor]) -> Tensor:
    for stack in stacks:
        x = x @ cast(stack, x.dtype).index_select(0, each)
    return x


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
    rows: Rows,
    padding_idx: Optional[int] = None,
) -> Tensor:
    """``(W + (B_i A_i)ᵀ)[tokens]`` where ``i`` is each row's.

    Args:
        tokens: indices ``[N, ...]``.
        weight: ``[num, dim]``.
        down: ``[n + 1, r, num]``, see `stacked`.
        up: ``[n + 1, r, dim]``, ``Bᵀ`` with its scale.
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
    rank = torch.arange(down.shape[1], device=tokens.device)
    thin = down[rows.index[:, None, None], rank, flat[..., None]]
    update = grouped(cast(thin, base.dtype), rows, up).view(base.shape)
    if padding_idx is not None:
        padded = (tokens == padding_idx % len(weight))[..., None]
        update = torch.where(padded, update.detach(), update)
    return cast(base + update, weight.dtype)


def convolution(
    x: Tensor,
    shape: Sequence[int],
    down: Tensor,
    up: Tensor,
    rows: Rows,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """The updates' part of a convolution: one of as many groups as there are rows.

    Args:
        x: ``[N, C_in, ...]``.
        shape: of the weight, ``[C_out, C_in / groups, *kernel]``.
        down: ``[n + 1, r, C_in / groups · prod(kernel)]``, see `stacked`.
        up: ``[n + 1, r, C_out]``, ``Bᵀ`` with its scale.
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
    first = cast(down, x.dtype).index_select(0, rows.index)  # [N, r, in]
    first = first[:, None].expand(-1, groups, -1, -1).reshape(-1, shape[1], *kernel)
    second = cast(up, x.dtype).index_select(0, rows.index).mT  # [N, out, r]
    second = second.reshape(-1, up.shape[1], *[1] * count)
    # [1, (N channels), ...]: a row's channels meet its own kernels alone
    y = narrow.Stage(stride, padding, dilation, n * groups)(x.reshape(1, -1, *x.shape[2:]), first)
    y = narrow.Stage((1,) * count, (0,) * count, (1,) * count, n * groups)(y, second)
    return y.reshape(n, -1, *y.shape[2:])
