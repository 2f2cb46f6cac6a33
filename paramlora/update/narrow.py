"""float16's range: the powers of two that keep what lies between two factors inside it.

``B·A`` is the same number for ``A·g`` and ``B/g``. Where both are finite in float32 and so is their
update, its thin product ``x·Aᵀ``, ``scale·B`` or ``dY·B`` may still be infinite in float16, whose
largest number is 65504, or lose its digits, below 6e-5. So in float16 alone every product of thin
matrices is given its own power of two, from the largest numbers that it meets, and its result gives
it back in float32. Nothing waits for the device, and no digit changes where the range did not
matter.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from paramlora.update.compat import is_batched
from paramlora.update.contexts import autocast_of, without_autocast

_Maybe = Optional[Tensor]
# 2**16 is beyond 65504
_TOP = 15  # the power of two that no product may reach
_FLOOR = 5  # that which a bound of a product is lifted to: its sums may lie far below their bound
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def wide(t: Tensor) -> Tensor:
    """A tensor of float16 in float32, any other as it is: times a scale it must not overflow."""
    return t.float() if t.dtype == torch.float16 else t


def of_factor(t: Tensor) -> Tensor:
    """A factor of 16 bits in float32, any other as it is: times a scale it must neither overflow
    nor be rounded, whatever the type that it is then multiplied in."""
    return t.float() if t.dtype.itemsize == 2 else t


def _logarithms(*tensors: Tensor) -> list[Tensor]:
    """The binary logarithm of the largest number in each; one that is none, or infinite, counts as
    large."""
    device = autocast_of(tensors[0])
    if device is not None:  # which would have all of them cast
        with torch.autocast(device, enabled=False):
            return _logarithms(*tensors)
    # the norm of infinity gives NaN where there is one, which is told as large below
    largest = [
        torch.linalg.vector_norm(t.detach(), math.inf).float() if t.numel() else t.new_zeros(())
        for t in tensors
    ]
    # log2 of 0 is -inf, and of inf inf: both ends are cut, so that powers stay finite in float32
    found = torch.stack([t.float() for t in largest]).nan_to_num_(nan=65504.0)
    return list(found.log2_().clamp_(-120, 120).unbind())


def balance(x: _Maybe, first: Tensor, second: Tensor, reach: int) -> Tensor:
    """The power of two ``g``, for ``first·g`` and ``second/g``: both, and all sums of `reach`
    products of x and the former, are in range, and as large as each other.

    A second that is zero still gets products that give it a gradient, see `_FLOOR`.
    """
    alone, other, *more = _logarithms(first, second, *(() if x is None else (x,)))
    bound = alone
    if more:
        # x is of float16: 2**-24 is its smallest number, and what is infinite counts as 2**16
        bound = alone + more[0].clamp(-24, 16) + math.log2(max(reach, 1))
    # half of the way makes both factors as large as each other; no less than lifts sums to the
    # floor
    g = torch.maximum((other - bound) * 0.5, _FLOOR - bound)
    # and no more than keeps first·g and its sums below the top
    return torch.minimum(g, _TOP - torch.maximum(bound, alone)).clamp_(-120, 120).floor_().exp2_()


def in_range(x: _Maybe, a: Tensor, b: Tensor, reach: int) -> tuple[Tensor, Tensor, Tensor]:
    """``a·g`` and ``b/g`` in float32, and ``g``, see `balance`."""
    g = balance(x, a, b, reach)
    # the factors stay in float32: whoever multiplies rounds them to half, once
    return a.float() * g, b.float() / g, g


def summed(thin: Tensor, other: Tensor, count: int) -> Tensor:
    """The power of two by which `thin` is multiplied, so that sums of `count` of its products with
    the other are in range; as float16."""
    one, two = _logarithms(thin, other)
    # the factor itself, times the power, must be in range too
    bound = torch.maximum(one + two + math.log2(max(count, 1)), one)
    # powers of two that float16 holds exactly
    return (_TOP - bound).clamp_(-24, _TOP).floor_().exp2_().half()


def outer(thin: Tensor, other: Tensor) -> Tensor:
    """``thin.T @ other`` of two matrices of as many rows, of float16; in float32."""
    m = summed(thin, other, len(thin))
    # multiplied into the thin matrix: fewer numbers, and a power of two rounds none of them
    return ((thin * m).t() @ other).float() / m.float()


class Stage(NamedTuple):
    """What a convolution is called with; `extra`: a transposed one's output padding."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    transposed: bool = False
    extra: Sequence[int] = (0, 0, 0)

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        n, placed = weight.dim() - 2, (self.stride, self.padding)
        if self.transposed:
            more: tuple[Any, ...] = (self.extra[:n], self.groups, self.dilation)
            return _TRANSPOSED[n - 1](x, weight, None, *placed, *more)
        return CONVOLUTIONS[n - 1](x, weight, None, *placed, self.dilation, self.groups)

    def reach(self, weight: Tensor) -> tuple[int, int]:
        """How many products an output sums at most, and how many the gradient of an input."""
        # [C_out, C_in / groups, *kernel]; transposed [C_in, C_out / groups, *kernel]
        sums = [weight.numel() // max(size, 1) for size in weight.shape[:2]]
        return (sums[1], sums[0]) if self.transposed else (sums[0], sums[1])

    def gradients(
        self, dy: Tensor, x: Tensor, weight: Tensor, masks: tuple[bool, bool]
    ) -> tuple[_Maybe, _Maybe]:
        """The gradients of input and weight that are wanted; the weight's, whose sums are long, in
        float32 where all are of float16."""
        if not (masks[1] and weight.dtype == torch.float16):
            return self._gradients(dy, x, weight, masks)
        # apart, as only the weight's gradient sums over all positions
        dx = self._gradients(dy, x, weight, (True, False))[0] if masks[0] else None
        count = dy.numel() // max(dy.shape[1], 1)
        few = x.numel() < dy.numel()
        # the smaller of both takes the power of two
        m = summed(*((x, dy) if few else (dy, x)), count)
        left, right = (dy, x * m) if few else (dy * m, x)
        # linear in both: whichever took the power, the result has it once
        _, dweight = self._gradients(left, right, weight, (False, True))
        return dx, None if dweight is None else dweight.float() / m.float()

    def _gradients(
        self, dy: Tensor, x: Tensor, weight: Tensor, masks: tuple[bool, bool]
    ) -> tuple[_Maybe, _Maybe]:
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            dy, x, weight, None, self.stride, self.padding, self.dilation, self.transposed,
            list(self.extra[: weight.dim() - 2]), self.groups, [*masks, False],
        )  # fmt: skip
        return dx, dweight


