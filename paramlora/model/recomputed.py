"""A value whose gradient can be asked for more than once, as that of a parameter can."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from paramlora.errors import AdapterError
from paramlora.update.attached import AttachedUpdate
from paramlora.update.compat import keeps_saved, transformed
from paramlora.update.contexts import without_autocast
from paramlora.update.kinds import FOREIGN, KINDS

AGAIN = "_paramlora_again"  # of layers whose tensors are to be read so, set by `inputs`


def read_again(plist: Any, read: Callable[[Any], Tensor]) -> Tensor:
    """What `read` computes of a list of parametrizations, as it were a parameter.

    Reentrant checkpointing asks each segment for the gradients of what it was handed by keyword,
    and goes on from there to the parameters: once for each segment. A parameter takes that, a sum
    does not, as its tensors are freed at the first time; so it is computed again each time.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return read(plist)
    parameters = [p for p in plist.parameters() if p.requires_grad]
    if not parameters or not all(isinstance(update, AttachedUpdate) for update in plist):
        return read(plist)
    again: Any = _Again.apply
    return again(lambda: read(plist), _Read(plist), *parameters)  # type: ignore[no-any-return]


class _Read:
    """What a value is computed from: the updates' strengths, and the tensors as they lie now."""

    def __init__(self, plist: Any) -> None:
        self.plist = plist
        self.held = [
            (own, name, tensor)
            for one in plist.modules()
            for own in (one._parameters, one._buffers)
            for name, tensor in own.items()
            if tensor is not None
        ]
        # none of ours draws numbers, and of a device a state is waited for
        ours = {*KINDS.values()} - FOREIGN
        drawn = () if all(type(update) in ours for update in plist) else self.held
        cards = {tensor.device for _, _, tensor in drawn if tensor.is_cuda}
        self.cpu = torch.get_rng_state() if drawn else None
        self.cards = {card: torch.cuda.get_rng_state(card) for card in cards}

    def told(self) -> tuple[Any, ...]:
        """Equal as long as nobody has changed them."""
        # an inference tensor counts no versions
        versions = (0 if t.is_inference() else t._version for _, _, t in self.held)
        return (*(update.strength for update in self.plist), *versions)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The tensors where they were then: `torch.func.functional_call` has others there for the
        time of a forward alone."""
        there = [(own, name, tensor, own.get(name)) for own, name, tensor in self.held]
        others = [one for one in there if one[2] is not one[3]]
        for own, name, tensor, _ in others:
            own[name] = tensor
        try:
            with self._drawing():
                yield
        finally:
            for own, name, _, other in others:
                own[name] = other

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """Where somebody's kind may draw numbers, those that it drew then."""
        if self.cpu is None:
            yield
            return
        with torch.random.fork_rng(list(self.cards)):
            torch.set_rng_state(self.cpu)
            for card, state in self.cards.items():
                torch.cuda.set_rng_state(state, card)
            yield


def counted(plist: Any, value: Tensor) -> Tensor:
    """A tensor of an update, told from a layer's own by whoever counts what is saved.

    Checkpointing computes a forward again and refuses where that saves another number of tensors.
    A sum may save none, like the plain tensor that is there once the adapter is gone: then half of
    the gradients would be of the one and half of the other, without a word. What its reader writes
    to is a copy, which is made of tensors that are saved.
    """
    # `keeps_saved`: only checkpointing, or whoever else has hooks on saved tensors, counts them
    counts = value.requires_grad and torch.is_grad_enabled() and keeps_saved()
    # a compiler and a transform know no such function
    if not counts or torch.compiler.is_compiling() or transformed():
        return value
    if any(getattr(update, "written_by_reader", False) for update in plist):
        return value
    return _Counted.apply(value)  # type: ignore[no-any-return, no-untyped-call]


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value.new_empty(0))  # never asked for
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        read: Callable[[], Tensor],
        of: _Read,
        *parameters: nn.Parameter,
    ) -> Tensor:
        ctx.read, ctx.of, ctx.before = read, of, of.told()
        ctx.parameters = parameters  # not saved for the backward, which would free them
        return read().clone()  # an update that does not act gives its input

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:
        # what is computed again would be another sum than the one that was used
        if ctx.of.told() != ctx.before:
            raise AdapterError(
                "an adapted tensor, or the strength of its adapter, changed between forward and "
                "backward. Call backward first, then step or set_adapters."
            )
        twice = torch.is_grad_enabled()  # whether a gradient of this gradient is wanted
        with torch.enable_grad(), ctx.of.in_place():
            value = ctx.read()
        # an update that is off reaches none of its parameters
        how = {"allow_unused": True, "create_graph": twice}
        grads = torch.autograd.grad(value, ctx.parameters, grad, **how)
        return None, None, *grads
