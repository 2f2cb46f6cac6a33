"""Which layers' forwards are known, and those forwards: a faster way to the definition's number.

A known forward is used only while the updates are the weight's only parametrizations and every
tensor is a plain one; else the layer's own forward reads ``weight``, the dense sum.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from paramlora.cuda.operands import served
from paramlora.errors import AdapterError
from paramlora.evaluate import dropout, functional, kronecker, rescaled, routed
from paramlora.evaluate.convolution import branch, convolution, dropped_convolution
from paramlora.update.attached import switches_of
from paramlora.update.choice import Choice, wrong_rows
from paramlora.update.compat import ANY_CONVOLUTION, transformed
from paramlora.update.contexts import autocast_of, in_own_types
from paramlora.update.dora import Dora
from paramlora.update.geometry import PLAIN, Layout, in_format_of
from paramlora.update.lokr import Lokr
from paramlora.update.lowrank import LowRank
from paramlora.update.narrow import LINEAR, of_factor
from paramlora.update.rows import Rows

_Forward = Callable[..., Tensor]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def written_in(module: str, function: Any) -> bool:
    """Whether that module wrote a function, and nobody put another in its place, be it under the
    same name, as `functools.wraps` does."""
    code, there = getattr(function, "__code__", None), sys.modules.get(module)
    return code is not None and code.co_filename == getattr(there, "__file__", None)


def _torchs(known: Any, name: str = "forward") -> Any:
    function = getattr(known, name)
    return function if written_in(known.__module__, function) else None


# torch's own functions, whatever is put in their place later, or was before this import
_LINEAR, _EMBEDDING = _torchs(nn.Linear), _torchs(nn.Embedding)
_CONVOLVED = {_torchs(known) for known in _CONVOLUTIONS} - {None}
_PART = "_conv_forward"  # of a convolution's forward
_INNER = {_torchs(known, _PART) for known in _CONVOLUTIONS} - {None}
_TRANSPOSED = {
    _torchs(known) for known in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
} - {None}
_SUMMED = (nn.Linear, *_CONVOLUTIONS)
_OF_TRANSFORMERS: set[Any] = set()  # filled when first seen: it need not be there
# the overrides of classes that only carry data
_OF_TORCH = Tensor.__torch_function__.__func__  # type: ignore[attr-defined]
_OF_TORCHVISION = "torchvision.tv_tensors._tv_tensor"


def forward_of(base: type) -> Optional[_Forward]:
    """The fast forward of a layer type whose own forward is a known one, else None."""
    own: Any = getattr(base, "forward", None)
    if own is None:
        return None
    if own is _LINEAR:
        return _linear
    if own is _EMBEDDING:
        return _embedding
    # torch's convolutions call `_conv_forward`, which a subclass may have changed alone
    if own in _CONVOLVED and getattr(base, _PART, None) in _INNER:
        return _convolution
    name = getattr(own, "__qualname__", "")
    if name == "Conv1D.forward" and written_in("transformers.pytorch_utils", own):
        _OF_TRANSFORMERS.add(own)
        return _conv1d_of_transformers
    return None


def adds_what_its_weight_gains(base: type) -> bool:
    """Whether a term of a layer type's weight is the same term of its output: of a known forward,
    and of a transposed convolution's, which nobody changed."""
    own = getattr(base, "forward", None)
    return forward_of(base) is not None or own in _TRANSPOSED


@cache
def ending_in(base: type) -> Optional[type]:
    """A class to stand behind `base` where its methods say ``super().forward``, as a scaled
    embedding does: of the nearest known class that it inherits from, with the fast forward."""
    for known in base.__mro__[1:]:
        # the nearest class with a forward of its own is what `super().forward` would reach
        fast = _FAST.get(forward_of(known)) if "forward" in vars(known) else None
        # it calls `_conv_forward` of `base`, which may be another
        inner = getattr(base, _PART, None) is getattr(known, _PART, None)
        if fast is not None and inner and type(known) is type and forward_of(base) is None:
            # behind `base` in the order of methods, so that `super().forward` in it finds this one
            return type(f"Known{known.__name__}", (known,), {"forward": _behind(known, fast)})
    return None


def reaches_known(base: type) -> bool:
    """Whether a layer type's forward is a known one, or says ``super().forward`` up to one, as a
    scaled embedding's does."""
    for kind in base.__mro__:
        own = vars(kind).get("forward")
        if own is None:
            continue
        if forward_of(kind) is not None:
            # of a metaclass that `ending_in` cannot stand behind, nothing is known
            return kind is base or forward_of(base) is not None or ending_in(base) is not None
        if not names_in(own).issuperset(("super", "forward")):
            return False
    return False


