"""Two processes under DDP train the same adapter as one process with the joint batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
SCRIPT = "benchmarks.stable_diffusion"
TINY = ["--tiny", "--dtype", "float64"]


def run(command, dump, *options):
    """The script's tensors, of each process."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    whole = [sys.executable, *command, SCRIPT, *TINY, *options, "--dump", str(dump)]
    done = subprocess.run(whole, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [torch.load(file) for file in sorted(dump.parent.glob(f"{dump.name}.*"))]


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]


def test_two_processes_equal_one_with_the_joint_batch(tmp_path):
    (alone,) = run(["-m"], tmp_path / "one")
    both = run(TORCHRUN, tmp_path / "two")
    assert len(both) == 2
    assert alone["reduced"] == 0
    assert both[0]["reduced"] == sum(t.nbytes for t in alone["factors"])
    for kind in ("gradients", "factors"):
        assert len(alone[kind]) == len(both[0][kind]) > 0
        for first, second, joint in zip(both[0][kind], both[1][kind], alone[kind]):
            assert torch.equal(first, second)
            assert joint.norm() > 0
            # sums in another order: float64 rounding, through a few layers and three steps
            torch.testing.assert_close(first, joint, rtol=1e-9, atol=1e-13)
