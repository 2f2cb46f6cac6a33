"""Which classes of experts are known, and their forwards: grouped products of each expert's rows.

transformers gives such a class several implementations of one function (its `integrations.moe`):
a loop, matrices gathered for each row, and grouped products. With an update all of them are this
one, which forms no dense sum. A loop that is known by its class's name is served likewise.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from paramlora.errors import AdapterError
from paramlora.evaluate.dropout import Drops
from paramlora.evaluate.experts import grouped_linear, owners, plain_product
from paramlora.evaluate.functional import cast
from paramlora.evaluate.routed_experts import grouped_linear_of_rows, pairs_of
from paramlora.evaluate.sources import Chosen, Computed, Source
from paramlora.model.forwards import (
    as_served,
    bare,
    dropped_rows,
    drops_of,
    in_class_of,
    known_parts,
    names_in,
    of_rows,
    own_class,
    parts_of_rows,
    plain_forward,
    refuse_dropout,
    scaling_of_rows,
    together,
    why_defined,
    written_in,
)
from paramlora.update.choice import Choice, wrong_rows
from paramlora.update.compat import (
    ANY_DROPOUT,
    asserted,
    every_module_hooks,
    recorded,
    traced,
)
from paramlora.update.contexts import autocast_of, in_own_types
from paramlora.update.geometry import PLAIN
from paramlora.update.lowrank import LowRank
from paramlora.update.narrow import of_factor, wide

_Forward = Callable[..., Any]
_REGISTRY = "transformers.integrations.moe"  # whose wrapper calls the implementation asked for
_SERVED = (None, "eager", "grouped_mm", "batched_mm")
_STACKS = ("gate_up_proj", "up_proj", "down_proj")  # what those classes call theirs
# loops of their own: by the name of the forward, in a module of transformers' models
_LOOPS = ("Step3p7Experts.forward", "LongcatFlashExperts.forward")
_SORTED = "ParallelExperts.forward"  # of JetMoE and GraniteMoE: rows sorted, sizes in a list
_EQUAL = "Llama4TextExperts.forward"  # as many rows for each expert
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# torch's activations that draw random numbers in training, which a second call would draw anew
_RANDOM: tuple[type[nn.Module], ...] = (nn.RReLU, *ANY_DROPOUT)


def expert_forward_of(base: type) -> Optional[_Forward]:
    """The fast forward of a class of experts that is known, else None."""
    own: Any = getattr(base, "forward", None)
    code, name = getattr(own, "__code__", None), getattr(own, "__qualname__", "")
    registry = sys.modules.get(_REGISTRY)
    # transformers wraps such a forward in its registry's module, whose file the wrapper's code has
    if code is not None and code.co_filename == getattr(registry, "__file__", None):
        return _of_experts(own, implemented=True)
    module = sys.modules.get(getattr(own, "__module__", ""))
    theirs = getattr(module, "__name__", "").startswith("transformers.models.")
    # known by name: the code must be of the module that it says, not somebody's own of that name
    if not theirs or code is None or code.co_filename != getattr(module, "__file__", None):
        return None
    if name in _LOOPS:
        return _of_experts(own, implemented=False)
    if name.endswith(_SORTED):
        return _of_sorted(own)
    return _of_equal(own) if name == _EQUAL else None


def drops_in_experts(base: type, name: str) -> bool:
    """Whether an update of that tensor of that class of experts can drop its own input: of a class
    that is known, or of one's own that says `expert_linear`, which is told the input."""
    if expert_forward_of(base) is None:
        return _says_expert_linear(base)
    return name in _STACKS or name == "weight"


@functools.cache
def _says_expert_linear(base: type) -> bool:
    """Whether a method of a class, but for `nn.Module`'s, names `expert_linear`, by any name."""
    methods = (f for kind in base.__mro__ if kind is not nn.Module for f in vars(kind).values())
    return any(_names_expert_linear(m) for m in methods if inspect.isfunction(m))


