"""The scales that a checkpoint stores beside its weights of 8-bit floats."""

from collections.abc import Callable, Mapping
from typing import Any, Optional

import torch
from torch import Tensor

from paramlora.errors import AdapterError
from paramlora.update.geometry import NARROW

# ComfyUI's, that of compressed-tensors, and that of blocks
_NAMES = ("scale_weight", "weight_scale", "weight_scale_inv")


def keys_of_scales(there: Mapping[str, Any], key: str) -> list[str]:
    """The keys of the scales of a weight; none of one that is not stored in 8 bits.

    Args:
        there: by key what has the tensor's ``dtype`` and ``shape``.
        key: of the weight.
    """
    if there[key].dtype not in NARROW:
        return []
    layer = key.removesuffix("weight")
    return [f"{layer}{name}" for name in _NAMES if f"{layer}{name}" in there]


def scale_of(there: Mapping[str, Any], key: str, read: Callable[[str], Any]) -> Optional[Tensor]:
    """What the elements of a weight of 8 bits are to be multiplied by: one number ``[]``, or one
    for each row ``[rows]``, in float32; None where nothing is stored beside it.

    Args:
        there: by key what has the tensor's ``dtype`` and ``shape``.
        key: of the weight.
        read: gives a tensor by its key.

    Raises:
        AdapterError: scales of blocks, which are not followed, or one that divides nothing.
    """
    found = keys_of_scales(there, key)
    if not found:
        return None
    value: Tensor = read(found[0]).detach().float()
    shape = tuple(there[key].shape)
    if value.numel() == 1:
        value = value.reshape(())
    elif len(shape) == 2 and value.numel() == shape[0] and value.shape[0] == shape[0]:
        value = value.reshape(-1)
    else:
        # no scale of ours to follow: 1 / 0 is refused below
        value = torch.zeros(())
    # _inv: of blocks of 128 by 128, as DeepSeek's checkpoints have them
    if found[0].endswith("_inv") or not (value.isfinite() & (1 / value).isfinite()).all():
        raise AdapterError(
            f"{found[0]}: {list(read(found[0]).shape)} are no scales of the rows of {key}, "
            f"{list(shape)}. Give the checkpoint that it was quantised from."
        )
    return value
