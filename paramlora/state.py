"""The live model to and from an adapter's tensors, named by module path."""

from collections.abc import Mapping

from torch import Tensor, nn

from paramlora.attach import check_adapters, updates
from paramlora.errors import FileError
from paramlora.switch import Switched


def adapter_state_dict(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """``{"<module path>.lora_A": ...}``: the adapter's own tensors, detached, not copied.

    A tensor other than ``weight`` has its name in the path, such as ``lstm.weight_ih_l0.lora_A``.
    One that is trained whole is ``lora_whole``. After ``"init": "pissa"`` or ``"olora"`` the
    factors are new tensors, of twice the rank: a plain adapter for the unchanged base.

    Raises:
        AdapterError: `adapter` is not attached.
    """
    return {key: tensor.detach() for key, tensor in _live(_stems(model, adapter)).items()}


def load_adapter_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], adapter: str = "default"
) -> nn.Module:
    """Copy `state` into an attached adapter; everything is checked before the first copy.

    Raises:
        AdapterError: `adapter` is not attached.
        FileError: missing or unexpected keys, or another shape.
    """
    stems = _stems(model, adapter)
    live = _live(stems)
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
    for key, tensor in live.items():
        if tensor.is_meta:
            raise FileError(
                f"{key} lies on the meta device, where values are lost. Load the model first."
            )
    for stem, update in stems.items():
        update.load_plain({name: state[_key(stem, name)] for name in update.plain()})
    return model


def _stems(model: nn.Module, adapter: str) -> dict[str, Switched]:
    check_adapters(model, adapter)
    return {path: update for path, _, update in updates(model) if update.adapter == adapter}


def _live(stems: Mapping[str, Switched]) -> dict[str, Tensor]:
    return {
        _key(stem, name): tensor
        for stem, update in stems.items()
        for name, tensor in update.plain().items()
    }


def _key(stem: str, name: str) -> str:
    return f"{stem}.{name}" if stem else name
