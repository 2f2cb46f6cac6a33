"""What every update is: named, switched on and off, and moved to and from a file."""

from typing import Any, Optional

import torch
from torch import Tensor, nn

from paramlora.casts import NotOffloaded, without_storage
from paramlora.config import TargetConfig


class Switched(nn.Module):
    """An update whose strength changes without compiling anything again.

    The number is a tensor, ``gain``, that compiled code reads. Only whether it is not zero
    (`acts`) and whether it is one (`fully`) are branches in that code.

    Args:
        adapter: the name under which the update is switched and saved.
        device, dtype: of ``gain``.
    """

    gain: Tensor
    adapter: str
    acts: bool
    fully: bool
    _strength: float
    order: tuple[str, ...] = ()  # of the owner's parameters, set when registered
    former: type = nn.Module  # the owner's class before the first, set when registered
    stored: bool = False  # whether the weight is in a type that only stores it (see `casts`)
    written_by_reader: bool = False  # such as an embedding with max_norm, set by attach
    entry: Optional[TargetConfig] = None  # what asked for it, set by attach
    _hf_hook = NotOffloaded()

    def __init__(self, adapter: str, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        gain = torch.full((), 1.0, device=device, dtype=dtype)
        self.register_buffer("gain", gain, persistent=False)
        self.keep(adapter=adapter, _strength=1.0, acts=True, fully=True)

    def keep(self, **values: Any) -> None:
        """Set attributes that are neither tensors nor modules, which nn.Module would first look
        for: as long as it takes to make a tensor, and a model has thousands of updates."""
        self.__dict__.update(values)

    @property
    def strength(self) -> float:
        """How strongly the update acts: 1 as trained, 0 not at all."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self.keep(_strength=value, acts=value != 0, fully=value == 1)
        self.gain.fill_(value)

    def _apply(self, fn: Any, recurse: bool = True) -> "Switched":
        lazy = self.gain.is_meta
        super()._apply(without_storage(self, fn), recurse)  # type: ignore[no-untyped-call]
        self.gain.fill_(self._strength)  # lost in a narrower type, or in memory that is new
        if lazy and not self.gain.is_meta:
            self.reset_parameters()
        return self

    def reset_parameters(self) -> None:
        """Start anew, where a model from the meta device has been given its memory."""
        raise NotImplementedError

    def plain(self) -> dict[str, Tensor]:
        """What a file holds, by the end of its key; live tensors where they are stored so."""
        raise NotImplementedError

    def load_plain(self, state: dict[str, Tensor]) -> None:
        """Take the values of a file, bit for bit those that `plain` gave it."""
        raise NotImplementedError
