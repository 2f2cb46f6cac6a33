"""The parametrization: ``W + strength · scale · B·A`` in the weight's own shape."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Optional

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.compiler import is_compiling

from paramlora.config import TargetConfig
from paramlora.errors import AdapterError, FileError
from paramlora.update.attached import (
    AttachedUpdate,
    Gains,
    Moved,
    Site,
    Told,
    as_asked,
    as_told,
    in_rows,
    lacking,
    put_in_place,
    sized,
)
from paramlora.update.casts import is_storage
from paramlora.update.contexts import in_own_types
from paramlora.update.geometry import (
    Layout,
    ambiguous,
    factor_dtype,
    fits_shape,
    laid_as,
    matrix_shape,
    summed_in,
)
from paramlora.update.init import initialise
from paramlora.update.kinds import register
from paramlora.update.names import LOW_RANK
from paramlora.update.sharded import gathered, laid_beside, take
from paramlora.update.sum import LowRankTerm, Term
from paramlora.update.summand import Summand, joined
from paramlora.update.value import Update, Value, check_types


@register
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

    method = "lora"
    computes: ClassVar[tuple[str, ...]] = (
        *("forward", "delta", "factors", "held"),
        *("scaling", "stored_scale"),
    )
    adds = True
    heeds = ("init",)
    parts = {"lora_A": "input", "lora_B": "output", "lora_scale": "number"}
    # a start from the weight keeps what the factors were, along the same sides
    hidden = {"lora_transposed": "number", "start_A": "input", "start_B": "output"}
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scale: Tensor
    first_scale: float
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
        options: dict[str, Any] = {"device": weight.device, "dtype": factor_dtype(weight.dtype)}
        super().__init__(adapter, **options, gains=gains)
        self.keep(r=r, layout=layout, first_scale=scale)
        self.lora_A = nn.Parameter(torch.randn(*lead, r, fan_in, **options).div_(r))
        self.lora_B = nn.Parameter(torch.zeros(*lead, out, r, **options))
        value = torch.full((), scale, **options)
        if trainable_scale:
            self.lora_scale = nn.Parameter(value)
        else:
            self.register_buffer("lora_scale", value)
        if layout == "transposed" and ambiguous(weight.shape, layout):
            # a byte, which a state dict keeps and no cast to a float changes
            mark = torch.ones((), dtype=torch.uint8, device=weight.device)
            self.register_buffer("lora_transposed", mark)
        # None of both in the state dict, as long as there is no start
        self._buffers.update(start_A=None, start_B=None)

    @classmethod
    def attached_to(
        cls, site: Site, entry: TargetConfig, adapter: str, gains: Optional[Gains]
    ) -> "LowRank":
        """A new update of the entry's rank, started as it says (see `init`)."""
        options = (entry.r, entry.scale, site.layout, entry.trainable_scale, adapter, gains)
        update = cls(site.weight.detach(), *options)
        if entry.init != "default":
            initialise(update, site.dense(), entry.init)
        return update

    @classmethod
    def of_rows(
        cls, held: Mapping[str, Tensor], rows: Moved, out: int
    ) -> Optional[Mapping[str, Tensor]]:
        """Those rows of ``B``, and all of ``A``, without ranks that do nothing there."""
        a, b = held["lora_A"], in_rows(held["lora_B"], rows, out)
        # a file of one fused weight often holds its parts apart, as blocks of zeros in B
        used = b.count_nonzero(0) > 0
        # not used.any(): an update of zeros keeps its rank, for there is none of rank 0
        if not used.all() and used.any():
            a, b = a[used], b[:, used]
        return {"lora_A": a, "lora_B": b}

    @classmethod
    def beside_each_other(cls, several: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Ranks side by side: the sum of all, each in its own rows."""
        a, b = ([one[name] for one in several] for name in ("lora_A", "lora_B"))
        return {"lora_A": torch.cat(a), "lora_B": torch.cat(b, 1)}

    @classmethod
    def elements(cls, entry: TargetConfig, shape: tuple[int, ...], layout: Layout) -> int:
        """How many both factors have."""
        stack, out, fan_in = matrix_shape(shape, layout)
        return stack * entry.r * (out + fan_in)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """``A`` normal with standard deviation ``1/r``, ``B`` zero, and the scale as given."""
        # `take`: they may be sharded, where a draw would differ between processes
        take(self.lora_A, torch.randn(self.lora_A.shape, device=self.lora_A.device) / self.r)
        self.lora_B.zero_()
        # a start of the base's values has lost them, and nothing is taken out
        for start in (self.start_A, self.start_B):
            if start is not None:
                start.zero_()
        self.lora_scale.fill_(self.first_scale)

    def start_from(self, a: Tensor, b: Tensor) -> None:
        """Start the factors at `a` and `b`, and keep both to take them out of every sum.

        The function starts unchanged: the update is ``scale·(B·A − b·a)`` (see `init`).
        """
        for name, value in (("A", a), ("B", b)):
            getattr(self, f"lora_{name}").data.copy_(value)
            # clones: training must not move what is taken out again
            setattr(self, f"start_{name}", getattr(self, f"lora_{name}").detach().clone())

    def make_room(self, rank: int, shape: tuple[int, ...], layout: Layout) -> None:
        """Add ranks of zeros up to `rank`, or to the rank of a weight of that shape."""
        if self.r < rank:
            # no more than the matrix holds, nor less than there is
            self.extend(max(self.r, min(rank, *matrix_shape(shape, layout)[1:])))

    def extend(self, rank: int) -> None:
        """Add ranks of zeros, which change no sum and get no gradient, up to `rank`.

        Raises:
            AdapterError: of a tensor only the kind itself knows where ranks lie.
        """
        if rank > self.r:
            self._check_grows(rank)
        for name in (*self.parts, *self.hidden):
            held, dim = getattr(self, name, None), self.rank_dim(name)
            if held is not None and dim is not None:
                size = list(held.shape)
                # a second kernel's A has several numbers for each rank
                size[dim] = size[dim] // self.r * (rank - self.r)
                # `.data`: the Parameter stays, as holders of it do
                held.data = torch.cat([held.data, held.data.new_zeros(size)], dim)
        self.keep(r=rank)

    def _check_grows(self, rank: int) -> None:
        """Refuse room for a rank where only the kind knows in which dimension it lies."""
        own = [name for name, part in self.parts.items() if part == "own"]
        if own:
            raise AdapterError(
                f"{type(self).__name__} does not say how {own[0]} grows with its rank, so there is "
                f'no room for rank {rank} (max_rank). Give the class an "extend", or leave '
                "max_rank out."
            )

    def rank_dim(self, name: str) -> Optional[int]:
        """The dimension of a factor in which its ranks lie; none of what is no factor."""
        part = self.parts.get(name) or self.hidden.get(name)
        return {"input": -2, "output": -1}.get(part or "")

    def shares_its_sum(self) -> bool:
        """Whether it holds its factors itself: a change of those that a flat shard holds shows
        nowhere."""
        # FSDP1 leaves views of its flat parameter, which are new at each call
        return {"lora_A", "lora_B"} <= self._parameters.keys()

    def summand(self) -> Optional[Summand]:
        """Its own part of the gradient of a sum; another kind's sum has another gradient."""
        # a kind that inherits computes another sum
        return Summand(self) if type(self) is LowRank else None

    def rank_of_sum(self) -> int:
        """The rank of its `factors`."""
        return self.r if self.held()[2] is None else 2 * self.r

    @property
    def scaling(self) -> Tensor:
        """The number before ``B·A``: the scale times the strength."""
        scale, gain = self.stored_scale(), self.gain
        # a strength may lie elsewhere in a model that is spread over devices
        return scale * (gain if gain.device == scale.device else gain.to(scale.device))

    def factors(self) -> tuple[Tensor, Tensor]:
        """The whole update as ``A`` and ``B``: of rank ``2r`` after `start_from`, else the two."""
        a, b, start_a, start_b = self.held()
        if start_a is None:
            return a, b
        # outside of a call `fully_shard` has parameters split, and the start, of buffers, whole
        if not is_compiling():
            start_a, start_b = laid_beside(start_a, a), laid_beside(start_b, b)
        return joined(a, b, start_a, start_b)

    def held(self) -> tuple[Tensor, Tensor, Optional[Tensor], Optional[Tensor]]:
        """A and B, and what `start_from` kept of both."""
        own = self._parameters  # without nn.Module's look-up, which a small layer would feel
        if "lora_A" in own and "lora_B" in own:
            start = self._buffers["start_A"], self._buffers["start_B"]
            return own["lora_A"], own["lora_B"], *start  # type: ignore[return-value]
        # a replica, a flat shard and a parametrization of a factor hold it elsewhere
        return self.lora_A, self.lora_B, self.start_A, self.start_B

    def stored_scale(self) -> Tensor:
        """``lora_scale``, in a fifth of the time."""
        scale = self._buffers.get("lora_scale")
        scale = self._parameters.get("lora_scale") if scale is None else scale
        return self.lora_scale if scale is None else scale

    @staticmethod
    def term_of(parts: Mapping[str, Tensor], gain: Tensor, layout: Layout) -> Term:
        """``strength · scale · B·A``, to be added."""
        scale = parts["lora_scale"]
        # scale and gain may lie on two devices
        return LowRankTerm(parts["lora_A"], parts["lora_B"], scale * gain.to(scale.device), layout)

    def at_most(self, largest: float) -> float:
        """By the largest of each factor and of the scale, and twice the rank for roundings."""
        return largest * largest * largest * abs(self.strength) * 2 * self.rank_of_sum()

    def term(self) -> Term:
        """What it does now: as it was trained without its strength, which would take a launch."""
        # a kind with a term of its own, or a strength other than 1
        if type(self).term_of is not LowRank.term_of or not self.fully:
            return super().term()
        parts = self.plain()
        return LowRankTerm(parts["lora_A"], parts["lora_B"], parts["lora_scale"], self.layout)

    @classmethod
    def title(cls) -> str:
        """Its kind as the key "hard" asks for it, of a subclass by its method."""
        return "hard" if cls.method == "lora" else cls.method

    @classmethod
    def beside_instead(cls) -> str:
        """Nothing else: it is what an entry without a kind asks for."""
        return "" if cls.method == "lora" else super().beside_instead()

    def value(self, shape: Optional[tuple[int, ...]], kind: Optional[str], groups: int) -> Value:
        """Its factors, whole on every process, and what attaches them again."""
        if not _is_plain(type(self)):
            return super().value(shape, kind, groups)
        a, b = (gathered(factor.detach()) for factor in self.factors())
        entry = self.entry or TargetConfig("", self.r)
        scale = as_asked(gathered(self.lora_scale.detach()), entry.scale)
        trains = isinstance(self.lora_scale, nn.Parameter)
        return Update(
            *(a, b, scale, shape, self.layout, trains, not self.beside),
            dropout=self.dropout,
            adapter_dtype=entry.adapter_dtype,
            kind=kind,
            groups=groups,
        )

    @classmethod
    def read_file(
        cls, where: str, parts: Mapping[str, Tensor], entry: TargetConfig, told: Told
    ) -> Value:
        """The value of an update in a native file."""
        a, b, scale = (parts[name] for name in LOW_RANK)
        check_types(where, a, b, scale)
        if min(a.dim(), b.dim()) < 2 or 0 in (a.numel(), b.numel()) or scale.numel() != 1:
            raise FileError(f"{where} is no update: its factors are no matrices. Save it again.")
        if not _is_plain(cls):
            return super().read_file(where, parts, entry, told)
        update = Update(
            *(a, b, as_told(scale, entry.scale), told.shape),
            layout=told.layout or ("stack" if a.dim() == 3 else "matrix"),
            trainable_scale=entry.trainable_scale,
            hard=entry.hard,
            up_kernel=entry.up_kernel,
            dropout=entry.dropout,
            adapter_dtype=entry.adapter_dtype,
            kind=told.kind,
            groups=told.groups,
        )
        if told.shape is not None:
            _check_fits(where, update, told.shape)
        return update

    @classmethod
    def read_state(cls, where: str, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Value:
        """The value of an update in an attached model's state dict."""
        missing = [name for name in cls.names(parts) if name not in parts]
        if missing:
            raise FileError(lacking(where, missing))
        a, b = _started(parts)
        scale = parts["lora_scale"]
        check_types(where, scale)
        if scale.numel() != 1 or a.dim() < 2 or b.dim() < 2:
            raise FileError(
                f"{where}: the update inside it has factors of impossible shape. Save it again."
            )
        named = None if a.dtype == factor_dtype(dtype) else str(a.dtype).removeprefix("torch.")
        if not _is_plain(cls):
            value: Any = super().read_state(where, {**parts, "lora_A": a, "lora_B": b}, dtype)
            other: Value = replace(value, adapter_dtype=named)
            return other
        layout = cls.layout_of({**parts, "lora_A": a, "lora_B": a})
        # of a branch three dimensions and more are a kernel, of a parametrization a stack
        kernel = "same" if cls.beside and b.dim() > 2 else 1
        update = Update(a, b, float(scale), None, layout, False, not cls.beside, kernel)
        return replace(update, adapter_dtype=named)

    def plain(self) -> dict[str, Tensor]:
        """What a file holds: an update of the unchanged weight by its `factors`, from which a kind
        with others makes its own."""
        a, b = LowRank.factors(self)
        held = {"lora_A": a, "lora_B": b, "lora_scale": self.lora_scale}
        return held if _is_plain(type(self)) else {**super().plain(), **held}

    @torch.no_grad()
    def taking(self, state: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """What is left to be copied of a file's values, and into which tensors."""
        if self.start_A is None or self.start_B is None:
            return super().taking(state)
        a, b = state["lora_A"], state["lora_B"]
        # the file's second half is what was taken out, with its sign on B
        starts = [(self.start_A, a[..., self.r :, :]), (self.start_B, -b[..., self.r :])]
        # the first half is what trains
        a, b = a[..., : self.r, :], b[..., : self.r]
        return starts + super().taking({**state, "lora_A": a, "lora_B": b})

    @torch.no_grad()
    def resize(self, base: Tensor) -> None:
        """Take the size of its resized base; what is new is zero, as before training."""
        super().resize(base)
        if self.start_A is not None and self.start_B is not None:
            _, out, fan_in = matrix_shape(base.shape, self.layout)
            put_in_place(self.start_A, sized(self.start_A, -1, fan_in))
            put_in_place(self.start_B, sized(self.start_B, -2, out))
        # of a size that is square now the shapes no longer tell the sides
        if self.layout == "transposed" and ambiguous(base.shape, self.layout):
            mark = torch.ones((), dtype=torch.uint8, device=base.device)
            self.register_buffer("lora_transposed", mark)

    def delta(
        self, shape: "tuple[int, ...] | torch.Size", dtype: Optional[torch.dtype] = None
    ) -> Tensor:
        """``strength · scale · B·A`` in `shape`, for a weight of `dtype`: in a type that rounds
        neither it nor the factors, and in which the scaled B alone is not too large."""
        self.check_mergeable("")  # of two kernels there is no such weight
        a, b = (factor.to(summed_in(dtype or factor.dtype, factor)) for factor in self.factors())
        with in_own_types(b):  # a weight is what it is, wherever it is read
            # B with its scale first: a rank's columns are fewer numbers than the product
            product = (b * self.scaling.to(b.dtype)) @ a
        if self.layout == "transposed":
            product = rearrange(product, "out fan_in -> fan_in out")
        return product.reshape(shape)

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight, rounded once to `weight`'s type; `weight` unchanged when off."""
        if not self.acts:
            return weight
        delta = self.delta(weight.shape, weight.dtype)
        # one rounding of the sum, and the base's strides
        return laid_as((wide(weight, delta) + delta).to(weight.dtype), weight)

    def extra_repr(self) -> str:
        return f"adapter={self.adapter!r}, r={self.r}, strength={self.strength}"


def _is_plain(kind: type[AttachedUpdate]) -> bool:
    """Whether a kind is the low-rank sum itself, whose value is an `Update`."""
    return kind.method in ("lora", "soft")


def _started(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """``A`` and ``B``, with what a start from the weight takes out again (see `start_from`)."""
    a, b = parts["lora_A"], parts["lora_B"]
    return joined(a, b, parts.get("start_A"), parts.get("start_B"))


def _check_fits(where: str, update: Update, shape: tuple[int, ...]) -> None:
    """Refuse factors of another weight than the metadata tells of, which anything may be."""
    a, b = tuple(update.lora_A.shape), tuple(update.lora_B.shape)
    fits = fits_shape(a, b, update.r, update.up_kernel, shape, update.layout)
    # a shape of a file's metadata is any text that somebody wrote
    if fits and shape[0] % update.groups == 0:
        return
    if len(shape) >= 2 and a[-1] != (fan_in := matrix_shape(shape, update.layout)[2]):
        raise FileError(
            f"{where}.lora_A: shape {list(a)} does not fit {[*a[:-1], fan_in]}, of the "
            f"weight of {list(shape)} in its metadata. Save it again."
        )
    raise FileError(
        f"{where}: factors of {list(a)} and {list(b)} do not fit the shape "
        f"{list(shape)} in its metadata. Save it again."
    )


def value_of(plist: Any) -> Tensor:
    """What torch's list of parametrizations computes; never the base itself to who writes to it."""
    value = _sum_of(plist)
    # an embedding with max_norm writes into what it reads
    written = any(getattr(update, "written_by_reader", False) for update in plist)
    return value.clone() if written and value is plist.original else value


def _sum_of(plist: Any) -> Tensor:
    """What a list computes; the sum of several updates rounds once."""
    updates = list(plist)
    # kinds that compute another weight do it one after the other
    if len(updates) < 2 or not all(type(update) is LowRank for update in updates):
        return _called(plist)
    weight: Tensor = plist.original
    acting = [update for update in updates if update.acts]
    # of one that acts torch's list does the same
    if len(acting) < 2:
        return _called(plist)
    total = weight
    for update in acting:
        delta = update.delta(weight.shape, weight.dtype)
        # the wide sum grows by each, and is rounded once behind all of them
        total = wide(total, delta) + delta
    return laid_as(total.to(weight.dtype), weight)


def _called(plist: Any) -> Tensor:
    """What a list gives, with our updates in their own types: autocast would round what somebody's
    kind multiplies, and the weight would be another one inside of it."""
    ours = plist.is_tensor and all(isinstance(one, AttachedUpdate) for one in plist)
    with in_own_types(plist.original) if ours else nullcontext():
        return plist()  # type: ignore[no-any-return]


def wide(weight: Tensor, delta: Tensor) -> Tensor:
    """The weight in the wider type of both, in which torch adds; or where that only stores its
    numbers (see `casts`) in the update's."""
    # of eight bits torch adds nothing
    return weight.to(delta.dtype) if is_storage(weight.dtype) else weight
