"""The 16-bit CUDA kernels compile for devices that are not here, and fit them; see `compiled`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tune import NEVER_RUN

pytest.importorskip("triton")


EVERY = {(8, 6): 101376, (9, 0): 232448}
A_FEW = {card.capability: card.shared for card in NEVER_RUN.values()}  # bytes of shared memory


def compiled(capability, folder, *few):
    """The bytes that each kernel takes."""
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


@pytest.mark.parametrize("capability", EVERY, ids=str)
def test_every_kernel_compiles_and_fits(capability, tmp_path):
    shared = compiled(capability, tmp_path)
    assert len(shared) > 30
    assert not {name: size for name, size in shared.items() if size > EVERY[capability]}


@pytest.mark.parametrize("capability", [of for of in A_FEW if of not in EVERY], ids=str)
def test_kernels_of_each_operation_compile_for_cards_that_never_ran(capability, tmp_path):
    shared = compiled(capability, tmp_path, "few")
    assert len(shared) > 11
    assert not {name: size for name, size in shared.items() if size > A_FEW[capability]}
