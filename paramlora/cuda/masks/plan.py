"""An input as an update with dropout gets it, in one launch; imported only on CUDA."""

import math
from typing import Any, Optional

import torch
from torch import Tensor

from paramlora.cuda.launch import Launch, on_its_device, planned
from paramlora.cuda.masks import kernels
from paramlora.cuda.operands import power

_PLANS: dict[Any, Any] = {}
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@on_its_device
def masked(x: Tensor, seed: Tensor, which: int, start: int, threshold: int) -> Optional[Tensor]:
    """``mask ∘ x``, in x's memory format; None where x is dense in none.

    Args:
        x: of any shape; the mask's columns are its last dimension, its rows all others.
        seed: ``[]``, whole numbers.
        which: of several masks of the same seed.
        start: how many rows of the whole input lie before it.
        threshold: the number below which an element's own has it dropped.
    """
    launch, addresses = planned(
        _PLANS, (x, seed), (which, start, threshold), lambda _: _plan(x, which, start, threshold)
    )
    if launch is None:
        return None
    y = torch.empty_like(x)
    launch((x, y, seed), (addresses[0], y.data_ptr(), addresses[1]))
    return y


def _plan(x: Tensor, which: int, start: int, threshold: int) -> Optional[Launch]:
    columns, last = x.shape[-1], not x.is_contiguous()
    if last and not (x.dim() in _LAST and x.is_contiguous(memory_format=_LAST[x.dim()])):
        return None
    # of channels last a row of the mask is spread over all of them
    images, lines = (len(x), math.prod(x.shape[2:-1])) if last else (1, 1)
    M, N = (columns, x.shape[1]) if last else (x.numel() // columns, columns)
    wide = min(128, power(N))
    tall = min(2048 // wide, power(M))
    return Launch(
        kernels.mask,
        x.get_device(),
        images * lines * -(-M // tall) * -(-N // wide),
        numbers=dict(M=M, N=N, LINES=lines, which=which, start=start, threshold=threshold),
        constants=dict(LAST=last, BLOCK_M=tall, BLOCK_N=wide),
        stages=1,
        warps=4,
    )
