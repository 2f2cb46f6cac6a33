"""An adapter as a value: its updates by the path of their tensor, free of any model or file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn, Optional, Union

import torch
from einops import rearrange
from torch import Tensor

from paramlora.config import DTYPES, TargetConfig
from paramlora.errors import AdapterError, FileError
from paramlora.update.geometry import (
    FLOATS,
    LAYOUTS,
    Layout,
    ambiguous,
    factor_dtype,
    fits_shape,
)
from paramlora.update.kinds import KINDS
from paramlora.update.names import LOW_RANK, WHOLE
from paramlora.update.sum import LowRankTerm, Term, WholeTerm

_Device = Union[str, torch.device]


class Listed(NamedTuple):
    """A value as a row of a table shows it, beside its name and shape.

    Args:
        r, scale, norm: its rank, its factor and its norm, or what stands in their places.
        kind: its kind where the rest does not tell.
        noun: what it is counted as.
    """

    r: str
    scale: str
    norm: str
    kind: str
    noun: str = "update"


class Value:
    """What an adapter does to one tensor, as files, recipes and state dicts ask it.

    Three kinds of value answer: `Update`, a tensor to have instead (`WholeValue`), and `KindUpdate`
    for every other kind of update that is registered (see `paramlora.update.kinds`).
    """

    alone: ClassVar[bool] = False  # whether its tensor can have no other update
    if (
        TYPE_CHECKING
    ):  # how a value has them is its own affair: fields, class attributes, properties

        @property
        def method(self) -> str:
            """The name under which its kind is registered."""

        @property
        def shape(self) -> Optional[tuple[int, ...]]:
            """The shape of the tensor, where it is known."""

        @property
        def hard(self) -> bool:
            """Whether it is of a parametrization, not of a branch beside the layer."""

    @property
    def shown(self) -> str:
        """Its kind, for a table."""
        return self.method

    def tensors(self) -> dict[str, Tensor]:
        """What it holds, by the end of a key in a file."""
        raise NotImplementedError

    def parts(self) -> dict[str, Tensor]:
        """All that an attached update takes, its number in float64."""
        return self.tensors()

    def stored(self) -> dict[str, Tensor]:
        """All that a native file holds of it."""
        return self.tensors()

    def attached(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What a model's state dict shows of it, where it updates a tensor of a type."""
        return self.tensors()

    def entry(self, name: str) -> TargetConfig:
        """The configuration that attaches it, under a name."""
        raise NotImplementedError

    def term(self, strength: float, dtype: torch.dtype, device: _Device = "cpu") -> Term:
        """What it adds to a tensor of a type, or makes of it, as a live model has it."""
        raise NotImplementedError

    def fitted(self, shape: tuple[int, ...]) -> Optional["Value"]:
        """Itself with the shape of its tensor, None where that is another weight's."""
        return self

    def placed(self, shape: tuple[int, ...], layout: Layout) -> "Value":
        """Itself for a layer's tensor, in the layer's layout where its own tensors fit several."""
        return self

    def check_types(self, where: str, dtype: torch.dtype) -> None:
        """Refuse tensors in whose type nothing can be computed, beside a base of `dtype`."""
        check_types(where, *self.tensors().values())

    def about(self) -> dict[str, Any]:
        """What the native file's metadata tells of its weight."""
        return {"shape": list(self.shape or ()), "layout": "matrix"}

    def content(self) -> tuple[object, ...]:
        """Equal for equal values but for their `tensors`."""
        return (self.method, self.shape)

    def check_mergeable(self, path: str) -> None:
        """Refuse what no weight of the layer's shape could do."""

    def listed(self) -> tuple[int, float]:
        """Its rank (0 where it has none) and its factor, for a table."""
        return 0, 1.0

    def norm(self) -> float:
        """The Frobenius norm of what it adds; no number where that depends on the weight."""
        return math.nan

    def row(self, norm: float) -> Listed:
        """What a table shows of it, with its norm, which takes time to find."""
        r, scale = self.listed()
        return Listed(str(r), f"{scale:g}", "-", self.method)

    def idle(self) -> bool:
        """Whether it certainly changes nothing."""
        return False

    def turned(self, layout: Layout) -> "Value":
        """The same change of the same weight, as a layer of another layout has its tensors."""
        return self

    def typed(self, entry: TargetConfig, dtype: torch.dtype) -> TargetConfig:
        """The entry that attaches it in its own type to a tensor of `dtype`."""
        return entry