class _Linear:
    """What a `Stage` is for a convolution, for a linear layer: its product and its gradients."""

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def reach(self, weight: Tensor) -> tuple[int, int]:
        return weight.shape[1], weight.shape[0]

    def gradients(
        self, dy: Tensor, x: Tensor, weight: Tensor, masks: tuple[bool, bool]
    ) -> tuple[_Maybe, _Maybe]:
        dx = dy @ weight if masks[0] else None
        if not masks[1]:
            return dx, None
        left, right = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        thin = left.shape[1] < right.shape[1]
        return dx, outer(left, right) if thin else outer(right, left).t()


LINEAR = _Linear()


class Pair(torch.autograd.Function):
    """``second(first(x))`` of two thin kernels in float32 and an input in float16."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, first: Tensor, second: Tensor, one: Any, two: Any, again: Any
    ) -> Tensor:
        narrow, kernel, g = in_range(x, first, second, one.reach(first)[0])
        thin = one(x, narrow.half())
        # inputs in their own types: a gradient of the gradient reads them, not what was cast
        ctx.save_for_backward(x, first, second, thin, g)
        ctx.stages, ctx.again = (one, two), again
        y: Tensor = two(thin, kernel.half())
        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, first, second, thin, g = ctx.saved_tensors
        (one, two), needs = ctx.stages, ctx.needs_input_grad
        if torch.is_grad_enabled() or is_batched(dy):
            return *ctx.again((x, first, second), needs[:3], dy), None, None, None
        # the other way round: dy meets the second kernel first
        up, down, h = in_range(dy, second, first, two.reach(second)[1])
        up, down = up.half(), down.half()
        dx = dfirst = dsecond = None
        # v is the gradient of thin, with h in it, which `dfirst` gives back
        v, dsecond = two.gradients(dy, thin, up, (needs[0] or needs[1], needs[2]))
        if v is not None:
            dx, dfirst = one.gradients(v, x, down, needs[:2])
        dfirst = None if dfirst is None else (dfirst / h).to(first.dtype)
        # thin's g is in it
        dsecond = None if dsecond is None else (dsecond / g).to(second.dtype)
        return dx, dfirst, dsecond, None, None, None


class Single(torch.autograd.Function):
    """A convolution by a kernel in float32 and an input in float16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, stage: Stage, again: Any) -> Tensor:
        ctx.save_for_backward(x, kernel)
        ctx.stage, ctx.again = stage, again
        # a kernel of its own has nothing to share a power with
        return stage(x, kernel.half())

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, kernel = ctx.saved_tensors
        stage, needs = ctx.stage, ctx.needs_input_grad
        if torch.is_grad_enabled() or is_batched(dy):
            return *ctx.again((x, kernel), needs[:2], dy), None, None
        dx, dkernel = stage.gradients(dy, x, kernel.half(), needs[:2])
        return dx, None if dkernel is None else dkernel.to(kernel.dtype), None, None