def _names_expert_linear(method: Any) -> bool:
    known, names = inspect.unwrap(method).__globals__, names_in(method)
    return "expert_linear" in names or any(known.get(name) is expert_linear for name in names)


class Stack(NamedTuple):
    """A tensor of expert matrices, taken apart."""

    weight: Tensor  # [experts, out, in], or [experts, in, out]
    updates: list[LowRank]  # that act
    dropping: bool  # whether one of them drops inputs now
    rows: Optional[Choice] = None  # which take which, inside of `route`


def stack_of(layer: nn.Module, name: str, x: Any) -> Optional[Stack]:
    """A layer's stack, adapted or not; None where only the definition is right."""
    held = layer._parameters.get(name)
    if held is not None:
        return Stack(held, [], False) if type(held) is nn.Parameter else None
    x = bare(x)
    # of somebody's tensor class no grouped product is known, not even one that drops
    if type(x) not in PLAIN and not is_compiling():
        return None
    parts = known_parts(layer, x, name)
    if parts is None:
        routes = parts_of_rows(layer, x, name)
        # dropping: `dropped_rows` tells from each update's rate whether any does
        stack = None if routes is None else Stack(*routes[:2], layer.training, routes[2])
    else:
        stack = Stack(*parts)
    if stack is None or any(update.layout != "stack" for update in stack.updates):
        return None
    return stack


def takes_rows(base: type, name: str) -> bool:
    """Whether a class of experts knows which token each row of that stack is of, so that the rows
    of a batch can take different adapters."""
    own = expert_forward_of(base)
    return own is not None and name in _STACKS


def product(
    x: Tensor,
    stack: Stack,
    ends: Tensor,
    transposed: bool,
    tokens: Optional[tuple[Tensor, Tensor]] = None,
    source: Optional[Source] = None,
    bias: Optional[Tensor] = None,
) -> Tensor:
    """`grouped_linear` of a stack and its updates, which may be none.

    Args:
        tokens: each row's expert, and its row of the batch; where those take adapters.
    """
    if bias is not None and not _is_plain(bias, x, stack.weight):
        y = product(x, stack, ends, transposed, tokens, source)
        # the bias gets its gradient here, which the product inside does not give it
        return y + bias[owners(ends, len(y))]
    if stack.rows is not None and stack.updates:
        if tokens is None:
            raise AdapterError(_UNTOLD)
        # made here: the rows are sorted anew by pairs anyway
        x = x if source is None else source.rows(x)
        return _product_of_rows(x, stack, stack.rows, ends, transposed, *tokens, bias)
    weight, updates, dropping, _ = stack
    if updates and updates[0].rounds_twice:
        return _as_served(x, stack, ends, transposed, source, bias)
    if updates:
        a, b, scale, strength = together(updates, "stack", dropping)
    else:
        a, b = weight[:, :0], weight[:, :, :0]
        scale, strength = torch.ones((), dtype=weight.dtype, device=weight.device), 1.0
    drops: Optional[Drops] = drops_of(x, updates) if dropping else None
    if transposed:
        weight, a, b = weight.mT, b.mT, a.mT
    return grouped_linear(x, weight, ends, a, b, scale, strength, drops, source, bias)


def _as_served(
    x: Tensor,
    stack: Stack,
    ends: Tensor,
    transposed: bool,
    source: Optional[Source],
    bias: Optional[Tensor],
) -> Tensor:
    """A stack's product as servers compute it: the base's is rounded, then the rounded update
    added."""
    y = product(x, Stack(stack.weight, [], False), ends, transposed, None, source, bias)
    # float16 in float32, where the thin product's range does not matter
    x = wide(cast(x if source is None else source.rows(x), y.dtype))
    for own, a, up in as_served(x, stack.updates, "stack", stack.dropping):
        a, up = (up.mT, a.mT) if transposed else (a, up)
        thin = plain_product(own, cast(a, x.dtype), ends)
        y = y + cast(plain_product(thin, cast(up, x.dtype), ends), y.dtype)
    return y


