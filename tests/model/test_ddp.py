"""A sweep under DDP: two processes train the same adapter as one process with the joint batch."""

import os
from functools import partial

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from benchmarks import stable_diffusion
from tests.model import forked

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork"),
]


def dumped(start, dump, *options):
    """The script's tensors, of each process."""
    start([*options, "--tiny", "--dtype", "float64", "--dump", str(dump)])
    return [torch.load(file) for file in sorted(dump.parent.glob(f"{dump.name}.*"))]


def test_two_processes_equal_one_with_the_joint_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # a forked process has none
    (alone,) = dumped(stable_diffusion.main, tmp_path / "one")
    both = dumped(partial(forked.both, stable_diffusion.main), tmp_path / "two")
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
