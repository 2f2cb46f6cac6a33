"""What the C++ of a layer's step (`steps.cpp`) asks of Python: the programs of a forward and of a
backward of operands of one kind."""

import math
import secrets
from collections.abc import Callable
from typing import Any, Optional, Union

import torch
from torch import Tensor

from paramlora.cuda import launch
from paramlora.cuda.convolution import plan as joined
from paramlora.cuda.depthwise import plan as depthwise
from paramlora.cuda.launch import tickets
from paramlora.cuda.linear import plan as linear
from paramlora.cuda.native import library
from paramlora.cuda.native.program import Program, Slot, Untold
from paramlora.cuda.operands import Operands, Rescale, served, switched_on
from paramlora.cuda.rescaled import plan as rescaled
from paramlora.update.compat import cuda_device, cuda_stream

_Sizes = tuple[int, ...]
Way = Callable[..., str]
# its operations and the slots of its results; None where the library never serves such operands;
# False where it does not yet
Told = Union[tuple[Any, tuple[int, ...]], None, bool]


def start(backward: Any, way: Way) -> Any:
    """The library's `layer`, or None where there is no library.

    Args:
        backward: finds the gradients that the library does not, see `functional`.
        way: the name of the way of a layer, of its operands, its window and its magnitude.
    """
    module = library.loaded()
    if module is None:
        return None

    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        _: float,
        window: Any,
        magnitude: Optional[Tensor],
        keeps: bool,
    ) -> Told:
        of = Operands(x, weight, bias, a, b, scale)
        more = () if magnitude is None else (magnitude, keeps)
        return _told(of, way(of, window, magnitude), window, _FORWARDS, more)

    def of_gradients(
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        kept: Tensor,
        numbers: _Sizes,
        *rescaled: Tensor,
    ) -> Told:
        of, window = Operands(x, weight, None, a, b, scale), window_of(numbers)
        name = way(of, window, rescaled[0] if rescaled else None)
        return _told(of, name, window, _BACKWARDS, (dy, kept, *rescaled))

    module.configure(
        # handed over once, so that the C++ imports nothing and knows no name of ours
        plan_forward=forward,
        plan_backward=of_gradients,
        backward=backward,
        tickets=tickets,
        number=2**62 + secrets.randbits(61),  # as `plan.NUMBERS`, whose numbers these never meet
        device=cuda_device,
        stream=cuda_stream,
        capturing=torch.cuda.is_current_stream_capturing,
        switched_on=switched_on,
    )
    return module.layer


def window_of(numbers: _Sizes) -> Any:
    """A convolution's stride, padding, dilation and groups, which C++ keeps in a row; None of a
    linear layer's, which has none."""
    axes = len(numbers) // 3
    return (*(numbers[i * axes :][:axes] for i in range(3)), numbers[-1]) if numbers else None


def _told(of: Operands, name: str, window: Any, programs: Any, more: tuple[Any, ...]) -> Told:
    if not served(of.x):
        return None
    found, program = programs.get(name), Program()
    try:
        results = None if found is None else found(program, of, window, *more)
    except Untold as reason:
        return False if reason.yet and not launch.distrusted() else None
    return None if results is None else (program.operations, results)


def _linear_forward(
    to: Program, of: Operands, _: Any, sizes: Optional[_Sizes] = None
) -> Optional[_Sizes]:
    """`sizes`: of the image, where the operands are those of its positions."""
    found, _ = linear.planned_forward(of, sizes is not None, None, False)
    # large products of several launches are not bound by the host
    if type(found) is not linear.Forward or found.single is None:
        return None
    y = to.reserve(*_laid(found.result, sizes), of.x.dtype)
    kept = to.reserve((found.size,), (1,), of.x.dtype)
    _launch_forward(to, of, found.single, y, kept, (kept, kept, kept))
    return y, kept


