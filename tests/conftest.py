"""What tests of several folders begin with."""

import pytest
import torch
from hypothesis import settings

# the same examples in each run, however slow its machine: one that fails by chance hides which
# change broke it
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture
def one_seed():
    torch.manual_seed(0)


@pytest.fixture
def needs_its_device(request, one_seed):
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs CUDA")


@pytest.fixture
def one_process(tmp_path):
    """The mesh of a group of one process, in which a tensor can be sharded."""
    import torch.distributed as dist  # takes a second
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/x", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with what the command line is run on."""
    from tests.cli.running import fill  # which needs the command line's libraries

    monkeypatch.chdir(tmp_path)
    fill()
    return tmp_path
