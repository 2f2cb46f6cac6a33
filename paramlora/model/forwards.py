"""Which layers' forwards are known, and those forwards: a faster way to the definition's number.

A known forward is used only while the updates are the weight's only parametrizations and every
tensor is a plain one; else the layer's own forward reads ``weight``, the dense sum.
"""

import sys
from collections.abc import Callable
from functools import cache
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from paramlora.evaluate import dropout, functional
from paramlora.evaluate.convolution import convolution, dropped_convolution
from paramlora.update.compat import transformed
from paramlora.update.geometry import Layout
from paramlora.update.lowrank import LowRank
from paramlora.update.narrow import wide

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


@cache
def ending_in(base: type) -> Optional[type]:
    """A class to stand behind `base` where its methods say ``super().forward``, as a scaled
    embedding does: of the nearest known class that it inherits from, with the fast forward."""
    for known in base.__mro__[1:]:
        fast = _FAST.get(forward_of(known)) if "forward" in vars(known) else None
        if fast is not None and type(known) is type and forward_of(base) is None:
            return type(f"Known{known.__name__}", (known,), {"forward": _behind(known, fast)})
    return None


def _behind(known: Any, fast: Callable[..., Tensor]) -> _Forward:
    def forward(self: nn.Module, input: Tensor) -> Tensor:
        return fast(self, input, known.forward)

    return forward


def plain_forward(layer: nn.Module) -> Any:
    """The forward that the layer's type has now, of itself; a merged one has its own type back."""
    kind: Any = type(layer)
    return (kind.__bases__[0] if "parametrizations" in layer._modules else kind).forward


def honours_dropout(base: type) -> bool:
    """Whether an update of that layer type can drop its own input: its forward is known, it is
    called, and it has a float to drop from."""
    unread = (nn.Embedding, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return forward_of(base) is not None and not issubclass(base, unread)


Known = tuple[Tensor, list[LowRank], bool]


def known_parts(layer: nn.Module, x: Any, name: str = "weight") -> Optional[Known]:
    """(base weight, updates that act, whether one drops inputs now), or None where only the
    definition is right."""
    # read without nn.Module's look-up, which costs as much as a launch: small layers feel each step
    lists: Any = layer._modules.get("parametrizations")
    if lists is None:  # merged or detached, and called through a forward that something kept
        return None
    plist: Any = lists._modules.get(name)
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
    return (a, b) if update.layout == layout else (b.mT, a.mT)


def together(
    updates: list[LowRank], layout: Layout, dropping: bool = False
) -> tuple[Tensor, Tensor, Tensor, float]:
    """A, B, scale and strength of one update, or of several by concatenating their ranks; while
    inputs are dropped, with what makes up for it."""
    if len(updates) == 1:
        (update,) = updates
        a, b = _factors(update, layout)
        more = 1 / (1 - update.dropout) if dropping else 1.0
        if is_compiling():
            return a, b, update.scaling, more
        return a, b, update.stored_scale(), update.strength * more
    pairs = [_factors(update, layout) for update in updates]
    scales = [u.scaling / (1 - u.dropout) if dropping else u.scaling for u in updates]
    scaled = [wide(b) * scale for (_, b), scale in zip(pairs, scales)]
    one = torch.ones((), dtype=scaled[0].dtype, device=scaled[0].device)
    return torch.cat([a for a, _ in pairs], -2), torch.cat(scaled, -1), one, 1.0


def _product(layer: nn.Module, x: Tensor, known: Known, layout: Layout) -> Tensor:
    weight, updates, dropping = known
    bias = _bias(layer)
    if not updates:
        return F.linear(x, weight, bias)
    factors = together(updates, layout, dropping)
    if dropping:
        return dropout.dropped_linear(x, weight, bias, *factors, drops_of(x, updates))
    return functional.linear(x, weight, bias, *factors)


def drops_of(x: Tensor, updates: list[LowRank]) -> dropout.Drops:
    """New masks for updates whose factors lie one after the other."""
    ranks = tuple(update.factors()[0].shape[-2] for update in updates)
    return dropout.drops_for(x, tuple(update.dropout for update in updates), ranks)


def _linear(self: Any, input: Tensor) -> Tensor:
    return _linear_or(self, input, plain_forward(self))


def _linear_or(self: Any, input: Tensor, plain: Any) -> Tensor:
    known = known_parts(self, input) if plain is _LINEAR else None
    if known is None:
        y: Tensor = plain(self, input)
        return y
    return _product(self, input, known, "matrix")


def _conv1d_of_transformers(self: Any, x: Tensor) -> Tensor:
    return _conv1d_or(self, x, plain_forward(self))


def _conv1d_or(self: Any, x: Tensor, plain: Any) -> Tensor:
    known = known_parts(self, x) if plain in _OF_TRANSFORMERS else None
    if known is None or not known[1]:  # its own forward adds the bias in another order than ours
        y: Tensor = plain(self, x)
        return y
    return _product(self, x, (known[0].t(), *known[1:]), "transposed")


def _convolution(self: Any, input: Tensor) -> Tensor:
    return _convolution_or(self, input, plain_forward(self))


def _convolution_or(self: Any, input: Tensor, plain: Any) -> Tensor:
    known = None
    if plain in _CONVOLVED and _inner(self) in _INNER and input.dim() == len(self.kernel_size) + 2:
        known = known_parts(self, input)
    if known is None:
        y: Tensor = plain(self, input)
        return y
    (weight, updates, dropping), bias = known, _bias(self)
    if not updates:
        y = self._conv_forward(input, weight, bias)
        return y
    stride, dilation, groups = self.stride, self.dilation, self.groups
    a, b, scale, strength = together(updates, "matrix", dropping)
    if dropping:
        _, padding = padded_input(self, input[:0])
        where, drops = (stride, padding, dilation, groups), drops_of(input, updates)
        scale = scale if strength == 1 else scale * strength
        values = (weight, bias, a, b, scale, where, drops)
        return dropped_convolution(input, lambda x: padded_input(self, x)[0], *values)
    x, padding = padded_input(self, input)
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
    return _embedding_or(self, input, plain_forward(self))


def _embedding_or(self: Any, input: Tensor, plain: Any) -> Tensor:
    known = known_parts(self, input) if plain is _EMBEDDING else None
    if known is None or self.max_norm is not None or self.scale_grad_by_freq or self.sparse:
        y: Tensor = plain(self, input)
        return y
    weight, updates, _ = known
    if not updates:
        return F.embedding(input, weight, self.padding_idx)
    a, b, scale, strength = together(updates, "transposed")
    return functional.embedding(input, weight, a, b, scale, self.padding_idx, strength)


# each with what it says where the layer's own forward is not it, but calls it
_FAST: dict[Any, Callable[..., Tensor]] = {
    _linear: _linear_or,
    _conv1d_of_transformers: _conv1d_or,
    _convolution: _convolution_or,
    _embedding: _embedding_or,
}
