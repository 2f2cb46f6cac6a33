"""A tensor trained whole beside its original: a new head, norms with their statistics, biases."""

import math
from collections.abc import Mapping, Sequence
from typing import Optional, cast

import torch
from torch import Tensor, nn

from paramlora.config import TargetConfig
from paramlora.errors import TargetError
from paramlora.update.attached import AttachedUpdate, Gains, Site, Told, put_in_place
from paramlora.update.contexts import in_own_types
from paramlora.update.geometry import Layout, laid_as, summed_in
from paramlora.update.kinds import register
from paramlora.update.sharded import gathered, take
from paramlora.update.sum import Term, WholeTerm
from paramlora.update.value import Value, WholeValue


@register
class Whole(AttachedUpdate):
    r"""The parametrization of a tensor that is trained itself, not by a low-rank update.

    .. math:: W' = W + strength · (V - W)

    Of several adapters that train one tensor, each has its own ``V``, and those that act are summed
    as other updates are (`together`); of one that acts as it was trained it is ``V``, bit for bit.

    A buffer, such as a running mean, is what its layer writes into: while the update acts as it was
    trained, `forward` gives ``lora_whole`` itself, and else a copy, so that the base never moves; a
    count of batches always itself. A layer that puts another tensor in its place puts it here.

    Args:
        weight: the tensor, of any shape; ``lora_whole`` starts as its copy.
        adapter: the name under which it is switched and saved.
        gains: where updates that are made together share the tensor of their strength.
        trains: whether it is a parameter; as `weight` is where None.

    Shapes: ``lora_whole`` has the shape of `weight`. Of a parameter it is a parameter, in float32
    on a 16-bit weight, where its updates would otherwise vanish, and in the weight's own type
    elsewhere; of a buffer it is a buffer of the same type.
    """

    alone = True  # but for others of its kind
    bounded = False
    inside = True
    internal = True
    vectors = True
    made_sharded = True
    method = "whole"
    parts = {"lora_whole": "weight"}
    lora_whole: Tensor
    based = "lora_whole"

    def __init__(
        self,
        weight: Tensor,
        adapter: str = "default",
        gains: Optional[Gains] = None,
        trains: Optional[bool] = None,
    ) -> None:
        trains = isinstance(weight, nn.Parameter) if trains is None else trains
        # a buffer keeps its type: its layer writes into it
        dtype = torch.float32 if trains and weight.dtype.itemsize <= 2 else weight.dtype
        super().__init__(adapter, weight.device, dtype, gains)
        own = weight.detach().to(dtype, copy=True)
        if trains:
            self.lora_whole = nn.Parameter(own)
        else:
            self.register_buffer("lora_whole", own)
            # a running mean: BatchNorm writes into what it reads
            self.keep(written_by_reader=True)

    def forward(self, weight: Tensor) -> Tensor:
        """``lora_whole`` in `weight`'s type; `weight` unchanged when off."""
        counts = not weight.is_floating_point()  # batches: what reads it divides by what it adds
        # a count is one for all: half of a count has no meaning
        if not self.acts and not counts:
            return weight
        # at the first read: the base has its values by then
        if self.unset:
            self.begin_as(weight)
        # the tensor itself where it acts in full, so that its gradient is the tensor's
        own = self.lora_whole
        if not self.fully and not counts:
            dtype = summed_in(weight.dtype, own)
            with in_own_types(weight):
                own = torch.lerp(weight.to(dtype), own.to(dtype), self._gain_for(own, dtype))
        return laid_as(own.to(weight.dtype), weight)

    def change(self, start: Tensor) -> Tensor:
        """What it adds to the base, ``strength · (V - W)``, in the type of `start`, the base."""
        if self.unset:
            self.begin_as(start)
        own = self.lora_whole.to(start.dtype)
        return self._gain_for(own, own.dtype) * (own - start)

    def assigned(self, value: Tensor) -> bool:
        """Hold another tensor, with the graph that made it, where it is a buffer that it fits;
        while the update does not act as it was trained it is let go, as what is written into a copy
        is."""
        own = self.lora_whole
        # a parameter that somebody assigns is torch's affair
        if isinstance(own, nn.Parameter) or isinstance(value, nn.Parameter):
            return False
        if (value.shape, value.dtype) != (own.shape, own.dtype):
            return False
        if self.fully or not value.is_floating_point():
            self.lora_whole = value
            self.keep(unset=False)
        return True

    @staticmethod
    def together(updates: Sequence["Whole"], weight: Tensor) -> Tensor:
        r"""What the tensors of several adapters make of one: :math:`W + Σᵢ sᵢ · (Vᵢ - W)`.

        Args:
            updates: at least one.
            weight: the base.

        Returns:
            The one of them that acts, if it is only one and acts as it was trained; otherwise a
            tensor of its own, in `weight`'s type. Of a count, such as BatchNorm's, one of them.
        """
        acting = [one for one in updates if one.acts]
        # of one tensor alone it is the tensor, bit for bit, or the way to it
        if len(acting) < 2 or not weight.is_floating_point():
            return cast(Tensor, (acting or updates)[-1](weight))
        # every difference is to the base, in one wide type
        start = weight.to(summed_in(weight.dtype, acting[0].lora_whole))
        with in_own_types(weight):
            total = start
            for one in acting:
                total = total + one.change(start)
        return laid_as(total.to(weight.dtype), weight)

    def _gain_for(self, own: Tensor, dtype: torch.dtype) -> Tensor:
        return self.gain.to(own.device, dtype)

    @torch.no_grad()
    def begin_as(self, weight: Tensor) -> None:
        """Start as a copy of the base."""
        take(self.lora_whole, weight)
        self.keep(unset=False)

    @classmethod
    def attached_to(
        cls, site: Site, entry: TargetConfig, adapter: str, gains: Optional[Gains]
    ) -> "Whole":
        """A copy of the tensor that trains."""
        if site.weight.is_meta:
            raise TargetError(
                f'"{entry.name}" ("whole") matches {site.path or "weight"}, which lies on the '
                "meta device and has no values to start from. Load the model first."
            )
        # what another parametrization shows is no parameter, and is made of some
        return cls(site.shown(), adapter, gains, isinstance(site.weight, nn.Parameter))

    @classmethod
    def elements(cls, entry: TargetConfig, shape: tuple[int, ...], layout: Layout) -> int:
        """How many the tensor has."""
        return math.prod(shape)

    @staticmethod
    def term_of(parts: Mapping[str, Tensor], gain: Tensor, layout: Layout) -> Term:
        """The tensor, instead of the weight."""
        return WholeTerm(parts["lora_whole"], gain)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Its one parameter; a buffer trains otherwise."""
        return {"whole": list(self.parameters())}

    def value(
        self, shape: Optional[tuple[int, ...]], kind: Optional[str], groups: int
    ) -> WholeValue:
        """The tensor to have instead."""
        return WholeValue(gathered(self.lora_whole.detach()))

    @classmethod
    def read_file(
        cls, where: str, parts: Mapping[str, Tensor], entry: TargetConfig, told: Told
    ) -> WholeValue:
        """The tensor of a native file."""
        value = WholeValue(parts["lora_whole"])
        if value.value.dtype != torch.int64:  # of BatchNorm's counts
            value.check_types(f"{where}.lora_whole", torch.float32)
        return value

    @classmethod
    def read_state(cls, where: str, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Value:
        """The tensor in a state dict."""
        return WholeValue(parts["lora_whole"])

    @torch.no_grad()
    def resize(self, base: Tensor) -> None:
        """Keep the rows that stay; new ones start as the base's."""
        own = self.lora_whole
        kept = min(own.shape[0], base.shape[0])
        fresh = base.detach().to(own.dtype, copy=True)
        fresh[:kept] = own[:kept]
        put_in_place(own, fresh)

    def extra_repr(self) -> str:
        return f"adapter={self.adapter!r}, whole, strength={self.strength}"
