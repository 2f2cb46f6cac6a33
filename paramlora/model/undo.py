"""Changing a model all or nothing: what stops a change half-way leaves the model as it was."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Optional

from torch import nn

from paramlora.update.contexts import as_made

_Held = tuple[Any, Any]  # a dict, list or set of a module, and a copy of its content
_Saved = tuple[nn.Module, type, dict[str, Any], list[_Held]]
# where torch keeps what registering changes; an RNN also lists its weights
_CONTAINERS = (*vars(nn.Module()), "_flat_weights")
_SIGNALS = [int(number) for number in signal.valid_signals()]
# CPython's own: the public one looks each of some sixty handlers up in an enumeration
_handler = getattr(signal, "_signal", signal).getsignal


class _Waiting:
    """The signals that came while a block was open, by number, and what answers each."""

    is_open = False  # of any such block: one inside of another leaves all to the outer one

    def __init__(self) -> None:
        self.came: dict[int, Callable[[], object]] = {}

    def answer(self, handler: Callable[..., object], number: int, frame: Any) -> None:
        """What is called when a signal comes."""
        # asked when the signal comes: a block may have been left by then
        if _Waiting.is_open:
            # the last of each number: as often as it came, it is answered once
            self.came[number] = partial(handler, number, frame)
        else:
            handler(number, frame)

    def end(self) -> None:
        """Answer those that came, each of which may raise."""
        if self.came:
            _, answer = self.came.popitem()
            try:
                answer()
            finally:
                self.end()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Have signals, such as Ctrl-C, wait until the block has ended, however often they come.

    What handles an exception can be stopped itself, between its lines and before its first one; so
    nothing but waiting lets a change end that has begun. Python answers signals in its main thread
    alone, and those that have no handler of Python's, such as SIGKILL, are none of it.
    """
    # only the main thread may set handlers, and only it runs them
    if _Waiting.is_open or threading.get_ident() != threading.main_thread().ident:
        yield
        return
    # a signal that is ignored, or has the system's own answer, stays as it is
    handlers = {n: own for n in _SIGNALS if callable(own := _handler(n))}
    waiting = _Waiting()
    try:
        _Waiting.is_open = True  # first: one that answers and does not wait could stop its end
        for number, own in handlers.items():
            signal.signal(number, partial(waiting.answer, own))
        yield
    finally:
        try:
            # again until all are back: a stop may come before the first is
            _again(lambda: _answered_by(handlers))
        finally:
            _Waiting.is_open = False
            waiting.end()


def _answered_by(handlers: dict[int, Callable[..., object]]) -> None:
    for number, own in handlers.items():
        signal.signal(number, own)


@contextmanager
def unchanged_on_error(
    modules: Iterable[nn.Module],
    flags_of: Iterable[nn.Parameter] = (),
    besides: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Put everything back when anything stops the block, Ctrl-C included.

    Args:
        modules: whose class, attributes, tensors, modules and hooks the block may change; those
            inside of them, such as lists of parametrizations, are to be named too.
        flags_of: parameters whose ``requires_grad`` the block may change.
        besides: puts back what the block changes elsewhere, and does the same when done again. A
            block of its own around this one could be left by another stop than this one is.
    """
    # flags are of parameters, in no dictionary of a module
    flags = [(p, p.requires_grad) for p in flags_of]
    saved = [_saved(module) for module in dict.fromkeys(modules)]

    def back() -> None:
        _put_back(saved, flags)
        besides()

    with undisturbed():
        try:
            yield
        except BaseException:
            to_the_end(back)
            raise


def to_the_end(act: Callable[[], None]) -> None:
    """Do what does the same when done again: again after each stop, which is raised at the end; an
    error that comes again ends it."""
    with undisturbed():
        _again(act)


def _again(act: Callable[[], None]) -> None:
    stop: Optional[BaseException] = None
    while True:
        try:
            act()
            break
        except BaseException as error:
            # twice an error is one that repeats itself; a stop may come any number of times
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
            with as_made(parameter):
                parameter.requires_grad_(requires_grad)


def _saved(module: nn.Module) -> _Saved:
    attributes = vars(module)
    # the dictionaries are emptied and filled, not replaced: torch and others hold them
    held = [
        (one, one.copy() if one else ())  # most are empty, and torch's take long to copy
        for name in _CONTAINERS
        if isinstance(one := attributes.get(name), (dict, list, set))
    ]
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

    A lock that is held for ever, or a collector that is off for ever, is worse than a call more:
    there are three to `leave`, and each goes on, whatever comes, once it has begun. Only presses of
    Ctrl-C at the first instruction of all three, a microsecond apart, would leave it open.

    Args:
        enter, leave: get a list of their own to keep in it what was entered; `leave` does nothing
            where nothing is kept.
    """
    kept: list[Any] = []
    with _left(kept, leave), _left(kept, leave), _left(kept, leave):
        with undisturbed():
            enter(kept)
        # outside of what is undisturbed: the block itself can be stopped
        yield


@contextmanager
def _left(kept: list[Any], leave: Callable[[list[Any]], None]) -> Iterator[None]:
    try:
        yield
    finally:
        if kept:
            _again(partial(_undisturbedly, leave, kept))


def _undisturbedly(leave: Callable[[list[Any]], None], kept: list[Any]) -> None:
    with undisturbed():
        leave(kept)
