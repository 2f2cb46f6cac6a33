"""Where a tensor can be sharded without other processes."""

import pytest
import torch.distributed as dist


@pytest.fixture
def one_process(tmp_path):
    """A group of one process, in which a tensor can be sharded."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/x", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
