"""Runs a file of this folder as a process of its own, such as one that Triton interprets."""

import json
import os
import subprocess
import sys
from pathlib import Path


def printed(module, *arguments, **environment):
    """The JSON that it prints. `TRITON_INTERPRET`, which Triton reads when a kernel is defined,
    must be there from the start."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.cuda.{module}", *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
