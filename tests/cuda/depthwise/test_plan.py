"""16-bit convolutions of single channels on CUDA, against float64."""

import pytest
import torch

from paramlora.cuda import operands as served
from tests.cuda.convolutions import compare_convolutions, convolved

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


DEPTHWISE = [  # input's batch and sizes, weight, rank, stride, padding, dilation
    ((8, 64, 64), (320, 1, 3, 3), 8, 1, 1, 1),
    ((2, 17, 9), (20, 1, 3, 3), 4, 1, (4, 0), 2),
    ((3, 12, 11), (8, 1, 3, 1), 9, (2, 3), (1, 0), 1),
    ((2, 56, 56), (96, 1, 7, 7), 64, 1, 3, 1),
    ((2, 8, 8), (7, 1, 2, 2), 40, 2, 0, 3),
    ((2, 1500), (64, 1, 4), 3, 1, 3, 1),
    ((2, 40), (9, 1, 31), 8, 3, 15, 1),
    ((2, 5, 6, 4), (6, 1, 2, 3, 4), 2, 1, (0, 1, 1), 1),
]


@pytest.mark.parametrize("formats", ("", "x", "w", "y", "xwy", "e"), ids="last:{}".format)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
def test_a_convolution_of_single_channels_and_its_gradients(case, dtype, formats):
    leaves, where, seed = convolved(*case, dtype, formats)
    channels = len(leaves[1])
    assert served.is_depthwise(served.Operands(*leaves), where, channels)
    compare_convolutions(leaves, where, seed, channels, True)
