"""Casts that are for a model's weights alone: into an 8-bit float type to store them, and back."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_Fn = Callable[[Tensor], Tensor]


def is_storage(dtype: torch.dtype) -> bool:
    """Whether a type only stores numbers: torch computes nothing in floats of 8 bits."""
    return dtype.is_floating_point and dtype.itemsize == 1


def without_storage(update: Any, fn: _Fn) -> _Fn:
    """What to do to an update's tensors where `fn` is done to a whole model.

    That is `fn`, but for casts into a type that only stores, and for the next cast out of it:
    a model in such a type (layerwise casting) is cast twice a call, and factors would lose at the
    first cast what no other brings back. They are moved along and keep their type.
    """
    gain: Tensor = update.gain
    after = fn(torch.empty(0, dtype=gain.dtype, device=gain.device))
    if after.dtype == gain.dtype or not (update.stored or is_storage(after.dtype)):
        return fn
    update.keep(stored=is_storage(after.dtype))
    return lambda tensor: tensor.to(after.device)
