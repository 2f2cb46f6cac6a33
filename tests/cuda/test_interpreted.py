"""A sweep of the 16-bit CUDA kernels without CUDA, in Triton's interpreter; see `interpreted`."""

import pytest

from tests.cuda.started import printed

pytest.importorskip("triton")
EPS = 2**-10  # of float16


@pytest.fixture(scope="module")
def results():
    return printed("interpreted", TRITON_INTERPRET="1")


def chosen(results, kind):
    """Of a "depthwise" convolution, or of all other layers: "("."""
    return {name: result for name, result in results.items() if name.startswith(kind)}


def test_every_layer_is_right_to_one_rounding(results):
    layers = {name: errors for name, (errors, _) in chosen(results, "(").items()}
    assert len(layers) == 44 + 26
    wrong = {name: errors for name, errors in layers.items() if max(errors.values()) > EPS}
    assert not wrong
    assert all({"y"} < errors.keys() for errors in layers.values())


def test_the_layers_ran_every_way(results):
    ways = {tuple(ran) for _, ran in chosen(results, "(").values()}
    assert ways == {
        ("forward", "backward", "backward"),
        ("forward", "project", "backward", "project", "backward"),
        ("forward", "project", "product", "project", "product"),
        ("pack", "project", "product", "project", "backward", "project", "backward"),
        ("pack", "project", "product", "project", "product", "project", "product"),
        ("pack", "product", "product", "product"),
        ("prepare", "put", "back", "spread", "back", "spread", "back", "spread", "back"),
        ("prepare", "put", "spread", "back", "spread", "back", "spread", "back"),
    }


def test_layers_that_drop_inputs_have_the_mask_of_torchs_operations(results):
    layers = {name: errors for name, (errors, _) in chosen(results, "dropped").items()}
    assert len(layers) == 16 + 3
    wrong = {name: errors for name, errors in layers.items() if max(errors.values()) > EPS}
    assert not wrong


def test_dropout_takes_the_same_launches(results):
    for name, (_, ran) in chosen(results, "dropped").items():
        assert ran == results[name.removeprefix("dropped ")][1]


def test_several_masks_of_one_layer_are_those_of_torchs_operations(results):
    layers = chosen(results, "several")
    assert len(layers) == 7
    assert not {name: e for name, (e, _) in layers.items() if max(e.values()) > EPS}
    assert all(ran[:3] == ["pack", "project", "product"] for _, ran in layers.values())


def test_convolutions_that_drop_inputs_have_the_mask_of_torchs_operations(results):
    convolutions = chosen(results, "masked")
    assert len(convolutions) == 9
    assert not {name: e for name, (e, _) in convolutions.items() if max(e.values()) > EPS}
    # of the gradients each alone: those of factors need no sum, that of the input no masked input
    masks = {tuple(name for name in ran if name == "mask") for _, ran in convolutions.values()}
    assert masks == {("mask",) * 5}


def test_programs_may_start_in_any_order(results):
    """What a program awaits is the work of one that has started before it."""
    for name, (errors, ran) in chosen(results, "last first").items():
        same = results[f"{name.removeprefix('last first: ')}, eager"]
        assert [errors, ran] == same and ran == ["forward", "backward", "backward"]
    assert len(chosen(results, "last first")) == 3


def test_float16_is_finite_and_right_at_both_ends_of_its_range(results):
    ranges = chosen(results, "range")
    assert len(ranges) == 5 * 3
    wrong = {name: e for name, (e, _) in ranges.items() if not max(e.values()) < 4 * EPS}
    assert not wrong
    assert all(ran for _, ran in ranges.values())


def test_every_convolution_of_single_channels_is_right_to_one_rounding(results):
    convolutions = chosen(results, "depthwise")
    assert len(convolutions) == 11
    for name, (errors, ran) in convolutions.items():
        # all that was rounded is the output and its input's gradient
        assert max(errors[key] for key in "yx") < EPS, (name, errors)
        assert max(errors[key] for key in "WAB") < 1e-6, (name, errors)
        assert {*ran} == {"add", "forward", "backward", "divide"}, name
