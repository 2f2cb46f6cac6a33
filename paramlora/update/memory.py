"""The bytes of tensors."""

import ctypes
from collections.abc import Iterator

from torch import Tensor

_CHUNK = 8 << 20


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied nor kept alive by this."""
    place = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(place).cast("B")


def pieces_of(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of any tensor, in pieces."""
    held = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    whole = bytes_of(held) if held.nbytes else memoryview(b"")
    for at in range(0, len(whole), _CHUNK):
        yield whole[at : at + _CHUNK]
