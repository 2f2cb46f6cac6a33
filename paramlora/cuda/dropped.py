"""A 16-bit linear layer whose update drops inputs, on CUDA: the kernels of experts, for one.

Masks are drawn from the seed where x is read, and again in the backward; see `masks.kernels`.
"""

from typing import Optional

import torch
from torch import Tensor

_Maybe = Optional[Tensor]


def forward(
    x: Tensor, weight: Tensor, bias: _Maybe, down: Tensor, up: Tensor, rate: float, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """``x Wᵀ + (mask ∘ x) downᵀ upᵀ + bias``, rounded once, and the thin product.

    Args:
        x: ``[rows, in]``; weight: ``[out, in]``; bias: ``[out]``; all of 16 bits.
        down: ``[r, in]``, up: ``[out, r]``, of x's type.
        rate: the chance that an element of x is dropped.
        seed: ``[]``, of the mask.
    """
    from paramlora.cuda.experts import plan

    x, ends = x.contiguous(), _whole(x)
    u = plan.thin(x, down[None], ends, width(len(down)), plan.Drop(rate, seed))
    own = None if bias is None else bias[None]
    return plan.product(x, weight.t()[None], ends, u, up.t()[None], None, own), u


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    u: _Maybe,
    rate: float,
    seed: Tensor,
    wanted: tuple[bool, bool, bool],
) -> tuple[_Maybe, _Maybe, _Maybe]:
    """The gradients of x, of down ``[r, in]`` and of up ``[out, r]`` that are wanted; those of the
    factors in float32, without what either was multiplied by.

    Args:
        dy: ``[rows, out]``; the others, and `u`, as of `forward`.
    """
    from paramlora.cuda.experts import plan

    drop, ends, dx, v = plan.Drop(rate, seed), _whole(x), None, None
    x, dy = x.contiguous(), dy.contiguous()
    if wanted[0] or wanted[1]:
        v = plan.thin(dy, up.t()[None], ends, width(len(down)), None)
        if wanted[0]:
            dx = plan.product(dy, weight[None], ends, v, down[None], drop)
    if not (wanted[1] or wanted[2]):
        return dx, None, None
    da, db = plan.sums(x, v, dy, u, ends, len(down), drop, wanted[1:])
    return dx, None if da is None else da[0], None if db is None else db[0]


def width(r: int) -> int:
    """Numbers in a row of a thin product, the rank and zeros: rows begin at aligned addresses."""
    return r + -r % 8


def _whole(x: Tensor) -> Tensor:
    """Where the rows of the only expert end, which are all."""
    return torch.full((1,), len(x), dtype=torch.int32, device=x.device)
