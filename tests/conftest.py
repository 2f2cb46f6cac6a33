"""What tests of several folders begin with."""

import pytest
import torch


@pytest.fixture
def one_seed():
    torch.manual_seed(0)


@pytest.fixture
def needs_its_device(request, one_seed):
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
