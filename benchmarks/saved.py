"""Bytes that a layer keeps for backward beyond its input and its parameters."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Tensors
from benchmarks.opponents import Way


def saved_bytes(way: Way, tensors: Tensors, context: AbstractContextManager[Any]) -> int:
    """Counts each storage once; the input and the parameters live anyway, so they are free."""
    owned = [tensors.x, *tensors.layer.parameters(), *way.call.parameters(), *way.call.buffers()]
    free = {t.untyped_storage().data_ptr() for t in owned}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in free:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), context:
        way.call(tensors.x)
    return sum(kept.values())
