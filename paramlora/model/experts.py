"""Which classes of experts are known, and their forwards: grouped products of each expert's rows.

transformers gives such a class several implementations of one function (its `integrations.moe`):
a loop, matrices gathered for each row, and grouped products. With an update all of them are this
one, which forms no dense sum. A loop that is known by its class's name is served likewise.
"""

import inspect
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from paramlora.errors import AdapterError
from paramlora.evaluate.dropout import Drops
from paramlora.evaluate.experts import grouped_linear
from paramlora.model.forwards import drops_of, known_parts, plain_forward, together
from paramlora.update.lowrank import LowRank

_Forward = Callable[..., Any]
_REGISTRY = "transformers.integrations.moe"  # whose wrapper calls the implementation asked for
_SERVED = (None, "eager", "grouped_mm", "batched_mm")
_STACKS = ("gate_up_proj", "up_proj", "down_proj")  # what those classes call theirs
# loops of their own: by the name of the forward, in a module of transformers' models
_LOOPS = ("Step3p7Experts.forward", "LongcatFlashExperts.forward")
_SORTED = "ParallelExperts.forward"  # of JetMoE and GraniteMoE: rows sorted, sizes in a list
_EQUAL = "Llama4TextExperts.forward"  # as many rows for each expert


def expert_forward_of(base: type) -> Optional[_Forward]:
    """The fast forward of a class of experts that is known, else None."""
    own: Any = getattr(base, "forward", None)
    code, name = getattr(own, "__code__", None), getattr(own, "__qualname__", "")
    registry = sys.modules.get(_REGISTRY)
    if code is not None and code.co_filename == getattr(registry, "__file__", None):
        return _of_experts(own, implemented=True)
    module = sys.modules.get(getattr(own, "__module__", ""))
    theirs = getattr(module, "__name__", "").startswith("transformers.models.")
    if not theirs or code is None or code.co_filename != getattr(module, "__file__", None):
        return None
    if name in _LOOPS:
        return _of_experts(own, implemented=False)
    if name.endswith(_SORTED):
        return _of_sorted(own)
    return _of_equal(own) if name == _EQUAL else None


def drops_in_experts(base: type, name: str) -> bool:
    """Whether an update of that tensor of that class of experts can drop its own input."""
    own = expert_forward_of(base)
    return own is not None and (name in _STACKS or name == "weight")


class Stack(NamedTuple):
    """A tensor of expert matrices, taken apart."""

    weight: Tensor  # [experts, out, in], or [experts, in, out]
    updates: list[LowRank]  # that act
    dropping: bool  # whether one of them drops inputs now


def stack_of(layer: nn.Module, name: str, x: Any) -> Optional[Stack]:
    """A layer's stack, adapted or not; None where only the definition is right."""
    held = layer._parameters.get(name)
    if held is not None:
        return Stack(held, [], False)
    parts = known_parts(layer, x, name)
    if parts is None or any(update.layout != "stack" for update in parts[1]):
        return None
    return Stack(*parts)


def product(x: Tensor, stack: Stack, ends: Tensor, transposed: bool) -> Tensor:
    """`grouped_linear` of a stack and its updates, which may be none."""
    weight, updates, dropping = stack
    if updates:
        a, b, scale, strength = together(updates, "stack", dropping)
    else:
        a, b = weight[:, :0], weight[:, :, :0]
        scale, strength = torch.ones((), dtype=weight.dtype, device=weight.device), 1.0
    drops: Optional[Drops] = drops_of(x, updates) if dropping else None
    if transposed:
        weight, a, b = weight.mT, b.mT, a.mT
    return grouped_linear(x, weight, ends, a, b, scale, strength, drops)


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
        AdapterError: the layer has no such stack.

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
    stack = stack_of(layer, name, x)
    if stack is None:
        held = getattr(layer, name, None)
        if not isinstance(held, Tensor):
            raise AdapterError(
                f"{type(layer).__name__} has no tensor {name!r}. Name one of its stacks of "
                "matrices, [experts, out, in]."
            )
        stack = Stack(held, [], False)
    if stack.weight.dim() != 3:
        raise AdapterError(
            f"{name!r} of {type(layer).__name__} is of shape {list(stack.weight.shape)}, where a "
            "stack of matrices, [experts, out, in], is needed."
        )
    return product(x, stack, counts.cumsum(0, dtype=torch.int32), False)


