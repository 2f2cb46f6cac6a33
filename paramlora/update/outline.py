"""Looking at many tensors by their shapes and types, before they are read."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Optional

import torch
from torch import Tensor

from paramlora.config.reading import LARGE
from paramlora.errors import ParamloraWarning
from paramlora.update.memory import all_finite

Pieces = Callable[[str], Iterable[memoryview]]


def looked(
    there: Mapping[str, Any],
    read: Callable[[str], Tensor],
    look: Callable[[dict[str, Tensor]], object],
    pieces: Optional[Pieces] = None,
) -> None:
    """Let `look` refuse tensors that together are large, all of which would be read in vain.

    It is given them on the meta device, without values, but for single numbers and numbers of
    rows; with `pieces`, one that is not finite is given as NaN everywhere, in memory for one
    number. Whatever asks for another value ends the look, and is found where all are read.

    Args:
        there: by key what has a tensor's ``dtype`` and ``shape``.
        read: gives a tensor.
        look: raises what is wrong with them.
        pieces: gives a tensor's bytes in pieces, each valid until the next one.
    """
    sizes = {key: math.prod(one.shape) * one.dtype.itemsize for key, one in there.items()}
    # small ones are read at once: a look would cost more than it saves
    if sum(sizes.values()) <= LARGE:
        return
    # ids of rows are numbers of which a check needs the values
    numbers = [key for key, one in there.items() if one.dtype == torch.int64]
    # a scale is one number, and decides whether an update is any good
    told = {key for key, one in there.items() if math.prod(one.shape) == 1}
    told |= set(numbers) if sum(sizes[key] for key in numbers) <= LARGE else set()
    outline = {
        key: read(key) if key in told else _without_values(one, pieces and pieces(key))
        for key, one in there.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ParamloraWarning)  # they come again
        try:
            look(outline)
        except RuntimeError:  # torch's, of a value on the meta device
            return


def _without_values(one: Any, pieces: Optional[Iterable[memoryview]]) -> Tensor:
    """A tensor on the meta device, or of NaN where a piece of it is not finite."""
    # in 8 bits it would be widened, which takes memory for each of its numbers
    wide = one.dtype.is_floating_point and one.dtype.itemsize > 1
    held = (torch.frombuffer(piece, dtype=one.dtype) for piece in pieces or () if wide and piece)
    if all(all_finite([part]) for part in held):
        return torch.empty(one.shape, dtype=one.dtype, device="meta")
    # expanded: one number in memory, of any shape
    return torch.full((), math.nan, dtype=one.dtype).expand(one.shape)
