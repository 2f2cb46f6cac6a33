"""The 16-bit CUDA kernels compile for devices that are not here, and fit them; see `compiled`.

How many blocks one multiprocessor then holds is computed by `benchmarks.tune.Limits`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tune import LIMITS, NEVER_RUN

pytest.importorskip("triton")


EVERY = ((9, 0),)
A_FEW = {card.capability for card in NEVER_RUN.values()} - set(EVERY)


def compiled(capability, folder, *few):
    """What a block of each kernel takes: bytes of shared memory, warps, registers of a thread."""
    major, minor = capability
    done = subprocess.run(
        [sys.executable, "-m", "tests.cuda.compiled", f"{major}{minor}", *few],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_CACHE_DIR": str(folder)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def resident(capability, taken):
    """Blocks that one multiprocessor holds at once, by kernel."""
    return {name: LIMITS[capability].resident(*of) for name, of in taken.items()}


@pytest.mark.parametrize("capability", EVERY, ids=str)
def test_every_kernel_compiles_and_fits(capability, tmp_path):
    taken = compiled(capability, tmp_path)
    assert len(taken) > 30
    assert not [name for name, blocks in resident(capability, taken).items() if blocks < 1]


@pytest.mark.parametrize("capability", sorted(A_FEW), ids=str)
def test_kernels_of_each_operation_compile_for_cards_that_never_ran(capability, tmp_path):
    taken = compiled(capability, tmp_path, "few")
    assert len(taken) > 11
    assert not [name for name, blocks in resident(capability, taken).items() if blocks < 1]
