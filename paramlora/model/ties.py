"""Which layers hold one tensor, as one object or as one memory."""

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from paramlora.update.geometry import PLAIN
from paramlora.update.walk import paths_of


def holders(model: nn.Module) -> "Counter[int]":
    """How many layers hold each parameter or buffer, by ``id``; a shared layer counts once."""
    return Counter(id(t) for module in paths_of(model) for _, t in _held(module))


def overlapping(model: nn.Module) -> dict[int, list[str]]:
    """For a tensor, by ``id``, the names of one or two others that share memory with it, as
    ``b.data = a.data`` has them do; tensors that share none are left out."""
    named = {
        id(tensor): (f"{path}.{name}" if path else name, tensor)
        for module, path in paths_of(model).items()
        for name, tensor in _held(module)
        if type(tensor) in PLAIN and not tensor.is_meta and tensor.numel()
        if tensor.layout is torch.strided  # others have no memory of one piece
    }
    stores: dict[tuple[torch.device, int], list[int]] = {}
    for key, (_, tensor) in named.items():
        memory = tensor.device, tensor.untyped_storage().data_ptr()
        stores.setdefault(memory, []).append(key)
    out: dict[int, list[str]] = {}
    for keys in stores.values():
        if len(keys) > 1:
            # by their starts, so that neighbours are enough to compare
            spans = sorted((*_span(named[key][1]), key) for key in keys)
            for key, others in _crossing(spans):
                out[key] = [named[other][0] for other in others]
    return out


def _held(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for held in (module._parameters, module._buffers):
        for name, tensor in held.items():
            if tensor is not None:
                yield name, tensor


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor and the one after its last, in its storage."""
    # by strides: what an expanded or a transposed tensor really reaches
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride()))
    start = int(tensor.storage_offset()) * tensor.itemsize
    return start, start + (last + 1) * tensor.itemsize


def _crossing(spans: list[tuple[int, int, int]]) -> Iterator[tuple[int, list[int]]]:
    """(key, keys of what it overlaps) of spans in the order of their starts, where there is any:
    the one before that reaches furthest, and the next one; of a thousand views not every pair."""
    furthest = spans[0]
    for index, (start, end, key) in enumerate(spans):
        others = [furthest[-1]] if index and start < furthest[1] else []
        others += [other for begin, _, other in spans[index + 1 : index + 2] if begin < end]
        if others:
            yield key, others
        furthest = max(furthest, spans[index], key=lambda span: span[1])