def check_types(where: str, *tensors: Tensor) -> None:
    """Refuse tensors of an update in whose type nothing can be computed, as in 8 bits."""
    wrong = next((tensor.dtype for tensor in tensors if tensor.dtype not in FLOATS), None)
    if wrong is not None:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise FileError(f"{where}: an update of type {wrong}. Save it in one of {names}.")


@dataclass(frozen=True)
class Update(Value):
    """One low-rank update, as every file format holds it.

    Args:
        lora_A: ``[*stack, r, in]``, the input side; a convolution's ``in`` is
            ``in_channels / groups · prod(kernel)``.
        lora_B: ``[*stack, out, r]``, the output side; ``[out, r, *kernel]`` where `up_kernel`
            is ``"same"``.
        scale: the factor itself, never divided by ``r``.
        shape: of the weight that it updates, where the file or the model tells.
        layout: where the input and output sides lie in that weight (see `matrix_shape`).
        trainable_scale, hard, up_kernel, dropout, adapter_dtype: as in the configuration.
        kind: of the layer, where known (see `Target.kind`): formats name kinds apart.
        groups: of a convolution.
    """

    lora_A: Tensor
    lora_B: Tensor
    scale: float = 1.0
    shape: Optional[tuple[int, ...]] = None
    layout: Layout = "matrix"
    trainable_scale: bool = False
    hard: bool = True
    up_kernel: Union[int, str] = 1
    dropout: float = 0.0
    adapter_dtype: Optional[str] = None
    kind: Optional[str] = None
    groups: int = 1

    @property
    def method(self) -> str:
        """The name of its kind."""
        return "lora" if self.hard else "soft"

    @property
    def shown(self) -> str:
        """Its kind, for a table."""
        return "low-rank"

    @property
    def r(self) -> int:
        """The rank."""
        return self.lora_B.shape[1 if self.up_kernel == "same" else -1]

    def entry(self, name: str) -> TargetConfig:
        """The configuration that attaches it, under a name."""
        return TargetConfig(
            name,
            self.r,
            self.scale,
            self.trainable_scale,
            self.hard,
            self.up_kernel,
            dropout=self.dropout,
            adapter_dtype=self.adapter_dtype,
        )

    def turned(self, layout: Layout) -> "Update":
        """The same change of the same weight, as a layer of another layout has its factors.

        A checkpoint does not tell which side of a weight is the input, as an embedding's first is.
        """
        # a stack is no pair of sides that change places, nor is a kernel behind B
        if {layout, self.layout} != {"matrix", "transposed"} or self.up_kernel == "same":
            return self
        # (BA)ᵀ = AᵀBᵀ
        return replace(self, lora_A=self.lora_B.mT, lora_B=self.lora_A.mT, layout=layout)

    def delta(self) -> Tensor:
        """``scale · B·A`` in the weight's shape, in the factors' own type; needs `shape`."""
        product = (self.lora_B * self.scale) @ self.lora_A
        if self.layout == "transposed":
            product = rearrange(product, "out fan_in -> fan_in out")
        return product.reshape(self.shape if self.shape is not None else product.shape)

    def tensors(self) -> dict[str, Tensor]:
        """Both factors."""
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    def parts(self) -> dict[str, Tensor]:
        """Both factors and the scale."""
        return {**self.tensors(), "lora_scale": torch.tensor(self.scale, dtype=torch.float64)}

    def stored(self) -> dict[str, Tensor]:
        """Both factors and the scale, which 16 bits would not hold."""
        return {**self.tensors(), "lora_scale": _stored_scale(self.scale, self.lora_A)}

    def attached(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Both factors and the scale, in the type of an attached update's, and its mark."""
        kind = _dtype(self.adapter_dtype, dtype)
        scale = torch.tensor(self.scale, dtype=_of_number(kind, dtype))
        out = dict(zip(LOW_RANK, (self.lora_A.to(kind), self.lora_B.to(kind), scale)))
        return {**out, **_mark(self.layout, self.shape)}

    def term(self, strength: float, dtype: torch.dtype, device: _Device = "cpu") -> Term:
        """``strength · scale · B·A``, to be added."""
        # as a live update has them, so that a file's merge gives the same bits
        kind = _dtype(self.adapter_dtype, dtype)
        a, b = (factor.to(device, kind) for factor in (self.lora_A, self.lora_B))
        scale = torch.tensor(self.scale, dtype=_of_number(kind, dtype), device=device)
        return LowRankTerm(a, b, scale * _gain(strength, kind, device), self.layout)

    def fitted(self, shape: tuple[int, ...]) -> Optional["Update"]:
        """With a shape, in the layout in which its factors fit it."""
        # a file that tells no shape may be of any layout; its own first
        layouts = [self.layout] if self.shape is not None else [self.layout, *LAYOUTS]
        a, b = tuple(self.lora_A.shape), tuple(self.lora_B.shape)
        for layout in layouts:
            if fits_shape(a, b, self.r, self.up_kernel, shape, layout):
                return replace(self, shape=shape, layout=layout)
        return None

    def about(self) -> dict[str, Any]:
        """What the native file's metadata tells of its weight."""
        return _about(self.shape, self.layout, self.groups, self.kind)

    def content(self) -> tuple[object, ...]:
        """Equal for equal values but for their factors."""
        return (self.shape, self.scale, self.layout, self.hard, self.up_kernel)

    def check_mergeable(self, path: str) -> None:
        """Refuse two kernels in a row."""
        if self.up_kernel == "same":
            refuse_two_kernels(path, tuple(self.lora_B.shape[2:]))

    def listed(self) -> tuple[int, float]:
        """Its rank and its factor."""
        return self.r, self.scale

    def norm(self) -> float:
        """The Frobenius norm of ``scale · B·A``: ``tr(BᵀB · AAᵀ)``, of the sizes of its rank, or of
        the product where that is smaller."""
        if self.up_kernel != 1:
            return math.nan
        a, b = self.lora_A.double(), self.lora_B.double()
        # whichever is smaller to form: a product of the weight's size or two of the rank's
        if b.shape[-2] * a.shape[-1] < self.r**2:
            return abs(self.scale) * float((b @ a).norm())
        # rounding may leave less than 0 of a norm of nothing
        squared = ((b.mT @ b) * (a @ a.mT)).sum().clamp(min=0)
        return abs(self.scale) * squared.sqrt().item()

    def row(self, norm: float) -> Listed:
        """Its rank, factor and norm."""
        return Listed(str(self.r), f"{self.scale:g}", f"{norm:.4g}", "")

    def idle(self) -> bool:
        """Whether a factor is all zero."""
        return not (self.lora_A.any() and self.lora_B.any())


@dataclass(frozen=True)
class KindUpdate(Value):
    """One update of a kind that is no low-rank sum: its tensors by name, and what its kind needs.

    Args:
        method: the name of its kind (see `paramlora.update.kinds`).
        held: the tensors, by the end of their key in a native file.
        scale: the factor, where its kind has one.
        options: the kind's own keys of the configuration.
        shape, layout, trainable_scale, dropout, adapter_dtype, kind, groups: as in `Update`.
    """

    method: str
    held: Mapping[str, Tensor]
    scale: float = 1.0
    shape: Optional[tuple[int, ...]] = None
    layout: Layout = "matrix"
    options: tuple[tuple[str, Any], ...] = ()
    trainable_scale: bool = False
    dropout: float = 0.0
    adapter_dtype: Optional[str] = None
    kind: Optional[str] = None
    groups: int = 1
    hard: ClassVar[bool] = True

    @property
    def r(self) -> int:
        """The rank, 0 of a kind without one."""
        return KINDS[self.method].rank_of(self.held)

    @property
    def _scaled(self) -> bool:
        return "lora_scale" in KINDS[self.method].parts

    def tensors(self) -> dict[str, Tensor]:
        """What it holds, by the end of a key."""
        return dict(self.held)

    def parts(self) -> dict[str, Tensor]:
        """All that an attached update takes."""
        scale = {"lora_scale": torch.tensor(self.scale, dtype=torch.float64)}
        return {**self.held, **(scale if self._scaled else {})}

    def stored(self) -> dict[str, Tensor]:
        """All that a native file holds of it."""
        like = next(iter(self.held.values()))
        scale = {"lora_scale": _stored_scale(self.scale, like)}
        return {**self.held, **(scale if self._scaled else {})}

    def attached(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Its tensors in the type of an attached update's, and the mark of a transposed layout."""
        kind = _dtype(self.adapter_dtype, dtype)
        out = {
            name: tensor.to(kind) if tensor.is_floating_point() else tensor
            for name, tensor in self.held.items()
        }
        if self._scaled:
            out["lora_scale"] = torch.tensor(self.scale, dtype=_of_number(kind, dtype))
        marked = "lora_transposed" in KINDS[self.method].hidden
        return {**out, **(_mark(self.layout, self.shape) if marked else {})}

    def entry(self, name: str) -> TargetConfig:
        """The configuration that attaches it, under a name."""
        return TargetConfig(
            name,
            self.r,
            self.scale,
            self.trainable_scale,
            dropout=self.dropout,
            adapter_dtype=self.adapter_dtype,
            kind=self.method,
            options=KINDS[self.method].completed(self.options, self.held),
        )

    def term(self, strength: float, dtype: torch.dtype, device: _Device = "cpu") -> Term:
        """What its kind makes of a tensor."""
        own = {name: tensor.to(device) for name, tensor in self.attached(dtype).items()}
        gain = _gain(strength, _dtype(self.adapter_dtype, dtype), device)
        return KINDS[self.method].term_of(own, gain, self.layout)

    def fitted(
        self, shape: tuple[int, ...], layouts: Sequence[Layout] = ()
    ) -> Optional["KindUpdate"]:
        """With a shape, in the first of some layouts (its own, where none are given) in which its
        tensors fit it."""
        layouts = layouts or ([self.layout] if self.shape is not None else [self.layout, *LAYOUTS])
        held = {name: _of_kernel(tensor, len(shape)) for name, tensor in self.held.items()}
        for layout in layouts:
            if KINDS[self.method].fits(held, shape, layout):
                return replace(self, held=held, shape=shape, layout=layout)
        return None

    def relaid(self, layout: Layout) -> "KindUpdate":
        """The same change of the same matrix, where a layer of another layout stores it: unlike
        `turned`, by which a weight has its sides changed and stays."""
        if {layout, self.layout} != {"matrix", "transposed"}:
            return self
        return replace(self, held=KINDS[self.method].relaid(self.held), layout=layout)

    def placed(self, shape: tuple[int, ...], layout: Layout) -> "KindUpdate":
        """With the shape and layout of its layer's tensor, where it knows none and fits them."""
        found = self.fitted(shape, [layout]) if self.shape is None else None
        return self if found is None else found

    def check_types(self, where: str, dtype: torch.dtype) -> None:
        """Refuse tensors in whose type nothing can be computed."""
        check_types(where, *(t for t in self.held.values() if t.dtype != torch.int64))

    def about(self) -> dict[str, Any]:
        """What the native file's metadata tells of its weight."""
        return _about(self.shape, self.layout, self.groups, self.kind)

    def content(self) -> tuple[object, ...]:
        """Equal for equal values but for their tensors."""
        return (self.method, self.shape, self.scale, self.layout, self.options)

    def listed(self) -> tuple[int, float]:
        """Its rank and its factor."""
        return self.r, self.scale


def _of_kernel(tensor: Tensor, dims: int) -> Tensor:
    """A tensor without the sizes of 1 by which peft gives the kernel of a Conv1d two dimensions."""
    padded = tensor.dim() > dims > 2 and set(tensor.shape[dims:]) == {1}
    return tensor.reshape(tensor.shape[:dims]) if padded else tensor


@dataclass(frozen=True)
class WholeValue(Value):
    """A tensor to have instead of the base's."""

    value: Tensor
    method: ClassVar[str] = "whole"
    hard: ClassVar[bool] = True
    alone: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's."""
        return tuple(self.value.shape)

    def tensors(self) -> dict[str, Tensor]:
        """The tensor."""
        return {WHOLE: self.value}

    def entry(self, name: str) -> TargetConfig:
        """The configuration that attaches it, under a name."""
        return TargetConfig(name, 0, whole=True)

    def term(self, strength: float, dtype: torch.dtype, device: _Device = "cpu") -> Term:
        """The tensor instead of the weight, or some of the way there."""
        gain = _gain(strength, self.value.dtype, device)
        return WholeTerm(self.value.to(device), gain)

    def check_types(self, where: str, dtype: torch.dtype) -> None:
        """Refuse another type, but that of a buffer that counts, such as BatchNorm's batches."""
        # a count has no other type, and takes no float
        if not self.value.dtype == dtype == torch.int64:
            check_types(where, self.value)

    def norm(self) -> float:
        """The Frobenius norm of the tensor."""
        return float(self.value.double().norm())

    def row(self, norm: float) -> Listed:
        """The tensor's norm."""
        return Listed("whole", "-", f"{norm:.4g}", "", "whole tensor")

    def typed(self, entry: TargetConfig, dtype: torch.dtype) -> TargetConfig:
        """The tensor keeps its own type where that is not the usual one."""
        own = str(self.value.dtype).removeprefix("torch.")
        # a type that no configuration names is cast at attaching
        usual = own not in DTYPES or self.value.dtype == factor_dtype(dtype)
        return entry if usual else replace(entry, adapter_dtype=own)


def _dtype(named: Optional[str], dtype: torch.dtype) -> torch.dtype:
    """The type that an update's tensors have when attached to a tensor of a type."""
    own: torch.dtype = factor_dtype(dtype) if named is None else getattr(torch, named)
    return own


def _gain(strength: float, kind: torch.dtype, device: _Device) -> Tensor:
    """A strength, in the type in which a live update holds it."""
    wide = torch.promote_types(kind, torch.float32)
    return torch.tensor(strength, dtype=wide, device=device)


def _of_number(kind: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """The type of the factor of an update whose tensors are of one type on a tensor of another: 16
    bits would round it, or lose it."""
    return factor_dtype(dtype) if kind.itemsize == 2 else kind


def _stored_scale(scale: float, like: Tensor) -> Tensor:
    dtype = like.dtype if like.dtype.itemsize > 2 and like.is_floating_point() else torch.float32
    return torch.tensor(scale, dtype=dtype)


def _mark(layout: Layout, shape: Optional[tuple[int, ...]]) -> dict[str, Tensor]:
    """The buffer that tells the sides of a weight whose shape does not (see `LowRank`); else
    none."""
    if layout == "transposed" and ambiguous(shape or (), layout):
        return {"lora_transposed": torch.ones((), dtype=torch.uint8)}
    return {}


def _about(
    shape: Optional[tuple[int, ...]], layout: Layout, groups: int, kind: Optional[str]
) -> dict[str, Any]:
    about = {"shape": list(shape or ()), "layout": layout, "groups": groups}
    return about if kind is None else {**about, "kind": kind}


@dataclass(frozen=True)
class Holder:
    """A layer that holds a tied tensor: what of an `Update` depends on the layer, not the tensor.

    Args:
        kind, layout, groups: as in `Update`.
    """

    kind: str
    layout: Layout
    groups: int = 1


@dataclass(frozen=True)
class Adapter:
    """The updates of one adapter, by path: a module's for its ``weight``, else the parameter's.

    The paths are the stems of the native file's keys: ``unet.to_q`` updates
    ``unet.to_q.weight``, ``attn.in_proj_weight`` updates that parameter.

    Args:
        updates: the low-rank updates.
        name: under which it is attached.
        metadata: of its file, where it has any.
        whole: by such a path, tensors to have instead of the base's.
        base: by path, what tells the base that it was trained on (see `digest`), where known.
        holders: the layers of tied tensors by path, where known: those share one `Update`, which
            has the first one's kind.
        others: the updates of other kinds than the low-rank one.
        apart: by path of an update, the other layers that hold the same tensor and do not get it,
            where known.
    """

    updates: Mapping[str, Update]
    name: str = "default"
    metadata: Mapping[str, str] = field(default_factory=dict)
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    base: Mapping[str, str] = field(default_factory=dict)
    holders: Mapping[str, Holder] = field(default_factory=dict)
    others: Mapping[str, KindUpdate] = field(default_factory=dict)
    apart: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def values(self) -> dict[str, Value]:
        """What it does to each tensor; paths that share an update or a tensor share a value."""
        # by identity, so that tied paths get one value
        made = {id(tensor): WholeValue(tensor) for tensor in self.whole.values()}
        whole = {path: made[id(tensor)] for path, tensor in self.whole.items()}
        return {**self.updates, **self.others, **whole}


def apart_by_kind(values: Mapping[str, Value]) -> dict[str, Any]:
    """The `updates`, `whole` and `others` of an `Adapter`, from what `Adapter.values` gives."""
    out: dict[str, dict[str, Any]] = {"updates": {}, "whole": {}, "others": {}}
    for path, value in values.items():
        if isinstance(value, WholeValue):
            out["whole"][path] = value.value
        else:
            out["updates" if isinstance(value, Update) else "others"][path] = value
    return out


def refuse_two_kernels(path: str, kernel: tuple[int, ...]) -> NoReturn:
    """Say why a branch with ``"up_kernel": "same"`` cannot be merged."""
    raise AdapterError(
        f'{path or "this layer"}: "up_kernel": "same" is two convolutions of kernel '
        f"{list(kernel)} in a row, which no kernel of that size equals. Nothing was "
        'merged; keep the adapter attached, or train it with "up_kernel": 1.'
    )
