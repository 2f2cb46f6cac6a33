"""The live model to and from an adapter's tensors, named by module path."""

from collections.abc import Mapping
from typing import Optional

import torch
from torch import Tensor, nn

from paramlora.adapter import Adapter, Update
from paramlora.attach import attach_targets, check_adapters, detach, lowranks, placed
from paramlora.config import TargetConfig
from paramlora.errors import FileError
from paramlora.lowrank import LowRank
from paramlora.soft import Branch
from paramlora.targets import Target, adaptable, targets_at

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


def adapter_of(model: nn.Module, adapter: str = "default") -> Adapter:
    """An attached adapter as a value: its tensors detached, not copied.

    Tied tensors that share one update hold the same `Update` under each of their paths.

    Raises:
        AdapterError: `adapter` is not attached.
    """
    check_adapters(model, adapter)
    there = {target.path: target for target in adaptable(model)}
    made: dict[int, Update] = {}
    updates = {}
    for path, _, lowrank in placed(model):
        if lowrank.adapter == adapter:
            fresh = _update(lowrank, there.get(path))
            updates[path] = made.setdefault(id(lowrank), fresh)
    return Adapter(updates, adapter)


def attach_adapter(model: nn.Module, adapter: Adapter, name: Optional[str] = None) -> nn.Module:
    """Attach an adapter at its own paths and load its values; all or nothing.

    Args:
        model: a model that has every path of `adapter`.
        adapter: its tensors are copied into new parameters.
        name: a name of your own instead of the adapter's.

    Raises:
        TargetError: a path that the model lacks, or a rank or kind that does not fit there.
        FileError: a tensor of another shape.
        AdapterError: an adapter of that name is attached already.
    """
    name = adapter.name if name is None else name
    before = [(p, p.requires_grad) for p in model.parameters()]
    attach_targets(model, targets_at(model, _entries(adapter)), name)
    try:
        values = _values(adapter)
        load_adapter_state_dict(model, {k: values[k] for k in _live(model, name)}, name)
    except BaseException:
        detach(model, name)
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
        raise
    return model


def _update(lowrank: LowRank, target: Optional[Target]) -> Update:
    scale = lowrank.lora_scale.detach()
    asked = lowrank.entry.scale if lowrank.entry is not None else scale.item()
    return Update(
        lowrank.lora_A.detach(),
        lowrank.lora_B.detach(),
        # the configuration's own number where it was not trained: 0.3, not float32's nearest
        asked if torch.equal(scale, torch.full_like(scale, asked)) else scale.item(),
        None if target is None else target.shape,
        lowrank.layout,
        isinstance(lowrank.lora_scale, nn.Parameter),
        not isinstance(lowrank, Branch),
        "same" if isinstance(lowrank, Branch) and lowrank.kernel else 1,
        None if target is None else target.kind,
        1 if target is None else target.groups,
    )


def _entries(adapter: Adapter) -> dict[str, TargetConfig]:
    """An entry for each path; paths that share one update share one entry."""
    first: dict[int, str] = {}
    entries = {}
    for path, update in adapter.updates.items():
        entry = first.setdefault(id(update), path)
        options = (update.scale, update.trainable_scale, update.hard, update.up_kernel)
        entries[path] = TargetConfig(entry, update.r, *options)
    return entries


def _values(adapter: Adapter) -> dict[str, Tensor]:
    return {
        f"{path}.{name}" if path else name: value
        for path, update in adapter.updates.items()
        for name, value in zip(_NAMES, (update.lora_A, update.lora_B, _scale(update)))
    }


def _scale(update: Update) -> Tensor:
    return torch.tensor(update.scale, dtype=torch.float64)


def _live(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    check_adapters(model, adapter)
    return {
        f"{path}.{name}" if path else name: getattr(lowrank, name)
        for path, _, lowrank in lowranks(model)
        if lowrank.adapter == adapter
        for name in _NAMES
    }
