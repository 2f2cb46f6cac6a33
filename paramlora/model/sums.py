"""The dense sums that readers of adapted tensors get: at most one for each tensor and call.

A layer whose forward nobody here knows, or the module around it, may read a tensor many times in
one call: an LSTM four times, a loop over experts once for each. All of them get one sum, which is
computed once and lies in memory once, for as long as the outermost call of a module lasts in this
thread; inside of torch's ``parametrize.cached()``, for as long as that block lasts. A sum is given
again only while everything that it was computed from is as it was, but for what torch leaves no
sign of: a write through ``.data``, and the step of a fused optimizer in compiled code.
"""

import sys
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.optim.optimizer import register_optimizer_step_post_hook

from paramlora.model.recomputed import read_again
from paramlora.update.attached import AttachedUpdate, shares_its_sum
from paramlora.update.compat import cached_by_torch, recorded, traced, transformed
from paramlora.update.contexts import without_autocast
from paramlora.update.geometry import PLAIN
from paramlora.update.lowrank import value_of
from paramlora.update.summand import Summand

# the frame of every call of a module runs this code
_CALL = nn.Module.__call__.__code__
_HELD = "_paramlora_sums"  # what the sums of a call are called among the locals of its frame


def read(plist: Any, again: bool) -> Tensor:
    """What a list of parametrizations computes, or has computed before in this call.

    Args:
        plist: torch's list.
        again: whether gradients are asked of it more than once, see `recomputed`.
    """
    # a sum under a transform is of the transform's tensors, and must not outlive it
    if transformed():
        return value_of(plist)
    updates = _acting(plist)
    # a trace or a recording must see the operations, each time
    held = _held() if updates and not traced() and not recorded() else None
    # nothing to share: no call holds sums, and nobody asks for more gradients
    state = None if not updates or held is None and not again else _State.of(plist, updates)
    if state is None or not updates:
        return read_again(plist, value_of) if again else value_of(plist)
    # by identity: the list lives as long as its layer, and a key of torch's own block is another
    key = ("paramlora", id(plist))
    found = None if held is None else held.get(key)
    if found is None or not found.serves(state):
        # without a graph: each reader's gradient is `_Sum`'s
        with torch.no_grad():
            found = _Found(plist, state, value_of(plist))
        if held is not None:
            held[key] = found
    return found.shown(updates)


def _acting(plist: Any) -> Optional[list[Any]]:
    """The updates that act, or None where one is not ours, holds its factors where their changes
    do not show, or gives what its reader writes to."""
    updates = list(plist._modules.values())
    for update in updates:
        ours = isinstance(update, AttachedUpdate) and shares_its_sum(update)
        if not ours or update.written_by_reader:
            return None
    return [update for update in updates if update.acts]


def _held() -> Optional[dict[Any, Any]]:
    """Where sums are held now: by torch's block, or by the frame of the outermost call of a module
    in this thread, whose locals are gone when it ends, however it does. None outside of both."""
    cached = cached_by_torch()
    if cached is not None:
        return cached
    # of the caller of `read`; this frame is none of a module
    frame, outermost = sys._getframe(1).f_back, None
    while frame is not None:
        if frame.f_code is _CALL:
            outermost = frame
        frame = frame.f_back
    if outermost is None:
        return None
    # a dictionary beside the frame's own variables, freed with it
    there: Any = outermost.f_locals
    if _HELD not in there:
        there[_HELD] = {}
    return there[_HELD]  # type: ignore[no-any-return]


class _Steps:
    """How many steps optimizers have taken. A fused one, and one with kernels of its own, write to
    parameters without counting a version of them."""

    count = 0
    counted = False

    @classmethod
    def until_now(cls) -> int:
        """How many there were, counted from the first call on: before it no sum was held."""
        if not cls.counted:
            cls.counted = True
            register_optimizer_step_post_hook(_stepped)
        return cls.count


def _stepped(*_: Any) -> None:
    # a number in compiled code is guarded, and each step would be compiled anew; a compiled step
    # counts versions itself, but for a fused one, of which torch leaves no sign
    if not is_compiling():
        _Steps.count += 1


@dataclass
class _State:
    """What a sum was computed from, to be compared by what cannot change unseen."""

    tensors: list[Tensor]  # held, so that none of another place gets one's address
    rest: list[Any]

    @classmethod
    def of(cls, plist: Any, updates: list[Any]) -> "Optional[_State]":
        """The state of a list and its updates, None where a change of a tensor would not show."""
        tensors = [plist.original]
        for update in updates:
            held = (*update._parameters.values(), *update._buffers.values())
            tensors += [t for t in held if t is not None]
        # an inference tensor counts no versions
        if any(type(t) not in PLAIN or t.is_inference() for t in tensors):
            return None
        # a sum that was made under inference mode cannot serve autograd
        rest: list[Any] = [torch.is_inference_mode_enabled(), updates, _Steps.until_now()]
        rest += [update.strength for update in updates]
        # `_version` shows what is written in place, `data_ptr` what `.data` was given
        rest += [(t._version, t.data_ptr(), t.requires_grad, t.dtype) for t in tensors]
        return cls(tensors, rest)

    def same(self, other: "_State") -> bool:
        pairs = zip(self.tensors, other.tensors)
        return self.rest == other.rest and all(one is two for one, two in pairs)


class _Found:
    """A sum, and with a gradient the one node of autograd that all its readers share."""

    def __init__(self, plist: Any, state: _State, value: Tensor) -> None:
        self.plist, self.state, self.value = plist, state, value
        self.version = 0 if value.is_inference() else value._version
        self.graphed: Optional[Tensor] = None

    def serves(self, state: _State) -> bool:
        """Whether nothing that it was computed from has changed, nor has a reader written to it."""
        unwritten = self.value.is_inference() or self.value._version == self.version
        # what a reader wrote to is no sum any more: the next one gets a new one
        return unwritten and self.state.same(state)

    def shown(self, updates: list[Any]) -> Tensor:
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in self.state.tensors):
            # an alias: a reader may set `requires_grad` on it
            return self.value.detach()
        if self.graphed is None:
            self.graphed = self._with_gradient([update.summand() for update in updates])
        return self.graphed

    def _with_gradient(self, summands: list[Optional[Summand]]) -> Tensor:
        parts = [part for part in summands if part is not None]
        # another kind knows no gradient of its own: autograd must run its formula
        if len(parts) < len(summands):
            known = [self.value]  # what was computed is not computed again, but for a backward
            return read_again(self.plist, lambda p: known.pop() if known else value_of(p))
        factors = [t for part in parts for t in (part.a, part.b, part.scale)]
        # `apply` directly: transforms were asked for above
        apply: Any = _Sum.apply
        graphed: Tensor = apply(self.value, parts, self.state.tensors[0], *factors)
        return graphed


class _Sum(torch.autograd.Function):
    """Gives a sum its gradient, as often as it is asked for: a parameter takes that, and what is
    read once and used in several places, segments of checkpointing among them, must too. So it
    saves no tensors for autograd, which would free them at the first time."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, parts: list[Summand], *tensors: Tensor) -> Tensor:
        ctx.parts = parts
        return value.detach()

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:
        needs, grads = ctx.needs_input_grad, []
        for index, part in enumerate(ctx.parts):
            # behind value, parts and the base: A, B and scale of each update
            wanted = needs[3 + 3 * index : 6 + 3 * index]
            found = part.gradients(grad) if any(wanted) else (None, None, None)
            grads += [g if want else None for g, want in zip(found, wanted)]
        return None, None, grad if needs[2] else None, *grads
