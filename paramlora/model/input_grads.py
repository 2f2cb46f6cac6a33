"""Inputs that carry gradients, which reentrant activation checkpointing needs."""

from typing import Any

import torch
from torch import Tensor, nn

from paramlora.errors import AdapterError
from paramlora.model.classes import Model
from paramlora.model.recomputed import AGAIN
from paramlora.model.undo import to_the_end, unchanged_on_error
from paramlora.update.walk import paths_of

_TOLD = "gradient_checkpointing"


def enable_input_grads(model: Model, *sources: nn.Module) -> Model:
    """Let gradients begin at the model's input, before its first adapted layer; returns it.

    ``torch.utils.checkpoint.checkpoint(..., use_reentrant=True)`` gives a segment gradients only
    when one of its inputs requires one, and with a frozen base none does. Without reentrance
    nothing is needed. The numbers do not change. An adapted tensor that is read outside of the
    segments and handed to several by keyword, as queries are, gets its gradient from each.
    `attach` calls this where transformers' own checkpointing is on already; merging or detaching
    the last adapter undoes it.

    Args:
        model: the model, adapted or not yet.
        sources: modules whose outputs begin the gradients, such as ``model.tok_embeddings``. By
            default what the model calls its input embeddings, else every ``nn.Embedding``, and
            the first floating-point input of the model.

    Raises:
        AdapterError: when the model is called, where no input can carry a gradient.

    Example:
        >>> from torch.utils.checkpoint import checkpoint
        >>> import paramlora
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(4, 3)
        ...     def forward(self, x):
        ...         return checkpoint(self.layer, x, use_reentrant=True)
        >>> net = enable_input_grads(paramlora.attach(Net(), {"layer": {"r": 2}}))
        >>> net(torch.randn(2, 4)).sum().backward()
        >>> assert net.layer.parametrizations.weight[0].lora_B.grad is not None
    """
    with unchanged_on_error([*model.modules(), *sources]):
        _disable(model)  # called twice, it hooks once
        # some models set requires_grad on a view of their input, so they take none that carries one
        # named sources carry their gradients themselves: then inputs are left as they are
        model.register_forward_pre_hook(_tensors_again if sources else _inputs, with_kwargs=True)
        for source in sources or _embeddings(model):
            source.register_forward_hook(_outputs)
    return model


def disable_input_grads(model: nn.Module) -> None:
    """Undo `enable_input_grads`; nothing where it was never called."""
    to_the_end(lambda: _disable(model))


def _disable(model: nn.Module) -> None:
    for module in paths_of(model):
        # found by the function, because a deep copy shares no handle with its original
        for key in [k for k, hook in module._forward_pre_hooks.items() if hook in _BEFORE]:
            del module._forward_pre_hooks[key]
            # a module keeps beside its hooks which of them take keywords
            module._forward_pre_hooks_with_kwargs.pop(key, None)
        for key in [k for k, hook in module._forward_hooks.items() if hook is _outputs]:
            del module._forward_hooks[key]
        module.__dict__.pop(AGAIN, None)


def checkpoints_reentrantly(model: nn.Module) -> bool:
    """Whether transformers' own checkpointing is on, in a way that needs such inputs."""
    for module in model.modules():
        # nn.Module takes long to look for what is not there
        told = vars(module).get(_TOLD, getattr(type(module), _TOLD, False))
        if told is True:
            # transformers keeps its choice among the arguments of a partial
            how = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", None)
            if how is not None and how.get("use_reentrant", True):
                return True
    return False


def _embeddings(model: nn.Module) -> list[nn.Module]:
    named = [found for module in model.modules() if (found := _named(module)) is not None]
    every = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return list(dict.fromkeys(named or every))


def _named(module: nn.Module) -> "nn.Module | None":
    """What a model of transformers calls its input embeddings."""
    ask = getattr(module, "get_input_embeddings", None)
    try:
        found = ask() if ask is not None else None
    except NotImplementedError:
        return None
    return found if isinstance(found, nn.Module) else None


def _inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not torch.is_grad_enabled():
        return None
    _tensors_again(model, args, kwargs)
    # transformers' extractors of sounds begin gradients at a view of their input, which must not
    # carry one already
    if any(vars(m).get("_requires_grad") is True and m.training for m in model.modules()):
        return None
    main = getattr(model, "main_input_name", None)
    if isinstance(main, str) and _floating(kwargs.get(main)):
        return args, {**kwargs, main: _carrying(kwargs[main])}
    for index, value in enumerate(args):
        if _floating(value):
            return (*args[:index], _carrying(value), *args[index + 1 :]), kwargs
    for name, value in kwargs.items():
        if _floating(value):
            return args, {**kwargs, name: _carrying(value)}
    if not any(_outputs in module._forward_hooks.values() for module in model.modules()):
        raise AdapterError(
            f"no input of {type(model).__name__} is a floating-point tensor and it has no "
            "embedding, so no gradient can begin there: name the first module with "
            "enable_input_grads(model, module), or checkpoint with use_reentrant=False."
        )
    return None


def _tensors_again(model: nn.Module, args: Any, kwargs: Any) -> None:
    """Have each adapted tensor that is read give its gradient more than once."""
    if torch.is_grad_enabled():
        # the flag is the layer's, read where its tensor is, see `layer_class`
        for module in model.modules():  # now, as layers may be adapted after the call of ours
            if "parametrizations" in module._modules:
                module.__dict__[AGAIN] = True


_BEFORE = (_inputs, _tensors_again)


def _outputs(module: nn.Module, args: Any, output: Any) -> Any:
    return _carrying(output) if torch.is_grad_enabled() and _floating(output) else output


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _carrying(tensor: Tensor) -> Tensor:
    # a copy, because a leaf that requires a gradient may not be written to in place
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_().clone()