@cache
def _of_experts(known: Any, implemented: bool) -> _Forward:
    """The forward of experts that are told, for each token, which of them and how strongly."""
    names = list(inspect.signature(known).parameters)[1:4]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        plain, given = plain_forward(self), {**dict(zip(names, args)), **kwargs}
        asked = getattr(self.config, "_experts_implementation", None) if implemented else "eager"
        stacks = None
        if plain is known and given.keys() == {*names} and _is_theirs(asked):
            stacks = _stacks(self, given[names[0]])
        if stacks is None:
            return plain(self, *args, **kwargs)
        hidden, index, weights = (given[name] for name in names)
        return _experts(self, hidden, index, weights, *stacks, asked in (None, "eager"))

    return forward


def _is_theirs(asked: Any) -> bool:
    """Whether an implementation is transformers' own, and one that is the same function."""
    if asked not in _SERVED or is_compiling():
        return asked in _SERVED
    module: Any = sys.modules.get(_REGISTRY)
    own = getattr(module, f"{asked}_experts_forward", None)
    return own is None or module.ALL_EXPERTS_FUNCTIONS.get(asked) is own


def _stacks(self: nn.Module, x: Any) -> Optional[tuple[Stack, Stack]]:
    """Both stacks, where one has an update that acts."""
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
    loop: bool,
) -> Tensor:
    """What each token's experts give, weighted and summed. An index beyond the experts, which a
    loop passes over, is of another process, or of one that gives its input (LongCat)."""
    flat, top = hidden.reshape(-1, hidden.shape[-1]), index.shape[-1]
    transposed, biased = getattr(self, "is_transposed", False), getattr(self, "has_bias", False)
    ids, order = torch.sort(index.reshape(-1))
    x, beyond = flat[order // top], None
    if loop or self._is_expert_parallel:
        beyond = (ids >= len(second.weight))[:, None]
    y = x if beyond is None else x.masked_fill(beyond, 0)
    y = product(y, first, _ends(ids, first), transposed)
    own = ids.clamp(max=len(second.weight) - 1)
    y = _activated(self, _biased(self, y, own) if biased else y)
    y = product(y, second, _ends(ids, second), transposed)
    y = y + self.down_proj_bias[own] if biased else y
    if beyond is not None:
        y = torch.where(beyond, x if hasattr(self, "identity_expert") else 0, y)
    if getattr(self, "has_post_expert_norm", False):
        y = self.post_expert_norm(y)
    y = y * weights.reshape(-1)[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    total = y[back].view(len(flat), top, -1).sum(1)
    return total.to(hidden.dtype).view(hidden.shape)


def _ends(ids: Tensor, stack: Stack) -> Tensor:
    """Where each matrix's rows end, of sorted indices."""
    experts = torch.arange(len(stack.weight), device=ids.device, dtype=ids.dtype)
    return torch.searchsorted(ids, experts, right=True, out_int32=True)


def _biased(self: Any, y: Tensor, ids: Tensor) -> Tensor:
    bias: Tensor = self.gate_up_proj_bias if self.has_gate else self.up_proj_bias
    return y + bias[ids]


def _activated(self: Any, y: Tensor) -> Tensor:
    if not getattr(self, "has_gate", True):
        return self.act_fn(y)  # type: ignore[no-any-return]
    if hasattr(self, "_apply_gate"):
        return self._apply_gate(y)  # type: ignore[no-any-return]
    gate, up = y.chunk(2, dim=-1)
    return self.act_fn(gate) * up  # type: ignore[no-any-return]


@cache
def _of_sorted(known: Any) -> _Forward:
    """The forward of one product, whose rows are sorted, and told how many each expert has."""

    def forward(self: Any, inputs: Tensor, expert_size: Any) -> Any:
        plain = plain_forward(self)
        stack = stack_of(self, "weight", inputs) if plain is known else None
        if stack is None or not stack.updates:
            return plain(self, inputs, expert_size)
        sizes = torch.as_tensor(expert_size, device=inputs.device)
        return product(inputs, stack, sizes.cumsum(0, dtype=torch.int32), False)

    return forward


@cache
def _of_equal(known: Any) -> _Forward:
    """The forward of experts with as many rows each, one after the other; matrices ``[in, out]``,
    and the second half of the first product is gated by the first."""

    def forward(self: Any, hidden_states: Tensor) -> Any:
        plain = plain_forward(self)
        stacks = _stacks(self, hidden_states) if plain is known else None
        if stacks is None:
            return plain(self, hidden_states)
        x, experts = hidden_states.reshape(-1, self.hidden_size), len(stacks[0].weight)
        ends = torch.arange(1, experts + 1, device=x.device, dtype=torch.int32)
        ends = ends * (len(x) // experts)
        gate, up = product(x, stacks[0], ends, True).chunk(2, dim=-1)
        return product(up * self.act_fn(gate), stacks[1], ends, True)

    return forward