def names_in(function: Any) -> set[str]:
    """What a function names in its code and in what is defined inside it, such as a loop's
    comprehension: attributes and globals."""
    # a decorator's code tells nothing of what it decorates
    code = getattr(inspect.unwrap(function), "__code__", None)
    codes = [] if code is None else [code]
    for code in codes:  # grows by what is defined inside
        codes += [one for one in code.co_consts if inspect.iscode(one)]
    return {name for code in codes for name in code.co_names}


def _behind(known: Any, fast: Callable[..., Tensor]) -> _Forward:
    # its input by place, or by the name that the known one gives it
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return fast(self, *args, plain=known.forward, **kwargs)

    return forward


def plain_forward(layer: nn.Module) -> Any:
    """The forward that the layer's type has now, of itself; a merged one has its own type back."""
    return own_class(layer).forward


def own_class(layer: nn.Module) -> Any:
    """The class of a layer without its updates."""
    # a forward that was kept, by a hook or a trace, may be called after the merge
    kind: Any = type(layer)
    return below(kind) if "parametrizations" in layer._modules else kind


def below(kind: Any) -> Any:
    """The class of itself that a parametrized layer has; ``fully_shard`` and ``replicate`` put
    theirs, which is no layer's, in front of the parametrized one."""
    base = kind.__bases__[0]
    # their base in front is a mixin: the layer's class is the one behind it
    return base if issubclass(base, nn.Module) else below(kind.__bases__[1])


