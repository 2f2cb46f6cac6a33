"""Several projections in one weight, block by block, against the products of each part."""

import pytest
import torch

from paramlora.errors import FileError
from paramlora.formats.fused import fused_linear, parted
from paramlora.update.value import Update

SIZES, R = (8, 4, 6), 2


@pytest.mark.parametrize("on", [(1, 1, 1), (1, 0, 1), (0, 1, 0)])
def test_each_trained_part_has_the_product_of_its_own_factors(on):
    torch.manual_seed(0)
    trained = [size for size, here in zip(SIZES, on) if here]
    downs, ups = torch.randn(len(trained), R, 5), [torch.randn(size, R) for size in trained]
    found = fused_linear(downs.flatten(0, 1), torch.cat(ups), 0.7, SIZES, on, "")
    products = iter([0.7 * up.double() @ down.double() for up, down in zip(ups, downs)])
    parts = [next(products) if here else torch.zeros(n, 5).double() for n, here in zip(SIZES, on)]
    torch.testing.assert_close(found.delta().double(), torch.cat(parts), rtol=1e-5, atol=1e-6)


def test_blocks_come_apart_again_and_anything_else_as_the_same_sum():
    torch.manual_seed(0)
    a, b = torch.randn(3 * R, 5), torch.randn(sum(SIZES), R)
    fused = fused_linear(a, b, 1.0, SIZES, [True] * 3, "")
    assert all(torch.equal(one, own) for one, own in zip(parted(fused, SIZES), (a, b)))
    dense = Update(torch.randn(R, 5), torch.randn(sum(SIZES), R), 1.0, (sum(SIZES), 5))
    again = fused_linear(*parted(dense, SIZES), 1.0, SIZES, [True] * 3, "")
    torch.testing.assert_close(again.delta(), dense.lora_B @ dense.lora_A)


def test_factors_of_other_parts_are_refused():
    with pytest.raises(FileError, match=r"x: factors of \[4, 5\] and \[9, 2\] do not fit parts of"):
        fused_linear(torch.ones(4, 5), torch.ones(9, 2), 1.0, SIZES, [True, False, True], "x")
