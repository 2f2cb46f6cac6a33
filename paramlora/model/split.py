"""Layers of which only a weight is known: called once for each adapter, with its rows alone."""

import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from types import MethodType
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from paramlora.update.attached import AttachedUpdate
from paramlora.update.choice import ONLY, UNSPLIT, Choice, wrong_rows
from paramlora.update.compat import ANY_CONVOLUTION, ANY_INSTANCE_NORM

# position by position: the rows lie where `route` says
_POSITIONS = (nn.Linear, nn.Bilinear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)
# a row at a time: they lie in the first dimension
_FIRST = (
    *ANY_CONVOLUTION,
    *ANY_INSTANCE_NORM,
    nn.GroupNorm,
    nn.RNNCellBase,
    nn.EmbeddingBag,
)
_OWN = (nn.RNNBase, nn.MultiheadAttention)  # where the layer says


def takes_positions(base: type) -> bool:
    """Whether a layer's forward is the same for every position of a row."""
    return issubclass(base, _POSITIONS) or _is_conv1d(base)


def splits(layer: nn.Module, base: type) -> bool:
    """Whether a layer may be called with some rows of its batch alone, by its class `base` without
    updates: its forward is torch's own, and keeps no statistics of what it sees."""
    known = next((kind for kind in base.__mro__ if kind.__module__.startswith("torch.nn.")), object)
    if not issubclass(base, (*_POSITIONS, *_FIRST, *_OWN)):
        return _is_conv1d(base)
    # BatchNorm-like statistics would be of each adapter's rows alone
    return getattr(base, "forward", None) is getattr(known, "forward", 0) and not getattr(
        layer, "track_running_stats", False
    )


def _is_conv1d(base: type) -> bool:
    return getattr(getattr(base, "forward", None), "__qualname__", "") == "Conv1D.forward"


@dataclass(frozen=True)
class _Places:
    """Where the rows lie in a layer's arguments by name (``""``: in any), and in its results."""

    given: Mapping[str, int]
    results: tuple[int, ...]
    dims: int = 0  # of an input that has rows at all
    heads: int = 0  # that share the first dimension with the rows in a mask of three


def _places(layer: Any, dim: int) -> _Places:
    if isinstance(layer, nn.RNNBase):
        batch = 0 if layer.batch_first else 1
        # a state has its layers in front, whatever `batch_first` says
        return _Places({"input": batch, "hx": 1}, (batch, 1), 3)
    if isinstance(layer, nn.MultiheadAttention):
        batch = 0 if layer.batch_first else 1
        # masks of padding have the batch first always, and its attention weights too
        given = {"query": batch, "key": batch, "value": batch, "key_padding_mask": 0}
        return _Places(given, (batch, 0), 3, layer.num_heads)
    first = 0 if isinstance(layer, _FIRST) else dim
    # behind the rows' dimension comes at least one of channels, and those of a kernel
    after = 0 if isinstance(layer, nn.Embedding) else 1 + len(getattr(layer, "kernel_size", ()))
    return _Places({"": first}, (first,), first + 1 + after)


