"""Methods of other libraries' models that must know of updates, such as ``save_pretrained``."""

import functools
from collections.abc import Callable
from importlib import import_module
from types import MethodType
from typing import Any

from torch import nn

from paramlora.model.layer_class import holds_updates
from paramlora.update.walk import paths_of

_METHODS = (
    "save_pretrained",
    "tie_weights",
    "resize_token_embeddings",
    "set_input_embeddings",
    "set_output_embeddings",
)
# what a class must inherit from: its own methods are known, those of other classes may differ
_OWNERS = {
    "PreTrainedModel": "transformers",
    "ModelMixin": "diffusers",
    "PyTorchModelHubMixin": "huggingface_hub",
}


def add_methods(model: nn.Module) -> None:
    """Put our form of these methods on each model inside `model` that holds updates.

    They stand in the instance's dictionary, so that the class stays as it is, and are bound, so
    that a deep copy has its own.
    """
    # every model inside: a pipeline's parts save themselves
    for module in model.modules():
        if library(module) and holds_updates(module):
            for name in _METHODS:
                # of the class: an instance's own is somebody's, and stays
                own = getattr(type(module), name, None)
                if callable(own) and name not in module.__dict__:
                    module.__dict__[name] = MethodType(_ours(own, name), module)


def remove_methods(model: nn.Module) -> None:
    """Take them off again; nothing where there are none."""
    for module in paths_of(model):
        for name in _METHODS:
            if _is_ours(module.__dict__.get(name)):
                del module.__dict__[name]


def library(model: nn.Module) -> str:
    """The library whose kind of model it is; empty for any other module."""
    known_by = type(model).__mro__ if hasattr(type(model), "save_pretrained") else ()
    for base in known_by:
        known = _OWNERS.get(base.__name__)
        if known is not None and base.__module__.partition(".")[0] == known:
            return known
    return ""


@functools.lru_cache(maxsize=1024)
def _ours(own: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The method to bind; what it needs is imported when it is called, as few processes save."""

    @functools.wraps(own)  # pipelines of diffusers look for the names of its arguments
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # merged or detached since, while something kept the method
        if not holds_updates(self):
            return own(self, *args, **kwargs)
        handlers = import_module("paramlora.integrations.pretrained")
        return getattr(handlers, name)(self, own, *args, **kwargs)

    method._of_paramlora = True  # type: ignore[attr-defined]
    return method


def _is_ours(method: Any) -> bool:
    return getattr(getattr(method, "__func__", None), "_of_paramlora", False)