def _is_plain(bias: Tensor, x: Tensor, weight: Tensor) -> bool:
    """Whether a bias may be added within the product: not trained, and of its type."""
    return not bias.requires_grad and bias.dtype == weight.dtype and autocast_of(x) is None


def _product_of_rows(
    x: Tensor,
    stack: Stack,
    rows: Choice,
    ends: Tensor,
    transposed: bool,
    experts: Tensor,
    batch: Tensor,
    bias: Optional[Tensor],
) -> Tensor:
    adapters = rows.index[batch]
    there = of_rows(stack.updates, rows)
    sides = [None if one is None else one.factors() for one in there]
    weight = stack.weight
    if transposed:
        weight, sides = (
            weight.mT,
            [None if own is None else (own[1].mT, own[0].mT) for own in sides],
        )
    # in float32 where x has 16 bits, which would round each scale and strength
    scaling = scaling_of_rows(there, of_factor(x))
    down = [None if own is None else own[0] for own in sides]
    up = [None if own is None else of_factor(own[1]).mT * s for own, s in zip(sides, scaling)]
    pairs = pairs_of(experts, adapters, len(weight), len(rows.names))
    dropped = dropped_rows(stack.dropping, x, stack.updates, rows, adapters)
    apart, twice = None if dropped is x else dropped, stack.updates[0].rounds_twice
    return grouped_linear_of_rows(x, weight, ends, down, up, pairs, apart, twice, bias)


_UNTOLD = (
    "rows of a batch take different adapters here, and expert_linear is not told which row each of "
    "its inputs is of. Call it outside of paramlora.route."
)


def batch_rows(layer: nn.Module, hidden: Tensor, stacks: tuple[Stack, ...]) -> Optional[Tensor]:
    """``[tokens]``, the batch's row of each token of ``[..., hidden]``, inside of `route`.

    The tokens of a row lie together where the rows are in the first dimension, as transformers'
    blocks flatten them, and one of each row after the other where they are in the second.

    Raises:
        AdapterError: they are no whole number of tokens for each row.
    """
    rows = next((stack.rows for stack in stacks if stack.rows is not None), None)
    if rows is None:
        return None
    tokens, count = hidden.shape[:-1].numel(), len(rows.index)
    # the rows in a third dimension or behind are no longer there once tokens are flattened
    if rows.dim > 1 or not count or tokens % count:
        raise wrong_rows(type(layer), hidden, rows.dim, count)
    every = torch.arange(tokens, device=hidden.device)
    return every % count if rows.dim else every // (tokens // count)


def expert_linear(layer: nn.Module, name: str, x: Tensor, counts: Tensor) -> Tensor:
    """``x_e W_eᵀ`` of a layer's stack of matrices, for a class of experts of one's own.

    With updates attached it is ``x_e W_eᵀ + s·(x_e A_eᵀ) B_eᵀ``, dropout and all, without the dense
    sum that reading ``getattr(layer, name)`` forms; without, it is the plain grouped product.

    Args:
        layer: the module that holds the stack, adapted or not.
        name: of the stack, ``[experts, out, in]``.
        x: ``[rows, in]``, sorted by expert.
        counts: ``[experts]``, whole numbers: how many rows each has.

    Returns:
        ``[rows, out]``.

    Raises:
        AdapterError: the layer has no such stack, x is no matrix, or `counts` are not its rows.
        RuntimeError: `counts` on a device, or in compiled code, are wrong numbers: no device is
            waited for, so that it is a later call that fails, as of an index beyond a table.

    Example:
        >>> import paramlora
        >>> class Experts(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.w1 = nn.Parameter(torch.randn(2, 5, 4))
        ...     def forward(self, x, counts):
        ...         return paramlora.expert_linear(self, "w1", x, counts)
        >>> model = paramlora.attach(Experts(), {"w1": {"r": 2}})
        >>> x, counts = torch.randn(3, 4), torch.tensor([2, 1])
        >>> assert torch.allclose(model(x, counts)[:2], x[:2] @ model.w1[0].T, atol=1e-5)
    """
    stack, kind = stack_of(layer, name, x), own_class(layer).__name__
    if stack is None:
        held = getattr(layer, name, None)
        if not isinstance(held, Tensor):
            raise AdapterError(
                f"{kind} has no tensor {name!r}. Name one of its stacks of "
                "matrices, [experts, out, in]."
            )
        refuse_dropout(layer, *why_defined(x), name)
        stack = Stack(held, [], False)
    if stack.weight.dim() != 3:
        raise AdapterError(
            f"{name!r} of {kind} is of shape {list(stack.weight.shape)}, where a stack of "
            "matrices, [experts, out, in], is needed. Name such a one."
        )
    if x.dim() != 2:
        raise AdapterError(
            f"x of {name!r} of {kind} must be [rows, in], sorted by expert, got {list(x.shape)}. "
            "Flatten it."
        )
    ends = _ends_of_counts(f"{name!r} of {kind}", len(stack.weight), x, counts)
    return in_class_of(x, product(bare(x), stack, ends, False))


