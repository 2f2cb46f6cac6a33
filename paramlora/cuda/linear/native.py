"""What the C++ of a linear layer (`native/linear.cpp`) asks of Python: plans, each told as a kernel
and what the driver hands it."""

import math
import secrets
from enum import IntEnum
from typing import Any, Optional

import torch
from torch import Tensor

from paramlora.cuda import launch
from paramlora.cuda.launch import Launch, tickets
from paramlora.cuda.linear import plan
from paramlora.cuda.native import library
from paramlora.cuda.native.handed import Described, handed
from paramlora.cuda.operands import Operands, served, switched_on
from paramlora.update.compat import cuda_device, cuda_stream


class Slot(IntEnum):
    """What changes from launch to launch, as `linear.cpp` numbers it; the first are addresses."""

    INPUT = 0
    WEIGHT = 1
    BIAS = 2
    A = 3
    B = 4
    SCALE = 5
    OUT = 6
    KEPT = 7
    DY = 8
    SCRATCH = 9
    DA = 10
    DB = 11
    TICKETS = 12
    STRENGTH = 13
    NUMBER = 14
    BLOCK = 15
    BLOCK_1 = 16
    BLOCK_2 = 17


def start(backward: Any) -> Any:
    """The library's `linear`, or None where there is no library.

    Args:
        backward: finds the gradients that the library does not, see `functional`.
    """
    module = library.loaded()
    if module is None:
        return None
    module.configure(
        # handed over once, so that the C++ imports nothing and knows no name of ours
        plan_forward=of_forward,
        plan_backward=of_backward,
        backward=backward,
        tickets=tickets,
        number=2**62 + secrets.randbits(61),  # as `plan.NUMBERS`, whose numbers these never meet
        device=cuda_device,
        stream=cuda_stream,
        capturing=torch.cuda.is_current_stream_capturing,
        switched_on=switched_on,
    )
    return module.linear


# Both return sizes, strides, numbers to reserve, and a launch; None where the library never serves
# such operands; False where it does not yet, for the first launch of a kernel is Triton's own.


def of_forward(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], a: Tensor, b: Tensor, scale: Tensor
) -> Any:
    """The forward's plan."""
    rows, image, sizes = _positions(x, weight), weight.dim() > 2, _sizes(x, weight)
    if rows is None or not served(x):
        return None
    of = Operands(rows, weight.flatten(1), bias, a, b, scale)
    found, _ = plan.planned_forward(of, image, None, False)
    # large products of several launches are not bound by the host
    if type(found) is not plan.Forward or found.single is None:
        return None
    more = Slot.KEPT if bias is None else Slot.BIAS
    places = (Slot.INPUT, Slot.A, Slot.B, Slot.SCALE, Slot.KEPT, more, Slot.KEPT, Slot.TICKETS)
    return _told(found, found.single, (Slot.INPUT, Slot.WEIGHT, Slot.OUT), places, sizes)


def of_backward(dy: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Any:
    """The plan of a backward that finds the gradients of the input and of the factors."""
    rows, gradient, image = _positions(x, weight), _positions(dy, weight), weight.dim() > 2
    if rows is None or gradient is None or not served(x):
        return None
    of = Operands(rows, weight.flatten(1), None, a, b, scale)
    found, _ = plan.planned_backward(gradient, of, True, (True, True), image, None, False)
    if type(found) is not plan.Backward or not found.together or found.separate:
        return None
    places = (Slot.DY, Slot.KEPT, Slot.SCRATCH, Slot.INPUT, Slot.DA, Slot.DB, Slot.SCALE)
    matrices = Slot.DY, Slot.WEIGHT, Slot.OUT
    return _told(found, found.launch, matrices, (*places, Slot.TICKETS), _sizes(x, weight))


def _positions(t: Tensor, weight: Tensor) -> Optional[Tensor]:
    """Of an image, where the weight is a kernel of one position, ``[N, positions, channels]``, if
    that is the same memory; of a linear layer the tensor."""
    if weight.dim() == 2:
        return t
    rows = t.flatten(2).transpose(1, 2) if t.dim() == weight.dim() else None
    same = rows is not None and rows.data_ptr() == t.data_ptr()
    return rows if same and weight.flatten(1).data_ptr() == weight.data_ptr() else None


def _sizes(x: Tensor, weight: Tensor) -> Optional[tuple[int, ...]]:
    """Of an image its sizes but for the batch and the channels; None of a linear layer."""
    return None if weight.dim() == 2 else tuple(x.shape[2:])


def _told(found: Any, single: Launch, matrices: Any, places: Any, sizes: Any) -> Any:
    # the first launch of a kind is Triton's own, which gives the compiled kernel
    if single.compiled is None:
        return None if launch.distrusted() else False
    if found.tiles.layouts:
        matrices = tuple(map(Described, matrices, found.tiles.layouts))
    given = (*matrices, *places, Slot.STRENGTH, Slot.NUMBER, *single.tail)
    told = handed(single.compiled, single.grid, given, Slot.BLOCK)
    if told is None:
        return None
    return (*_laid(found.result.shape, found.result.stride, sizes), found.size, told)


def _laid(
    shape: tuple[int, ...], stride: tuple[int, ...], sizes: Optional[tuple[int, ...]]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape and the strides of a result, as an image of such sizes where x is one."""
    if sizes is None:
        return shape, stride
    (batch, _, channels), (first, step, last) = shape, stride
    steps = (step * math.prod(sizes[i:]) for i in range(1, len(sizes) + 1))
    return (batch, channels, *sizes), (first, last, *steps)
