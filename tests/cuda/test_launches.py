"""In how many launches the kernels compute a linear layer, asked without any device."""

import pytest

from paramlora.cuda.launches import Launches
from paramlora.evaluate import choose

LAUNCHES = [
    ((8192, 512, 1024), 16, False, True, None, Launches.TOGETHER),
    ((8192, 512, 1024), 16, False, False, (True, True), Launches.TOGETHER),
    ((8192, 512, 1024), 16, False, True, (True, False), Launches.APART),
    ((8192, 512, 1024), 16, True, True, None, Launches.APART),
    ((512, 512, 1024), 16, True, True, None, Launches.APART),
    ((512, 512, 1024), 16, True, True, (True, True), Launches.APART),
    ((512, 512, 1024), 16, True, False, None, Launches.APART),
    ((8192, 4096, 2048), 16, False, True, None, Launches.APART),
    ((32768, 4096, 2048), 16, False, True, None, Launches.APART),
    ((600, 512, 256), 128, False, True, None, Launches.TOGETHER),
    ((600, 512, 256), 128, False, False, None, Launches.CUBLAS),
    ((600, 512, 256), 128, True, True, None, Launches.CUBLAS),
    ((8192, 4096, 2048), 256, False, True, None, Launches.CUBLAS),
    ((300, 512, 256), 256, False, True, (True, True), Launches.APART),
]


@pytest.mark.parametrize("sizes, R, captured, hopper, wanted, how", LAUNCHES)
def test_dropout_takes_the_same_launches_but_none_of_cublas(
    sizes, R, captured, hopper, wanted, how
):
    own = Launches.APART if how is Launches.CUBLAS else how
    assert choose.launches(sizes, R, captured, hopper, wanted, masks=1) is own


def test_a_large_product_shares_no_launch_and_a_masked_one_less():
    assert choose.launches((8192, 1024, 4096), 16, False, True) is Launches.APART
    assert choose.launches((4096, 1024, 4096), 16, False, True) is Launches.TOGETHER
    assert choose.launches((4096, 1024, 2048), 16, False, True, masks=1) is Launches.APART
    assert choose.launches((4096, 1024, 1024), 16, False, True, masks=1) is Launches.TOGETHER


@pytest.mark.parametrize("sizes, R, captured, hopper, wanted, how", LAUNCHES)
def test_several_masks_are_drawn_in_a_launch_of_their_own(sizes, R, captured, hopper, wanted, how):
    assert choose.launches(sizes, R, captured, hopper, wanted, masks=2) is Launches.APART


@pytest.mark.parametrize("sizes, R, captured, hopper, wanted, how", LAUNCHES)
def test_the_launches_of_our_kernels(sizes, R, captured, hopper, wanted, how):
    assert choose.launches(sizes, R, captured, hopper, wanted) is how
