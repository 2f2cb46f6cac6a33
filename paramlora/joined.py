"""The kernels of a 16-bit convolution and its update on CUDA, joined in one launch."""

import functools
import math
from typing import Any, Optional

import torch
from torch import Tensor

from paramlora import kernels
from paramlora.launch import Launch, bound
from paramlora.served import factors_fit, padded


class _Join:
    """The plan of `join`; `last`: channels are the last in the weight's memory."""

    def __init__(self, weight: Tensor, a: Tensor, b: Tensor, last: bool, tall: bool) -> None:
        (out, inner, *kernel), r = weight.shape, len(a)
        positions, R, one = math.prod(kernel), r + -r % 8, [1] * len(kernel)
        middle = functools.reduce(lambda m, k: m * k + k // 2, kernel, 0)
        if tall:
            added, rows = 0, widened(out, R)
            self.shapes = [(rows, inner, *kernel)]
            self.strides = [_strides(inner, kernel, last)]
        else:
            added, rows = widened(inner, R) - inner, out + R
            self.shapes = [(out, inner + added, *kernel), (R, inner, *kernel), (out, R, *one)]
            of_joined, of_down = (_strides(n, kernel, last) for n in (inner + added, inner))
            self.strides = [of_joined, of_down, _strides(R, one, last)]
        numbers = (out, inner, added, positions, r, R, middle, *a.stride(), *b.stride())
        grid = rows * -(-(inner + added) * positions // 1024)
        constants = (last, 0 if tall else padded(R), 1024)
        self.down = weight.element_size() * out * inner * positions  # where it starts, if tall
        self.launch = Launch(kernels.join, weight.get_device(), grid, numbers, constants, 1, 4)

    def __call__(self, weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        results = tuple(map(weight.new_empty_strided, self.shapes, self.strides))
        tensors, more = (weight, a, b, scale), results
        addresses = [t.data_ptr() for t in (*tensors, *more)]
        if len(results) == 1:
            # down need not lie at a multiple of 16; then its rows have no such length either, and
            # Triton, which knows that length, takes it element by element
            more = 3 * results
            addresses += (addresses[4] + self.down, addresses[4])
        self.launch((*tensors, *more), tuple(addresses))
        return results


def widened(channels: int, R: int) -> int:
    """Channels of a joined tensor: cuDNN is a third slower at 328 of them than at 384, and at 136
    than at 160 (bfloat16, 3×3, an H200)."""
    block = 64 if channels >= 256 else 32 if channels >= 64 else 8
    return channels + R + -(channels + R) % block


def _strides(channels: int, kernel: list[int], last: bool) -> tuple[int, ...]:
    """Of ``[out, channels, *kernel]``, with the channels last or before the kernel."""
    inward = [math.prod(kernel[i + 1 :]) for i in range(len(kernel))]
    positions = math.prod(kernel)
    if last:
        return (channels * positions, 1, *(channels * step for step in inward))
    return (channels * positions, positions, *inward)


_JOINS: dict[Any, Any] = {}


def join(
    weight: Tensor, a: Tensor, b: Tensor, scale: Tensor, tall: bool
) -> Optional[tuple[Tensor, ...]]:
    """The kernels of a convolution and its update in one launch, see `kernels.join`, in the
    weight's type and memory format; the rank padded to a multiple R of the 8 channels that tensor
    cores take, the channels of both together to what cuDNN is quick at, see `widened`.

    Args:
        weight: ``[C_out, C_in, *kernel]``, 16-bit.
        a: ``[r, C_in · prod(kernel)]``.
        b: ``[C_out, r]``.
        scale: ``[]``.
        tall: what the gradient of the input needs, not the forward.

    Returns:
        ``[C_out, C_in + R + 0s, *kernel]``, ``[R, C_in, *kernel]`` and ``[C_out, R, 1...]``, or
        where `tall` ``[C_out + R + 0s, C_in, *kernel]`` alone; None where the weight has another
        order.
    """
    device = weight.get_device()
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return join(weight, a, b, scale, tall)
    addresses = weight.data_ptr(), a.data_ptr(), b.data_ptr(), scale.data_ptr()
    odd = (addresses[0] | addresses[1] | addresses[2] | addresses[3]) & 15
    key = (
        weight.shape, weight.stride(), weight.dtype, a.shape, a.stride(), a.dtype, b.shape,
        b.stride(), b.dtype, scale.dtype, device, a.get_device(), b.get_device(),
        scale.get_device(), tall, odd and tuple(p & 15 for p in addresses),
    )  # fmt: skip
    plan = _JOINS.get(key, _JOINS)
    if plan is _JOINS:
        bound(_JOINS)
        plan = _JOINS[key] = _plan_join(weight, a, b, scale, tall)
    return None if plan is None else plan(weight, a, b, scale)


def _plan_join(weight: Tensor, a: Tensor, b: Tensor, scale: Tensor, tall: bool) -> Optional[_Join]:
    if not factors_fit(weight, a, b, scale):
        return None
    if weight.is_contiguous():
        return _Join(weight, a, b, False, tall)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.dim())
    if last is None or not weight.is_contiguous(memory_format=last):
        return None
    return _Join(weight, a, b, True, tall)
