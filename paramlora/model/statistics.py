"""What a model was before its first adapter: which parameters trained, and what its buffers held.

A training forward moves buffers, such as BatchNorm's running statistics, which are in no adapter's
file. So they are remembered, told of, and put back. A base checkpoint that is loaded later is what
the model was, from then on.

Three kinds stay as they are: another tensor of another shape, which somebody resized; one in no
state dict whose module has other plain attributes than before, which is a cache (of a rotary
embedding's angles) that belongs to those; and large tables of narrow whole numbers, a quantiser's
weights. What has eight bytes an entry, or one for a truth, is no weight: indices, counts, masks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from paramlora.errors import warn
from paramlora.model.targets import own_path
from paramlora.update.attached import AttachedUpdate
from paramlora.update.contexts import as_made
from paramlora.update.walk import paths_of

_FROZEN = "_frozen_by_paramlora"  # of the model: the names of the parameters that attach froze
_BUFFERS = "_buffers_before_paramlora"  # of a module: what its buffers held
_MOST_WHOLE = 2**16  # narrow whole numbers of a table that is no weight
_PLAIN = (bool, int, float, str, type(None))
_OF_MODULES = vars(nn.Module()).keys()
_WAYS = (
    'Call eval() on those layers, which keeps them still, or name them in an entry {"whole": '
    "true}, which trains and saves their statistics too."
)


@dataclass
class _Record:
    """What a module was: its plain attributes, and by name its buffers and what they held."""

    plain: dict[str, Any]
    buffers: dict[str, tuple[Tensor, Tensor]]


def keepers(model: nn.Module) -> list[nn.Module]:
    """The modules with buffers of their own that `remember` records."""
    return [module for module in model.modules() if any(True for _ in _buffers(module))]


@torch.no_grad()
def remember(model: nn.Module, kept: list[nn.Module], froze: bool) -> None:
    """Record what the model is and what `kept`, its `keepers`, hold; freeze it where asked to."""
    # only what trains: what the user froze must stay so after the last adapter
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad and froze]
    vars(model)[_FROZEN] = frozenset(own_path(name) for name, _ in trained)
    for module in kept:
        # the tensor itself too: whether it was replaced tells how to put it back
        held = {name: (one, one.clone()) for name, one in _buffers(module)}
        vars(module)[_BUFFERS] = _Record(_plain(module), held)
        # a base checkpoint that is loaded later is the new "before"
        module.register_load_state_dict_pre_hook(_loaded)  # type: ignore[no-untyped-call]
    for _, parameter in trained:
        parameter.requires_grad_(False)


@torch.no_grad()
def put_back(model: nn.Module) -> None:
    """What `remember` froze trains again, and what moved holds its earlier values."""
    # every module: a model that was attached to may lie in another now
    for owner in model.modules():
        # by name, as a deep copy has parameters of its own
        frozen = vars(owner).get(_FROZEN, ())
        for name, parameter in owner.named_parameters() if frozen else ():
            if own_path(name) in frozen:
                with as_made(parameter):
                    parameter.requires_grad_(True)
    # a list: what is put back would change what is compared
    for _, module, name, value in list(_moved(model)):
        now = module._buffers[name]
        # the very buffer: written in place, so that whoever holds it sees it
        if now is not None and now is vars(module)[_BUFFERS].buffers[name][0]:
            with as_made(now):
                # one that was resized is given its earlier shape first
                now.resize_(value.shape).copy_(value)
        else:  # what a forward put in its place may be the caller's
            module._buffers[name] = value


def forget(model: nn.Module) -> None:
    """Leave no record on the model."""
    for module in paths_of(model):
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
    moved = [path for path, module, name, _ in _moved(model) if _is_saved(module, name)]
    names = list(dict.fromkeys(path or "the model" for path in moved))
    if names:
        _warn(names, "hold buffers that moved since the adapter was attached and are not in its")


def _averages(module: nn.Module) -> bool:
    """Whether a module itself keeps running statistics, as BatchNorm does."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return module._buffers.get("running_mean") is not None


def _warn(names: list[str], what: str) -> None:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    warn(f"{', '.join(names[:3])}{more}: {what} file. {_WAYS}")


def _loaded(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Record what a checkpoint brings; one that does not fit is torch's to refuse."""
    buffers = vars(module)[_BUFFERS].buffers if _BUFFERS in vars(module) else {}
    for name, (held, before) in list(buffers.items()):
        value = state.get(prefix + name) if _is_saved(module, name) else None
        # another shape is an error of torch's, a moment later
        if isinstance(value, Tensor) and value.shape == before.shape and not value.is_meta:
            new = value.detach().to(before.device, before.dtype, copy=True)
            buffers[name] = held, new


def _moved(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(path, owner, name, the earlier value as it would be there now) of buffers that differ."""
    for path, module in model.named_modules():
        record = vars(module).get(_BUFFERS)
        if record is None:
            continue
        # a cache belongs to the attributes that it was computed from
        alike = _plain(module) == record.plain
        for name, now in _buffers(module):
            # a buffer that came later has itself for its earlier value
            held, value = record.buffers.get(name, (now, now))
            # resized by somebody: its values are none of ours
            fits = now is held or now.shape == value.shape
            if fits and (alike or _is_saved(module, name)):
                value = value.to(now.device, now.dtype)
                # by bytes: NaN is not equal to itself
                if now.shape != value.shape or not torch.equal(_bits(now), _bits(value)):
                    yield own_path(path), module, name, value


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: compared by them, NaN is like itself."""
    return tensor.reshape(-1).view(torch.uint8)


def _plain(module: nn.Module) -> dict[str, Any]:
    """A module's own attributes of the simplest types."""
    held = vars(module).items()
    return {name: one for name, one in held if type(one) in _PLAIN and name not in _OF_MODULES}


def _buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own buffers, unless they cannot move or are weights in whole numbers."""
    if not isinstance(module, (AttachedUpdate, torch.jit.ScriptModule)):
        for name, held in module._buffers.items():
            if _is_recorded(held):
                yield name, held


def _is_recorded(held: object) -> TypeGuard[Tensor]:
    if not isinstance(held, Tensor) or type(held) not in (Tensor, nn.Buffer) or held.is_meta:
        return False
    if held.layout is not torch.strided or held.is_quantized:
        return False
    real = held.is_floating_point() or held.is_complex()
    wide = held.dtype in (torch.int64, torch.uint64, torch.bool)
    return real or wide or held.dim() < 2 or held.numel() <= _MOST_WHOLE


def _is_saved(module: nn.Module, name: str) -> bool:
    return name not in module._non_persistent_buffers_set
