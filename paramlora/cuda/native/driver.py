"""CUDA's driver, by the few functions that a launch takes; nothing is linked against it."""

import ctypes
import functools
from typing import Any

_CALLS = {"launch": "cuLaunchKernelEx", "describe": "cuTensorMapEncodeTiled"}


@functools.cache
def _library() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def addresses() -> dict[str, int]:
    """Where the driver's functions are that C++ calls."""
    found = {name: getattr(_library(), call) for name, call in _CALLS.items()}
    return {name: ctypes.cast(call, ctypes.c_void_p).value or 0 for name, call in found.items()}


def sizes_of(kernel: int) -> list[int]:
    """Bytes of each of a kernel's parameters, as the driver counts them (since CUDA 12.4)."""
    sizes: list[int] = []
    size = ctypes.c_size_t()
    of = _library().cuFuncGetParamInfo
    offset = ctypes.byref(ctypes.c_size_t())
    # an index past the last parameter ends it with an error
    while not of(ctypes.c_void_p(kernel), ctypes.c_size_t(len(sizes)), offset, ctypes.byref(size)):
        sizes.append(size.value)
    return sizes
