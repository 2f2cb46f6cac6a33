"""An adapter as a value: its updates by the path of their tensor, free of any model or file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn, Optional, Union

from einops import rearrange
from torch import Tensor

from paramlora.config import TargetConfig
from paramlora.errors import AdapterError
from paramlora.update.geometry import Layout


@dataclass(frozen=True)
class Update:
    """One low-rank update, as every file format holds it.

    Args:
        lora_A: ``[*stack, r, in]``, the input side; a convolution's ``in`` is
            ``in_channels / groups · prod(kernel)``.
        lora_B: ``[*stack, out, r]``, the output side; ``[out, r, *kernel]`` where `up_kernel`
            is ``"same"``.
        scale: the factor itself, never divided by ``r``.
        shape: of the weight that it updates, where the file or the model tells.
        layout: where the input and output sides lie in that weight (see `matrix_shape`).
        trainable_scale, hard, up_kernel, dropout, adapter_dtype: as in the configuration.
        kind: of the layer, where known (see `Target.kind`): formats name kinds apart.
        groups: of a convolution.
    """

    lora_A: Tensor
    lora_B: Tensor
    scale: float = 1.0
    shape: Optional[tuple[int, ...]] = None
    layout: Layout = "matrix"
    trainable_scale: bool = False
    hard: bool = True
    up_kernel: Union[int, str] = 1
    dropout: float = 0.0
    adapter_dtype: Optional[str] = None
    kind: Optional[str] = None
    groups: int = 1

    @property
    def r(self) -> int:
        """The rank."""
        return self.lora_B.shape[1 if self.up_kernel == "same" else -1]

    def entry(self, name: str) -> TargetConfig:
        """The configuration that attaches it, under a name."""
        return TargetConfig(
            name,
            self.r,
            self.scale,
            self.trainable_scale,
            self.hard,
            self.up_kernel,
            dropout=self.dropout,
            adapter_dtype=self.adapter_dtype,
        )

    def delta(self) -> Tensor:
        """``scale · B·A`` in the weight's shape, in the factors' own type; needs `shape`."""
        product = (self.lora_B * self.scale) @ self.lora_A
        if self.layout == "transposed":
            product = rearrange(product, "out fan_in -> fan_in out")
        return product.reshape(self.shape if self.shape is not None else product.shape)


@dataclass(frozen=True)
class Holder:
    """A layer that holds a tied tensor: what of an `Update` depends on the layer, not the tensor.

    Args:
        kind, layout, groups: as in `Update`.
    """

    kind: str
    layout: Layout
    groups: int = 1


@dataclass(frozen=True)
class Adapter:
    """The updates of one adapter, by path: a module's for its ``weight``, else the parameter's.

    The paths are the stems of the native file's keys: ``unet.to_q`` updates
    ``unet.to_q.weight``, ``attn.in_proj_weight`` updates that parameter.

    Args:
        updates: the low-rank updates.
        name: under which it is attached.
        metadata: of its file, where it has any.
        whole: by such a path, tensors to have instead of the base's.
        base: by path, what tells the base that it was trained on (see `digest`), where known.
        holders: the layers of tied tensors by path, where known: those share one `Update`, which
            has the first one's kind.
    """

    updates: Mapping[str, Update]
    name: str = "default"
    metadata: Mapping[str, str] = field(default_factory=dict)
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    base: Mapping[str, str] = field(default_factory=dict)
    holders: Mapping[str, Holder] = field(default_factory=dict)


def refuse_two_kernels(path: str, kernel: tuple[int, ...]) -> NoReturn:
    """Say why a branch with ``"up_kernel": "same"`` cannot be merged."""
    raise AdapterError(
        f'{path or "this layer"}: "up_kernel": "same" is two convolutions of kernel '
        f"{list(kernel)} in a row, which no kernel of that size equals. Nothing was "
        'merged; keep the adapter attached, or train it with "up_kernel": 1.'
    )
