"""Ctrl-C in the middle of each command: nothing half written, exit code 130, one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")

SCRIPT = Path(__file__).with_name("interrupted.py")
COUNT = 4  # stops of each command


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and sends signals")
def test_a_command_that_is_stopped_leaves_all_or_nothing(tmp_path):
    paths = [str(SCRIPT.parents[2]), str(SCRIPT.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path, str(COUNT)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    harm, hits = (json.loads(line) for line in done.stdout.splitlines())
    assert harm["harm"] == []
    assert hits["hits"] > 12  # of 44
