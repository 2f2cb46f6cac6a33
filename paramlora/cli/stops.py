"""The signals that end a command as Ctrl-C does: what it has begun is taken back first."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

STOPPED = 128 + signal.SIGINT  # the exit code, as shells tell a signal
_NAMES = ("SIGTERM", "SIGHUP")  # of `kill`, `timeout` and schedulers; of a terminal that closes


@contextmanager
def heeded() -> Iterator[None]:
    """A block that such a signal stops as Ctrl-C does, and whose exit code then tells the signal.

    One that is ignored (``nohup``), or that a program around this one answers, stays as it is.
    """
    came: list[int] = []

    def stop(number: int, frame: Any) -> NoReturn:
        came.append(number)
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        ours = []  # Python lets no other set a handler
    try:
        for number in ours:
            signal.signal(number, stop)
        yield
    except SystemExit as done:
        if came and done.code == STOPPED:
            raise SystemExit(128 + came[-1]) from None
        raise
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
