"""The 16-bit CUDA kernels compile for devices that are not here, and fit them; see `compiled`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("capability, limit", ((86, 101376), (90, 232448)))
def test_every_kernel_compiles_and_fits(capability, limit, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.cuda.compiled", str(capability)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    shared = json.loads(done.stdout)
    assert len(shared) > 30
    assert not {name: size for name, size in shared.items() if size > limit}
