"""What a model was before its first adapter: which parameters trained, and what its buffers held.

A training forward moves buffers, such as BatchNorm's running statistics, which are in no adapter's
file. So they are remembered, told of, and put back. A base checkpoint that is loaded later is what
the model was, from then on.
"""

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from paramlora.errors import warn
from paramlora.model.targets import own_path
from paramlora.update.attached import AttachedUpdate

_FROZEN = "_frozen_by_paramlora"  # of the model: the names of the parameters that attach froze
_BUFFERS = "_buffers_before_paramlora"  # of a module: what its buffers held
_WAYS = (
    'Call eval() on those layers, which keeps them still, or name them in an entry {"whole": '
    "true}, which trains and saves their statistics too."
)


def keepers(model: nn.Module) -> list[nn.Module]:
    """The modules with buffers of their own that `remember` records."""
    return [module for module in model.modules() if any(True for _ in _buffers(module))]


@torch.no_grad()
def remember(model: nn.Module, kept: list[nn.Module], froze: bool) -> None:
    """Record what the model is and what `kept`, its `keepers`, hold; freeze it where asked to."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad and froze]
    vars(model)[_FROZEN] = frozenset(own_path(name) for name, _ in trained)
    for module in kept:
        vars(module)[_BUFFERS] = {name: held.clone() for name, held in _buffers(module)}
        module.register_load_state_dict_pre_hook(_loaded)  # type: ignore[no-untyped-call]
    for _, parameter in trained:
        parameter.requires_grad_(False)


@torch.no_grad()
def put_back(model: nn.Module) -> None:
    """What `remember` froze trains again, and what moved holds its earlier values."""
    for owner in model.modules():
        frozen = vars(owner).get(_FROZEN, ())
        for name, parameter in owner.named_parameters() if frozen else ():
            if own_path(name) in frozen:
                parameter.requires_grad_(True)
    for _, held, value in _moved(model):
        held.copy_(value)


def forget(model: nn.Module) -> None:
    """Leave no record on the model."""
    for module in model.modules():
        vars(module).pop(_FROZEN, None)
        if vars(module).pop(_BUFFERS, None) is not None:
            hooks = module._load_state_dict_pre_hooks
            # found by the function, because a deep copy shares no handle with its original
            for key in [k for k, one in hooks.items() if getattr(one, "hook", one) is _loaded]:
                del hooks[key]


def warn_moving(model: nn.Module) -> None:
    """Tell that a training forward will move running statistics."""
    named = model.named_modules()
    names = [own_path(path) for path, module in named if module.training and _averages(module)]
    if names:
        _warn(names, "keep running statistics, which move while they train and are in no adapter's")


def warn_moved(model: nn.Module) -> None:
    """Tell that buffers moved which no file of the adapter will hold."""
    names = list(dict.fromkeys(path or "the model" for path, _, _ in _moved(model)))
    if names:
        _warn(names, "hold buffers that moved since the adapter was attached and are not in its")


def _averages(module: nn.Module) -> bool:
    """Whether it keeps running statistics of its own."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return module._buffers.get("running_mean") is not None


def _warn(names: list[str], what: str) -> None:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    warn(f"{', '.join(names[:3])}{more}: {what} file. {_WAYS}")


def _loaded(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Record what a checkpoint brings; one that does not fit is torch's to refuse."""
    record = vars(module).get(_BUFFERS, {})
    for name, before in record.items():
        value = state.get(prefix + name)
        if isinstance(value, Tensor) and value.shape == before.shape and not value.is_meta:
            record[name] = value.detach().to(before.device, before.dtype, copy=True)


def _moved(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(path of the owner, buffer, its earlier value) of those that differ."""
    for path, module in model.named_modules():
        record = vars(module).get(_BUFFERS, {})
        for name, held in _buffers(module) if record else ():
            value = record.get(name)
            if value is not None and held.shape == value.shape:
                value = value.to(held.device, held.dtype)
                if not torch.equal(held, value):
                    yield own_path(path), held, value


def _buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's persistent buffers of real numbers, and of single numbers, such as a count."""
    if not isinstance(module, (AttachedUpdate, torch.jit.ScriptModule)):
        for name, held in module._buffers.items():
            if _is_recorded(held) and name not in module._non_persistent_buffers_set:
                yield name, held


def _is_recorded(held: object) -> TypeGuard[Tensor]:
    if not isinstance(held, Tensor) or type(held) not in (Tensor, nn.Buffer) or held.is_meta:
        return False
    return held.is_floating_point() or held.dim() == 0
