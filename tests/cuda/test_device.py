"""What a device is, asked of itself: NVIDIA's, AMD's or another."""

import pytest
import torch

from paramlora.cuda import device


@pytest.mark.parametrize(
    "hip, capability, triton, answer",
    [
        (None, (8, 0), True, True),
        (None, (9, 0), True, True),
        (None, (12, 0), True, True),
        (None, (7, 5), True, False),
        (None, (9, 0), False, False),
        ("6.4.43482", (9, 4), True, False),  # an MI300
        ("6.4.43482", (9, 0), True, False),
    ],
)
def test_the_kernels_run_on_nvidias_devices_alone(hip, capability, triton, answer):
    assert device.runs(hip, capability, triton) is answer


def test_a_device_of_amd_is_asked_for_its_hip(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4.43482")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(device, "_SERVED", {})
    assert device.serves(0) is False
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(device, "_SERVED", {})
    assert device.serves(0) is device._importable()
