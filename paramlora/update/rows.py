"""Single rows of a matrix trained whole, such as those of new tokens; the rest stays as it is."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Optional

import torch
from torch import Tensor, nn

from paramlora.config import TargetConfig
from paramlora.errors import AdapterError, FileError, TargetError, counted
from paramlora.update.attached import AttachedUpdate, Gains, Site, Told
from paramlora.update.contexts import in_own_types
from paramlora.update.geometry import Layout, factor_dtype, in_format_of, laid_as, summed_in
from paramlora.update.kinds import register
from paramlora.update.sharded import is_sharded, take
from paramlora.update.sum import Block, Term
from paramlora.update.value import Value


@register
class Rows(AttachedUpdate):
    r"""Some rows of a tensor, instead of its own.

    .. math:: W'_i = W_i + strength · (V_i - W_i) \quad \text{for each row } i \text{ of } ids

    This is what peft calls trainable tokens. Tied tensors move together.

    Args:
        weight: the tensor, of two or more dimensions; the rows start as its own.
        ids: which of its rows, along its first dimension.
        adapter: the name under which it is switched and saved.
        gains: where updates that are made together share the tensor of their strength.

    Shapes: ``lora_rows`` ``[n, *weight.shape[1:]]``, in float32 on a 16-bit weight, and
    ``lora_ids`` ``[n]``, of int64 and ascending.
    """

    method = "rows"
    parts = {"lora_rows": "own", "lora_ids": "own"}
    tied = True
    based = "lora_rows"
    lora_rows: nn.Parameter
    lora_ids: Tensor
    known: Optional[Tensor] = None  # the numbers, while the rest is on the meta device

    def __init__(
        self,
        weight: Tensor,
        ids: Sequence[int],
        adapter: str = "default",
        gains: Optional[Gains] = None,
    ) -> None:
        dtype = factor_dtype(weight.dtype)
        super().__init__(adapter, weight.device, dtype, gains)
        # ascending, so that a merge finds a block's rows by bisection
        self.register_buffer("lora_ids", torch.tensor(sorted(ids), device=weight.device))
        self.lora_rows = nn.Parameter(weight.detach()[self.lora_ids].to(dtype))

    @classmethod
    def attached_to(
        cls, site: Site, entry: TargetConfig, adapter: str, gains: Optional[Gains]
    ) -> "Rows":
        """The entry's rows, as the tensor has them now."""
        if site.weight.is_meta:
            raise TargetError(
                f'"{entry.name}" ("rows") matches {site.path or "weight"}, which lies on the '
                "meta device and has no values to start from. Load the model first."
            )
        update = cls(site.read(), dict(entry.options)["rows"], adapter, gains)
        # rows are as stored, whatever side they are of; another tool asks which layer has them
        update.keep(layout=site.layout)
        return update

    @classmethod
    def check_site(cls, entry: TargetConfig, shape: tuple[int, ...], layout: Layout) -> str:
        """Why it cannot have such rows."""
        most = max(dict(entry.options)["rows"])
        return (
            ""
            if most < shape[0]
            else f"which has {counted(shape[0], 'row')}, and none of number {most}. Number them "
            "from 0."
        )

    @classmethod
    def elements(cls, entry: TargetConfig, shape: tuple[int, ...], layout: Layout) -> int:
        """How many the rows have."""
        return len(dict(entry.options)["rows"]) * torch.Size(shape[1:]).numel()

    def _apply(self, fn: Any, recurse: bool = True) -> "Rows":
        before = self.lora_ids
        if not before.is_meta:
            self.keep(known=before)
        super()._apply(fn, recurse)
        if not self.lora_ids.is_meta:
            self.keep(known=None)
        return self

    def reset_parameters(self) -> None:
        """Start anew with the same rows, of the base's values at the first read."""
        super().reset_parameters()
        # numbers are no values that train: without them nothing says which rows to start
        if self.known is not None:
            self.lora_ids.copy_(self.known)

    @torch.no_grad()
    def begin_as(self, weight: Tensor) -> None:
        """Start the rows as the base's."""
        take(self.lora_rows, weight[self.lora_ids])
        self.keep(unset=False)

    def forward(self, weight: Tensor) -> Tensor:
        """The tensor with its rows in place; `weight` unchanged when off."""
        if not self.acts:
            return weight
        # `index_copy`, not an assignment: the base must stay, and autograd follow
        new = weight.index_copy(0, self.lora_ids, self.rows_of(weight).to(weight.dtype))
        # torch gives it in the order of channels first
        return laid_as(in_format_of(new, weight), weight)

    def rows_of(self, weight: Tensor) -> Tensor:
        """What the rows are now: between the weight's and the trained ones, in a type that rounds
        neither."""
        if self.unset:
            self.begin_as(weight)
        own: Tensor = self.lora_rows
        # as trained: no row of the weight is read
        if self.fully:
            return own
        dtype = summed_in(weight.dtype, own)
        before, gain = weight[self.lora_ids].to(dtype), self.gain.to(own.device, dtype)
        with in_own_types(weight):
            return torch.lerp(before, own.to(dtype), gain)

    @staticmethod
    def term_of(parts: Mapping[str, Tensor], gain: Tensor, layout: Layout) -> Term:
        """The rows instead of the weight's."""
        return RowsTerm(parts["lora_rows"], tuple(parts["lora_ids"].tolist()), gain)

    def check_mergeable(self, path: str) -> None:
        """Refuse rows that lie on several processes, of which no one has them and the weight's.

        Raises:
            AdapterError: they do.
        """
        super().check_mergeable(path)
        if is_sharded(self.lora_rows):
            raise AdapterError(
                f'adapter "{self.adapter}": the rows of {path or "weight"} lie on several '
                "processes, where they cannot be put in place. Save the adapter, and merge it into "
                "the checkpoint (paramlora merge)."
            )

    @classmethod
    def fits(cls, held: Mapping[str, Tensor], shape: tuple[int, ...], layout: Layout) -> bool:
        """Whether the tensor has such rows."""
        rows, ids = held["lora_rows"], held["lora_ids"]
        inside = tuple(rows.shape) == (len(ids), *shape[1:]) and len(shape) >= 2
        return inside and int(ids[-1]) < shape[0]

    @classmethod
    def read_file(
        cls, where: str, parts: Mapping[str, Tensor], entry: TargetConfig, told: Told
    ) -> Value:
        """The value of an update in a native file."""
        _check(where, parts)
        return super().read_file(where, parts, _with_ids(entry, parts["lora_ids"]), told)

    @classmethod
    def read_state(cls, where: str, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Value:
        """The value of an update in an attached model's state dict."""
        value: Any = super().read_state(where, parts, dtype)
        _check(where, parts)
        found: Value = replace(value, options=_options(parts["lora_ids"]))
        return found

    @torch.no_grad()
    def resize(self, base: Tensor) -> None:
        """Keep the rows, which must all be there.

        Raises:
            AdapterError: one of them is not.
        """
        most = int(self.lora_ids[-1])
        if most >= base.shape[0]:
            raise AdapterError(
                f'adapter "{self.adapter}": it trains row {most}, and {base.shape[0]} would be '
                "left. Merge or detach it first."
            )

    def extra_repr(self) -> str:
        rows = counted(len(self.lora_ids), "row")
        return f"adapter={self.adapter!r}, {rows}, strength={self.strength}"


def _options(ids: Tensor) -> tuple[tuple[str, Any], ...]:
    return (("rows", tuple(ids.tolist())),)


def _with_ids(entry: TargetConfig, ids: Tensor) -> TargetConfig:
    return replace(entry, options=_options(ids))


def _check(where: str, parts: Mapping[str, Tensor]) -> None:
    """Refuse numbers of rows that are none, or not ascending."""
    rows, ids = parts["lora_rows"], parts["lora_ids"]
    # checked before a comparison: a file may hold anything
    sound = ids.dtype == torch.int64 and ids.dim() == 1 and len(ids) > 0 and rows.dim() >= 2
    if (
        not sound
        or len(ids) != len(rows)
        or int(ids[0]) < 0
        or not bool((ids[1:] > ids[:-1]).all())
    ):
        raise FileError(f"{where}: its lora_ids are no ascending numbers of rows. Save it again.")


@dataclass(frozen=True)
class RowsTerm(Term):
    """Has some rows instead of a tensor's own, or goes some of the way there."""

    values: Tensor
    ids: tuple[int, ...]
    gain: Tensor

    def prepared(self, wide: torch.dtype) -> "RowsTerm":
        return replace(self, values=self.values.detach().reshape(len(self.ids), -1).to(wide))

    def applied(self, total: Tensor, block: Block) -> Tensor:
        flat, size = total.view(-1), self.values.shape[1]
        start, stop = block.run.start, block.run.start + flat.numel()
        # the first row that reaches into the block
        first = bisect_left(self.ids, start // size)
        # and the first that begins behind it, by a division that rounds up
        for at in range(first, bisect_left(self.ids, -(-stop // size))):
            begin = self.ids[at] * size
            low, high = max(start, begin), min(stop, begin + size)
            own, there = (
                self.values[at, low - begin : high - begin],
                flat[low - start : high - start],
            )
            there.copy_(own if self.gain == 1 else torch.lerp(there, own, self.gain.to(own.dtype)))
        return total