def _ends_of_counts(where: str, experts: int, x: Tensor, counts: Any) -> Tensor:
    """``[experts]``, where each expert's rows end, in the 32 bits that torch's grouped product and
    the kernels take.

    Raises:
        AdapterError: the counts are no whole numbers of that many matrices, or not all of x's rows.
        RuntimeError: so they are on a device, or in compiled code, which nobody waits for.
    """
    whole = isinstance(counts, Tensor) and counts.dtype in _WHOLE
    if not whole or counts.shape != (experts,):
        got = f"{list(counts.shape)} of {counts.dtype}" if isinstance(counts, Tensor) else counts
        raise AdapterError(
            f"counts must tell the rows of each of the {experts} matrices of {where}, in a tensor "
            f"of {experts} whole numbers, got {got}. Give index.bincount(minlength={experts})."
        )
    if counts.device != x.device:
        raise AdapterError(
            f"counts of {where} lie on {counts.device}, and x on {x.device}. Give "
            "counts.to(x.device)."
        )
    counts = bare(counts)
    ends: Tensor = counts.cumsum(0)  # in 64 bits: what 32 cannot hold would pass for less
    # a number is read where it costs no wait, and where nobody follows the operations
    if counts.is_cpu and type(counts) in PLAIN and not (is_compiling() or traced() or recorded()):
        given = counts.tolist()
        if sum(given) != len(x) or min(given, default=0) < 0:
            raise AdapterError(
                f"counts of {where} must add up to the rows of x, {len(x)}, none below 0, got "
                f"{given}. Give index.bincount(minlength={experts})."
            )
    else:
        sound = ((counts >= 0) & (ends[-1:] == len(x))).all()
        # without the number of rows, which compiled code would hold fast
        asserted(sound, f"counts of {where} must add up to the rows of x, none below 0")
    return ends.to(torch.int32)


@functools.cache
def _of_experts(known: Any, implemented: bool) -> _Forward:
    """The forward of experts that are told, for each token, which of them and how strongly."""
    names = list(inspect.signature(known).parameters)[1:4]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        plain, given = plain_forward(self), {**dict(zip(names, args)), **kwargs}
        asked = getattr(self.config, "_experts_implementation", None) if implemented else "eager"
        # an argument beyond these three means something that is not known here
        serves = plain is known and given.keys() == {*names} and _is_theirs(asked)
        stacks = _stacks(self, given[names[0]]) if serves else None
        if stacks is None:
            if serves:
                refuse_dropout(self, *why_defined(given[names[0]]))
            _refuse_dropout(self, f"the implementation {asked!r}" if implemented else "its loop")
            return plain(self, *args, **kwargs)
        # a router's answers are of the class of what it was asked
        hidden, index, weights = (bare(given[name]) for name in names)
        y = _experts(self, hidden, index, weights, *stacks, asked)
        return in_class_of(given[names[0]], y)

    return forward


