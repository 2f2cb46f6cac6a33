"""The parametrization: ``W + strength · scale · B·A`` in the weight's own shape."""

import math
from typing import Any, Literal, Optional

import torch
from einops import rearrange
from torch import Tensor, nn

from paramlora.config import TargetConfig

Layout = Literal["matrix", "transposed", "stack"]
LAYOUTS: tuple[Layout, ...] = ("matrix", "transposed", "stack")


def matrix_shape(shape: "tuple[int, ...] | torch.Size", layout: Layout) -> tuple[int, int, int]:
    """(stack, out, in): the matrices that a weight of `shape` holds.

    ``matrix`` flattens all but the first dimension into the input side, ``transposed``
    stores the input side first, ``stack`` holds one ``[out, in]`` for each leading index.
    """
    if layout == "stack":
        return math.prod(shape[:-2]), shape[-2], shape[-1]
    first, rest = shape[0], math.prod(shape[1:])
    return (1, rest, first) if layout == "transposed" else (1, first, rest)


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of an update's factors: a 16-bit one would lose their small steps."""
    return torch.float32 if dtype.itemsize <= 2 else dtype


def ambiguous(shape: "tuple[int, ...] | torch.Size", layout: Layout) -> bool:
    """Whether the factors' shapes do not tell which side of the weight is the input."""
    return layout != "stack" and shape[0] ** 2 == math.prod(shape)


class LowRank(nn.Module):
    r"""Low-rank update of one tensor, Hu et al. 2021 (arXiv:2106.09685), equation 3.

    .. math:: W' = W + strength · scale · B A

    Args:
        weight: the tensor to adapt, of any shape with two or more dimensions.
        r: rank.
        scale: the factor itself, never divided by `r`.
        layout: where the input and output sides lie in `weight`.
        trainable_scale: make ``lora_scale`` a parameter instead of a buffer.
        adapter: the name under which this update is switched and saved.

    Shapes: ``lora_A`` ``[r, in]``, ``lora_B`` ``[out, r]`` (a leading ``stack`` dimension for
    ``layout="stack"``), ``lora_scale`` ``[]``. They are float32 on a 16-bit weight, where their
    updates would otherwise vanish, and the weight's own type elsewhere. A transposed weight with
    as many inputs as outputs also has the buffer ``lora_transposed``, because a state dict would
    otherwise not tell on which side they lie.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scale: Tensor

    def __init__(
        self,
        weight: Tensor,
        r: int,
        scale: float = 1.0,
        layout: Layout = "matrix",
        trainable_scale: bool = False,
        adapter: str = "default",
    ) -> None:
        super().__init__()
        stack, out, fan_in = matrix_shape(weight.shape, layout)
        lead = (stack,) if layout == "stack" else ()
        where: dict[str, Any] = {"device": weight.device, "dtype": factor_dtype(weight.dtype)}
        self.order: tuple[str, ...] = ()  # of the owner's parameters, set when registered
        self.written_by_reader = False  # such as an embedding with max_norm, set by attach
        self.entry: Optional[TargetConfig] = None  # what asked for it, set by attach
        self.r, self.layout, self.adapter, self.strength = r, layout, adapter, 1.0
        self.lora_A = nn.Parameter(torch.randn(*lead, r, fan_in, **where) / r)
        self.lora_B = nn.Parameter(torch.zeros(*lead, out, r, **where))
        value = torch.tensor(scale, **where)
        if trainable_scale:
            self.lora_scale = nn.Parameter(value)
        else:
            self.register_buffer("lora_scale", value)
        if layout == "transposed" and ambiguous(weight.shape, layout):
            mark = torch.ones((), dtype=torch.uint8, device=weight.device)
            self.register_buffer("lora_transposed", mark)

    def delta(self, shape: "tuple[int, ...] | torch.Size") -> Tensor:
        """``strength · scale · B·A`` reshaped to `shape`, in the factors' own type."""
        product = (self.lora_B * (self.lora_scale * self.strength)) @ self.lora_A
        if self.layout == "transposed":
            product = rearrange(product, "out fan_in -> fan_in out")
        return product.reshape(shape)

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight, rounded once to `weight`'s type; `weight` unchanged when off."""
        if self.strength == 0:
            return weight.clone() if self.written_by_reader else weight
        delta = self.delta(weight.shape)
        return (weight.to(delta.dtype) + delta).to(weight.dtype)

    def extra_repr(self) -> str:
        return f"adapter={self.adapter!r}, r={self.r}, strength={self.strength}"
