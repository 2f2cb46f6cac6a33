"""An update that adds a dense tensor which it forms of a few small ones, by whatever formula."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Optional

import torch
from einops import EinopsError
from torch import Tensor, nn

from paramlora.config import TargetConfig
from paramlora.errors import FileError
from paramlora.update.attached import AttachedUpdate, Gains, Site, Told
from paramlora.update.contexts import in_own_types
from paramlora.update.geometry import Layout, factor_dtype, laid_as, matrix_shape, summed_in
from paramlora.update.lowrank import wide
from paramlora.update.sum import Block, Term
from paramlora.update.value import Value, check_types

Parts = Mapping[str, Tensor]


class Added(AttachedUpdate):
    """``W' = W + strength · scale · change``; a kind says what its change is, and of what.

    The change is formed as the weight's matrix ``[out, in]``; a convolution's may have its kernel
    behind, ``[out, in, *kernel]``.

    Args:
        layer: the module that holds the tensor; of a convolution its kernel counts.
        weight: the tensor to adapt.
        entry: as it asks for it.
        layout, adapter, gains: as of any update.

    Shapes: the kind's own, in float32 on a 16-bit weight; ``lora_scale`` ``[]``.
    """

    bounded = False
    adds = True
    computes = ("forward", "scaling")  # of a change of its own the term is made too
    hidden = {"lora_transposed": "number"}
    lora_scale: Tensor
    random: ClassVar[Collection[str]] = ()  # the tensors that do not start at zero

    def __init__(
        self,
        weight: Tensor,
        entry: TargetConfig,
        layout: Layout = "matrix",
        adapter: str = "default",
        gains: Optional[Gains] = None,
    ) -> None:
        options: dict[str, Any] = {"device": weight.device, "dtype": factor_dtype(weight.dtype)}
        super().__init__(adapter, **options, gains=gains)
        self.keep(r=entry.r, layout=layout, first_scale=entry.scale)
        for name, shape in self.sizes(entry, tuple(weight.shape), layout).items():
            setattr(self, name, nn.Parameter(torch.zeros(shape, **options)))
        value = torch.full((), entry.scale, **options)
        if entry.trainable_scale:
            self.lora_scale = nn.Parameter(value)
        else:
            self.register_buffer("lora_scale", value)
        self.reset_parameters()

    @classmethod
    def attached_to(
        cls, site: Site, entry: TargetConfig, adapter: str, gains: Optional[Gains]
    ) -> "Added":
        """A new update as the entry asks for it; what it adds starts at zero."""
        return cls(site.weight.detach(), entry, site.layout, adapter, gains)

    @classmethod
    def sizes(
        cls, entry: TargetConfig, shape: tuple[int, ...], layout: Layout
    ) -> dict[str, tuple[int, ...]]:
        """The shapes of its tensors, by name."""
        raise NotImplementedError

    @staticmethod
    def change(parts: Parts) -> Tensor:
        """What is added, but for the scale: ``[out, in]`` or ``[out, in, *kernel]``."""
        raise NotImplementedError

    @classmethod
    def check_site(cls, entry: TargetConfig, shape: tuple[int, ...], layout: Layout) -> str:
        """Why it cannot update a tensor of that shape."""
        if layout == "stack":
            return f'a stack of matrices {list(shape)}, for which there is no "{cls.method}".'
        return ""

    @classmethod
    def elements(cls, entry: TargetConfig, shape: tuple[int, ...], layout: Layout) -> int:
        """How many all its tensors have, but for its scale."""
        sizes = cls.sizes(entry, shape, layout).values()
        return sum(torch.Size(size).numel() for size in sizes)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Each tensor as its kind starts it, and the scale as given."""
        for name, own in self._parameters.items():
            if own is not None and name != "lora_scale":
                self.start(name, own)
        self.lora_scale.fill_(self.first_scale)

    first_scale: float = 1.0

    @classmethod
    def start(cls, name: str, own: Tensor) -> None:
        """Give one tensor its first values."""
        raise NotImplementedError

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight, rounded once to `weight`'s type; `weight` unchanged when off."""
        if not self.acts:
            return weight
        # in the sum's type, so that factors of 16 bits lose nothing in products
        own = {n: one.to(summed_in(weight.dtype, one)) for n, one in self.shown().items()}
        with in_own_types(weight):
            delta = laid_out(self.change(own), tuple(weight.shape), self.layout)
            delta = delta * self.scaling()
        return laid_as((wide(weight, delta) + delta).to(weight.dtype), weight)

    def scaling(self) -> Tensor:
        """The number before the change: the scale times the strength."""
        return self.lora_scale * self.gain.to(self.lora_scale.device)

    @classmethod
    def term_of(cls, parts: Parts, gain: Tensor, layout: Layout) -> Term:
        """``strength · scale · change``, to be added."""
        return AddedTerm(cls, parts, parts["lora_scale"] * gain, layout)

    @classmethod
    def names(cls, present: Collection[str]) -> tuple[str, ...]:
        """The tensors that are there: `fits` tells whether they are enough."""
        return tuple(name for name in cls.parts if name in present or name == "lora_scale")

    @classmethod
    def fits(cls, held: Parts, shape: tuple[int, ...], layout: Layout) -> bool:
        """Whether the change has as many outputs and inputs as the weight's matrix."""
        if layout == "stack" or len(shape) < 2:
            return False
        found = _shape_of(cls, held)
        if len(found) < 2:
            return False
        _, out, fan_in = matrix_shape(shape, layout)
        same = (found[0], found[1:].numel()) == (out, fan_in)
        return same and (len(found) == 2 or tuple(found) == shape)

    @classmethod
    def outputs_of(cls, held: Parts) -> int:
        """How many rows its change has; 0 of tensors that do not fit each other."""
        return next(iter(_shape_of(cls, held)), 0)

    @classmethod
    def read_file(cls, where: str, parts: Parts, entry: TargetConfig, told: Told) -> Value:
        """The value of an update in a native file."""
        check_types(where, *parts.values())
        # a file's tensors with nothing in them would be of any shape
        if any(one.dim() < 2 or not one.numel() for n, one in parts.items() if n != "lora_scale"):
            raise FileError(f"{where} is no update: its factors are no matrices. Save it again.")
        return super().read_file(where, parts, entry, told)

    @classmethod
    def read_state(cls, where: str, parts: Parts, dtype: torch.dtype) -> Value:
        """The value of an update in an attached model's state dict."""
        check_types(where, *(one for name, one in parts.items() if name in cls.parts))
        value: Any = super().read_state(where, parts, dtype)
        found: Value = replace(value, options=cls.options_of(value.held))
        return found


