"""The parametrization: ``W + strength · scale · B·A`` in the weight's own shape."""

import math
from typing import Any, Optional

import torch
from einops import rearrange
from torch import Tensor, nn

from paramlora.config import TargetConfig
from paramlora.update.attached import AttachedUpdate, Gains
from paramlora.update.casts import is_storage
from paramlora.update.contexts import in_own_types
from paramlora.update.geometry import Layout, ambiguous, factor_dtype, matrix_shape
from paramlora.update.sharded import gathered, take
from paramlora.update.sum import LowRankTerm
from paramlora.update.value import Update


class LowRank(AttachedUpdate):
    r"""Low-rank update of one tensor, Hu et al. 2021 (arXiv:2106.09685), equation 3.

    .. math:: W' = W + strength · scale · B A

    Args:
        weight: the tensor to adapt, of any shape with two or more dimensions.
        r: rank.
        scale: the factor itself, never divided by `r`.
        layout: where the input and output sides lie in `weight`.
        trainable_scale: make ``lora_scale`` a parameter instead of a buffer.
        adapter: the name under which this update is switched and saved.
        gains: where updates that are made together share the tensor of their strength.

    Shapes: ``lora_A`` ``[r, in]``, ``lora_B`` ``[out, r]`` (a leading ``stack`` dimension for
    ``layout="stack"``), ``lora_scale`` ``[]``. They are float32 on a 16-bit weight, where their
    updates would otherwise vanish, and the weight's own type elsewhere. A transposed weight with
    as many inputs as outputs also has the buffer ``lora_transposed``, because a state dict would
    otherwise not tell on which side they lie.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scale: Tensor
    r: int
    layout: Layout
    first_scale: float
    dropout: float = 0.0  # on the input of the low-rank branch, set by attach
    start_A: Optional[Tensor]
    start_B: Optional[Tensor]

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
        stack, out, fan_in = matrix_shape(weight.shape, layout)
        lead = (stack,) if layout == "stack" else ()
        where: dict[str, Any] = {"device": weight.device, "dtype": factor_dtype(weight.dtype)}
        super().__init__(adapter, **where, gains=gains)
        self.keep(r=r, layout=layout, first_scale=scale)
        self.lora_A = nn.Parameter(torch.randn(*lead, r, fan_in, **where).div_(r))
        self.lora_B = nn.Parameter(torch.zeros(*lead, out, r, **where))
        value = torch.full((), scale, **where)
        if trainable_scale:
            self.lora_scale = nn.Parameter(value)
        else:
            self.register_buffer("lora_scale", value)
        if layout == "transposed" and ambiguous(weight.shape, layout):
            mark = torch.ones((), dtype=torch.uint8, device=weight.device)
            self.register_buffer("lora_transposed", mark)
        self._buffers.update(start_A=None, start_B=None)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """``A`` normal with standard deviation ``1/r``, ``B`` zero, and the scale as given."""
        take(self.lora_A, torch.randn(self.lora_A.shape, device=self.lora_A.device) / self.r)
        self.lora_B.zero_()
        self.lora_scale.fill_(self.first_scale)

    def start_from(self, a: Tensor, b: Tensor) -> None:
        """Start the factors at `a` and `b`, and keep both to take them out of every sum.

        The function starts unchanged: the update is ``scale·(B·A − b·a)`` (see `init`).
        """
        for name, value in (("A", a), ("B", b)):
            getattr(self, f"lora_{name}").data.copy_(value)
            setattr(self, f"start_{name}", getattr(self, f"lora_{name}").detach().clone())

    def extend(self, rank: int) -> None:
        """Add ranks of zeros, which change no sum and get no gradient, up to `rank`."""
        for name in ("lora_A", "lora_B", "start_A", "start_B"):
            held, dim = getattr(self, name), self.rank_dim(name)
            if held is not None:
                size = list(held.shape)
                size[dim] = size[dim] // self.r * (rank - self.r)
                held.data = torch.cat([held.data, held.data.new_zeros(size)], dim)
        self.keep(r=rank)

    def rank_dim(self, name: str) -> int:
        """The dimension of a factor in which its ranks lie."""
        return -2 if name.endswith("A") else -1

    @property
    def scaling(self) -> Tensor:
        """The number before ``B·A``: the scale times the strength."""
        scale, gain = self.stored_scale(), self.gain
        return scale * (gain if gain.device == scale.device else gain.to(scale.device))

    def factors(self) -> tuple[Tensor, Tensor]:
        """The whole update as ``A`` and ``B``: of rank ``2r`` after `start_from`, else the two."""
        own = self._parameters  # without nn.Module's look-up, which a small layer would feel
        if self._buffers["start_A"] is None:
            if "lora_A" in own and "lora_B" in own:
                return own["lora_A"], own["lora_B"]  # type: ignore[return-value]
            # a replica, a flat shard and a parametrization of a factor hold it elsewhere
            return self.lora_A, self.lora_B
        assert self.start_A is not None and self.start_B is not None
        a = torch.cat([self.lora_A, self.start_A], dim=-2)  # [2r, in]
        return a, torch.cat([self.lora_B, -self.start_B], dim=-1)  # [out, 2r]

    def stored_scale(self) -> Tensor:
        """``lora_scale``, in a fifth of the time."""
        scale = self._buffers.get("lora_scale")
        scale = self._parameters.get("lora_scale") if scale is None else scale
        return self.lora_scale if scale is None else scale

    def term(self) -> LowRankTerm:
        """``strength · scale · B·A``, to be added."""
        return LowRankTerm(*self.factors(), self.scaling, self.layout)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Both factors, and the scale where it trains."""
        scale = [self.lora_scale] if isinstance(self.lora_scale, nn.Parameter) else []
        return {"lora_A": [self.lora_A], "lora_B": [self.lora_B], "lora_scale": scale}

    def described(self) -> tuple[int, float, str]:
        """Its rank and scale; no number on the meta device."""
        scale = self.lora_scale.detach()
        value = math.nan if scale.is_meta else scale.item()
        return self.r, value, "soft" if self.beside else "hard"

    def value(self, shape: Optional[tuple[int, ...]], kind: Optional[str], groups: int) -> Update:
        """Its factors, whole on every process, and what attaches them again."""
        a, b = (gathered(factor.detach()) for factor in self.factors())
        entry = self.entry or TargetConfig("", self.r)
        scale = _number(gathered(self.lora_scale.detach()), entry.scale)
        trains = isinstance(self.lora_scale, nn.Parameter)
        return Update(
            *(a, b, scale, shape, self.layout, trains, not self.beside),
            dropout=self.dropout,
            adapter_dtype=entry.adapter_dtype,
            kind=kind,
            groups=groups,
        )

    def plain(self) -> dict[str, Tensor]:
        """What a file holds: an update of the unchanged weight by its `factors`."""
        a, b = self.factors()
        return {"lora_A": a, "lora_B": b, "lora_scale": self.lora_scale}

    @torch.no_grad()
    def load_plain(self, state: dict[str, Tensor]) -> None:
        """Take the values of a file, bit for bit those that `plain` gave it."""
        a, b = state["lora_A"], state["lora_B"]
        if self.start_A is not None and self.start_B is not None:
            take(self.start_A, a[..., self.r :, :])
            take(self.start_B, -b[..., self.r :])
            a, b = a[..., : self.r, :], b[..., : self.r]
        take(self.lora_A, a)
        take(self.lora_B, b)
        take(self.lora_scale, state["lora_scale"])

    def delta(
        self, shape: "tuple[int, ...] | torch.Size", dtype: Optional[torch.dtype] = None
    ) -> Tensor:
        """``strength · scale · B·A`` in `shape`, of `dtype` or the factors' own type; of float32
        instead of float16, in which the scaled B alone might be too large."""
        a, b = (factor.to(dtype or factor.dtype) for factor in self.factors())
        if b.dtype == torch.float16:
            a, b = a.float(), b.float()
        with in_own_types(b):  # a weight is what it is, wherever it is read
            product = (b * self.scaling.to(b.dtype)) @ a
        if self.layout == "transposed":
            product = rearrange(product, "out fan_in -> fan_in out")
        return product.reshape(shape)

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight, rounded once to `weight`'s type; `weight` unchanged when off."""
        if not self.acts:
            return weight.clone() if self.written_by_reader else weight
        delta = self.delta(weight.shape)
        total = (_wide(weight, delta) + delta).to(weight.dtype)
        if total.stride() != weight.stride() and total.is_contiguous() and weight.is_contiguous():
            # channels last of a kernel of 1: its strides alone tell a convolution its format
            return total.as_strided(weight.shape, weight.stride())
        return total

    def extra_repr(self) -> str:
        return f"adapter={self.adapter!r}, r={self.r}, strength={self.strength}"


def _number(scale: Tensor, asked: float) -> float:
    """The configuration's own number where it was not trained: 0.3, not float32's nearest."""
    same = scale.dtype.itemsize > 2 and torch.equal(scale, torch.full_like(scale, asked))
    return asked if same else scale.item()


def value_of(plist: Any) -> Tensor:
    """What torch's list of parametrizations computes; the sum of several updates rounds once."""
    updates = list(plist)
    if len(updates) < 2 or not all(type(update) is LowRank for update in updates):
        return plist()  # type: ignore[no-any-return]
    weight: Tensor = plist.original
    acting = [update for update in updates if update.acts]
    if len(acting) < 2:
        return plist()  # type: ignore[no-any-return]
    total = weight
    for update in acting:
        delta = update.delta(weight.shape)
        total = _wide(total, delta) + delta
    return total.to(weight.dtype)


def _wide(weight: Tensor, delta: Tensor) -> Tensor:
    """The weight in the wider type of both, in which torch adds; or where that only stores its
    numbers (see `casts`) in the update's."""
    return weight.to(delta.dtype) if is_storage(weight.dtype) else weight
