"""RunLoRA's orders of evaluation (Cherniuk et al. 2023, arXiv:2312.03415), from the mathematics.

Four forward orders; eight backward ones, which are two choices for each of the three
gradients. The best pair is chosen by time for each shape, the forward first, as there.
Here ``x [n, i]``, ``W [o, i]``, ``A [r, i]``, ``B [o, r]``.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import once

Bias = Optional[Tensor]


def base_first(x: Tensor, W: Tensor, A: Tensor, B: Tensor, bias: Bias) -> Tensor:
    flat = x.flatten(0, -2)
    return F.linear(flat, W, bias).addmm_(flat @ A.T, B.T).unflatten(0, x.shape[:-1])


def delta_first(x: Tensor, W: Tensor, A: Tensor, B: Tensor, bias: Bias) -> Tensor:
    flat = x.flatten(0, -2)
    low = F.linear(flat @ A.T, B, bias)
    return low.addmm_(flat, W.T).unflatten(0, x.shape[:-1])


def dense(x: Tensor, W: Tensor, A: Tensor, B: Tensor, bias: Bias) -> Tensor:
    flat = x.flatten(0, -2)
    return F.linear(flat, torch.addmm(W, B, A), bias).unflatten(0, x.shape[:-1])


def dense_unflattened(x: Tensor, W: Tensor, A: Tensor, B: Tensor, bias: Bias) -> Tensor:
    y = x @ torch.addmm(W, B, A).T
    return y if bias is None else y + bias


FORWARDS = (base_first, delta_first, dense, dense_unflattened)
# whether dX goes through W + BA, dA through dYᵀX, dB through dYᵀX
BACKWARDS = tuple(itertools.product((False, True), repeat=3))


def gradients(
    order: tuple[bool, ...], dy: Tensor, x: Tensor, W: Tensor, A: Tensor, B: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dA, dB) in one of the eight orders."""
    through_sum, a_by_dw, b_by_dw = order
    flat, dy2 = x.flatten(0, -2), dy.flatten(0, -2)
    dw = dy2.T @ flat if a_by_dw or b_by_dw else None
    low = None if through_sum and a_by_dw else dy2 @ B  # [n, r]
    if through_sum:
        dx = dy2 @ torch.addmm(W, B, A)
    else:
        dx = (dy2 @ W).addmm_(low, A)
    dA = B.T @ dw if a_by_dw else low.T @ flat
    dB = dw @ A.T if b_by_dw else dy2.T @ (flat @ A.T)
    return dx.reshape(x.shape), dA, dB


class Order(torch.autograd.Function):
    """One pair of orders; saves only references: x, W, A, B."""

    @staticmethod
    def forward(ctx: Any, pair: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor, bias: Bias) -> Any:
        ctx.save_for_backward(x, W, A, B)
        ctx.order = pair[1]
        return pair[0](x, W, A, B, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return None, *_wide(gradients(ctx.order, dy, *ctx.saved_tensors)), None


def _wide(grads: tuple[Tensor, Tensor, Tensor]) -> tuple[Optional[Tensor], ...]:
    dx, dA, dB = grads
    return dx, None, dA, dB


class BestOrder(nn.Module):
    """A linear layer in the fastest order; chosen at the first call of each input's shape."""

    def __init__(self, layer: nn.Linear, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.A = nn.Parameter(A.to(layer.weight.dtype))
        self.B = nn.Parameter(B.to(layer.weight.dtype))
        self.pairs: dict[tuple[Any, ...], Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        tensors = (x, self.layer.weight, self.A, self.B, self.layer.bias)
        if torch.is_autocast_enabled(x.device.type):
            low = torch.get_autocast_dtype(x.device.type)
            tensors = tuple(t if t is None else t.to(low) for t in tensors)
        key = (x.shape, tensors[0].dtype)
        if key not in self.pairs:
            self.pairs[key] = best(*[t if t is None else t.detach() for t in tensors])
        with torch.autocast(x.device.type, enabled=False):
            return Order.apply(self.pairs[key], *tensors)


def best(
    x: Tensor, W: Tensor, A: Tensor, B: Tensor, bias: Bias
) -> tuple[Callable[..., Tensor], Any]:
    """The fastest forward order, and the fastest backward order."""
    with torch.no_grad():
        forward = min(FORWARDS, key=lambda f: once(partial(f, x, W, A, B, bias), x.device))
        dy = forward(x, W, A, B, bias)
        backward = min(
            BACKWARDS, key=lambda o: once(partial(gradients, o, dy, x, W, A, B), x.device)
        )
    return forward, backward
