"""The gradient of a dense sum that many readers share, for each of its low-rank updates."""

from typing import Any, Optional

import torch
from torch import Tensor

from paramlora.errors import AdapterError
from paramlora.update.geometry import matrix_shape
from paramlora.update.narrow import of_factor


def joined(
    a: Tensor, b: Tensor, start_a: Optional[Tensor], start_b: Optional[Tensor]
) -> tuple[Tensor, Tensor]:
    """Two factors, and behind them of rank ``2r`` those that a start takes out again."""
    if start_a is None or start_b is None:
        return a, b
    return torch.cat([a, start_a], dim=-2), torch.cat([b, -start_b], dim=-1)  # [2r, in], [out, 2r]


class Summand:
    """A low-rank update, as it was when a sum with it was computed.

    Args:
        update: a `LowRank`.
    """

    def __init__(self, update: Any) -> None:
        (self.a, self.b), self.scale = update.factors(), update.stored_scale()
        self.held = update.held()
        self.layout, self.gain = update.layout, update.gain.to(self.scale.device)
        self.watched = [t for t in update._parameters.values() if t is not None]
        self.versions = [t._version for t in self.watched]

    def gradients(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of A, B and the scale: ``(s·B)ᵀ G``, ``s·G Aᵀ``, of the sum's ``G``.

        Raises:
            AdapterError: the update has changed since.
        """
        # after an optimizer's step the gradient would be of other factors
        if [t._version for t in self.watched] != self.versions:
            raise AdapterError(
                "an adapted tensor, or the strength of its adapter, changed between forward and "
                "backward. Call backward first, then step or set_adapters."
            )
        # joined anew, of what the tensors hold now, as whoever computes the sum again reads them
        a, b = joined(*self.held)
        # in 16 bits the scale would be rounded, and float16's range would not hold the products
        a, b, scale = of_factor(a), of_factor(b), of_factor(self.scale) * self.gain
        stack, out, fan_in = matrix_shape(grad.shape, self.layout)
        if self.layout == "transposed":
            g = grad.reshape(fan_in, out).t()
        else:  # no flatten, which many gradients at once do not know
            g = grad.reshape((stack, out, fan_in) if self.layout == "stack" else (out, fan_in))
        g = g.to(b.dtype)
        scale, product = scale.to(b.dtype), g @ a.mT
        da, db = (b * scale).mT @ g, product * scale
        dscale = (product * b).sum() * self.gain
        return da.to(self.a.dtype), db.to(self.b.dtype), dscale.to(self.scale.dtype)
