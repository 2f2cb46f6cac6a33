"""The two factors out of other shapes, and at most as many as the matrix has: the same product."""

import pytest
import torch

from paramlora import formats
from paramlora.errors import FileError
from paramlora.formats import Content, Slot
from paramlora.formats.factors import from_dense, held, within
from paramlora.update.value import Update
from tests.formats.kept import DTYPES, close, halves, product


def test_a_grouped_convolution_of_peft_that_no_weight_equals():
    state = {"base_model.model.c.lora_A.weight": torch.randn(4, 6, 3)}
    state["base_model.model.c.lora_B.weight"] = torch.randn(8, 2, 1)
    base = {"c": Slot((8, 3, 3), "matrix", "convolution", 2)}
    config = {"r": 4, "lora_alpha": 4, "target_modules": ["c"]}
    with pytest.raises(FileError, match="c: the first factor of this grouped convolution reads"):
        formats.read(Content(state, {}, config), base)


def test_a_rank_above_the_matrix_is_multiplied_out():
    torch.manual_seed(0)
    for shape in ((4, 6), (6, 4)):
        update = Update(torch.randn(9, shape[1]), torch.randn(shape[0], 9), 0.7, shape)
        small = within(update)
        assert small.r == 4
        torch.testing.assert_close(small.delta(), update.delta())


@pytest.mark.parametrize("size", [1e-7, 1e-4, 1.0, 6e4])
def test_the_nearest_of_a_rank_is_not_rounded_to_16_bits(size):
    torch.manual_seed(0)
    delta = (size * torch.outer(torch.rand(5), torch.rand(6))).half()
    u, s, v = torch.linalg.svd(delta.double())
    close(product(from_dense(delta, 1)), s[0] * torch.outer(u[:, 0], v[0]))


@pytest.mark.parametrize("size", [1e-4, 300.0])
def test_a_rank_above_the_matrix_keeps_its_product(size):
    torch.manual_seed(0)
    update = Update(halves(9, 6, size=size), halves(5, 9, size=size), 0.5, (5, 6))
    assert within(update).r == 5
    close(product(within(update)), product(update))


def test_what_is_held_is_no_narrower_than_asked():
    one = torch.tensor([0.5]).double()
    for dtype in DTYPES:
        assert held(one, dtype).dtype == held(torch.zeros(2).double(), dtype).dtype == dtype
