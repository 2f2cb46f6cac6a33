"""Looking at many tensors by their shapes and types, before they are read."""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from paramlora.config.reading import LARGE
from paramlora.errors import ParamloraWarning


def looked(
    there: Mapping[str, Any],
    read: Callable[[str], Tensor],
    look: Callable[[dict[str, Tensor]], object],
) -> None:
    """Let `look` refuse tensors that together are large, all of which would be read in vain.

    It is given them on the meta device, without values, but for single numbers and numbers of
    rows. Whatever asks for another value ends the look, and is found where all are read.

    Args:
        there: by key what has a tensor's ``dtype`` and ``shape``.
        read: gives a tensor.
        look: raises what is wrong with them.
    """
    sizes = {key: math.prod(one.shape) * one.dtype.itemsize for key, one in there.items()}
    if sum(sizes.values()) <= LARGE:
        return
    numbers = [key for key, one in there.items() if one.dtype == torch.int64]
    told = {key for key, one in there.items() if math.prod(one.shape) == 1}
    told |= set(numbers) if sum(sizes[key] for key in numbers) <= LARGE else set()
    outline = {
        key: read(key) if key in told else torch.empty(one.shape, dtype=one.dtype, device="meta")
        for key, one in there.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ParamloraWarning)  # they come again
        try:
            look(outline)
        except RuntimeError:  # torch's, of a value on the meta device
            return
