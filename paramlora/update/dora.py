"""DoRA: the low-rank sum gives each output's direction, and a trained magnitude its length."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Optional

import torch
from torch import Tensor, nn

from paramlora.config import TargetConfig
from paramlora.update.attached import Gains, Moved, Site, in_rows, put_in_place
from paramlora.update.contexts import in_own_types
from paramlora.update.geometry import Layout, factor_dtype, laid_as, matrix_shape
from paramlora.update.kinds import register
from paramlora.update.lowrank import LowRank, wide
from paramlora.update.sharded import take
from paramlora.update.sum import Block, LowRankTerm, Term


@register
class Dora(LowRank):
    r"""Weight-decomposed low-rank update, Liu et al. 2024 (arXiv:2402.09353), equation 5.

    .. math:: W' = m · \frac{W + scale · B A}{‖W + scale · B A‖}

    The norm is that of each output's inputs, as peft takes it, and gets no gradient (their section
    4.3). At a strength other than 1 the weight is that far on the way from ``W`` to ``W'``.

    Shapes: ``lora_A``, ``lora_B`` and ``lora_scale`` as of `LowRank`. ``lora_magnitude`` has the
    weight's number of dimensions, and 1 along those over which the norm is taken: ``[out, 1]`` for
    a Linear, ``[1, out]`` for an embedding and transformers' Conv1D, ``[out, 1, 1, 1]`` for a
    convolution in two dimensions, ``[1, out, 1, 1]`` for a transposed one, ``[E, out, 1]`` for
    a stack of matrices. It starts at ``‖W‖``, so that the function starts unchanged. What another
    tool trained with the norm over outputs has ``[1, in]`` instead, and keeps that.
    """

    method = "dora"
    adds = False
    heeds = LowRank.heeds
    computes = (*LowRank.computes, "rescale", "magnitude")
    parts = {**LowRank.parts, "lora_magnitude": "weight"}
    lora_magnitude: nn.Parameter
    weight_shape: tuple[int, ...]
    based = "lora_magnitude"

    def __init__(
        self,
        weight: Tensor,
        r: int,
        scale: float = 1.0,
        layout: Layout = "matrix",
        trainable_scale: bool = False,
        adapter: str = "default",
        gains: Optional[Gains] = None,
    ) -> None:
        super().__init__(weight, r, scale, layout, trainable_scale, adapter, gains)
        shape = [1] * weight.dim()
        outer = _outer(weight.dim(), layout)
        shape[outer] = weight.shape[outer]
        if layout == "stack":
            shape[:outer] = weight.shape[:outer]
        options: dict[str, Any] = {"device": weight.device, "dtype": factor_dtype(weight.dtype)}
        # no values yet: a norm needs the weight's, see `begin_as`
        self.lora_magnitude = nn.Parameter(torch.empty(shape, **options))
        self.keep(unset=True, weight_shape=tuple(weight.shape))

    @classmethod
    def attached_to(
        cls, site: Site, entry: TargetConfig, adapter: str, gains: Optional[Gains]
    ) -> "Dora":
        """A new update of the entry's rank; the magnitude starts at the weight's norm."""
        update: Any = super().attached_to(site, entry, adapter, gains)
        # of the meta device the norm is taken at the first read
        if not site.weight.is_meta:
            # of what earlier updates make of the weight now, so that the function starts unchanged
            update.begin_as(site.read())
        return update  # type: ignore[no-any-return]

    @classmethod
    def elements(cls, entry: TargetConfig, shape: tuple[int, ...], layout: Layout) -> int:
        """How many both factors and the magnitude have."""
        outer = _outer(len(shape), layout)
        stack = matrix_shape(shape, layout)[0]
        return super().elements(entry, shape, layout) + stack * shape[outer]

    def reset_parameters(self) -> None:
        """Start the factors anew; the magnitude starts once the base has its values."""
        super().reset_parameters()
        self.keep(unset=True)

    @torch.no_grad()
    def begin_as(self, weight: Tensor) -> None:
        """Set the magnitude to the norm of the weight, which then stays as it is."""
        # in the magnitude's type: norms of 16-bit weights would be rounded
        take(self.lora_magnitude, norms(weight.to(self.lora_magnitude.dtype), self.lora_magnitude))
        self.keep(unset=False)

    def takes(self, name: str, own: Tensor, shape: tuple[int, ...]) -> bool:
        """Whether a tensor fits; a magnitude may also be of the norm over the other side."""
        # a stack has no other side over which a norm could be
        if name != "lora_magnitude" or self.layout == "stack":
            return super().takes(name, own, shape)
        return len(shape) == len(self.weight_shape) and all(
            n in (1, size) for n, size in zip(shape, self.weight_shape)
        )

    @classmethod
    def relaid(cls, held: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Its tensors, the magnitude along the dimensions of the weight that is stored so."""
        return {**held, "lora_magnitude": held["lora_magnitude"].transpose(0, 1)}

    @classmethod
    def of_rows(
        cls, held: Mapping[str, Tensor], rows: Moved, out: int
    ) -> Optional[Mapping[str, Tensor]]:
        """Those rows of the low-rank sum and of the magnitude; none of a norm over outputs, which
        is over all rows."""
        own, low = held["lora_magnitude"], super().of_rows(held, rows, out)
        if not own.numel() == own.shape[0] == cls.outputs_of(held) or low is None:
            return None
        return {**low, "lora_magnitude": in_rows(own, rows, out)}

    @classmethod
    def beside_each_other(cls, several: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Each magnitude in its own rows."""
        own = torch.stack([one["lora_magnitude"] for one in several]).sum(0)
        return {**super().beside_each_other(several), "lora_magnitude": own}

    @torch.no_grad()
    def taking(self, state: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """What is left to be copied of a file's values, whose norm may be over the other side."""
        own, told = self.lora_magnitude, state["lora_magnitude"]
        # another tool's is of another shape: room first, and the values with all others
        if own.shape != told.shape:
            put_in_place(own, told.to(own.device, own.dtype, copy=True))
        return super().taking(state)

    @torch.no_grad()
    def before_resize(self, base: Tensor) -> None:
        """Keep the norm by which its sum has been divided."""
        if not self.unset:
            self.keep(former=self._norm(base))

    @torch.no_grad()
    def resize(self, base: Tensor) -> None:
        """Take the size of its resized base; the magnitude of what is new is its norm, and what
        stays is as long as it was."""
        own = self.lora_magnitude
        # norms of the base stand for new rows, old rows keep theirs
        fresh = norms(base.to(own.dtype), own)
        if fresh.shape != own.shape:
            dim = next(i for i, (a, b) in enumerate(zip(own.shape, fresh.shape)) if a != b)
            kept = min(own.shape[dim], fresh.shape[dim])
            fresh.narrow(dim, 0, kept).copy_(own.narrow(dim, 0, kept))
            put_in_place(own, fresh)
        self.keep(weight_shape=tuple(base.shape))
        super().resize(base)
        former = self.__dict__.pop("former", None)
        # a norm over all rows, as an embedding's, is another one with other rows
        if former is not None and former.shape == own.shape == fresh.shape:
            own.mul_(torch.where(former == 0, 1, self._norm(base) / former))

    def _norm(self, base: Tensor) -> Tensor:
        delta = self.delta(base.shape, base.dtype)
        return norms(wide(base, delta) + delta, self.lora_magnitude).to(self.lora_magnitude.dtype)

    @property
    def scaling(self) -> Tensor:
        """The number before ``B·A``: the scale alone, as the strength acts on the whole."""
        return self.stored_scale()

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight, rounded once to `weight`'s type; `weight` unchanged when off."""
        if not self.acts:
            return weight
        if self.unset:
            self.begin_as(weight)
        delta = self.delta(weight.shape, weight.dtype)
        with in_own_types(delta):
            base = wide(weight, delta)
            total = base + delta
            # detached: section 4.3 treats the norm as a constant
            total = total * self.rescale(norms(total.detach(), self.lora_magnitude))
            if not self.fully:
                total = torch.lerp(base.to(total.dtype), total, self.gain.to(total))
        return laid_as(total.to(weight.dtype), weight)

    def shares_its_sum(self) -> bool:
        """As of a low-rank sum: the magnitude is a tensor beside its factors."""
        return super().shares_its_sum()

    def rescale(self, norm: Tensor) -> Tensor:
        """``m / ‖W + scale·BA‖``, 0 where both are."""
        own = self.lora_magnitude.to(norm.dtype).reshape(norm.shape)
        return own / torch.where(norm == 0, 1, norm)

    def is_of_outputs(self, outer: int) -> bool:
        """Whether the norm is that of each output, which lie along a dimension of the weight."""
        own = self.magnitude()
        return own.shape[outer] == own.numel()

    def magnitude(self) -> Tensor:
        """``lora_magnitude``, in a fifth of the time."""
        own = self._parameters.get("lora_magnitude")  # a replica holds it elsewhere
        return self.lora_magnitude if own is None else own

    @staticmethod
    def term_of(parts: Mapping[str, Tensor], gain: Tensor, layout: Layout) -> Term:
        """The rescaled sum, instead of the weight."""
        # inside at full strength: the gain goes the way from W to W' instead
        one = torch.ones_like(gain)
        inner: Any = LowRank.term_of(parts, one, layout)
        return DoraTerm(inner, parts["lora_magnitude"], gain, layout)


def _outer(dims: int, layout: Layout) -> int:
    """The dimension of a weight that runs along its outputs."""
    return {"matrix": 0, "transposed": 1, "stack": dims - 2}[layout]


def norms(weight: Tensor, like: Tensor) -> Tensor:
    """The norm over every dimension in which `like` has one element; those are kept as 1."""
    dims = [dim for dim, size in enumerate(like.shape) if size == 1]
    return torch.linalg.vector_norm(weight, dim=dims, keepdim=True) if dims else weight.abs()


def output_norms(weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    r"""``‖W + scale·BA‖`` of each row, without the dense sum.

    .. math:: ‖W‖^2 + 2 · scale · ⟨W A^T, B⟩ + scale^2 · ⟨B A A^T, B⟩

    Args:
        weight: ``[out, in]``, whose product with A may be rounded to its own type.
        a: ``[r, in]``.
        b: ``[out, r]``.
        scale: one number.

    Returns:
        ``[out]``, in float32, or float64 of a float64 weight.

    Example:
        >>> w, a, b = (torch.randn(shape).double() for shape in ((3, 4), (2, 4), (3, 2)))
        >>> want = torch.linalg.vector_norm(w + 0.5 * b @ a, dim=1)
        >>> assert torch.allclose(output_norms(w, a, b, torch.tensor(0.5).double()), want)
    """
    with in_own_types(weight), torch.no_grad():
        dtype = factor_dtype(weight.dtype)
        own = weight.float() if weight.dtype == torch.float16 else weight  # whose sums overflow
        a, b, scale = a.to(dtype), b.to(dtype), scale.to(dtype)
        if a.numel():  # divided by its largest number, so that its squares are finite
            size = torch.linalg.vector_norm(a, math.inf).clamp_min_(torch.finfo(dtype).tiny)
            a, scale = a / size, scale * size
        # scale² ⟨BAAᵀ, B⟩ and the crossed term both take B with its scale
        b = b * scale
        crossed = (own @ a.to(own.dtype).t()).to(dtype)  # [out, r]
        # (2·crossed + B·AAᵀ) ∘ B, summed over the rank: [out]
        cross = torch.addmm(crossed, b, a @ a.t(), beta=2).mul_(b).sum(1)
        squared = torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square_()
        # rounding may leave less than nothing where W and the update cancel
        found: Tensor = squared.add_(cross).clamp_min_(0).sqrt_()
        return found


@dataclass(frozen=True)
class DoraTerm(Term):
    """Makes ``m · V/‖V‖`` of a weight, ``V`` being the sum with ``inner``; or some of the way.

    Where the norm is not over a row of the weight as it is stored, a block is a whole matrix.
    """

    inner: LowRankTerm
    magnitude: Tensor
    gain: Tensor
    layout: Layout

    @property
    def whole_rows(self) -> bool:  # type: ignore[override]
        """A norm needs all of a row at least."""
        return True

    @property
    def whole_matrix(self) -> bool:  # type: ignore[override]
        """Whether the norm is over more than a row."""
        return self.magnitude.shape[self.magnitude.dim() - 2 if self.layout == "stack" else 0] == 1

    def prepared(self, wide: torch.dtype) -> "DoraTerm":
        magnitude = self.magnitude.detach().to(wide)
        if self.layout == "stack":
            magnitude = magnitude.reshape(-1, *magnitude.shape[-2:])
        return replace(self, inner=self.inner.prepared(wide), magnitude=magnitude)

    def applied(self, total: Tensor, block: Block) -> Tensor:
        # the sum is written into `total`, and the way begins at the base
        base = total if self.gain == 1 else total.clone()
        total = self.inner.applied(total, block)
        own = self.magnitude[block.which] if self.layout == "stack" else self.magnitude
        if self.whole_matrix:
            matrix = total.view(len(total), own.shape[1], -1)  # of a kernel: the rest
            own = own.reshape(1, -1, 1)
        else:
            # [rows, 1, columns]: norms over the last dimension alone
            matrix, own = total[:, None], own.reshape(-1, 1, 1)[block.rows]
        norm = norms(matrix, own)
        # m and its norm are 0 together, which leaves 0
        matrix = matrix * (own / torch.where(norm == 0, 1, norm))
        new = matrix.reshape(total.shape)
        return new if self.gain == 1 else torch.lerp(base, new, self.gain.to(new.dtype))
