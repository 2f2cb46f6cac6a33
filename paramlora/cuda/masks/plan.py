"""An input as an update with dropout gets it, in one launch; imported only on CUDA."""

import math
from typing import Any, Optional

import torch
from torch import Tensor

from paramlora.cuda.launch import Launch, on_its_device, planned
from paramlora.cuda.masks import kernels
from paramlora.cuda.operands import power
from paramlora.update.geometry import CHANNELS_LAST

_PLANS: dict[Any, Any] = {}


@on_its_device
def masked(x: Tensor, seed: Tensor, which: int, start: int, threshold: int) -> Tensor:
    """``mask ∘ x``, in x's memory format, or contiguous where x is dense in none.

    Args:
        x: of any shape; the mask's columns are its last dimension, its rows all others.
        seed: ``[]``, whole numbers.
        which: of several masks of the same seed.
        start: how many rows of the whole input lie before it.
        threshold: the number below which an element's own has it dropped.
    """
    rest = which, start, threshold
    launch, (px, ps) = planned(_PLANS, (x, seed), rest, lambda _: _plan(x, *rest))
    if launch is None:
        return masked(x.contiguous(), seed, *rest)  # type: ignore[no-any-return]
    y = torch.empty_like(x)
    launch((x, x, y, seed), (px, px, y.data_ptr(), ps))
    return y


def _plan(x: Tensor, which: int, start: int, threshold: int) -> Optional[Launch]:
    columns, device, last = x.shape[-1], x.get_device(), not x.is_contiguous()
    if not last:
        return _launch(device, (1, x.numel() // columns, columns), which, start, threshold)
    if x.dim() not in CHANNELS_LAST or not x.is_contiguous(memory_format=CHANNELS_LAST[x.dim()]):
        return None
    return of_images(device, tuple(x.shape), x.shape[1], threshold, False, which, start)


def of_images(
    device: int,
    shape: tuple[int, ...],
    channels: int,
    threshold: int,
    add: bool,
    which: int = 0,
    start: int = 0,
) -> Launch:
    """The launch of `kernels.mask` of images ``[batch, N, ...]`` whose channels are the last in
    memory.

    Args:
        device: its index.
        shape: in memory.
        channels: those of the mask, which are the first.
        threshold, which, start: as of `masked`.
        add: whether it is added to another image.
    """
    lines = math.prod(shape[2:-1])
    sizes = (shape[0] * lines, shape[-1], shape[1])
    return _launch(device, sizes, which, start, threshold, (lines, channels), add)


def _launch(
    device: int,
    sizes: tuple[int, int, int],
    which: int,
    start: int,
    threshold: int,
    last: Optional[tuple[int, int]] = None,
    add: bool = False,
) -> Launch:
    """`sizes`: lines of all images, M and N of `kernels.mask`. `last`: LINES and channels of images
    whose channels are the last."""
    every, M, N = sizes
    wide = min(128, power(N))
    tall = min(2048 // wide, power(M))
    lines, channels = last or (1, 1)
    return Launch(
        kernels.mask,
        device,
        every * -(-M // tall) * -(-N // wide),
        numbers=dict(
            M=M, N=N, LINES=lines, channels=channels, which=which, start=start, threshold=threshold
        ),
        constants=dict(ADD=add, LAST=last is not None, BLOCK_M=tall, BLOCK_N=wide),
        stages=1,
        warps=4,
    )