def _refuse_dropout(self: nn.Module, how: str) -> None:
    """Say so where dropout would act, had the forward not to be left to the dense sums."""
    # attached to a layer whose forward is not known, dropout could not act, see `_check_dropout`
    names = 'Choose "eager", "grouped_mm" or "batched_mm" by set_experts_implementation'
    refuse_dropout(self, f"by {how}", names)


def _is_theirs(asked: Any) -> bool:
    """Whether an implementation is transformers' own, and one that is the same function."""
    # a compiler guards each dictionary that is looked into
    if asked not in _SERVED or is_compiling():
        return asked in _SERVED
    module: Any = sys.modules.get(_REGISTRY)
    own = getattr(module, f"{asked}_experts_forward", None)
    # a user's own function under one of these names is not ours to replace
    return own is None or module.ALL_EXPERTS_FUNCTIONS.get(asked) is own


def _stacks(self: nn.Module, x: Any) -> Optional[tuple[Stack, Stack]]:
    """The stacks of an experts' first and second product, where an update acts on one; else
    None."""
    up = "gate_up_proj" if getattr(self, "has_gate", True) else "up_proj"
    first, second = stack_of(self, up, x), stack_of(self, "down_proj", x)
    if first is None or second is None or not first.updates + second.updates:
        return None
    return first, second


