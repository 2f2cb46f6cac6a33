"""Which layers' forwards are known, and those forwards: a faster way to the definition's number.

A known forward is used only while the updates are the weight's only parametrizations and every
tensor is a plain one; else the layer's own forward reads ``weight``, the dense sum.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from paramlora.evaluate import functional, routed
from paramlora.evaluate.convolution import branch, convolution, laid_as
from paramlora.update.choice import Choice, wrong_rows
from paramlora.update.compat import transformed
from paramlora.update.geometry import Layout
from paramlora.update.lowrank import LowRank
from paramlora.update.narrow import LINEAR, wide

_Forward = Callable[..., Tensor]
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _written_in(module: str, function: Any) -> bool:
    """Whether that module wrote a function, and nobody put another in its place, be it under the
    same name, as `functools.wraps` does."""
    code, there = getattr(function, "__code__", None), sys.modules.get(module)
    return code is not None and code.co_filename == getattr(there, "__file__", None)


def _torchs(known: Any, name: str = "forward") -> Any:
    function = getattr(known, name)
    return function if _written_in(known.__module__, function) else None


# torch's own functions, whatever is put in their place later, or was before this import
_LINEAR, _EMBEDDING = _torchs(nn.Linear), _torchs(nn.Embedding)
_CONVOLVED = {_torchs(known) for known in _CONVOLUTIONS} - {None}
_INNER = {_torchs(known, "_conv_forward") for known in _CONVOLUTIONS} - {None}
_OF_TRANSFORMERS: set[Any] = set()  # filled when first seen: it need not be there


def forward_of(base: type) -> Optional[_Forward]:
    """The fast forward of a layer type whose own forward is a known one, else None."""
    own: Any = getattr(base, "forward", None)
    if own is None:
        return None
    if own is _LINEAR:
        return _linear
    if own is _EMBEDDING:
        return _embedding
    if own in _CONVOLVED and getattr(base, "_conv_forward", None) in _INNER:
        return _convolution
    name = getattr(own, "__qualname__", "")
    if name == "Conv1D.forward" and _written_in("transformers.pytorch_utils", own):
        _OF_TRANSFORMERS.add(own)
        return _conv1d_of_transformers
    return None


def _plain_forward(layer: nn.Module) -> Any:
    """The forward that the layer's type has now, of itself; a merged one has its own type back."""
    kind: Any = type(layer)
    return (kind.__bases__[0] if "parametrizations" in layer._modules else kind).forward


