"""The memory that this process holds, by Linux's own count.

Not by ``getrusage``: its maximum is handed on by the process that started this one, so that a
child of a large test run seems to need what its parent once did.
"""

import contextlib
from pathlib import Path

_SELF = Path("/proc/self")
COUNTED = (_SELF / "status").exists()


def peak() -> int:
    """The most MiB held at a time since `restart`, or since the process began."""
    lines = (_SELF / "status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024


def restart() -> None:
    """Let `peak` count from what is held now, where the system allows it."""
    with contextlib.suppress(OSError):
        (_SELF / "clear_refs").write_text("5")
