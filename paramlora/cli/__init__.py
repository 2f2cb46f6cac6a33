"""The command line: the only place that prints or exits. A file holds a group of commands."""

import sys
from typing import Optional

from paramlora.cli.stops import STOPPED, heeded
from paramlora.errors import is_stop


def main(arguments: Optional[list[str]] = None) -> None:
    """Run the command line and exit: 0, 1 for a fault of ours, 2 for wrong input, 128 + N where
    signal N stopped it."""
    with heeded():
        try:  # here, since a signal may come while torch is imported, which takes seconds
            from paramlora.cli.commands import run
        except BaseException as error:
            if not is_stop(error):
                raise
            print("stopped", file=sys.stderr)
            sys.exit(STOPPED)
        run(arguments)
