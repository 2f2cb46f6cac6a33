"""What the rows of a grouped product are made of: kept as it is, and made again for gradients.

The rows of experts are tokens, each as often as it is chosen, or what an activation gives. Both
are larger than what they come from, or cheaper to compute than to keep. Tensors only.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor

_Maybe = Optional[Tensor]
_BLOCK = 128 << 20  # bytes of rows whose gradient is computed at a time: smaller ones take time
Again = tuple[Tensor, Callable[[Tensor], Tensor]]  # the rows, and the gradient of what made them


class Chosen(NamedTuple):
    """Rows that are tokens ``[tokens, in]``, sorted by who chose them.

    Args:
        order: ``[rows]``, the choice that each row is, as ``token * top + place``.
        back: ``[rows]``, where each choice's row lies.
        top: choices of each token.
        partial: whether some rows, the last, may be nobody's, and without a gradient.
    """

    order: Tensor
    back: Tensor
    top: int
    partial: bool

    def rows(self, flat: Tensor) -> Tensor:
        """``[rows, in]``."""
        # `order` counts choices, `top` for each token
        return flat[self.order // self.top]

    def pulled(self, dx: Tensor, ends: Tensor) -> Tensor:
        """The gradient of the tokens: sums in the order of the choices, nothing scattered."""
        if self.partial:
            # their dx was never written; 0 · NaN would still be NaN, so they are filled
            dx = dx.masked_fill((torch.arange(len(dx), device=dx.device) >= ends[-1])[:, None], 0)
        tokens = len(self.back) // self.top
        # a gather and a sum over `top`: `index_add_` on CUDA adds in another order each time
        return dx[self.back].view(tokens, self.top, dx.shape[1]).sum(1)

    def again(self, flat: Tensor, ends: Tensor) -> Again:
        return self.rows(flat), lambda dx: self.pulled(dx, ends)


class Computed(NamedTuple):
    """Rows that a function without parameters gives, each of the row at its place."""

    rows: Callable[[Tensor], Tensor]

    def again(self, y: Tensor, _: Tensor) -> Again:
        if y.nbytes <= _BLOCK:  # small enough for what lies between to be kept, not made once more
            # the graph that the backward needs is made now and kept in the closure
            x, given = self._recorded(y)
            return x.detach(), lambda dx: _through(x, given, dx)
        with torch.no_grad():
            return self.rows(y), lambda dx: self.pulled(dx, y)

    def pulled(self, dx: Tensor, y: Tensor) -> Tensor:
        """The gradient of y, some rows at a time: of all of them at once what lies between y and x
        takes more memory than all else that a layer of experts has alive then."""
        out = torch.empty_like(y)
        count = max(1, _BLOCK // max(1, y[:1].nbytes))
        for start in range(0, len(y), count):
            some = slice(start, start + count)
            out[some] = _through(*self._recorded(y[some]), dx[some])
        return out

    def _recorded(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The rows, and the leaf that they are computed from."""
        # backward runs without gradients, but this small graph is differentiated at once
        with torch.enable_grad():
            given = y.detach().requires_grad_()
            return self.rows(given), given


def _through(x: Tensor, given: Tensor, dx: Tensor) -> Tensor:
    # an activation may compute in another type than the product's gradient has
    (found,) = torch.autograd.grad(x, given, dx.to(x.dtype))
    return found


Source = Union[Chosen, Computed]


def taken_apart(source: Optional[Source]) -> tuple[_Maybe, _Maybe, Any]:
    """Both tensors of a source, and the rest, as an autograd function takes it."""
    if isinstance(source, Chosen):
        return source.order, source.back, (source.top, source.partial)
    return None, None, source


def put_together(order: _Maybe, back: _Maybe, rest: Any) -> Optional[Source]:
    """What `taken_apart` was given."""
    return rest if order is None or back is None else Chosen(order, back, *rest)