def honours_dropout(base: type) -> bool:
    """Whether an update of that layer type can drop its own input: its forward is known, or ends in
    a known one, it is called, and it has a float to drop from."""
    # attention reads the weight of its `out_proj` past its forward
    unread = (nn.Embedding, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return reaches_known(base) and not issubclass(base, unread)


Known = tuple[Tensor, list[LowRank], bool]


def is_known(update: Any) -> bool:
    """Whether the known forwards compute an update, beside others and row by row: a low-rank sum,
    and nothing that inherits from it, which may compute anything."""
    return type(update) is LowRank


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
        if type(update) is not LowRank:  # `is_known`, without the call
            return None
        switch = update.current()
        if switch.rows is not None:  # see `parts_of_rows`
            return None
        if switch.acts:
            updates.append(update)
            dropping = dropping or (update.dropout != 0 and layer.training)
    weight = plist._parameters.get("original")
    if weight is None:  # of a replica, and of a flat shard
        # DataParallel's replicas hold tensors as plain attributes, as does FSDP1
        weight = plist.__dict__.get("original")
    if weight is None:
        return None
    # under a compiler tensors are of its own classes
    if not is_compiling():
        if type(weight) not in PLAIN or type(x) not in PLAIN and not _takes_mask(x, dropping):
            return None
        # which take the plain operations of a dropping update, but no autograd function
        if transformed() and not dropping:
            return None
    return weight, updates, dropping


def _takes_mask(x: Any, dropping: bool) -> bool:
    """Whether an input of a class of somebody's is dropped, which plain operations do; a nested one
    has no rows to draw a mask for."""
    return dropping and isinstance(x, Tensor) and not x.is_nested and not only_carries(x)


def only_carries(x: Any) -> bool:
    """Whether a tensor is of a class of somebody's that only carries data: each function of torch
    computes with it what it does with a plain tensor, and gives a result of some class."""
    kind: Any = type(x)
    if kind in PLAIN or not isinstance(x, Tensor) or is_compiling():
        return False
    own = getattr(kind.__torch_function__, "__func__", None)
    # another override may compute anything
    known = own is _OF_TORCH or written_in(_OF_TORCHVISION, own)
    return known and kind.__torch_dispatch__ is Tensor.__torch_dispatch__


def bare(x: Any) -> Any:
    """Such a tensor as a plain one, of the same memory and gradient; anything else as it is."""
    # torch's override as a plain tensor's: it gives no class back to what lost it
    if not only_carries(x):
        return x
    return Tensor.__torch_function__(Tensor.as_subclass, (), (x, Tensor))  # type: ignore[no-untyped-call]


def in_class_of(x: Any, y: Tensor) -> Tensor:
    """What a function of torch gives of x instead of y, which was computed of `bare` x."""
    if not only_carries(x):
        return y
    given: Tensor = type(x).__torch_function__(lambda _: y, (type(x),), (x,))
    return given


def _of_bare(compute: Callable[..., Tensor], layer: Any, x: Any, plain: Any) -> Tensor:
    return in_class_of(x, compute(layer, bare(x), plain))


def refuse_dropout(layer: nn.Module, how: str, way_out: str, only: Optional[str] = None) -> None:
    """Say so where dropout would act, had the forward not to be left to the dense sums.

    Args:
        only: the tensor that is read; else all of the layer's.

    Raises:
        AdapterError: an update that acts drops its input now.
    """
    lists: Any = layer._modules.get("parametrizations") if layer.training else None
    for name, held in () if lists is None else lists._modules.items():
        for update in held._modules.values() if only in (None, name) else ():
            if getattr(update, "dropout", 0) and update.current().acts:
                kind = below(type(layer)).__name__
                raise AdapterError(
                    f"{name!r} of {kind} is read as a dense sum {how}, where "
                    f'"dropout": {update.dropout} cannot act. {way_out}, or leave "dropout" out.'
                )


def _defined(layer: nn.Module, x: Any, plain: _Forward) -> Tensor:
    """What a known layer's own forward gives, which reads the dense sum.

    Raises:
        AdapterError: an update drops its input now, which that sum would not show.
    """
    if layer.training:
        refuse_dropout(layer, *why_defined(x))
    y: Tensor = plain(layer, x)
    return y


def why_defined(x: Any) -> tuple[str, str]:
    """Why a known forward does not serve an input in training, and the way out, for messages."""
    if type(x) not in PLAIN and not is_compiling():
        return f"for an input of the class {type(x).__name__}", "Give a plain tensor"
    return "beside an update or a rule of another kind", "Merge that one first"


_Rescaled = tuple[Tensor, Dora, bool]


def _alone(layer: Any, x: Any) -> Optional[tuple[Tensor, Any]]:
    """(base weight, the one update that acts), where all tensors are plain ones; else None."""
    lists: Any = layer._modules.get("parametrizations")
    plist: Any = None if lists is None else lists._modules.get("weight")
    weight = None if plist is None else plist._parameters.get("original")
    if weight is None:
        return None
    # a parametrization of somebody else always acts
    acting = [update for update in plist._modules.values() if getattr(update, "acts", True)]
    if len(acting) != 1:
        return None
    update, dropping = acting[0], layer.training and getattr(acting[0], "dropout", 0) != 0
    if is_compiling() or type(x) in PLAIN and type(weight) in PLAIN:
        return weight, update
    return (weight, update) if type(weight) in PLAIN and _takes_mask(x, dropping) else None


def _rescaled(layer: Any, x: Any, outer: int) -> Optional[_Rescaled]:
    """(base weight, the one update that acts, whether it drops inputs now), where that is a DoRA
    with a norm for each output; else None, where only the definition is right.

    Args:
        outer: the dimension of the weight along which the outputs lie.
    """
    weight, update = _alone(layer, x) or (None, None)
    # one magnitude for each output, not for each input, as some tools have it
    if weight is None or type(update) is not Dora or not update.is_of_outputs(outer):
        return None
    dropping = update.dropout != 0 and layer.training
    if not is_compiling() and transformed() and not dropping:
        return None
    if update.unset:
        update.begin_as(weight)
    return weight, update, dropping


def _by_rows(layer: Any, x: Any) -> Optional[tuple[Tensor, Rows]]:
    """(base weight, the one update that acts), where that trains single rows; else None."""
    weight, update = _alone(layer, x) or (None, None)
    return None if weight is None or type(update) is not Rows else (weight, update)


def _rows_product(layer: Any, x: Tensor, found: tuple[Tensor, Rows]) -> Tensor:
    """A linear layer's outputs, those of the trained rows computed again."""
    weight, update = found
    bias, ids = _bias(layer), update.lora_ids
    y = F.linear(x, weight, bias)
    # the trained rows alone are rounded, to the weight's type as the dense sum is
    rows = update.rows_of(weight).to(weight.dtype)
    own = F.linear(x, rows, None if bias is None else bias[ids])
    # not an assignment, which autograd would not follow
    return y.index_copy(-1, ids, own.to(y.dtype))


def _rows_embedding(layer: Any, ids: Tensor, found: tuple[Tensor, Rows]) -> Tensor:
    """An embedding's outputs, those of the trained rows looked up among them."""
    weight, update = found
    padding = layer.padding_idx
    y = F.embedding(ids, weight, padding)
    # an id behind the last trained one still needs a place; the comparison below tells them apart
    at = torch.searchsorted(update.lora_ids, ids).clamp_max(len(update.lora_ids) - 1)
    rows = F.embedding(at, update.rows_of(weight).to(weight.dtype))
    if padding is not None:  # which gets no gradient
        rows = functional.without_gradient(rows, (ids == padding)[..., None])
    return torch.where((update.lora_ids[at] == ids)[..., None], rows, y)


def _as_rescaled(
    found: _Rescaled,
    layout: Layout,
    fused: Callable[[Tensor, Tensor, Tensor, Any], Tensor],
    apart: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    bias: Any,
    rest: int = 0,
) -> Tensor:
    """A layer's output under a DoRA: the low-rank layer's, rescaled by outputs.

    Args:
        layout: of the layer.
        fused: gives the layer's output of A, B, the scale and a bias, or none.
        apart: as `_partly` takes it.
        bias: of the layer, or None.
        rest: how many dimensions of an output come after that of the outputs.
    """
    weight, update, dropping = found
    if dropping or not update.fully:
        return _partly(found, layout, apart, bias, rest)
    (a, b), scale, size = _factors(update, layout), update.stored_scale(), (-1, *[1] * rest)
    norm = _norms(found, layout, a, b).reshape(size)
    # in 16 bits a large bias would drown what is rounded
    inside = weight.dtype.itemsize > 2 and autocast_of(weight) is None
    z = fused(a, b, scale, bias if inside else None)
    shaped = None if bias is None else bias.reshape(size)
    return rescaled.rescaled(z, update.lora_magnitude.reshape(size), norm, shaped, inside)


def _norms(found: _Rescaled, layout: Layout, a: Tensor, b: Tensor) -> Tensor:
    weight, update, _ = found
    matrix = weight.flatten(1) if layout == "matrix" else weight.t()
    return rescaled.norms_of(matrix, a, b, update.stored_scale())


def _partly(
    found: _Rescaled,
    layout: Layout,
    apart: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    bias: Any,
    rest: int = 0,
) -> Tensor:
    """A layer's output where its DoRA drops inputs, or acts some of the way.

    Args:
        layout, bias, rest: as of `_as_rescaled`.
        apart: gives the base's output and the branch's, of A and the scaled B.
    """
    update = found[1]
    a, b = _factors(update, layout)
    factor = update.rescale(_norms(found, layout, a, b).reshape(-1, *[1] * rest))
    # the branch is rescaled in its thin factor: before that it may be beyond float16's range
    base, low = apart(a, of_factor(b) * update.stored_scale() * factor.reshape(-1, 1))
    own = base.to(factor.dtype)
    total = torch.lerp(own, own * factor + low, update.gain.to(factor))
    total = total if bias is None else total + bias.reshape(-1, *[1] * rest)
    return total.to(base.dtype)


def _with_room(
    compute: Callable[[Any, Tensor, _Rescaled, Any], Tensor],
    layer: Any,
    x: Tensor,
    found: _Rescaled,
) -> Tensor:
    """``compute(layer, x, found, bias)``; of float16 in float32, but for our kernels: a sum that is
    finite when it is rescaled may be beyond float16's range before."""
    device, (weight, update, dropping), bias = autocast_of(x), found, _bias(layer)
    # autocast decides the type, and float16 alone lacks range
    if (x.dtype if device is None else torch.get_autocast_dtype(device)) != torch.float16:
        return compute(layer, x, found, bias)
    narrow = x, weight, bias
    if device is not None:
        narrow = tuple(functional.cast_for_autocast(device, *narrow))
    if narrow[0].dtype != torch.float16 or served(narrow[0]):
        return compute(layer, x, found, bias)
    with in_own_types(x):
        x, weight = narrow[0].float(), narrow[1].float()
        bias = None if bias is None else narrow[2].float()
        return compute(layer, x, (weight, update, dropping), bias).half()


def _rescaled_linear(layer: Any, x: Tensor, found: _Rescaled, layout: Layout) -> Tensor:
    weight, update, dropping = found
    if dropping or not update.fully:
        return _with_room(partial(_rescaled_product, layout=layout), layer, x, found)
    (a, b), scale = _factors(update, layout), update.stored_scale()
    own = weight if layout == "matrix" else weight.t()
    return rescaled.linear(x, own, _bias(layer), a, b, scale, update.magnitude())


def _rescaled_product(layer: Any, x: Tensor, found: _Rescaled, bias: Any, layout: Layout) -> Tensor:
    weight, update, dropping = found
    own = weight if layout == "matrix" else weight.t()

    def apart(a: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        def low(x: Tensor, a: Tensor, up: Tensor) -> Tensor:
            return functional.thin_pair(x, a, up, LINEAR, LINEAR)

        rate = update.dropout if dropping else 0.0
        return F.linear(x, own), dropout.dropped_branch(x, a, up, rate, low)

    return _partly(found, layout, apart, bias)


def _rescaled_convolution(layer: Any, input: Tensor, found: _Rescaled, bias: Any) -> Tensor:
    weight, update, dropping = found
    x, padding = padded_input(layer, input)
    window = layer.stride, padding, layer.dilation, layer.groups

    def apart(a: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        y = layer._conv_forward(input, weight, None)

        def low(x: Tensor, a: Tensor, up: Tensor) -> Tensor:
            return branch(padded_input(layer, x)[0], weight.shape, a, up, *window)

        rate = update.dropout if dropping else 0.0
        # in the output's memory format, as torch laid it
        return y, dropout.dropped_branch(in_format_of(input, y), a, up, rate, low)

    def fused(a: Tensor, b: Tensor, scale: Tensor, bias: Any) -> Tensor:
        return convolution(x, weight, bias, a, b, scale, *window, 1.0)

    return _as_rescaled(found, "matrix", fused, apart, bias, len(layer.kernel_size))


def _rescaled_embedding(layer: Any, ids: Tensor, found: _Rescaled) -> Tensor:
    weight, padding = found[0], layer.padding_idx

    def apart(a: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        low = F.embedding(ids, a.t(), padding) @ up.t()
        return F.embedding(ids, weight, padding), low

    def fused(a: Tensor, b: Tensor, scale: Tensor, bias: Any) -> Tensor:
        # float32 of a float16 table: it is rescaled before it is rounded
        return functional.embedding_in_range(ids, weight, a, b, scale, padding, 1.0)

    y = _as_rescaled(found, "transposed", fused, apart, None).to(weight.dtype)
    if padding is None:
        return y
    # no gradient from where padding stands, of the magnitude neither
    return functional.without_gradient(y, (ids == padding)[..., None])


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
        # compiled code reads the strength as a tensor: as a number it would be compiled in
        if is_compiling():
            return a, b, update.scaling, more
        return a, b, update.stored_scale(), update.current().effective * more
    pairs = [_factors(update, layout) for update in updates]
    scales = [u.scaling / (1 - u.dropout) if dropping else u.scaling for u in updates]
    # each B takes its own scale, as one number is left for all of them
    scaled = [of_factor(b) * scale for (_, b), scale in zip(pairs, scales)]
    one = torch.ones((), dtype=scaled[0].dtype, device=scaled[0].device)
    return torch.cat([a for a, _ in pairs], -2), torch.cat(scaled, -1), one, 1.0


def as_served(
    x: Tensor, updates: list[LowRank], layout: Layout, dropping: bool
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What is added to a base's rounded product: an input, A, and B with what is before it; of all
    updates at once where none drops its input."""
    if dropping:
        pairs = [(F.dropout(x, u.dropout), *_factors(u, layout), u.scaling) for u in updates]
        return [(own, a, of_factor(b) * scaling) for own, a, b, scaling in pairs]
    a, b, scale, strength = together(updates, layout)
    return [(x, a, of_factor(b) * scale * strength)]


def _product(layer: nn.Module, x: Tensor, known: Known, layout: Layout) -> Tensor:
    weight, updates, dropping = known
    bias = _bias(layer)
    if not updates:
        return F.linear(x, weight, bias)
    if updates[0].rounds_twice:
        y = F.linear(x, weight, bias)
        for own, a, up in as_served(x, updates, layout, dropping):
            y = y + functional.thin_pair(own, a, up, LINEAR, LINEAR)
        return y
    factors = together(updates, layout, dropping)
    if dropping:
        return dropout.dropped_linear(x, weight, bias, *factors, drops_of(x, updates))
    return functional.linear(x, weight, bias, *factors)


def drops_of(x: Tensor, updates: list[LowRank]) -> dropout.Drops:
    """New masks for updates whose factors lie one after the other."""
    ranks = tuple(update.rank_of_sum() for update in updates)
    return dropout.drops_for(x, tuple(update.dropout for update in updates), ranks)


def _other_linear(layer: Any, x: Tensor) -> Tensor:
    """A linear layer under updates of another kind than the low-rank one."""
    found = _rescaled(layer, x, 0)
    if found is not None:
        return _rescaled_linear(layer, x, found, "matrix")
    weight, update = _alone(layer, x) or (None, None)
    if type(update) is Lokr and update.layout == "matrix" and weight is not None:
        return kronecker.linear(x, weight, _bias(layer), update.shown(), update.scaling())
    rows = _by_rows(layer, x)
    return _defined(layer, x, _LINEAR) if rows is None else _rows_product(layer, x, rows)


def _other_embedding(layer: Any, ids: Tensor) -> Tensor:
    """An embedding under updates of another kind than the low-rank one."""
    found = _rescaled(layer, ids, 1)
    if found is not None:
        return _rescaled_embedding(layer, ids, found)
    rows = _by_rows(layer, ids)
    y: Tensor = _EMBEDDING(layer, ids) if rows is None else _rows_embedding(layer, ids, rows)
    return y


def _linear(self: Any, input: Tensor) -> Tensor:
    return _linear_or(self, input, plain_forward(self))


def _linear_or(self: Any, input: Tensor, plain: Any) -> Tensor:
    # asked at every call: somebody may have put another forward in torch's place since
    known = known_parts(self, input) if plain is _LINEAR else None
    if known is None:
        if plain is _LINEAR and only_carries(input):
            return _of_bare(_linear_or, self, input, plain)
        routes = parts_of_rows(self, input) if plain is _LINEAR else None
        if routes is not None:
            return linear_of_rows(self, input, *routes, "matrix")
        y: Tensor = _other_linear(self, input) if plain is _LINEAR else plain(self, input)
        return y
    return _product(self, input, known, "matrix")


def _conv1d_of_transformers(self: Any, x: Tensor) -> Tensor:
    return _conv1d_or(self, x, plain_forward(self))


def _conv1d_or(self: Any, x: Tensor, plain: Any) -> Tensor:
    known = known_parts(self, x) if plain in _OF_TRANSFORMERS else None
    if known is None and plain in _OF_TRANSFORMERS and only_carries(x):
        return _of_bare(_conv1d_or, self, x, plain)
    routes = parts_of_rows(self, x) if known is None and plain in _OF_TRANSFORMERS else None
    if routes is not None:
        return linear_of_rows(self, x, routes[0].t(), *routes[1:], "transposed")
    found = _rescaled(self, x, 1) if known is None and plain in _OF_TRANSFORMERS else None
    if found is not None:
        return _rescaled_linear(self, x, found, "transposed")
    if known is None and plain in _OF_TRANSFORMERS:
        return _defined(self, x, plain)
    if known is None or not known[1]:  # its own forward adds the bias in another order than ours
        y: Tensor = plain(self, x)
        return y
    return _product(self, x, (known[0].t(), *known[1:]), "transposed")


def _convolution(self: Any, input: Tensor) -> Tensor:
    return _convolution_or(self, input, plain_forward(self))


def _convolution_or(self: Any, input: Tensor, plain: Any) -> Tensor:
    known = None
    # also an instance's own `_conv_forward`, as some tools set
    if plain in _CONVOLVED and _inner(self) in _INNER:
        dims, alone = input.dim(), len(self.kernel_size) + 1
        known = known_parts(self, input) if dims == alone + 1 else None
        if known is None and only_carries(input):
            return _of_bare(_convolution_or, self, input, plain)
        routes = parts_of_rows(self, input) if known is None else None
        if routes is not None:
            return _convolution_of_rows(self, input, *routes)
        if dims == alone:  # an image without its batch
            return _convolution_or(self, input[None], plain).squeeze(0)
        found = _rescaled(self, input, 0) if known is None else None
        if found is not None:
            return _with_room(_rescaled_convolution, self, input, found)
        if known is None:
            return _defined(self, input, plain)
    if known is None:
        y: Tensor = plain(self, input)
        return y
    return _convolved(self, input, known)


def _convolved(self: Any, input: Tensor, known: Known) -> Tensor:
    (weight, updates, dropping), bias = known, _bias(self)
    y: Tensor
    if not updates:
        y = self._conv_forward(input, weight, bias)
        return y
    stride, dilation, groups = self.stride, self.dilation, self.groups
    if updates[0].rounds_twice:
        y = self._conv_forward(input, weight, bias)
        for own, a, up in as_served(input, updates, "matrix", dropping):
            x, padding = padded_input(self, own)
            y = y + branch(x, weight.shape, a, up, stride, padding, dilation, groups)
        return y
    a, b, scale, strength = together(updates, "matrix", dropping)
    if dropping:
        _, padding = padded_input(self, input[:0])  # only the padding is asked for
        window, drops = (stride, padding, dilation, groups), drops_of(input, updates)
        scale = scale if strength == 1 else scale * strength
        values = (weight, bias, a, b, scale, window, drops)
        # padding comes behind the mask: what is padded in is dropped where its source is
        return dropped_convolution(input, lambda x: padded_input(self, x)[0], *values)
    x, padding = padded_input(self, input)
    return convolution(x, weight, bias, a, b, scale, stride, padding, dilation, groups, strength)


def sums_beside(layer: nn.Module) -> bool:
    """Whether `in_one_sum` knows what a layer computes: torch's own class, or what transformers
    computes with its `Conv1D`."""
    return type(layer) in _SUMMED or forward_of(type(layer)) is _conv1d_of_transformers


def in_one_sum(layer: nn.Module, x: Tensor, known: Known) -> Tensor:
    """What a layer of `sums_beside` gives with such updates, as with hard ones."""
    if isinstance(layer, ANY_CONVOLUTION):
        return _convolved(layer, x, known)
    if isinstance(layer, nn.Linear):
        return _product(layer, x, known, "matrix")
    return _product(layer, x, (known[0].t(), *known[1:]), "transposed")


def in_one_sum_of_rows(
    layer: nn.Module, x: Tensor, weight: Tensor, updates: list[LowRank], rows: Choice
) -> Tensor:
    """`in_one_sum` of rows that each have an update."""
    if isinstance(layer, ANY_CONVOLUTION):
        return _convolution_of_rows(layer, x, weight, updates, rows)
    if isinstance(layer, nn.Linear):
        return linear_of_rows(layer, x, weight, updates, rows, "matrix")
    return linear_of_rows(layer, x, weight.t(), updates, rows, "transposed")


def _inner(layer: Any) -> Any:
    own = layer.__dict__
    return own[_PART] if _PART in own else type(layer)._conv_forward


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
    if pads[::2] == pads[1::2]:  # "same" with a kernel of odd size
        # F.pad's pairs, backwards and once each: the first dimension first
        return x, tuple(pads[::-2])
    return F.pad(x, pads), none


def _embedding(self: Any, input: Tensor) -> Tensor:
    return _embedding_or(self, input, plain_forward(self))


def _embedding_or(self: Any, input: Tensor, plain: Any) -> Tensor:
    # renormalising writes into the table, and the others have gradients of their own
    other = self.max_norm is not None or self.scale_grad_by_freq or self.sparse
    known = known_parts(self, input) if plain is _EMBEDDING and not other else None
    if known is None:
        usual = plain is _EMBEDDING and not other
        if usual and only_carries(input):
            return _of_bare(_embedding_or, self, input, plain)
        routes = parts_of_rows(self, input) if usual else None
        if routes is not None:
            return _embedding_of_rows(self, input, *routes)
        y: Tensor = _other_embedding(self, input) if usual else plain(self, input)
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


# --- rows of a batch that take different updates -------------------------------------------------


_Routes = tuple[Tensor, list[LowRank], Choice]


def parts_of_rows(layer: nn.Module, x: Any, name: str = "weight") -> Optional[_Routes]:
    """(base weight, updates that act, on which rows each does) inside of `route`, else None."""
    lists: Any = layer._modules.get("parametrizations")
    plist: Any = None if lists is None else lists._modules.get(name)
    weight = None if plist is None else plist._parameters.get("original")
    if weight is None or type(x) not in PLAIN or type(weight) not in PLAIN:
        return None
    every: list[Any] = [*plist._modules.values()]
    # one that is not ours, or of another kind, has no factors to route
    if {*map(type, every)} != {LowRank}:  # `is_known`, of all
        return None
    # asked at once: inside of a backward each is the switch of the forward
    switches = switches_of(every)
    rows = switches[0].rows
    # those that act; which rows they act on is the same for all
    return None if rows is None else (weight, [u for u, s in zip(every, switches) if s.acts], rows)


def rows_first(layer: nn.Module, x: Tensor, dim: int, rows: Choice, after: int = 0) -> Tensor:
    """An input with its rows in front; one that is there once for all rows is repeated.

    Args:
        dim: where the rows lie.
        after: how many dimensions must follow the rows'.

    Raises:
        AdapterError: it has another number of rows.
    """
    count, there = len(rows.index), x.shape[dim] if x.dim() > dim + after else -1
    # a whole packed batch is not there once for each of its positions
    once = there == 1 and not (rows.packed and x.dim() > dim + 1 + after)
    if there != count and not once:
        raise wrong_rows(type(layer), x, dim, count, rows.packed)
    x = _moved(x, dim, 0)
    return x if there == count else x.expand(count, *x.shape[1:])


def is_flattened(layer: nn.Module, x: Tensor, rows: Choice) -> bool:
    """Whether an input without rows is the batch's positions, see `Flattened`."""
    known, count = rows.flattened, len(rows.index)
    # a compiler shows no memory to compare; rows in front need no such question
    if known is None or rows.dim or rows.packed or is_compiling() or len(x) == count:
        return False
    return known.holds(layer, x, count)


def _moved(x: Tensor, dim: int, to: int) -> Tensor:
    """x with a dimension moved; no view, and no node of autograd, of what is there already."""
    return x if dim == to else x.movedim(dim, to)


def factors_of_rows(updates: list[LowRank], rows: Choice, layout: Layout) -> tuple[Tensor, Tensor]:
    """What `routed.linear` takes: A, and B transposed with its scale, of all adapters."""
    there = of_rows(updates, rows)
    pairs = [(None, None) if one is None else _factors(one, layout) for one in there]
    up = of_factor(routed.joined([b for _, b in pairs], rows.ranks, 1))
    # [ranks + 1, 1] by each rank's owner: one product scales all adapters' B
    scaling = scaling_of_rows(there, up).index_select(0, rows.owner)
    return routed.joined([a for a, _ in pairs], rows.ranks, 0), (up * scaling).t()


def of_rows(updates: list[LowRank], rows: Choice) -> list[Optional[LowRank]]:
    """The update of each of the rows' adapters, None where it does not act."""
    held = {update.adapter: update for update in updates}
    return [held.get(name) for name in rows.names]


def scaling_of_rows(there: Sequence[Optional[LowRank]], like: Tensor) -> Tensor:
    """``[adapters + 1]``: what is before each one's ``B·A``. Of one that is missing, and of the
    base, any number that is finite: their factors are zeros."""
    one = like.new_ones(())
    scales = [one if u is None else u.stored_scale().to(like.dtype) for u in there]
    gains = [one if u is None else u.current().gain.to(like.device, like.dtype) for u in there]
    return torch.stack([*scales, one]) * torch.stack([*gains, one])


def dropped_rows(
    training: bool,
    x: Tensor,
    updates: list[LowRank],
    rows: Choice,
    index: Optional[Tensor] = None,
) -> Tensor:
    """The input of the updates' part: each row drops as its adapter says, which `index` gives where
    it is not that of `rows`."""
    rates = {update.adapter: update.dropout for update in updates}
    if not training or not any(rates.values()):
        return x
    index = rows.index if index is None else index
    dtype = torch.promote_types(x.dtype, torch.float32)  # 16 bits hold no rate exactly
    # [N, 1, ...]: each row's own rate, 0 for the base
    each = x.new_tensor([*(rates.get(name, 0.0) for name in rows.names), 0.0], dtype=dtype)[index]
    each = each.reshape(-1, *[1] * (x.dim() - 1))
    # and of their random numbers one in 256 is zero
    gone = torch.rand_like(x, dtype=dtype) < each
    # divided in float32, and rounded once to x's type
    return torch.where(gone, 0.0, x / (1 - each)).to(x.dtype)


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
    if is_flattened(layer, x, rows):
        in_front = x.reshape(len(rows.index), -1, x.shape[-1])
        y = beside_rows(layer, in_front, updates, rows, layout, base)
        return y.view(*x.shape[:-1], y.shape[-1])
    x = rows_first(layer, x, rows.dim, rows, 1)
    # as served: the base rounds alone, and the updates' part alone
    apart = base is not None and updates[0].rounds_twice
    if base is not None and not apart:
        found = _in_place(layer, x, updates, rows, layout, *base)
        if found is not None:
            return _moved(found, 0, rows.dim)
    down, up = factors_of_rows(updates, rows, layout)
    dropped = dropped_rows(layer.training, x, updates, rows)
    weight, bias = base if base is not None and not apart else (None, None)
    y = routed.linear(x, weight, bias, down, up, rows, None if dropped is x else dropped)
    if base is not None and apart:
        y = F.linear(x, *base) + y
    return _moved(y, 0, rows.dim)


def _in_place(
    layer: nn.Module,
    x: Tensor,
    updates: list[LowRank],
    rows: Choice,
    layout: Layout,
    weight: Tensor,
    bias: Optional[Tensor],
) -> Optional[Tensor]:
    """`beside_rows` of factors where they lie, where kernels serve it."""
    if not x.is_cuda:
        return None
    drops = layer.training and any(update.dropout for update in updates)
    # kernels read factors of one layout where they lie: nothing may be missing or turned
    if drops or len(updates) < len(rows.names) or {u.layout for u in updates} != {layout}:
        return None
    downs, ups, started, _ = zip(*[update.held() for update in updates])
    if {*map(type, downs + ups)} != {nn.Parameter} or started != (None,) * len(started):
        return None  # made for this call, or on several devices
    scales = [update.stored_scale() for update in updates]
    gains = [switch.gain for switch in switches_of(updates)]
    return routed.in_place(x, weight, bias, (downs, ups, scales, gains), rows)


def convolved_rows(layer: Any, x: Tensor, updates: list[LowRank], rows: Choice) -> Tensor:
    """The updates' part of a convolution of each row's update."""
    x, padding = padded_input(layer, dropped_rows(layer.training, x, updates, rows))
    down, up = factors_of_rows(updates, rows, "matrix")
    shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    window = layer.stride, padding, layer.dilation, layer.groups
    return routed.convolved(x, shape, down, up, rows, *window)


def linear_of_rows(
    layer: nn.Module,
    x: Tensor,
    weight: Tensor,
    updates: list[LowRank],
    rows: Choice,
    layout: Layout,
) -> Tensor:
    """A linear layer with each row's update."""
    if not updates:
        return F.linear(x, weight, _bias(layer))
    return beside_rows(layer, x, updates, rows, layout, (weight, _bias(layer)))


def _convolution_of_rows(
    layer: Any, x: Tensor, weight: Tensor, updates: list[LowRank], rows: Choice
) -> Tensor:
    x, bias = rows_first(layer, x, 0, rows, len(layer.kernel_size) + 1), _bias(layer)
    updates = updates if len(x) else []  # torch has no convolution of no groups
    y: Tensor
    if not updates or updates[0].rounds_twice:
        y = layer._conv_forward(x, weight, bias)
        # the branch's input in the output's memory format
        return y + convolved_rows(layer, in_format_of(x, y), updates, rows) if updates else y
    x = in_format_of(x, weight)
    dropped = dropped_rows(layer.training, x, updates, rows)
    # padded after it is dropped, as in `dropped_convolution`
    more = None if dropped is x else padded_input(layer, dropped)[0]
    x, padding = padded_input(layer, x)
    window = (layer.stride, padding, layer.dilation, layer.groups)
    down, up = factors_of_rows(updates, rows, "matrix")
    return routed.convolution(x, weight, bias, down, up, rows, window, more)


def _embedding_of_rows(
    layer: Any, ids: Tensor, weight: Tensor, updates: list[LowRank], rows: Choice
) -> Tensor:
    if not updates:
        return F.embedding(ids, weight, layer.padding_idx)
    ids = rows_first(layer, ids, rows.dim, rows)
    down, up = factors_of_rows(updates, rows, "transposed")
    y = routed.embedding(ids, weight, down, up, rows, layer.padding_idx)
    return _moved(y, 0, rows.dim)
