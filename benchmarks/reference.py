"""The dense float64 definition of an adapted layer, which every opponent must meet."""

import copy
from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.func import functional_call

SCALE = 1.0  # the original's example; RunLoRA's orders have no factor of their own


class Result(NamedTuple):
    """Output and gradients of one step; ``dx`` is None where the input holds indices."""

    y: Tensor
    dx: Optional[Tensor]
    dA: Tensor
    dB: Tensor


def delta(layer: nn.Module, A: Tensor, B: Tensor) -> Tensor:
    """``scale · B·A`` in the shape of the layer's weight; an embedding stores ``[in, out]``."""
    product = SCALE * (B @ A)
    product = product.T if isinstance(layer, nn.Embedding) else product
    return product.reshape(layer.weight.shape)  # type: ignore[arg-type]


def definition(layer: nn.Module, A: Tensor, B: Tensor, x: Tensor, dy: Tensor) -> Result:
    """``layer(x)`` with the weight ``W + scale·B·A`` and its gradients, all in float64."""
    wide = copy.deepcopy(layer).double()
    A, B = (t.detach().double().requires_grad_() for t in (A, B))
    if x.is_floating_point():
        x = x.detach().double().requires_grad_()
    weight = wide.weight + delta(layer, A, B)
    y = functional_call(wide, {"weight": weight}, (x,))
    wanted = [A, B, x] if x.is_floating_point() else [A, B]
    dA, dB, *dx = torch.autograd.grad(y, wanted, dy.double())
    return Result(y.detach(), dx[0] if dx else None, dA, dB)


def bound(dtype: torch.dtype, longest: int) -> float:
    """Largest allowed ``‖got - want‖ / ‖want‖``.

    The first term is four times the unit roundoff of the type in which results are stored
    (2⁻⁸ for bfloat16, 2⁻²⁴ for float32): an evaluation rounds at most about a dozen quantities of
    the size of the result (inputs under autocast, factors, both products, their sum), the
    roundings are independent, so their root sum of squares stays below √12 < 4. The second
    is the error of a float32 sum of `longest` random terms, which grows as their root.
    """
    unit = torch.finfo(dtype).eps / 2
    return 4 * unit + 2 * longest**0.5 * 2.0**-24


def check(got: Result, want: Result, limit: float) -> dict[str, float]:
    """The relative errors, asserted below `limit`, after asserting that nothing is zero."""
    errors = {}
    for name, ours, theirs in zip(Result._fields, got, want):
        if theirs is None:
            continue
        assert ours is not None, f"{name}: no gradient"
        ours = ours.reshape(theirs.shape)  # peft holds a convolution's factors as kernels
        assert ours.norm() > 0 and theirs.norm() > 0, f"{name} is zero"
        errors[name] = ((ours.double() - theirs).norm() / theirs.norm()).item()
        assert errors[name] < limit, f"{name}: relative error {errors[name]:.2e} >= {limit:.2e}"
    return errors
