"""What the class of a layer tells: its name in an entry, and whether it is a linear layer."""

import sys
from typing import Optional, TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)  # what is given is given back, of its own type


def is_hf_conv1d(module: nn.Module) -> bool:
    """transformers.pytorch_utils.Conv1D stores ``[in, out]``; known by name, so not imported."""
    return any(
        c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils"
        for c in type(module).__mro__
    )


def is_linear(module: nn.Module) -> bool:
    """Whether a layer is a product with one matrix, however it is stored."""
    return isinstance(module, nn.Linear) or is_hf_conv1d(module)


def is_of(name: str, module: nn.Module) -> bool:
    """Whether a class of a name is a module's own or one that it derives from.

    Args:
        name: ``Linear``, or as it is imported: ``torch.nn.Linear``, ``my_package.layers.Mine``.
        module: the layer.

    Example:
        >>> from torch.nn.utils import parametrizations
        >>> layer = parametrizations.orthogonal(nn.Linear(2, 2))
        >>> is_of("Linear", layer), is_of("torch.nn.Linear", layer), is_of("Module", layer)
        (True, True, False)
    """
    if "." in name:
        asked = _imported(name)
        return asked is not None and isinstance(module, asked)
    return any(c.__name__ == name for c in type(module).__mro__ if c is not nn.Module)


def _imported(name: str) -> Optional[type]:
    """A class by its dotted name, of the modules that are imported already; nothing is run."""
    place, _, own = name.rpartition(".")
    found = vars(sys.modules[place]).get(own) if place in sys.modules else None
    return found if isinstance(found, type) else None
