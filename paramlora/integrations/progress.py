"""How far each layer has moved, for a training loop's own log."""

from collections.abc import Callable

from torch import nn

from paramlora.model.attach import check_adapters, placed
from paramlora.model.norms import relative_size


def update_norms(model: nn.Module, adapter: str = "default") -> dict[str, float]:
    """The size of each update against its weight: ``‖W' - W‖ / ‖W‖``, Frobenius norms.

    0 before the first step (except in tensors that are loaded); one that stays 0 belongs to a
    layer that the loss does not reach. Infinite where the weight is all zeros. Soft convolutions of
    two kernels, which are not one weight, and counts of batches are left out. All processes of a
    sharded model call it.

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
            size = relative_size(module, update)
            if size is not None:
                found[path] = size
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