def honours_dropout(base: type) -> bool:
    """Whether an update of that layer type can drop its own input: its forward is known, it is
    called, and it has a float to drop from."""
    unread = (nn.Embedding, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return forward_of(base) is not None and not issubclass(base, unread)


_Known = tuple[Tensor, list[LowRank], bool, Optional[Choice]]


def _known(layer: nn.Module, x: Any) -> Optional[_Known]:
    """(base weight, updates that act, whether one drops inputs now, on which rows each acts), or
    None where only the definition is right."""
    # read without nn.Module's look-up, which costs as much as a launch: small layers feel each step
    lists: Any = layer._modules.get("parametrizations")
    if lists is None:  # merged or detached, and called through a forward that something kept
        return None
    plist: Any = lists._modules.get("weight")
    if plist is None:  # torch removed ours, and somebody's of another tensor is left
        return None
    updates, dropping, rows = [], False, None
    for update in plist._modules.values():
        if type(update) is not LowRank:
            return None
        switch = update.current()
        rows = switch.rows or rows
        if switch.acts:
            updates.append(update)
            dropping = dropping or (update.dropout != 0 and layer.training)
    weight = plist._parameters.get("original")
    if weight is None:  # of a replica, and of a flat shard
        weight = plist.__dict__.get("original")
    if weight is None:
        return None
    if not is_compiling():
        if type(x) not in _PLAIN or type(weight) not in _PLAIN:
            return None
        # which take the plain operations of a dropping update, but no autograd function
        if transformed() and not dropping and rows is None:
            return None
    return weight, updates, dropping, rows


def _bias(layer: Any) -> Any:
    own = layer._parameters
    return own["bias"] if "bias" in own else layer.bias  # one that is trained whole


def _factors(update: LowRank, layout: Layout) -> tuple[Tensor, Tensor]:
    """A on the layer's input side and B on its output side, also where a tied layer of the other
    layout gave the update its sides."""
    a, b = update.factors()
    return (a, b) if update.layout == layout else (b.t(), a.t())


def _together(updates: list[LowRank], layout: Layout) -> tuple[Tensor, Tensor, Tensor, float]:
    """A, B, scale and strength of one update, or of several by concatenating their ranks."""
    if len(updates) == 1:
        (update,) = updates
        a, b = _factors(update, layout)
        if is_compiling():
            return a, b, update.scaling, 1.0
        return a, b, update.stored_scale(), update.strength
    pairs = [_factors(update, layout) for update in updates]
    scaled = [wide(b) * update.scaling for (_, b), update in zip(pairs, updates)]
    one = torch.ones((), dtype=scaled[0].dtype, device=scaled[0].device)
    return torch.cat([a for a, _ in pairs], 0), torch.cat(scaled, 1), one, 1.0


def _product(layer: nn.Module, x: Tensor, known: _Known, layout: Layout) -> Tensor:
    weight, updates, dropping, rows = known
    bias = _bias(layer)
    if not updates:
        return F.linear(x, weight, bias)
    if rows is not None:
        return beside_rows(layer, x, updates, rows, layout, (weight, bias))
    if dropping:
        y = F.linear(x, weight, bias)
        for update in updates:
            y = y + _dropped_product(x, update, layout)
        return y
    if updates[0].served:
        a, b, scale, strength = _together(updates, layout)
        pair = functional.thin_pair(x, a, wide(b) * scale * strength, LINEAR, LINEAR)
        return F.linear(x, weight, bias) + pair
    return functional.linear(x, weight, bias, *_together(updates, layout))


def _dropped_product(x: Tensor, update: LowRank, layout: Layout) -> Tensor:
    a, b = _factors(update, layout)
    dropped = F.dropout(x, update.dropout)
    return functional.thin_pair(dropped, a, wide(b) * update.scaling, LINEAR, LINEAR)


def _linear(self: Any, input: Tensor) -> Tensor:
    plain = _plain_forward(self)
    known = _known(self, input) if plain is _LINEAR else None
    if known is None:
        y: Tensor = plain(self, input)
        return y
    return _product(self, input, known, "matrix")


def _conv1d_of_transformers(self: Any, x: Tensor) -> Tensor:
    plain = _plain_forward(self)
    known = _known(self, x) if plain in _OF_TRANSFORMERS else None
    if known is None or not known[1]:  # its own forward adds the bias in another order than ours
        y: Tensor = plain(self, x)
        return y
    return _product(self, x, (known[0].t(), *known[1:]), "transposed")


def _convolution(self: Any, input: Tensor) -> Tensor:
    plain, known = _plain_forward(self), None
    if plain in _CONVOLVED and _inner(self) in _INNER and input.dim() == len(self.kernel_size) + 2:
        known = _known(self, input)
    if known is None:
        y: Tensor = plain(self, input)
        return y
    (weight, updates, dropping, rows), bias = known, _bias(self)
    if not updates:
        y = self._conv_forward(input, weight, bias)
        return y
    if rows is not None:
        return _convolution_of_rows(self, input, weight, bias, updates, rows)
    x, padding = padded_input(self, input)
    stride, dilation, groups = self.stride, self.dilation, self.groups
    if dropping or updates[0].served:
        y = self._conv_forward(input, weight, bias)
        for update in updates:
            a, b = _factors(update, "matrix")
            rate = update.dropout if self.training else 0.0
            dropped, _ = padded_input(self, F.dropout(laid_as(input, y), rate))
            up = wide(b) * update.scaling
            y = y + branch(dropped, weight.shape, a, up, stride, padding, dilation, groups)
        return y
    a, b, scale, strength = _together(updates, "matrix")
    return convolution(x, weight, bias, a, b, scale, stride, padding, dilation, groups, strength)


def _inner(layer: Any) -> Any:
    own = layer.__dict__
    return own["_conv_forward"] if "_conv_forward" in own else type(layer)._conv_forward


def padded_input(layer: Any, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input and the zeros padding that is left: other modes and uneven ones come first."""
    if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return x, layer.padding
    pads = layer._reversed_padding_repeated_twice
    none = (0,) * len(layer.kernel_size)
    if layer.padding_mode != "zeros":
        return F.pad(x, pads, mode=layer.padding_mode), none
    if layer.padding == "valid":
        return x, none
    if pads[::2] == pads[1::2]:
        return x, tuple(pads[::-2])
    return F.pad(x, pads), none


def _embedding(self: Any, input: Tensor) -> Tensor:
    plain = _plain_forward(self)
    known = _known(self, input) if plain is _EMBEDDING else None
    if known is None or self.max_norm is not None or self.scale_grad_by_freq or self.sparse:
        y: Tensor = plain(self, input)
        return y
    weight, updates, _, rows = known
    if not updates:
        return F.embedding(input, weight, self.padding_idx)
    if rows is not None:
        tokens = rows_first(self, input, rows.dim, rows)
        down, up = factors_of_rows(updates, rows, "transposed")
        y = routed.embedding(tokens, weight, down, up, rows, self.padding_idx)
        return y.movedim(0, rows.dim)
    a, b, scale, strength = _together(updates, "transposed")
    return functional.embedding(input, weight, a, b, scale, self.padding_idx, strength)


# --- rows of a batch that take different updates -------------------------------------------------


def rows_first(layer: nn.Module, x: Tensor, dim: int, rows: Choice, after: int = 0) -> Tensor:
    """An input with its rows in front; one that is there once for all rows is repeated.

    Args:
        dim: where the rows lie.
        after: how many dimensions must follow the rows'.

    Raises:
        AdapterError: it has another number of rows.
    """
    count, there = len(rows.index), x.shape[dim] if x.dim() > dim + after else 0
    if there not in (1, count) or there == 0:
        raise wrong_rows(type(layer), x, dim, count)
    x = x.movedim(dim, 0)
    return x if there == count else x.expand(count, *x.shape[1:])


def factors_of_rows(updates: list[LowRank], rows: Choice, layout: Layout) -> tuple[Tensor, Tensor]:
    """What `routed.linear` takes: A, and B transposed with its scale, of all adapters."""
    held = {update.adapter: update for update in updates}
    there = [held.get(name) for name in rows.names]
    pairs = [(None, None) if one is None else _factors(one, layout) for one in there]
    up = wide(routed.joined([b for _, b in pairs], rows.ranks, 1))
    scaling = scaling_of_rows(there, up).index_select(0, rows.owner)
    return routed.joined([a for a, _ in pairs], rows.ranks, 0), (up * scaling).t()


def scaling_of_rows(there: Sequence[Optional[LowRank]], like: Tensor) -> Tensor:
    """``[adapters + 1]``: what is before each one's ``B·A``. Of one that is missing, and of the
    base, any number that is finite: their factors are zeros."""
    one = like.new_ones(())
    scales = [one if u is None else u.stored_scale().to(like.dtype) for u in there]
    gains = [one if u is None else u.current().gain.to(like.device, like.dtype) for u in there]
    return torch.stack([*scales, one]) * torch.stack([*gains, one])


def dropped_rows(layer: nn.Module, x: Tensor, updates: list[LowRank], rows: Choice) -> Tensor:
    """The input of the updates' part: each row drops as its adapter says."""
    rates = {update.adapter: update.dropout for update in updates}
    if not layer.training or not any(rates.values()):
        return x
    each = x.new_tensor([*(rates.get(name, 0.0) for name in rows.names), 0.0])[rows.index]
    each = each.reshape(-1, *[1] * (x.dim() - 1))
    return torch.where(torch.rand_like(x) < each, 0.0, x / (1 - each))


def beside_rows(
    layer: nn.Module,
    x: Tensor,
    updates: list[LowRank],
    rows: Choice,
    layout: Layout,
    base: Optional[tuple[Tensor, Optional[Tensor]]] = None,
) -> Tensor:
    """A linear layer of `base`, its weight and bias, with each row's update; without it the
    updates' part alone."""
    x = rows_first(layer, x, rows.dim, rows, 1)
    down, up = factors_of_rows(updates, rows, layout)
    dropped = dropped_rows(layer, x, updates, rows)
    apart = base is not None and (dropped is not x or updates[0].served)
    weight, bias = base if base is not None and not apart else (None, None)
    y = routed.linear(dropped, weight, bias, down, up, rows)
    if base is not None and apart:
        y = F.linear(x, *base) + y
    return y.movedim(0, rows.dim)


def convolved_rows(layer: Any, x: Tensor, updates: list[LowRank], rows: Choice) -> Tensor:
    """The updates' part of a convolution of each row's update."""
    x, padding = padded_input(layer, dropped_rows(layer, x, updates, rows))
    down, up = factors_of_rows(updates, rows, "matrix")
    shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    where = layer.stride, padding, layer.dilation, layer.groups
    return routed.convolution(x, shape, down, up, rows, *where)


def _convolution_of_rows(
    layer: Any,
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    updates: list[LowRank],
    rows: Choice,
) -> Tensor:
    x = rows_first(layer, x, 0, rows)
    y: Tensor = layer._conv_forward(x, weight, bias)
    return y + convolved_rows(layer, laid_as(x, y), updates, rows)
