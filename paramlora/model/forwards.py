"""Which layers' forwards are known, and those forwards: a faster way to the definition's number.

A known forward is used only while the updates are the weight's only parametrizations and every
tensor is a plain one; else the layer's own forward reads ``weight``, the dense sum.
"""

import sys
from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from paramlora.evaluate import functional
from paramlora.evaluate.convolution import branch, convolution, laid_as
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


_Known = tuple[Tensor, list[LowRank], bool]


def _known(layer: nn.Module, x: Any) -> Optional[_Known]:
    """(base weight, updates that act, whether one drops inputs now), or None where only the
    definition is right."""
    # read without nn.Module's look-up, which costs as much as a launch: small layers feel each step
    lists: Any = layer._modules.get("parametrizations")
    if lists is None:  # merged or detached, and called through a forward that something kept
        return None
    plist: Any = lists._modules.get("weight")
    if plist is None:  # torch removed ours, and somebody's of another tensor is left
        return None
    updates, dropping = [], False
    for update in plist._modules.values():
        if type(update) is not LowRank:
            return None
        if update.acts:
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
        if transformed() and not dropping:
            return None
    return weight, updates, dropping


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
    weight, updates, dropping = known
    bias = _bias(layer)
    if not updates:
        return F.linear(x, weight, bias)
    if dropping:
        y = F.linear(x, weight, bias)
        for update in updates:
            y = y + _dropped_product(x, update, layout)
        return y
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
    (weight, updates, dropping), bias = known, _bias(self)
    if not updates:
        y = self._conv_forward(input, weight, bias)
        return y
    x, padding = padded_input(self, input)
    stride, dilation, groups = self.stride, self.dilation, self.groups
    if dropping:
        y = self._conv_forward(input, weight, bias)
        for update in updates:
            a, b = _factors(update, "matrix")
            dropped, _ = padded_input(self, F.dropout(laid_as(input, y), update.dropout))
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
    weight, updates, _ = known
    if not updates:
        return F.embedding(input, weight, self.padding_idx)
    a, b, scale, strength = _together(updates, "transposed")
    return functional.embedding(input, weight, a, b, scale, self.padding_idx, strength)
