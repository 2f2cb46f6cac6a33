"""Whether the 16-bit CUDA kernels compute, which operands they serve, and the sizes that follow
from theirs."""

import functools
import os
from math import prod
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from paramlora.cuda.device import card, serves
from paramlora.cuda.launches import WIDEST

Window = tuple[tuple[int, ...], ...]  # of a convolution: stride, padding, dilation
_SIXTEEN = (torch.bfloat16, torch.float16)
TAPS = 64  # most of a kernel of a single channel: more of them would fill the registers
SPAN = 64  # rows of the smallest tile: at most one signal for each
DEEP = 128  # dimensions of a block of the factors' gradients
OFF = ("0", "false", "off", "no")
# what was asked for: by the environment or a call, then by each block that was entered since
_asked = [[os.environ.get("PARAMLORA_KERNELS", "1").lower() not in OFF]]
_on = _asked[-1][0]  # compiled code is guarded by it, so that a switch has it compiled again


class Operands(NamedTuple):
    """What a layer with an update is computed from.

    Args:
        x: ``[..., in]``, or of a convolution ``[N, C_in, ...]``.
        weight: ``[out, in]`` or ``[C_out, C_in / groups, *kernel]``.
        bias: ``[out]`` or None.
        a: ``[r, in]``, as many numbers as a row of the weight has.
        b: ``[out, r]``.
        scale: ``[]``.
    """

    x: Tensor
    weight: Tensor
    bias: Optional[Tensor]
    a: Tensor
    b: Tensor
    scale: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them in this order, the scale in place of a bias that is not there."""
        x, weight, bias, a, b, scale = self
        return x, weight, scale if bias is None else bias, a, b, scale


class Rescale(NamedTuple):
    """By what DoRA multiplies a layer's outputs, ``m/norm`` of each, both contiguous ``[out]``, the
    norm in float32; and whether the outputs from before that are kept, for m's gradient."""

    m: Tensor
    norm: Tensor
    keeps: bool


class Drop(NamedTuple):
    """Masks: the chance that an element is dropped by each, of an equal share of the ranks, and the
    seed ``[]`` that they are drawn from."""

    rates: tuple[float, ...]
    seed: Tensor

    @property
    def thresholds(self) -> tuple[int, ...]:
        """The numbers below which an element's own has it dropped, see `masks.kernels`."""
        return tuple(map(threshold, self.rates))


def threshold(rate: float) -> int:
    """The number in 32 bits with a sign below which a share `rate` of all such numbers lies."""
    return round(rate * 2**32) - 2**31


class Wanted(NamedTuple):
    """Which gradients of `Operands` are wanted."""

    x: bool
    weight: bool
    bias: bool
    a: bool
    b: bool
    scale: bool

    @property
    def factors(self) -> bool:
        """Whether that of A, of B, or of the scale, which is found on the way to B's, is."""
        return self.a or self.b or self.scale


class kernels:
    """Whether paramlora's own kernels compute what they serve, or torch's operations do everything.

    A call switches the process; as a context manager it holds until the block is left. So does
    ``PARAMLORA_KERNELS=0`` in the environment, from the start. Without the kernels no custom
    operator is compiled either. The numbers differ by roundings: whoever doubts one compares both.

    Args:
        on: False leaves everything to torch's operations.

    Example:
        >>> layer, x = torch.nn.Linear(4, 3), torch.randn(2, 4)
        >>> with kernels(False):
        ...     y = layer(x)
        >>> assert torch.equal(y, layer(x))
    """

    # a call writes into the list (of one bool) of the block around it; a block adds its own
    def __init__(self, on: bool) -> None:
        self._own, self._outer = [bool(on)], _asked[-1]
        self._before, self._outer[0] = self._outer[0], bool(on)
        _settle()

    def __enter__(self) -> "kernels":
        self._outer[0] = self._before  # which the call had already changed
        _asked.append(self._own)
        _settle()
        return self

    def __exit__(self, *_: object) -> None:
        # by itself, not the last: blocks of several threads may overlap
        _asked[:] = [held for held in _asked if held is not self._own]
        _settle()


def _settle() -> None:
    global _on
    _on = _asked[-1][0]


def switched_on() -> bool:
    """Whether the kernels may compute what they serve, see `kernels`."""
    return _on


