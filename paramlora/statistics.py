"""What a model was before its first adapter: which parameters trained, and what its buffers held.

A training forward moves buffers, such as BatchNorm's running statistics, which are in no adapter's
file. So they are remembered, told of, and put back.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

from paramlora.errors import ParamloraWarning
from paramlora.switch import Switched
from paramlora.targets import own_path

_RECORD = "_before_paramlora"
_WAYS = (
    'Call eval() on those layers, which keeps them still, or name them in an entry {"whole": '
    "true}, which trains and saves their statistics too."
)


@dataclass(frozen=True)
class Before:
    """Of a model, by the names in its state dict.

    Args:
        frozen: the parameters that `attach` froze.
        buffers: the values of the persistent buffers of real numbers, and of single numbers.
    """

    frozen: frozenset[str]
    buffers: dict[str, Tensor]


@torch.no_grad()
def remember(model: nn.Module, froze: bool) -> None:
    """Record what the model is, and freeze it where asked to."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad and froze]
    buffers = {name: held.clone() for name, held in _buffers(model) if not held.is_meta}
    vars(model)[_RECORD] = Before(frozenset(own_path(name) for name, _ in trained), buffers)
    for _, parameter in trained:
        parameter.requires_grad_(False)


@torch.no_grad()
def put_back(model: nn.Module) -> None:
    """What `remember` froze trains again, and what moved holds its earlier values."""
    for owner, record in _records(model):
        for name, parameter in owner.named_parameters():
            if own_path(name) in record.frozen:
                parameter.requires_grad_(True)
        for _, held, value in _moved(owner, record):
            held.copy_(value)


def forget(model: nn.Module) -> None:
    """Leave no record on the model."""
    for owner, _ in _records(model):
        del vars(owner)[_RECORD]


def warn_moving(model: nn.Module) -> None:
    """Tell that a training forward will move running statistics."""
    names = [
        own_path(path)
        for path, module in model.named_modules()
        if module.training and _averages(module)
    ]
    if names:
        _warn(names, "keep running statistics, which move while they train and are in no adapter's")


def warn_moved(model: nn.Module) -> None:
    """Tell that buffers moved which no file of the adapter will hold."""
    found = (moved for owner, record in _records(model) for moved in _moved(owner, record))
    names = list(dict.fromkeys(name.rpartition(".")[0] or "the model" for name, _, _ in found))
    if names:
        _warn(names, "hold buffers that moved since the adapter was attached and are not in its")


def _averages(module: nn.Module) -> bool:
    """Whether it keeps running statistics of its own."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return module._buffers.get("running_mean") is not None


def _warn(names: list[str], what: str) -> None:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    warnings.warn(
        f"{', '.join(names[:3])}{more}: {what} file. {_WAYS}", ParamloraWarning, stacklevel=5
    )


def _records(model: nn.Module) -> list[tuple[nn.Module, Before]]:
    return [(one, vars(one)[_RECORD]) for one in model.modules() if _RECORD in vars(one)]


def _moved(owner: nn.Module, record: Before) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, buffer, its earlier value) of those that differ."""
    for name, held in _buffers(owner):
        value = record.buffers.get(name)
        if value is None or held.is_meta or held.shape != value.shape:
            continue
        value = value.to(held.device, held.dtype)
        if not torch.equal(held, value):
            yield name, held, value


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, buffer) of what `Before` records; nothing that is an update's own."""
    for path, module in model.named_modules():
        if not isinstance(module, (Switched, torch.jit.ScriptModule)):
            for name, held in module._buffers.items():
                if _is_recorded(held) and name not in module._non_persistent_buffers_set:
                    yield own_path(f"{path}.{name}" if path else name), held


def _is_recorded(held: object) -> TypeGuard[Tensor]:
    """Whether it is a plain tensor of real numbers, or a single number, such as a count."""
    if not isinstance(held, Tensor) or type(held) not in (Tensor, nn.Buffer):
        return False
    return held.is_floating_point() or held.dim() == 0
