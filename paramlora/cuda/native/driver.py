"""What CUDA's driver hands a kernel that Triton compiled, told for C++, which launches it without
Triton's own launcher (its ``backends/nvidia/driver.py``).

Nothing is taken for granted: a kernel whose parameters the driver itself counts otherwise, or that
needs more than is known here, is left to Python.
"""

import ctypes
import functools
import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import Any, NamedTuple, Optional

# of a parameter; a block is a CUtensorMap
_BYTES = {"i32": 4, "i64": 8, "fp32": 4, "pointer": 8, "block": 128}
_SCRATCH = ("pointer", "pointer")  # Triton adds two addresses to every kernel's parameters
_CALLS = {"launch": "cuLaunchKernelEx", "describe": "cuTensorMapEncodeTiled"}


class Described(NamedTuple):
    """A matrix that the tensor memory engine loads: the slot of its address, and its shape, its
    strides and the shape of a block, see `tiles.Tiles`."""

    slot: IntEnum
    layout: tuple[list[int], ...]


class Handed(NamedTuple):
    """A launch, as `linear.cpp` reads it.

    Args:
        kernel: the driver's handle.
        threads: of a program.
        shared: bytes of memory that they share.
        parameters: of each its slot, or -1, and the bits of what never changes.
        blocks: of each matrix that the tensor memory engine loads its slot, the engine's swizzle,
            the shapes of a block and of the matrix, and bytes from row to row.
    """

    kernel: int
    threads: int
    shared: int
    parameters: list[tuple[int, int]]
    blocks: list[tuple[int, int, tuple[int, ...], tuple[int, ...], int]]


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


def handed(compiled: Any, given: tuple[Any, ...], first: int) -> Optional[Handed]:
    """A launch of a compiled kernel, or None where it needs more than is known here.

    Args:
        compiled: by Triton.
        given: for each of its arguments a number, the slot of one that changes from launch to
            launch, or a matrix that the tensor memory engine loads.
        first: the slot of the first such matrix; the others follow.
    """
    try:
        about, kinds = compiled.metadata, list(compiled.src.signature.values())
        if not _is_simple(about) or len(kinds) != len(given):
            return None
        # what is constant is compiled into the kernel
        pairs = [(kind, one) for kind, one in zip(kinds, given) if kind != "constexpr"]
        loads = iter(about.tensordesc_meta or ())
        blocks = [_block(one, next(loads)) for _, one in pairs if isinstance(one, Described)]
        told = [*_parameters(pairs, first), *((kind, -1, 0) for kind in _SCRATCH)]
        if [_BYTES[kind] for kind, *_ in told] != sizes_of(compiled.function):
            return None
        parameters = [(slot, bits) for _, slot, bits in told]
        threads = 32 * about.num_warps
        return Handed(compiled.function, threads, about.shared, parameters, blocks)
    except (AttributeError, KeyError, StopIteration):  # of a Triton that names them otherwise
        return None


def _is_simple(about: Any) -> bool:
    """Whether a kernel is launched by its grid alone."""
    more = about.launch_pdl, about.launch_cooperative_grid, about.num_ctas > 1
    return not any((*more, about.global_scratch_size, about.profile_scratch_size))


def _parameters(pairs: Iterable[tuple[str, Any]], first: int) -> Iterable[tuple[str, int, int]]:
    """Of each parameter its kind, its slot or -1, and the bits of what never changes."""
    for kind, one in pairs:
        if isinstance(one, Described):
            shape, strides, _ = one.layout
            # Triton's kernels take a descriptor as the map, then its shape and its strides
            yield "block", first, 0
            first += 1
            yield from (("i32", -1, n) for n in shape)
            yield from (("i64", -1, n) for n in strides)
        elif isinstance(one, IntEnum):
            yield "pointer" if kind.startswith("*") else kind, int(one), 0
        else:
            yield kind, -1, _bits(one)


def _block(of: Described, load: Any) -> tuple[int, int, tuple[int, ...], tuple[int, ...], int]:
    shape, strides, _ = of.layout
    # `linear.cpp` describes bfloat16 alone; the distance of rows is in bytes
    if load["fp4_padded"] or load["elem_size"] != 2:
        raise KeyError(load["elem_size"])
    return int(of.slot), load["swizzle"], tuple(load["block_size"]), tuple(shape), 2 * strides[0]


def _bits(number: Any) -> int:
    """Those of a number in the lower end of 64."""
    if isinstance(number, float):
        return int.from_bytes(struct.pack("<f", number), "little")
    return int(number) % 2**64
