"""Where a weight's matrices lie, and which factors fit them, against torch's own layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from paramlora.update.geometry import (
    MOST_SIDE,
    ambiguous,
    factor_dtype,
    fits_shape,
    laid_as,
    matrix_shape,
    possible,
    summed_in,
)


@pytest.mark.parametrize(
    "layer, layout, x",
    [
        (nn.Linear(4, 6, bias=False), "matrix", torch.randn(5, 4)),
        (nn.Conv2d(3, 6, (2, 3), bias=False), "matrix", torch.randn(5, 3, 2, 3)),
        (nn.Conv1d(4, 6, 2, groups=2, bias=False), "matrix", None),
        (nn.ConvTranspose2d(3, 6, (2, 3), bias=False), "transposed", torch.randn(5, 3, 1, 1)),
    ],
)
def test_the_matrix_of_a_layer_maps_its_inputs_to_its_outputs(layer, layout, x):
    stack, out, fan_in = matrix_shape(layer.weight.shape, layout)
    assert stack == 1 and out * fan_in == layer.weight.numel()
    if x is None:  # of a grouped one: the inputs of one group
        assert (out, fan_in) == (6, 2 * 2)
        return
    weight = layer.weight.detach()
    matrix = weight.reshape(fan_in, out).t() if layout == "transposed" else weight.reshape(out, -1)
    got = F.linear(x.reshape(len(x), fan_in), matrix)
    torch.testing.assert_close(got, layer(x).detach().reshape(len(x), out))


def test_a_stack_is_a_matrix_for_each_index_before_it():
    assert matrix_shape((3, 5, 4), "stack") == (3, 5, 4)
    assert matrix_shape((2, 3, 5, 4), "stack") == (6, 5, 4)


def test_no_type_of_a_sum_rounds_its_terms():
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        assert factor_dtype(dtype) == torch.float32
    for dtype in (torch.float32, torch.float64):
        assert factor_dtype(dtype) == dtype
        assert summed_in(torch.bfloat16, torch.ones(1, dtype=dtype)) == dtype
    assert summed_in(torch.float64, torch.ones(1)) == torch.float64


def test_a_sum_has_the_strides_of_its_weight():
    weight = torch.randn(4, 3, 1, 1).to(memory_format=torch.channels_last)
    total = torch.randn(4, 3, 1, 1)
    laid = laid_as(total, weight)
    assert laid.stride() == weight.stride() != total.stride() and torch.equal(laid, total)
    turned = torch.randn(3, 4).t()
    assert laid_as(torch.ones(4, 3), turned).stride() == (3, 1)  # of another order: left alone


@pytest.mark.parametrize(
    "shape, layout, told",
    [
        ((4, 4), "matrix", True),
        ((4, 6), "matrix", False),
        ((6, 2, 3), "transposed", True),
        ((4, 4, 4), "stack", False),
    ],
)
def test_a_square_does_not_tell_its_sides(shape, layout, told):
    assert ambiguous(shape, layout) == told


def test_what_no_tensor_can_be_is_impossible():
    assert possible((0, 3)) and possible((1,) * 64) and possible((MOST_SIDE // 16,))
    assert not possible((1,) * 65) and not possible((MOST_SIDE // 16 + 1,))
    assert not possible((0, 2**40, 2**40))
    with pytest.raises((RuntimeError, OverflowError)):
        torch.empty((0, 2**40, 2**40), device="meta")


@pytest.mark.parametrize(
    "a, b, kernel, shape, layout, fits",
    [
        ((2, 4), (6, 2), 1, (6, 4), "matrix", True),
        ((2, 12), (6, 2), 1, (6, 4, 3), "matrix", True),
        ((2, 6), (4, 2), 1, (6, 4), "transposed", True),
        ((3, 2, 4), (3, 6, 2), 1, (3, 6, 4), "stack", True),
        ((2, 12), (6, 2, 3), "same", (6, 4, 3), "matrix", True),
        ((6, 4), (2, 2, 3), "same", (4, 2, 3), "transposed", True),
        ((2, 4), (6, 3), 1, (6, 4), "matrix", False),  # another rank
        ((2, 6), (4, 2), 1, (6, 4), "matrix", False),  # turned
        ((2, 4), (6, 2), 1, (24,), "matrix", False),  # of a vector
    ],
)
def test_factors_that_are_those_of_a_weight(a, b, kernel, shape, layout, fits):
    assert fits_shape(a, b, 2, kernel, shape, layout) == fits