def has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels serve this product: x is `served`, and the weight of its type has
    contiguous rows or columns."""
    return weight.dtype == x.dtype and served(x) and 1 in weight.stride()


def served(x: Tensor) -> bool:
    """Whether the kernels serve tensors such as this: 16 bits, on a device that `runs` them, and
    nobody has switched them off."""
    return _on and x.is_cuda and x.dtype in _SIXTEEN and serves(x.get_device())


def fits(of: Operands) -> bool:
    """Whether the operands are what they should be, on one device: the kernels get bare addresses.
    Others are left to torch, which says what is wrong with them."""
    x, weight, bias, a, b, scale = of
    (out, fan_in), device = weight.shape, x.get_device()
    if x.shape[-1] != fan_in or weight.get_device() != device:
        return False
    if bias is not None and (bias.shape != (out,) or bias.get_device() != device):
        return False
    return factors_fit(weight, a, b, scale)


def masks_fit(of: Operands, drop: Optional[Drop]) -> bool:
    """Whether the kernels draw a linear layer's masks: of a rank whose thin products they compute
    on every device, by a seed on the layer's; several, where each has a share of it that tensor
    cores take, on cards before Blackwell."""
    if drop is None:
        return True
    if len(drop.rates) > 1 and of.x.is_cuda and card(of.x.get_device()).capability >= (10, 0):
        return False  # Triton 3.7 ends in an assertion where it compiles their backward for 10.0
    near = drop.seed.get_device() == of.x.get_device() and drop.seed.dtype == torch.int64
    r, masks = len(of.a), len(drop.rates)
    shared = masks == 1 or r == padded(r) == masks * padded(r // masks)
    return near and padded(r) <= WIDEST and shared


def factors_fit(weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> bool:
    """Whether an update's own operands fit a weight ``[out, ...]`` and lie on its device."""
    # `a` of a convolution is flat: [r, in / groups * taps]
    out, size, device = weight.shape[0], weight.numel(), weight.get_device()
    if size == 0 or a.shape[1] * out != size or b.shape != (out, a.shape[0]) or scale.numel() != 1:
        return False
    if not (_is_near(a) and _is_near(b) and padded(len(a)) * (a.shape[1] + out) < 2**31):
        return False
    return (a.get_device(), b.get_device(), scale.get_device()) == (device, device, device)


def _is_near(t: Tensor) -> bool:
    """Whether 32 bits reach every element of a factor from its first."""
    return sum((size - 1) * step for size, step in zip(t.shape, t.stride())) < 2**31


def outputs_of(sizes: tuple[int, ...], kernel: tuple[int, ...], window: Window) -> tuple[int, ...]:
    """The sizes of a convolution's output; `window`: its stride, padding and dilation."""
    along = zip(sizes, kernel, *window)
    return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in along)


def is_depthwise(of: Operands, window: Window, groups: int) -> bool:
    """Whether the kernels serve this convolution and its update, of single channels; `window`: its
    stride, padding and dilation. What is wrong with other operands, torch says."""
    x, weight, bias, a, b, scale = of
    device = x.get_device()
    if not served(x) or x.dtype != weight.dtype or weight.get_device() != device:
        return False
    if bias is not None and (bias.shape != x.shape[1:2] or bias.get_device() != device):
        return False
    fits = _is_depthwise(x.shape, weight.shape, window, groups)
    return fits and factors_fit(weight, a, b, scale)


@functools.lru_cache(4096)
def _is_depthwise(x: tuple[int, ...], weight: tuple[int, ...], window: Window, groups: int) -> bool:
    if len(x) != len(weight) or weight[:2] != (x[1], 1) or groups != x[1]:
        return False
    outputs = outputs_of(x[2:], weight[2:], window)
    small = prod(weight[2:]) <= TAPS and max(prod(x[2:]), prod(outputs)) < 2**31
    return small and prod(x) > 0 and min(outputs) > 0


def kept_size(M: int, N: int, K: int, r: int, masks: int = 0) -> int:
    """Elements of `kept` (see `linear.kernels`), of 16 bits, for ``[M, K]`` by ``[K, N]`` at rank
    r, with the numbers of rows and columns of each mask."""
    R = padded(r)
    blocks = -(-K // DEEP) + -(-N // DEEP)
    numbers = masks * (M + K)
    # in elements of 16 bits: 2 make a number or a count of 32, 4 a signal of 64
    numbers = 2 * (numbers + numbers % 2)
    return (
        numbers + R * (K + N + M) + 2 * (blocks + blocks % 2) + 4 * (packs(N, K, R) + -(-M // SPAN))
    )


def packs(N: int, K: int, R: int) -> int:
    """Programs that cast the factors, the last of which clears the counts."""
    return -(-K // pack_width(R)) + -(-N // pack_width(R)) + 1


def pack_width(R: int) -> int:
    """Dimensions that one of them casts."""
    return max(16, 2048 // R)


def padded(r: int) -> int:
    """The rank that tensor cores take: a power of two of at least 16."""
    return max(16, power(r))


def power(n: int) -> int:
    """The least power of two that is not below a number."""
    return 1 << (n - 1).bit_length()
