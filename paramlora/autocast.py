"""Whether autocast is on for a tensor."""

from typing import Optional

import torch
from torch import Tensor


def autocast_of(x: Tensor) -> Optional[str]:
    """The kind of x's device where autocast is on there, else None. Not every kind has one: the
    meta device, where shapes are inferred, has none, and torch raises when asked."""
    # a device's name takes as long to spell as a launch
    device = "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type
    if device not in ("cuda", "cpu") and not torch.amp.is_autocast_available(device):
        return None
    return device if torch.is_autocast_enabled(device) else None
