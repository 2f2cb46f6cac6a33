"""Stacks of expert matrices whose rows take different low-rank updates: a group of rows is a pair
of expert and adapter.

Each row is multiplied by its own update and by nothing else, as in `routed`. Tensors only.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from paramlora.evaluate import choose
from paramlora.evaluate.choose import Way
from paramlora.evaluate.experts import (
    expert_sums,
    grouped_linear,
    owners,
    plain_product,
    runs,
    serves_pairs,
)
from paramlora.evaluate.functional import cast, cast_for_autocast, untold
from paramlora.update.choice import padded, steps
from paramlora.update.compat import applied, recorded
from paramlora.update.contexts import autocast_of, without_autocast

_Maybe = Optional[Tensor]


class Pairs(NamedTuple):
    """Rows that lie sorted by expert, by their pairs of expert and adapter.

    Args:
        order: ``[rows]``, which row comes where once they are sorted by pairs.
        back: ``[rows]``, where each row then lies.
        ends: ``[experts · (adapters + 1)]``, where the rows of each pair end.
    """

    order: Tensor
    back: Tensor
    ends: Tensor


def pairs_of(experts: Tensor, adapters: Tensor, count: int, names: int) -> Pairs:
    """Sort rows, with nothing that waits for a device.

    Args:
        experts: ``[rows]``, ascending; one of `count` or more is nobody's.
        adapters: ``[rows]``, one of `names`, or `names` itself for the base.
    """
    # one number for a pair, in which the expert weighs more, so that sorting keeps experts together
    key, order = torch.sort(experts * (names + 1) + adapters, stable=True)
    # an expert of `count` or more sorts behind the last pair, whose end then stops before it
    every = torch.arange(count * (names + 1), device=key.device, dtype=key.dtype)
    ends = torch.searchsorted(key, every, right=True, out_int32=True)
    # the inverse of a permutation, by a scatter: no second sort
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(key), device=key.device))
    return Pairs(order, back, ends)


def joined(factors: Sequence[_Maybe], dtype: torch.dtype) -> Tensor:
    """The factors of all pairs ``[experts · (adapters + 1), r, side]``, where r is `padded`.

    Args:
        factors: of each adapter ``[experts, r_i, side]``, None where it does not act; the base's,
            zeros, come last.
    """
    like = next(factor for factor in factors if factor is not None)
    # every pair has as many ranks, which a grouped product demands
    most = padded(max(factor.shape[1] for factor in factors if factor is not None))
    none = like.new_zeros((), dtype=dtype).expand(like.shape[0], most, like.shape[2])
    every = [
        none if factor is None else F.pad(cast(factor, dtype), (0, 0, 0, most - factor.shape[1]))
        # the last is the base's, whose zeros leave x W alone
        for factor in (*factors, None)
    ]
    # [experts, adapters + 1, ...] flattened counts pairs as `pairs_of` does
    return torch.stack(every, 1).flatten(0, 1)


def grouped_linear_of_rows(
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    down: Sequence[_Maybe],
    up: Sequence[_Maybe],
    pairs: Pairs,
    dropped: _Maybe = None,
    twice: bool = False,
    bias: _Maybe = None,
) -> Tensor:
    """``x (W_e + B_ei A_ei)ᵀ`` where ``e`` and ``i`` are each row's expert and adapter.

    Args:
        x: ``[rows, in]``, sorted by expert.
        weight: ``[experts, out, in]``, any strides.
        ends: ``[experts]``, where each expert's rows end.
        down: of each adapter ``A`` ``[experts, r_i, in]``, or None where it does not act.
        up: likewise ``Bᵀ`` with its scale, ``[experts, r_i, out]``.
        pairs: of the rows.
        dropped: what the updates get instead of x.
        twice: round the base's product first, as servers do.
        bias: ``[experts, out]``, of the weight's type; it gets no gradient.

    Returns:
        ``[rows, out]``. In 16 bits the update is added before the only rounding: on CUDA by the
        kernels of experts, whose groups are the pairs, where nothing is dropped; on a CPU but for
        float16; and nowhere in what is compiled.

    Example:
        >>> x, W = torch.randn(3, 4).double(), torch.randn(2, 5, 4).double()
        >>> A, B = torch.randn(2, 1, 4).double(), torch.randn(2, 1, 5).double()
        >>> pairs = pairs_of(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), 2, 1)
        >>> y = grouped_linear_of_rows(x, W, torch.tensor([1, 3]), [A], [B], pairs)
        >>> assert torch.allclose(y[1], x[1] @ W[1].T)
        >>> assert torch.allclose(y[2], x[2] @ (W[1] + B[1].T @ A[1]).T)
    """
    device = autocast_of(x)
    if device is not None:
        x, weight, dropped = cast_for_autocast(device, x, weight, dropped)
        with torch.autocast(device, enabled=False):
            return grouped_linear_of_rows(x, weight, ends, down, up, pairs, dropped, twice, bias)
    x = cast(x, weight.dtype)
    rank = padded(max(factor.shape[1] for factor in down if factor is not None))
    apart = twice or untold() or recorded()
    ours = not apart and serves_pairs(x, weight, len(pairs.ends), rank)
    way = choose.of_pairs(x.dtype, ours, apart, dropped is not None, not x.is_cuda)
    if way is Way.KERNELS:
        dtype = torch.promote_types(x.dtype, torch.bfloat16)  # float16 has no range for them
        a, b = joined(down, dtype), joined(up, dtype).mT.contiguous()
        scale = torch.ones((), device=x.device)
        y = grouped_linear(x[pairs.order], weight, pairs.ends, a, b, scale, bias=bias)
        return y[pairs.back]
    update = _low(x if dropped is None else cast(dropped, x.dtype), down, up, pairs)
    if way is Way.PLAIN:
        y = plain_product(x, weight, ends) + update
    else:
        y = applied(_Onto, update, x, weight, ends)
    return y if bias is None else y + bias[owners(ends, len(y))]


def _low(x: Tensor, down: Sequence[_Maybe], up: Sequence[_Maybe], pairs: Pairs) -> Tensor:
    """The updates' part, in `steps` of the ranks; float16, of whose range it knows nothing, in
    float32."""
    if x.dtype == torch.float16:
        return _low(x.float(), down, up, pairs).to(x.dtype)
    # rows sorted by pairs; put back by `back` at the end
    own, a, b = x[pairs.order], joined(down, x.dtype), joined(up, x.dtype)
    parts = (
        plain_product(plain_product(own, a[:, some], pairs.ends), b[:, some].mT, pairs.ends)
        for some in steps(a.shape[1])
    )
    return reduce(torch.add, parts)[pairs.back]


class _Onto(torch.autograd.Function):
    """``x_e W_eᵀ + low`` in 16 bits with one rounding: `low` is what the product is added onto."""

    @staticmethod
    def forward(ctx: Any, low: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, weight, ends)
        y = torch.zeros_like(low)
        for e, rows in runs(ends):
            # `addmm` of low: one float32 accumulator takes both on a CPU
            y[rows] = torch.addmm(low[rows], x[rows], weight[e].t())
        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, ends = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dx = plain_product(dy, weight.mT, ends) if needs[1] else None
        return dy, dx, expert_sums(dy, x, ends) if needs[2] else None, None
