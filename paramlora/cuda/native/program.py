"""What a layer's step does on the device, told for C++ (`steps.cpp`), which does it without Python.

A program is made of operations on slots: a step's operands, then what is reserved or computed on
the way.
"""

from collections.abc import Iterable
from enum import IntEnum
from typing import Any, NamedTuple, Optional

import torch

from paramlora.cuda.native import handed
from paramlora.cuda.native.handed import Described, Handed

_Sizes = tuple[int, ...]
Window = tuple[_Sizes, _Sizes, _Sizes]  # stride, padding and dilation


class Slot(IntEnum):
    """Where the operands of a step are, and what else changes from launch to launch, as
    `steps.cpp` numbers it."""

    X = 0
    WEIGHT = 1
    BIAS = 2
    A = 3
    B = 4
    SCALE = 5
    DY = 6
    KEPT = 7
    MAGNITUDE = 8
    NORM = 9
    Z = 10
    STRENGTH = 32
    NUMBER = 33
    TICKETS = 34
    BLOCK = 35
    BLOCK_1 = 36
    BLOCK_2 = 37
    BLOCK_3 = 38


class Kind(IntEnum):
    """What an operation does, as `steps.cpp` numbers it."""

    RESERVE = 0
    LAUNCH = 1
    CONVOLVE = 2
    GRADIENT = 3
    SUM = 4
    CAST = 5


class Operation(NamedTuple):
    """One of a program, as `steps.cpp` reads it.

    Args:
        kind: what it does.
        out: the slot of what it makes.
        of: the slots of what it reads; -1 of what is left out.
        sizes, strides: of what it makes; none of a convolution whose result may lie in any way.
        dtype: of what it makes, where it says so.
        window: of a convolution.
        of_weight: whether a convolution's gradient is its weight's, not its input's.
        launch: of a kernel.
    """

    kind: Kind
    out: int = 0
    of: _Sizes = ()
    sizes: _Sizes = ()
    strides: _Sizes = ()
    dtype: Optional[torch.dtype] = None
    window: Optional[Window] = None
    of_weight: bool = False
    launch: Optional[Handed] = None


class Untold(Exception):
    """A program cannot be told.

    Attributes:
        yet: whether it can later, as the first launch of a kernel is Triton's own, which then
            gives the compiled kernel.
    """

    def __init__(self, yet: bool) -> None:
        super().__init__()
        self.yet = yet


class Program:
    """The operations of one step, in their order."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self._made = Slot.Z + 1

    def _add(self, kind: Kind, *rest: Any, **more: Any) -> int:
        if self._made == Slot.STRENGTH:
            raise Untold(yet=False)
        out = handed.Slot(self._made)
        self.operations.append(Operation(kind, out, *rest, **more))
        self._made += 1
        return out

    def reserve(self, sizes: _Sizes, strides: _Sizes, dtype: torch.dtype) -> int:
        """Memory of a tensor."""
        return self._add(Kind.RESERVE, (), sizes, strides, dtype)

    def launch(self, one: Any, pointers: Iterable[int], values: _Sizes = ()) -> None:
        """Launch a kernel.

        Args:
            one: a `Launch`.
            pointers: the slots of what it takes, as of `Launch.__call__`; of the first ones, as
                many as it has layouts, the engine loads the matrices.
            values: the slots of numbers that change.

        Raises:
            Untold: it was not compiled yet, or needs more than is known here.
        """
        if one.compiled is None:
            raise Untold(yet=True)
        slots = list(pointers)
        count = len(one.layouts)
        given = (*map(Described, slots, one.layouts), *slots[count:], *values, *one.tail)
        told = handed.handed(one.compiled, one.grid, given, Slot.BLOCK)
        if told is None:
            raise Untold(yet=False)
        self.operations.append(Operation(Kind.LAUNCH, launch=told))

    def convolve(self, of: _Sizes, window: Window, sizes: _Sizes = (), strides: _Sizes = ()) -> int:
        """A convolution of an input and a weight, and of a bias if it is there."""
        return self._add(Kind.CONVOLVE, of, sizes, strides, window=window)

    def gradient(
        self,
        of: _Sizes,
        window: Window,
        of_weight: bool,
        sizes: _Sizes = (),
        strides: _Sizes = (),
    ) -> int:
        """The gradient of a convolution's input, or of its weight, of the slots of the output's,
        the input and the weight."""
        more = {"window": window, "of_weight": of_weight}
        return self._add(Kind.GRADIENT, of, sizes, strides, **more)

    def sum(self, of: int) -> int:
        """The sum over the first dimension."""
        return self._add(Kind.SUM, (of,))

    def cast(self, of: int, held: torch.dtype, dtype: torch.dtype) -> int:
        """The numbers of a slot, in another type than the one in which it holds them."""
        return of if held == dtype else self._add(Kind.CAST, (of,), dtype=dtype)