class Split:
    """A forward that calls a layer's own once for each adapter of the batch.

    Args:
        layer: one that `splits`.
        dim: of the rows, where the layer does not tell.
        groups: by adapter the indices of its rows, None: the base's.
        update: one of the layer's.
        taken: the rows of its tensor in this block.

    Attributes:
        before: the forward of an instance that it took the place of.
        left: whether its block is.
    """

    def __init__(
        self,
        layer: nn.Module,
        dim: int,
        groups: Mapping[Optional[str], Tensor],
        update: AttachedUpdate,
        taken: Choice,
    ) -> None:
        self.forward, self.places = _unsplit(layer), _places(layer, dim)
        self.names = list(inspect.signature(self.forward).parameters)
        self.layer, self.groups, self.update, self.taken = layer, groups, update, taken
        self.count = sum(map(len, groups.values()))
        # of an instance, which is put back; the class's needs no place
        self.before, self.left = vars(layer).get("forward"), False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # this layer inside of a part of another: its rows are one adapter's already
        if ONLY.adapter != UNSPLIT:
            return self.forward(*args, **kwargs)
        # compiled code cannot ask which backward runs; its block is open
        now = self.taken if torch.compiler.is_compiling() else self.update.current().rows
        if now is None:  # a forward outside of all blocks, computed again in this one
            return self.forward(*args, **kwargs)
        # or in another one; on the device where they were taken, from which the model may be moved
        if now.on(self.taken.index.device) is not self.taken:
            raise self.update.of_some_rows()
        given = dict(zip(self.names, args)) | kwargs
        # the first input tells whether it has rows at all
        _check_rows(self.layer, self.places, next(iter(given.values()), None), self.count)
        parts = [self._part(adapter, rows, given) for adapter, rows in self.groups.items()]
        # the adapters' results come one after the other: where each row then lies
        order = torch.argsort(torch.cat(list(self.groups.values())))
        if isinstance(parts[0], Tensor):
            return _joined(parts, self.places.results[0], order)
        return tuple(_joined(p, d, order) for p, d in zip(zip(*parts), self.places.results))

    def _part(self, adapter: Optional[str], rows: Tensor, given: dict[str, Any]) -> Any:
        layer, places, count = self.layer, self.places, self.count
        own = {k: _taken(layer, places, k, v, rows, count) for k, v in given.items()}
        try:  # twice: what stops the line that leaves the one does not stop that of the other
            try:
                ONLY.adapter = adapter
                return self.forward(**own)
            finally:
                ONLY.adapter = UNSPLIT
        finally:
            ONLY.adapter = UNSPLIT

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The forward of a copy, of which no block is open: its own."""
        return deepcopy(self.forward, memo)


def _check_rows(layer: nn.Module, places: _Places, x: Any, count: int) -> None:
    """Refuse an input without rows: in it another dimension would be taken for them.

    Raises:
        AdapterError: it is one, or a packed sequence.
    """
    if isinstance(x, PackedSequence):
        raise wrong_rows(type(layer), x.data, next(iter(places.given.values())), count)
    if isinstance(x, Tensor) and x.dim() < places.dims:
        raise wrong_rows(type(layer), x, next(iter(places.given.values())), count)


def _unsplit(layer: nn.Module) -> Callable[..., Any]:
    """A layer's forward below those that open blocks of `route` put in its place."""
    forward: Any = layer.forward
    while hasattr(forward, "before"):
        forward = forward.before or MethodType(type(layer).forward, layer)
    return forward  # type: ignore[no-any-return]


def _taken(layer: Any, places: _Places, name: str, value: Any, rows: Tensor, count: int) -> Any:
    """Some rows of what a layer is given."""
    # torch.Size is a tuple, and none of tensors
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return tuple(_taken(layer, places, name, one, rows, count) for one in value)
    # [rows · heads, ...]: a row's heads lie together
    if name == "attn_mask" and places.heads and value is not None and value.dim() == 3:
        by_row = value.unflatten(0, (-1, places.heads))
        return by_row.index_select(0, rows.to(value.device)).flatten(0, 1)
    dim = places.given.get(name, places.given.get(""))
    if dim is None or not isinstance(value, Tensor):
        return value
    if value.dim() <= dim or value.shape[dim] != count:
        raise wrong_rows(type(layer), value, dim, count)
    return value.index_select(dim, rows.to(value.device))


def _joined(parts: Any, dim: int, order: Tensor) -> Any:
    """The results of all rows in their order; of a tuple, such as an LSTM's state, each."""
    if parts[0] is None:
        return None
    if isinstance(parts[0], tuple):
        return tuple(_joined(one, dim, order) for one in zip(*parts))
    return torch.cat(parts, dim).index_select(dim, order.to(parts[0].device))
