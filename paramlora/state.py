"""The live model to and from an adapter's tensors, named by module path."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from paramlora.attach import check_adapters, lowranks
from paramlora.errors import FileError

_NAMES = ("lora_A", "lora_B", "lora_scale")


def adapter_state_dict(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """``{"<module path>.lora_A": ...}``: the adapter's own tensors, detached, not copied.

    A tensor other than ``weight`` has its name in the path, such as ``lstm.weight_ih_l0.lora_A``.

    Raises:
        AdapterError: `adapter` is not attached.
    """
    return {key: tensor.detach() for key, tensor in _live(model, adapter).items()}


def load_adapter_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], adapter: str = "default"
) -> nn.Module:
    """Copy `state` into an attached adapter; everything is checked before the first copy.

    Raises:
        AdapterError: `adapter` is not attached.
        FileError: missing or unexpected keys, or another shape.
    """
    live = _live(model, adapter)
    missing = sorted(live.keys() - state.keys())
    unexpected = sorted(state.keys() - live.keys())
    if missing or unexpected:
        raise FileError(
            f'adapter "{adapter}" does not fit {type(model).__name__}: '
            f"missing: {', '.join(missing) or 'none'}; "
            f"unexpected: {', '.join(unexpected) or 'none'}. Attach its own configuration."
        )
    for key, tensor in live.items():
        if tensor.shape != state[key].shape:
            raise FileError(
                f"{key}: shape {list(state[key].shape)} does not fit {list(tensor.shape)}. "
                "Was it made for another model or rank?"
            )
    with torch.no_grad():
        for key, tensor in live.items():
            tensor.copy_(state[key])
    return model


def _live(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    check_adapters(model, adapter)
    return {
        f"{path}.{name}" if path else name: getattr(lowrank, name)
        for path, _, lowrank in lowranks(model)
        if lowrank.adapter == adapter
        for name in _NAMES
    }
