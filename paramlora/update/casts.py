"""What is done to a model's weights to save memory, and must not be done to its updates."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paramlora.errors import AdapterError

_Fn = Callable[[Tensor], Tensor]


def is_storage(dtype: torch.dtype) -> bool:
    """Whether a type only stores numbers: torch computes nothing in floats of 8 bits."""
    return dtype.is_floating_point and dtype.itemsize == 1


def without_storage(update: Any, fn: _Fn) -> _Fn:
    """What to do to an update's tensors where `fn` is done to a whole model.

    That is `fn`, but for casts into a type that only stores, and for the next cast out of it:
    a model in such a type (layerwise casting) is cast twice a call, and factors would lose at the
    first cast what no other brings back. They are moved along and keep their type.
    """
    # the switch's own: its type and place are the same for all rows, inside of `route` too
    gain: Tensor = update.switch.gain
    # an empty tensor asks `fn` for its type: a cast, a move or both
    after = fn(torch.empty(0, dtype=gain.dtype, device=gain.device))
    # once `stored`, the cast out of the storing type is passed by too
    if after.dtype == gain.dtype or not (update.stored or is_storage(after.dtype)):
        return fn
    update.keep(stored=is_storage(after.dtype))
    return lambda tensor: tensor.to(after.device)  # moved, and not cast


class NotOffloaded:
    """The attribute ``_hf_hook``, where one that takes the tensors elsewhere is refused.

    accelerate brings them back for a call of the module that holds them; an update is read by its
    layer without such a call, so that it would be read where it has no values.
    """

    def __get__(self, update: Any, cls: type) -> Any:
        if update is None:
            return self
        # as an attribute that is not there: accelerate asks by `hasattr`
        try:
            return update.__dict__["_hf_hook"]
        except KeyError:
            raise AttributeError("_hf_hook") from None

    def __set__(self, update: Any, hook: Any) -> None:
        # its hooks are one, or several in a sequence
        if any(getattr(one, "offload", False) for one in (hook, *getattr(hook, "hooks", ()))):
            hook.detach_hook(update)  # it has taken the tensors already
            raise AdapterError(
                f'adapter "{update.adapter}": accelerate cannot keep an update elsewhere between '
                "calls. Call accelerate.hooks.remove_hook_from_submodules(model), then merge, or "
                "move the whole model with cpu_offload_with_hook."
            )
        update.__dict__["_hf_hook"] = hook

    def __delete__(self, update: Any) -> None:
        del update.__dict__["_hf_hook"]
