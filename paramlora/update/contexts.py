"""The context in which the library computes: its own, whatever the caller's."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Optional

import torch
from torch import Tensor

from paramlora.update.compat import outside_transforms, transforms_active


def autocast_of(x: Tensor) -> Optional[str]:
    """The kind of x's device where autocast is on there, else None. Not every kind has one: the
    meta device, where shapes are inferred, has none, and torch raises when asked."""
    # a device's name takes as long to spell as a launch
    device = "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type
    if device not in ("cuda", "cpu") and not torch.amp.is_autocast_available(device):
        return None
    return device if torch.is_autocast_enabled(device) else None


def in_own_types(x: Tensor) -> AbstractContextManager[Any]:
    """Leave autocast, which would round a product of x's device to 16 bits."""
    device = autocast_of(x)
    return nullcontext() if device is None else torch.autocast(device, enabled=False)


def without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A function's backward in its forward's types, whatever the context that it is called in."""

    # autograd runs a backward in the context of whoever calls it, whose autocast would round
    @functools.wraps(backward)
    def called(ctx: Any, dy: Tensor) -> Any:
        device = autocast_of(dy)
        if device is not None:
            with torch.autocast(device, enabled=False):
                return backward(ctx, dy)
        return backward(ctx, dy)

    return called


def as_made(tensor: Tensor) -> AbstractContextManager[Any]:
    """Around a change of a tensor in place, unseen by autograd: one that was made under
    `torch.inference_mode`, as by a deep copy there, can be changed under it alone."""
    return torch.inference_mode() if tensor.is_inference() else torch.no_grad()


@contextmanager
def own_context() -> Iterator[None]:
    """Around what reads, writes, merges or changes a model: no autocast, no other default device
    than the CPU, and no transform of torch.func, whose tensors nobody can read after it.

    A merge in an evaluation's block, or a file that is read where a model is built on the meta
    device, then gives what it gives elsewhere.
    """
    with ExitStack() as stack:
        # a merge writes into tensors that outlive the transform
        if transforms_active():
            stack.enter_context(outside_transforms())
        for device in ("cpu", "cuda", "xpu", "mps"):
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        # a default device takes factory calls elsewhere, as `torch.device("meta")` in a block does
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
