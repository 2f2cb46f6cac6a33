"""Every benchmark file records the machine and the versions."""

import pytest
import torch

from benchmarks.machine import machine


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(machine())


@pytest.fixture(autouse=True, scope="session")
def float32_means_float32():
    """Convolutions would otherwise use TensorFloat-32 where matrix products do not."""
    torch.backends.cudnn.allow_tf32 = False
