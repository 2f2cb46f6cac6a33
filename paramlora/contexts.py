"""The context in which the library computes: its own, whatever the caller's."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


def in_own_types(tensor: Tensor) -> AbstractContextManager[Any]:
    """Leave autocast, which would round a product of `tensor`'s device to 16 bits."""
    device = "cpu" if tensor.is_cpu else "cuda" if tensor.is_cuda else tensor.device.type
    if device == "meta" or not _casts(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


@contextmanager
def own_context() -> Iterator[None]:
    """Around what reads, writes or merges: no autocast, and no other default device than the CPU.

    A merge in an evaluation's block, or a file that is read where a model is built on the meta
    device, then gives what it gives elsewhere.
    """
    with ExitStack() as stack:
        for device in ("cpu", "cuda", "xpu", "mps"):
            if _casts(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def _casts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