def _launch_forward(
    to: Program, of: Operands, one: Any, y: int, kept: int, more: tuple[int, int, int]
) -> None:
    """`more`: the slots of a magnitude, its norm and the output from before they rescale it."""
    (m, norm, z), bias = more, kept if of.bias is None else Slot.BIAS
    factors = (Slot.X, Slot.A, Slot.B, Slot.SCALE, kept, bias, m, norm, kept, Slot.TICKETS)
    to.launch(one, (Slot.X, Slot.WEIGHT, y, z, *factors), (Slot.STRENGTH, Slot.NUMBER))


def _rescaled_forward(
    to: Program, of: Operands, _: Any, magnitude: Tensor, keeps: bool
) -> Optional[_Sizes]:
    (x, weight, bias, a, b, scale), out = of, len(of.weight)
    # stands in for the one that is reserved
    norm = weight.new_empty(out, dtype=torch.float32)
    lengths, _ = rescaled.planned_lengths(weight, a, b, scale, norm)
    by = Rescale(magnitude, norm, keeps)
    found, _ = linear.planned_forward(of, False, None, False, by)
    if type(found) is not linear.Forward or found.single is None:
        return None
    norm_at = to.reserve((out,), (1,), torch.float32)
    to.launch(lengths, (Slot.WEIGHT, Slot.A, Slot.B, Slot.SCALE, norm_at))
    shape, stride, _ = found.result
    y, kept = to.reserve(shape, stride, x.dtype), to.reserve((found.size,), (1,), x.dtype)
    if rescaled.rescales_inside(found):
        z_at = to.reserve(shape, stride, x.dtype) if keeps else kept
        _launch_forward(to, of, found.single, y, kept, (Slot.MAGNITUDE, norm_at, z_at))
        return y, kept, norm_at, z_at
    bare = of._replace(bias=None)
    found, _ = linear.planned_forward(bare, False, None, False)
    z_at, more = to.reserve(shape, stride, x.dtype), norm_at if bias is None else Slot.BIAS
    _launch_forward(to, bare, found.single, z_at, kept, (kept, kept, kept))
    rows = x.new_empty((found.sizes[0], out))  # stands in for z
    launch_of_y, _ = rescaled.planned_rescale(rows, magnitude, norm, bias)
    to.launch(launch_of_y, (z_at, Slot.MAGNITUDE, norm_at, more, y))
    return y, kept, norm_at, z_at


def _rescaled_backward(
    to: Program,
    of: Operands,
    _: Any,
    dy: Tensor,
    kept: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    z: Tensor,
) -> Optional[_Sizes]:
    if not (dy.is_contiguous() and z.is_contiguous()):
        return None
    wide, size = torch.float32, z.shape[-1]
    found, _ = rescaled.planned_backward(dy.view(-1, size), z.view(-1, size), magnitude, norm)
    dz = to.reserve(tuple(z.shape), z.stride(), z.dtype)
    parts = to.reserve((found.groups, len(of.weight)), (len(of.weight), 1), wide)
    to.launch(found.launch, (Slot.DY, Slot.Z, Slot.MAGNITUDE, Slot.NORM, dz, parts))
    dm = to.cast(to.sum(parts) if found.groups > 1 else parts, wide, magnitude.dtype)
    # z lies as its gradient will
    rest = _linear_backward(to, of, None, z, kept, dy_at=dz)
    return rest and (*rest, dm)


def _linear_backward(
    to: Program,
    of: Operands,
    _: Any,
    dy: Tensor,
    __: Tensor,
    sizes: Optional[_Sizes] = None,
    dy_at: int = Slot.DY,
) -> Optional[_Sizes]:
    wide, image = torch.float32, sizes is not None
    found, _ = linear.planned_backward(dy, of, True, (True, True), image, None, False)
    if type(found) is not linear.Backward or not found.together or found.separate:
        return None
    dx = to.reserve(*_laid(found.result, sizes), of.x.dtype)
    scratch = to.reserve((found.size,), (1,), of.x.dtype)
    (r, fan_in), out = of.a.shape, len(of.b)
    da, db = to.reserve((r, fan_in), (fan_in, 1), wide), to.reserve((out, r), (r, 1), wide)
    places = (dy_at, Slot.KEPT, scratch, Slot.X, da, db, Slot.SCALE, Slot.TICKETS)
    numbers = (Slot.STRENGTH, Slot.NUMBER)
    to.launch(found.launch, (dy_at, Slot.WEIGHT, dx, *places), numbers)
    # in float32 so far, as the kernels sum
    return dx, to.cast(da, wide, of.a.dtype), to.cast(db, wide, of.b.dtype)


