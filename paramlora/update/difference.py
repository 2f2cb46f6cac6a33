"""A tensor of any shape added to a weight whole: changes of biases and norms, LyCORIS's full."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Optional

import torch
from torch import Tensor, nn

from paramlora.config import TargetConfig
from paramlora.update.attached import AttachedUpdate, Gains, Moved, Site, in_rows, put_in_place
from paramlora.update.contexts import in_own_types
from paramlora.update.geometry import Layout, factor_dtype, laid_as, summed_in
from paramlora.update.kinds import register
from paramlora.update.lowrank import wide
from paramlora.update.sum import Block, Number, Term


@register
class Difference(AttachedUpdate):
    r"""A dense change of a tensor of any number of dimensions.

    .. math:: W' = W + strength · D

    What LyCORIS calls full (modules/full.py: ``diff``, ``diff_b``) and norm (modules/norms.py:
    ``w_norm``, ``b_norm``). Tied tensors move together.

    Args:
        weight: the tensor.
        adapter: the name under which it is switched and saved.
        gains: where updates that are made together share the tensor of their strength.

    Shapes: ``lora_diff`` has the shape of `weight`, in float32 on a 16-bit weight; it starts at
    zero.
    """

    method = "difference"
    adds = True
    parts = {"lora_diff": "weight"}
    bounded = False
    tied = True
    vectors = True
    lora_diff: nn.Parameter

    def __init__(
        self, weight: Tensor, adapter: str = "default", gains: Optional[Gains] = None
    ) -> None:
        dtype = factor_dtype(weight.dtype)
        super().__init__(adapter, weight.device, dtype, gains)
        zeros = torch.zeros(tuple(weight.shape), device=weight.device, dtype=dtype)
        self.lora_diff = nn.Parameter(zeros)

    @classmethod
    def attached_to(
        cls, site: Site, entry: TargetConfig, adapter: str, gains: Optional[Gains]
    ) -> "Difference":
        """Zero, so that nothing changes yet."""
        update = cls(site.weight.detach(), adapter, gains)
        # it changes the tensor as it is stored; a file of factors asks which side is the input
        update.keep(layout=site.layout)
        return update

    @classmethod
    def elements(cls, entry: TargetConfig, shape: tuple[int, ...], layout: Layout) -> int:
        """How many the tensor has."""
        return math.prod(shape)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Zero."""
        self.lora_diff.zero_()

    def forward(self, weight: Tensor) -> Tensor:
        """The sum, rounded once to `weight`'s type; `weight` unchanged when off."""
        if not self.acts:
            return weight
        with in_own_types(weight):
            # a small change and its strength in a wide type
            own = self.lora_diff.to(summed_in(weight.dtype, self.lora_diff))
            delta = own * self.gain.to(own)
        return laid_as((wide(weight, delta) + delta).to(weight.dtype), weight)

    @staticmethod
    def term_of(parts: Mapping[str, Tensor], gain: Tensor, layout: Layout) -> Term:
        """``strength · D``, to be added."""
        return DifferenceTerm(parts["lora_diff"], gain)

    @classmethod
    def fits(cls, held: Mapping[str, Tensor], shape: tuple[int, ...], layout: Layout) -> bool:
        """Whether it has the tensor's shape."""
        return tuple(held["lora_diff"].shape) == tuple(shape)

    @classmethod
    def outputs_of(cls, held: Mapping[str, Tensor]) -> int:
        """How many rows it has."""
        return held["lora_diff"].shape[0]

    @classmethod
    def of_rows(
        cls, held: Mapping[str, Tensor], rows: Moved, out: int
    ) -> Optional[Mapping[str, Tensor]]:
        """Those rows."""
        return {"lora_diff": in_rows(held["lora_diff"], rows, out)}

    @classmethod
    def beside_each_other(cls, several: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Each in its own rows."""
        return {"lora_diff": torch.stack([one["lora_diff"] for one in several]).sum(0)}

    @torch.no_grad()
    def resize(self, base: Tensor) -> None:
        """Keep what stays; new rows have no change."""
        own = self.lora_diff
        fresh, kept = own.new_zeros(tuple(base.shape)), min(len(own), len(base))
        fresh[:kept] = own[:kept]
        put_in_place(own, fresh)

    def extra_repr(self) -> str:
        return f"adapter={self.adapter!r}, difference, strength={self.strength}"


@dataclass(frozen=True)
class DifferenceTerm(Term):
    """Adds ``strength · value``, element by element."""

    value: Tensor
    strength: Tensor

    def prepared(self, wide: torch.dtype) -> "DifferenceTerm":
        flat = self.value.detach().reshape(-1).to(wide)
        return replace(self, value=flat * self.strength.detach().to(flat))

    def applied(self, total: Tensor, block: Block) -> Tensor:
        return total.add_(self.value[block.run].view(total.shape))

    def bound(self) -> Number:
        # in double: a product of two large float32 numbers would be infinite
        return self.value.detach().abs().max().double() * self.strength.detach().abs().double()
