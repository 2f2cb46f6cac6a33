"""Changing a model all or nothing: what stops a change half-way leaves the model as it was."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

from torch import nn

_Held = tuple[Any, Any]  # a dict, list or set of a module, and a copy of its content
_Saved = tuple[nn.Module, type, dict[str, Any], list[_Held]]
# where torch keeps what registering changes; an RNN also lists its weights
_CONTAINERS = (*vars(nn.Module()), "_flat_weights")


@contextmanager
def unchanged_on_error(
    modules: Iterable[nn.Module], flags_of: Iterable[nn.Parameter] = ()
) -> Iterator[None]:
    """Put everything back when anything stops the block, Ctrl-C included.

    Args:
        modules: whose class, attributes, tensors, modules and hooks the block may change; those
            inside of them, such as lists of parametrizations, are to be named too.
        flags_of: parameters whose ``requires_grad`` the block may change.
    """
    flags = [(p, p.requires_grad) for p in flags_of]
    saved = [_saved(module) for module in dict.fromkeys(modules)]
    try:
        yield
    except BaseException:
        to_the_end(lambda: _put_back(saved, flags))
        raise


def to_the_end(act: Callable[[], None]) -> None:
    """Do what does the same when done again: again after each stop, which is raised at the end. So
    whoever is impatient stops it once more in vain; an error that comes again ends it."""
    stop: Optional[BaseException] = None
    while True:
        try:
            act()
            break
        except BaseException as error:
            if isinstance(error, Exception) and isinstance(stop, Exception):
                raise
            stop = error
    if stop is not None:
        raise stop


def _put_back(saved: list[_Saved], flags: list[tuple[nn.Parameter, bool]]) -> None:
    for one in saved:
        _restore(*one)
    for parameter, requires_grad in flags:
        if parameter.requires_grad is not requires_grad:
            parameter.requires_grad_(requires_grad)


def _saved(module: nn.Module) -> _Saved:
    attributes = vars(module)
    containers = (attributes[name] for name in _CONTAINERS if name in attributes)
    held = [(one, one.copy()) for one in containers if isinstance(one, (dict, list, set))]
    return module, type(module), attributes.copy(), held


def _restore(
    module: nn.Module, cls: type, attributes: dict[str, Any], containers: list[_Held]
) -> None:
    module.__class__ = cls
    now = vars(module)
    for name in now.keys() - attributes.keys():
        del now[name]
    now.update(attributes)
    for held, content in containers:
        held.clear()
        held.extend(content) if isinstance(held, list) else held.update(content)


@contextmanager
def surely_left(
    enter: Callable[[list[Any]], None], leave: Callable[[list[Any]], None]
) -> Iterator[None]:
    """Around the block `enter`, and after it `leave`, also where Ctrl-C comes while it leaves.

    A lock that is held for ever, or a collector that is off for ever, is worse than one call more:
    `leave` is called twice, so that what stops the one does not stop the other.

    Args:
        enter, leave: get a list of their own to keep in it what was entered; `leave` does nothing
            where nothing is kept.
    """
    kept: list[Any] = []
    with _left(kept, leave), _left(kept, leave):
        enter(kept)
        yield


@contextmanager
def _left(kept: list[Any], leave: Callable[[list[Any]], None]) -> Iterator[None]:
    try:
        yield
    finally:
        leave(kept)