def _laid(result: Any, sizes: Optional[_Sizes]) -> tuple[_Sizes, _Sizes]:
    """The shape and the strides of a linear layer's result, as an image of such sizes if any."""
    if sizes is None:
        return result.shape, result.stride
    (batch, _, channels), (first, step, last) = result.shape, result.stride
    steps = (step * math.prod(sizes[i:]) for i in range(1, len(sizes) + 1))
    return (batch, channels, *sizes), (first, last, *steps)


def _pointwise_forward(to: Program, of: Operands, window: Any) -> Optional[_Sizes]:
    inside = _of_positions(of)
    return inside and _linear_forward(to, inside, window, tuple(of.x.shape[2:]))


def _pointwise_backward(
    to: Program, of: Operands, window: Any, dy: Tensor, kept: Tensor
) -> Optional[_Sizes]:
    inside, gradient = _of_positions(of), _positions(dy)
    if inside is None or gradient is None:
        return None
    return _linear_backward(to, inside, window, gradient, kept, tuple(of.x.shape[2:]))


def _of_positions(of: Operands) -> Optional[Operands]:
    """The operands of a kernel of one position, as a linear layer's of every position, if they are
    the same memory."""
    x, weight = _positions(of.x), of.weight.flatten(1)
    if x is None or weight.data_ptr() != of.weight.data_ptr():
        return None
    return of._replace(x=x, weight=weight)


def _positions(image: Tensor) -> Optional[Tensor]:
    """``[N, positions, channels]``, if that is the same memory."""
    rows = image.flatten(2).transpose(1, 2)
    return rows if rows.data_ptr() == image.data_ptr() else None


def _joined_forward(to: Program, of: Operands, window: Any) -> Optional[_Sizes]:
    found, _ = joined.planned_forward(of, window[:3], None)
    return found.told(to, of) if type(found) is joined.Forward else None


def _joined_backward(
    to: Program, of: Operands, window: Any, dy: Tensor, t: Tensor
) -> Optional[_Sizes]:
    found, _ = joined.planned_backward(dy, of, t, True, (True, True), window[:3], None)
    if type(found) is not joined.Backward:
        return None
    dx, da, db = found.told(to, of)
    return dx, da, to.cast(db, torch.float32, of.b.dtype)


def _depthwise_forward(to: Program, of: Operands, window: Any) -> Optional[_Sizes]:
    weight, dense = of.weight, of.bias is None or of.bias.is_contiguous()
    if not (of.x.is_contiguous() and dense) or weight.flatten(1).data_ptr() != weight.data_ptr():
        return None
    return depthwise.planned_forward(of, window[:3])[0].told(to, of)


def _depthwise_backward(
    to: Program, of: Operands, window: Any, dy: Tensor, total: Tensor
) -> Optional[_Sizes]:
    if not (dy.is_contiguous() and of.x.is_contiguous()):
        return None
    how = (window[:3], True, (True, False, True))
    return depthwise.planned_backward(dy, of, total, *how)[0].told(to, of)


_FORWARDS = {
    "LINEAR": _linear_forward,
    "RESCALED": _rescaled_forward,
    "POINTWISE": _pointwise_forward,
    "JOINED": _joined_forward,
    "DEPTHWISE": _depthwise_forward,
}
_BACKWARDS = {
    "LINEAR": _linear_backward,
    "RESCALED": _rescaled_backward,
    "POINTWISE": _pointwise_backward,
    "JOINED": _joined_backward,
    "DEPTHWISE": _depthwise_backward,
}