def _shape_of(kind: type[Added], held: Parts) -> torch.Size:
    """The shape of what tensors make; empty where they do not fit each other."""
    try:
        # the meta device computes shapes alone, of tensors that may be from any file
        return kind.change({name: one.to("meta") for name, one in held.items()}).shape
    except (RuntimeError, KeyError, EinopsError, IndexError):
        return torch.Size()


def laid_out(change: Tensor, shape: tuple[int, ...], layout: Layout) -> Tensor:
    """A change in the weight's own shape."""
    return (change.flatten(1).t() if layout == "transposed" else change).reshape(shape)


@dataclass(frozen=True)
class AddedTerm(Term):
    """Adds ``factor · change``, which is formed once, whole, in the wide type of the sum."""

    kind: type[Added]
    parts: Parts
    factor: Tensor
    laid: Layout
    formed: Optional[Tensor] = None

    def prepared(self, wide: torch.dtype) -> "AddedTerm":
        own = {name: one.detach().to(wide) for name, one in self.parts.items()}
        with in_own_types(self.factor):
            # formed whole: no kind says which of its factors' numbers are in a block
            change = self.kind.change(own).flatten(1) * self.factor.detach().to(wide)
        change = change.t() if self.laid == "transposed" else change
        return replace(self, formed=change.reshape(-1))

    def applied(self, total: Tensor, block: Block) -> Tensor:
        assert self.formed is not None
        return total.add_(self.formed[block.run].view(total.shape))
