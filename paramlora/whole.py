"""A tensor trained whole beside its frozen original: a new head, norms, biases."""

import torch
from torch import Tensor, nn

from paramlora.sharded import take
from paramlora.switch import Switched


class Whole(Switched):
    r"""The parametrization of a tensor that is trained itself, not by a low-rank update.

    .. math:: W' = W + strength · (V - W)

    Args:
        weight: the tensor, of any shape; ``lora_whole`` starts as its copy.
        adapter: the name under which it is switched and saved.

    Shapes: ``lora_whole`` has the shape of `weight`; it is float32 on a 16-bit weight, where its
    updates would otherwise vanish, and the weight's own type elsewhere.
    """

    lora_whole: nn.Parameter

    def __init__(self, weight: Tensor, adapter: str = "default") -> None:
        dtype = torch.float32 if weight.dtype.itemsize <= 2 else weight.dtype
        super().__init__(adapter, weight.device, dtype)
        self.lora_whole = nn.Parameter(weight.detach().to(dtype, copy=True))

    def forward(self, weight: Tensor) -> Tensor:
        """``lora_whole`` in `weight`'s type; `weight` unchanged when off."""
        if not self.acts:
            return weight.clone() if self.written_by_reader else weight
        own = self.lora_whole
        if not self.fully:
            own = torch.lerp(weight.to(own.dtype), own, self.gain)  # type: ignore[assignment]
        return own.to(weight.dtype)

    def plain(self) -> dict[str, Tensor]:
        """What a file holds."""
        return {"lora_whole": self.lora_whole}

    @torch.no_grad()
    def load_plain(self, state: dict[str, Tensor]) -> None:
        """Take the value of a file."""
        take(self.lora_whole, state["lora_whole"])

    def extra_repr(self) -> str:
        return f"adapter={self.adapter!r}, whole, strength={self.strength}"
