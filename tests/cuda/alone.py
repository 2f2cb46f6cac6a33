"""Runs what `benchmarks.alone` compares in Triton's interpreter, and prints its rows.

`test_alone` starts it in a process of its own with ``TRITON_INTERPRET=1``, which Triton reads when
a kernel is defined.
"""

import json
import sys

import torch
from torch import nn

from benchmarks import alone
from paramlora.cuda import operands
from paramlora.evaluate import convolution, functional
from tests.cuda import interpreted


def single_channels(tiny):
    return nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, groups=2), nn.Flatten(), nn.Linear(32, 16))


def zoo(build, x):
    """A small model all of whose layers are adapted."""
    call = lambda model, args: model(*args)  # noqa: E731
    return alone.Everything(build, lambda batch, tiny: (x,), call, lambda path: True, 2, 2)


MODELS = {
    "linear": zoo(lambda tiny: nn.Sequential(nn.Linear(16, 24)), torch.randn(9, 16)),
    "depthwise": zoo(single_channels, torch.randn(2, 2, 4, 4)),
}


def main():
    interpreted.stand_in_for_the_device()
    operands.served = functional.served = lambda x: x.dtype == torch.float16
    convolution.has_kernel = functional.has_kernel = lambda x, weight: 1 in weight.stride()
    rows = {}
    for part, of in MODELS.items():
        trained = alone.trained_model(of, True, torch.float16)
        rows[part], _ = alone.compared(trained, alone.PARTS[part].ways())
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
