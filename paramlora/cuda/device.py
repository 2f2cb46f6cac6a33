"""What a CUDA device is, asked of itself."""

from dataclasses import dataclass
from typing import Optional

import torch

from paramlora.update.compat import constant_result

_CARDS: dict[int, "Card"] = {}
_SERVED: dict[int, bool] = {}


@dataclass(frozen=True)
class Card:
    """A device.

    Args:
        capability: CUDA's, such as (9, 0).
        processors: its multiprocessors.
    """

    capability: tuple[int, int]
    processors: int

    @property
    def hopper(self) -> bool:
        """Whether it has the tensor memory engine, lets a kernel start before the one ahead ends,
        and has the shared memory of the tiles that use them: Hopper and Blackwell for data
        centres, not for games (12.0)."""
        return (9, 0) <= self.capability < (12, 0)


def card(device: int) -> Card:
    """A device, by its index."""
    if device not in _CARDS:
        about = torch.cuda.get_device_properties(device)
        _CARDS[device] = Card((about.major, about.minor), about.multi_processor_count)
    return _CARDS[device]


def runs(hip: Optional[str], capability: tuple[int, int], triton: bool) -> bool:
    """Whether the kernels run on a device: one of NVIDIA's, of 8.0 or later, with Triton.

    Args:
        hip: `torch.version.hip`. Where there is one, devices are AMD's, which torch also calls
            "cuda", and whose capabilities are other numbers: an MI300's is (9, 4).
        capability: of the device.
        triton: whether Triton is there.
    """
    return hip is None and capability >= (8, 0) and triton


@constant_result
def serves(device: int) -> bool:
    """Whether the kernels run on a device, by its index; see `runs`."""
    if device not in _SERVED:
        capability = torch.cuda.get_device_capability(device)
        _SERVED[device] = runs(torch.version.hip, capability, _importable())
    return _SERVED[device]


def _importable() -> bool:
    try:
        # older Tritons have none, and `launch` makes its blocks as those
        import triton.tools.tensor_descriptor  # noqa: F401
    except ImportError:
        return False
    return True