def _experts(
    self: Any,
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    first: Stack,
    second: Stack,
    asked: Any,
) -> Tensor:
    """What each token's experts give, weighted and summed. An index beyond the experts, which a
    loop passes over, is of another process, or of one that gives its input (LongCat).

    Args:
        asked: the implementation.
    """
    flat, top = hidden.reshape(-1, hidden.shape[-1]), index.shape[-1]
    batch = batch_rows(self, hidden, (first, second))
    transposed, biased = getattr(self, "is_transposed", False), getattr(self, "has_bias", False)
    ids, order = torch.sort(index.reshape(-1))
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    told = None if batch is None else (ids, batch[order // top])
    # older transformers do not tell
    partial = asked in (None, "eager") or getattr(self, "_is_expert_parallel", True)
    # torch's grouped product computes in the weight's type, whatever autocast asks for
    types = in_own_types if asked == "grouped_mm" else nullcontext
    chosen, bias = Chosen(order, back, top, partial), _bias(self) if biased else None
    with types(flat):
        y = product(flat, first, _ends(ids, first), transposed, told, chosen, bias)
    activated: Optional[Computed] = None
    if _can_be_made_again(self) and autocast_of(y) is None:
        # not computed yet: `product` makes it where it is needed, and again for gradients
        activated = Computed(functools.partial(_activated, self))
    else:
        y = _activated(self, y)
    bias = self.down_proj_bias if biased else None
    with types(y):
        y = product(y, second, _ends(ids, second), transposed, told, activated, bias)
    if partial:
        # of other processes' experts nothing was computed: any number may stand there
        y = y.masked_fill((ids >= len(second.weight))[:, None], 0)
    if getattr(self, "has_post_expert_norm", False):
        y = self.post_expert_norm(y)
    y = y * weights.reshape(-1)[order, None]
    # each size in full: torch infers none of a batch without tokens
    total = y[back].view(len(flat), top, y.shape[1]).sum(1)
    if hasattr(self, "identity_expert"):
        # LongCat's identity experts have indices behind the real ones
        own = weights.masked_fill(index < len(second.weight), 0).reshape(len(flat), top)
        total = total + flat * own.sum(1, keepdim=True)
    return total.to(hidden.dtype).view(hidden.shape)


def _ends(ids: Tensor, stack: Stack) -> Tensor:
    """Where each matrix's rows end, of sorted indices."""
    experts = torch.arange(len(stack.weight), device=ids.device, dtype=ids.dtype)
    return torch.searchsorted(ids, experts, right=True, out_int32=True)


def _bias(self: Any) -> Tensor:
    return self.gate_up_proj_bias if self.has_gate else self.up_proj_bias  # type: ignore[no-any-return]


def _can_be_made_again(self: Any) -> bool:
    """Whether what lies between both products is known to be a function of the first one's output
    alone: then it may be computed apart from autograd's graph, and once more in the backward. A
    gate or an activation of somebody's own may train parameters, or draw random numbers; whoever
    hooks an activation reads it once, and perhaps wants gradients of what was read."""
    if is_compiling():  # which keeps or computes again what it finds best
        return False
    gate, act = getattr(type(self), "_apply_gate", None), getattr(self, "act_fn", None)
    if "_apply_gate" in vars(self) or gate is not None and not _is_of_libraries(gate):
        return False
    if not isinstance(act, nn.Module):
        return act is None or _is_of_libraries(act)
    hooks = act._forward_hooks, act._forward_pre_hooks, act._backward_hooks, act._backward_pre_hooks
    if any(hooks) or every_module_hooks() or "forward" in vars(act):
        return False
    # xIELU's parameters want gradients too
    plain = not isinstance(act, _RANDOM) and not any(True for _ in act.parameters())
    return plain and _is_of_libraries(type(act).forward)


def _is_of_libraries(function: Any) -> bool:
    """Whether torch or transformers wrote a function."""
    module = getattr(function, "__module__", None) or ""
    return module.split(".")[0] in ("torch", "transformers") and written_in(module, function)


def _activated(self: Any, y: Tensor) -> Tensor:
    if not getattr(self, "has_gate", True):
        return self.act_fn(y)  # type: ignore[no-any-return]
    if hasattr(self, "_apply_gate"):
        return self._apply_gate(y)  # type: ignore[no-any-return]
    gate, up = y.chunk(2, dim=-1)
    return self.act_fn(gate) * up  # type: ignore[no-any-return]


@functools.cache
def _of_sorted(known: Any) -> _Forward:
    """The forward of one product, whose rows are sorted, and told how many each expert has."""

    def forward(self: Any, inputs: Tensor, expert_size: Any) -> Any:
        plain = plain_forward(self)
        stack = stack_of(self, "weight", inputs) if plain is known else None
        if stack is None or not stack.updates:
            _refuse_dropout(self, "its loop")
            return plain(self, inputs, expert_size)
        sizes = torch.as_tensor(expert_size, device=inputs.device)
        y = product(bare(inputs), stack, bare(sizes).cumsum(0, dtype=torch.int32), False)
        return in_class_of(inputs, y)

    return forward


@functools.cache
def _of_equal(known: Any) -> _Forward:
    """The forward of experts with as many rows each, one after the other; matrices ``[in, out]``,
    and the second half of the first product is gated by the first."""

    def forward(self: Any, hidden_states: Tensor) -> Any:
        plain = plain_forward(self)
        stacks = _stacks(self, hidden_states) if plain is known else None
        if stacks is None:
            _refuse_dropout(self, "its own product")
            return plain(self, hidden_states)
        rows = bare(hidden_states).reshape(-1, self.hidden_size)
        return in_class_of(hidden_states, _equal(self, rows, stacks))

    return forward


def _equal(self: Any, x: Tensor, stacks: tuple[Stack, Stack]) -> Tensor:
    """What such rows give, ``[experts * tokens, in]``."""
    experts = len(stacks[0].weight)
    every = torch.arange(experts, device=x.device, dtype=torch.int32)
    tokens = len(x) // experts
    ends, told = (every + 1) * tokens, None
    batch = batch_rows(self, x[:tokens], stacks)  # each expert has all tokens
    if batch is not None:
        told = (every.long().repeat_interleave(tokens), batch.repeat(experts))
    gate, up = product(x, stacks[0], ends, True, told).chunk(2, dim=-1)
    return product(up * self.act_fn(gate), stacks[1], ends, True, told)
