"""Weights that lie on several processes (DTensor), and the order of attaching and wrapping."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, Optional

import torch
from torch import Tensor, nn

from paramlora.errors import AdapterError
from paramlora.update.compat import copied
from paramlora.update.contexts import as_made
from paramlora.update.walk import paths_of


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor; in a process that has none, nothing is imported to find out."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def gathered(tensor: Any) -> Tensor:
    """The tensor on every process; all of them must call this together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[no-any-return]


def take(own: Tensor, value: Tensor) -> None:
    """Copy `value`, the same on every process, into `own`, sharded or not."""
    if is_sharded(own) and not is_sharded(value):
        value = distributed(value.to(own.device, own.dtype), own)
    elif not is_sharded(own):
        value = gathered(value)
    with as_made(own):
        own.copy_(value)


def take_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """`take` of many, all plain ones of them at once."""
    plain: list[tuple[Tensor, Tensor]] = []
    for own, value in pairs:
        if type(own) not in (Tensor, nn.Parameter) or own.is_inference() or is_sharded(value):
            take(own, value)
        else:
            plain.append((own, value))
    if plain:
        with torch.no_grad():
            copied([own for own, _ in plain], [value for _, value in plain])


def check_order(model: nn.Module) -> None:
    """Refuse to attach where a wrapper has taken the parameters already.

    Raises:
        AdapterError: names the wrapper and the order that works.
    """
    first: dict[type, str] = {}
    for path, module in model.named_modules():
        first.setdefault(type(module), path)
    for kind, path in first.items():
        for cls in kind.__mro__:
            if cls.__name__ in _TAKERS and cls.__module__.startswith("torch."):
                raise AdapterError(
                    f"{path or kind.__name__} is under {_TAKERS[cls.__name__]} already, "
                    "which would not know new parameters. Attach first, then wrap."
                )


_FSDP1, _FSDP2 = "FullyShardedDataParallel", "FSDPModule"
_TAKERS = {
    _FSDP2: "fully_shard",
    _FSDP1: _FSDP1,
    "DistributedDataParallel": "DistributedDataParallel",
}


def check_not_flat(model: nn.Module, what: str, gathers: bool = False) -> None:
    """Refuse what needs each tensor where torch's FSDP1 holds them in flat parts: those are of
    other shapes in each process, and what is taken off a layer stays in the flat parameter.

    Args:
        what: the function that was called.
        gathers: whether it is right inside of ``summon_full_params``, where all is there.

    Raises:
        AdapterError: names the function and the way out.
    """
    for module in _of_class(model, _FSDP1):
        state: Any = getattr(module, "training_state", None)
        if gathers and getattr(state, "name", "") == "SUMMON_FULL_PARAMS":
            continue
        inside = f"inside `with {_FSDP1}.summon_full_params(model):`, in all processes"
        where = (
            inside
            if gathers
            else f"on a model that is not wrapped, with an adapter that was saved {inside}"
        )
        raise AdapterError(
            f"{what} under {_FSDP1}: each process holds flat parts of the tensors alone. "
            f"Call it {where}; or use fully_shard."
        )


def reshard(model: nn.Module) -> None:
    """Have torch's `fully_shard` put its sharded tensors back, where a call left the whole ones:
    what is written into those is lost."""
    for module in _of_class(model, _FSDP2):
        module.reshard()  # type: ignore[operator]


def under_fully_shard(model: nn.Module) -> bool:
    """Whether torch's `fully_shard` puts the tensors of its layers in their places."""
    return any(True for _ in _of_class(model, _FSDP2))


def check_own_parameters(model: nn.Module, groups: Mapping[str, list[nn.Parameter]]) -> None:
    """Refuse to group the parameters of an update that torch's FSDP1 has put into its flat ones.

    Raises:
        AdapterError: names the way out.
    """
    if not any(groups.values()) and any(True for _ in _of_class(model, _FSDP1)):
        raise AdapterError(
            f"{_FSDP1} holds the adapter's tensors in flat parameters, each of which has one rate. "
            "Wrap with use_orig_params=True; or use fully_shard."
        )


def _of_class(model: nn.Module, name: str) -> Iterator[nn.Module]:
    if "torch.distributed.fsdp" not in sys.modules:  # in which all of them are
        return
    for module in paths_of(model):
        kind: Any = type(module)
        if _descends(kind, name):
            yield module


@cache
def _descends(kind: type, name: str) -> bool:
    return any(cls.__name__ == name for cls in kind.__mro__)


def distributed(value: Tensor, like: Any) -> Tensor:
    """A tensor that every process has whole, sharded as another is."""
    return distribute(value, like, like.placements)


def distribute(value: Tensor, like: Any, placements: Any) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, placements)


def laid_beside(value: Optional[Tensor], like: Any) -> Optional[Tensor]:
    """A tensor that every process has whole, for an operation with one that may be sharded."""
    if value is None or not is_sharded(like) or is_sharded(value):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    places = [Replicate()] * like.device_mesh.ndim
    return DTensor.from_local(value, like.device_mesh, places, run_check=False)


def writes() -> bool:
    """Whether this process is the one that writes a file for all."""
    return not _running() or torch.distributed.get_rank() == 0


def wait() -> None:
    """Until every process is here."""
    if _running():
        torch.distributed.barrier()


def _running() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
