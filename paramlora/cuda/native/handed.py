"""What CUDA's driver hands a kernel that Triton compiled, told for C++, which launches it without
Triton's own launcher (its ``backends/nvidia/driver.py``).

Nothing is taken for granted: a kernel whose parameters the driver itself counts otherwise, or that
needs more than is known here, is left to Python.
"""

import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import Any, NamedTuple, Optional

from paramlora.cuda.native import driver, library

_ELEMENTS = {"fp16": 6, "bf16": 9}  # as CUtensorMapDataType numbers them
# of a parameter; a block is a CUtensorMap
_BYTES = {"i32": 4, "i64": 8, "fp32": 4, "pointer": 8, "block": 128}
_SCRATCH = ("pointer", "pointer")  # Triton adds two addresses to every kernel's parameters


class Slot(int):
    """The number of a slot: what is in it changes from launch to launch."""


class Described(NamedTuple):
    """A matrix that the tensor memory engine loads: the slot of its address, and its shape, its
    strides and the shape of a block, see `tiles.Tiles`."""

    slot: int
    layout: tuple[list[int], ...]


class Handed(NamedTuple):
    """A launch, as `launch.h` reads it.

    Args:
        kernel: the driver's handle.
        grid: how many programs.
        threads: of a program.
        shared: bytes of memory that they share.
        early: may start before the kernel ahead ends.
        first: the slot of the first of the blocks, as parameters name them.
        parameters: of each its slot, or -1, and the bits of what never changes.
        blocks: of each matrix that the tensor memory engine loads the slot of its address, the
            engine's swizzle, the shapes of a block and of the matrix, bytes from row to row, and
            the type of its elements.
    """

    kernel: int
    grid: int
    threads: int
    shared: int
    early: bool
    first: int
    parameters: list[tuple[int, int]]
    blocks: list[tuple[int, int, tuple[int, ...], tuple[int, ...], int, int]]


def launcher(
    compiled: Any, grid: int, layouts: tuple[Any, ...], kinds: tuple[type, ...], tail: Any
) -> Any:
    """A launch by C++, called with the stream and what is of each of `kinds`; or None where that
    was not built, or where the launch needs more than is known here.

    Args:
        compiled, grid: as of `handed`.
        layouts: of the first arguments, matrices that the tensor memory engine loads.
        kinds: of the arguments that change: an address or a number, a whole one or not.
        tail: the arguments that follow and never change.
    """
    module = library.loaded()
    if module is None:
        return None
    slots = [*map(Slot, range(len(kinds)))]
    matrices = map(Described, slots, layouts)
    told = handed(compiled, grid, (*matrices, *slots[len(layouts) :], *tail), len(kinds))
    return None if told is None else module.launcher(told, [kind is float for kind in kinds])


def handed(compiled: Any, grid: int, given: tuple[Any, ...], first: int) -> Optional[Handed]:
    """A launch of a compiled kernel, or None where it needs more than is known here.

    Args:
        compiled: by Triton.
        grid: how many programs.
        given: for each of its arguments a number, the slot of one that changes from launch to
            launch, or a matrix that the tensor memory engine loads.
        first: the slot of the first such matrix; the others follow.
    """
    try:
        about, kinds = compiled.metadata, list(compiled.src.signature.values())
        if not _is_simple(about) or len(kinds) != len(given):
            return None
        # what is constant is compiled into the kernel, as is a number that was 1
        if any(kind == "constexpr" and _changes(one) for kind, one in zip(kinds, given)):
            return None
        pairs = [(kind, one) for kind, one in zip(kinds, given) if kind != "constexpr"]
        loads = iter(about.tensordesc_meta or ())
        blocks = [
            _block(kind, one, next(loads)) for kind, one in pairs if isinstance(one, Described)
        ]
        told = [*_parameters(pairs, first), *((kind, -1, 0) for kind in _SCRATCH)]
        if [_BYTES[kind] for kind, *_ in told] != driver.sizes_of(compiled.function):
            return None
        parameters = [(slot, bits) for _, slot, bits in told]
        rest = 32 * about.num_warps, about.shared, bool(about.launch_pdl), int(first)
        return Handed(compiled.function, grid, *rest, parameters, blocks)
    except (AttributeError, KeyError, StopIteration):  # of a Triton that names them otherwise
        return None


def _is_simple(about: Any) -> bool:
    """Whether a kernel is launched by its grid alone."""
    scratch = about.global_scratch_size or about.profile_scratch_size
    return not (scratch or about.launch_cooperative_grid or about.num_ctas > 1)


def _changes(one: Any) -> bool:
    return isinstance(one, (Slot, IntEnum, Described))


def _parameters(pairs: Iterable[tuple[str, Any]], first: int) -> Iterable[tuple[str, int, int]]:
    """The kind of each parameter, its slot or -1, and the bits of what never changes."""
    for kind, one in pairs:
        if isinstance(one, Described):
            shape, strides, _ = one.layout
            # Triton's kernels take a descriptor as the map, then its shape and its strides
            yield "block", first, 0
            first += 1
            yield from (("i32", -1, n) for n in shape)
            yield from (("i64", -1, n) for n in strides)
        elif _changes(one):
            yield "pointer" if kind.startswith("*") else kind, int(one), 0
        else:
            yield kind, -1, _bits(one)


def _block(kind: str, of: Described, load: Any) -> tuple[Any, ...]:
    (shape, strides, _), element = of.layout, kind.removeprefix("tensordesc<").split("[")[0]
    if load["fp4_padded"]:
        raise KeyError("fp4_padded")
    sizes = tuple(load["block_size"]), tuple(shape), 2 * strides[0]
    return int(of.slot), load["swizzle"], *sizes, _ELEMENTS[element]


def _bits(number: Any) -> int:
    """The bits of a number, in the lower end of 64."""
    if isinstance(number, float):
        return int.from_bytes(struct.pack("<f", number), "little")
    return int(number) % 2**64
