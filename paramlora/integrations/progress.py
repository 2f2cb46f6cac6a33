"""How far each layer has moved, for a training loop's own log."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from paramlora.model.attach import (
    base_of,
    check_adapters,
    disable_adapters,
    placed,
    updates_of,
)
from paramlora.model.branch import Branch
from paramlora.model.quantised import dense
from paramlora.update.attached import AttachedUpdate
from paramlora.update.lowrank import LowRank
from paramlora.update.sharded import gathered
from paramlora.update.whole import Whole


@torch.no_grad()
def update_norms(model: nn.Module, adapter: str = "default") -> dict[str, float]:
    """The size of each update against its weight: ``‖W' - W‖ / ‖W‖``, Frobenius norms.

    0 before the first step (except in tensors that are loaded); one that stays 0 belongs to a
    layer that the loss does not reach. Infinite where the weight is all zeros. Soft convolutions of
    two kernels, which are not one weight, are left out. All processes of a sharded model call it.

    Args:
        model: with `adapter` attached.
        adapter: whose updates, at the strength that they have.

    Returns:
        By the path of the tensor in files.

    Raises:
        AdapterError: it is not attached.

    Example:
        >>> import paramlora
        >>> model = paramlora.attach(nn.Sequential(nn.Linear(4, 3)), {"0": {"r": 2}})
        >>> update_norms(model)
        {'0': 0.0}
    """
    check_adapters(model, adapter)
    found: dict[str, float] = {}
    for path, module, update in placed(model):
        if update.adapter == adapter and path not in found:
            base = _base(module, update)
            size = _size(update, base)
            if size is not None:
                found[path] = (size / _norm(base)).item()
    return found


def log_updates(
    model: nn.Module,
    write: Callable[[str, float, int], object],
    step: int,
    adapter: str = "default",
) -> None:
    """Write `update_norms`, one call for each update.

    Args:
        model: with `adapter` attached.
        write: called with ``("update/" + path, norm, step)``: a TensorBoard ``SummaryWriter``'s
            ``add_scalar``, or ``print``.
        step: of the training.
        adapter: whose updates.

    Raises:
        AdapterError: it is not attached.

    Example:
        >>> import paramlora
        >>> model = paramlora.attach(nn.Sequential(nn.Linear(4, 3)), {"0": {"r": 2}})
        >>> log_updates(model, print, 10)
        update/0 0.0 10
    """
    for path, norm in update_norms(model, adapter).items():
        write(f"update/{path}", norm, step)


def _base(module: nn.Module, update: AttachedUpdate) -> Tensor:
    """The weight that an update of this layer acts on, as numbers."""
    held = {name: list(of) for name, of in updates_of(module)}
    (name,) = [name for name, of in held.items() if any(one is update for one in of)]
    if all(isinstance(one, AttachedUpdate) for one in held[name]):
        return dense(module, base_of(module, name).detach())
    with disable_adapters(module):  # under a weight norm, the weight is what that computes
        return getattr(module, name).detach()  # type: ignore[no-any-return]


def _size(update: AttachedUpdate, base: Tensor) -> "Tensor | None":
    if isinstance(update, Whole):
        return _norm(update.lora_whole - base) * abs(update.strength)
    if not isinstance(update, LowRank) or (isinstance(update, Branch) and update.kernel):
        return None
    a, b = (gathered(factor).to(torch.float64) for factor in update.factors())
    # ‖B·A‖² = trace(BᵀB · AAᵀ), which needs no product of the weight's size
    square = ((b.mT @ b) * (a @ a.mT)).sum().clamp(min=0)
    return square.sqrt() * gathered(update.scaling).abs()


def _norm(tensor: Tensor) -> Tensor:
    return gathered(torch.linalg.vector_norm(tensor, dtype=_wide(tensor))).to(torch.float64)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
