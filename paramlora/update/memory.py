"""The bytes of tensors, and whether all of them are numbers."""

import ctypes
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

_CHUNK = 8 << 20


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied nor kept alive by this."""
    place = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(place).cast("B")


def pieces_of(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of any tensor, in pieces."""
    held = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    content = bytes_of(held) if held.nbytes else memoryview(b"")
    for at in range(0, len(content), _CHUNK):
        yield content[at : at + _CHUNK]


_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds anything that is not finite: a thousand are asked at once."""
    held = [t.detach() for t in tensors if t.numel()]
    # torch takes no mixture of plain and sharded ones
    if any(
        type(t) is not Tensor or t.dtype not in _FLOATS or t.device.type not in ("cpu", "cuda")
        for t in held
    ):
        return all(bool(torch.isfinite(t).all()) for t in held)
    # of nothing the norm is no tensor in older versions
    largest = nn.utils.get_total_norm(held, math.inf, foreach=True) if held else 0.0
    return math.isfinite(largest)
