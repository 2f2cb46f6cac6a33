"""A scale as other tools' alpha: through every pair of formats to the last bit."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paramlora import formats
from paramlora.formats.scale import alpha_of
from tests.formats.linears import adapter, read, same

MIXED = "comfyui diffusers kohya peft original".split()
UNIFORM = [*MIXED, "litgpt", "sglang", "torchtune", "vllm"]
# alphas that other tools divide by the rank: most are not exact in floating point
ODD = st.floats(1e-3, 1e3, allow_nan=False) | st.sampled_from([0.1, 1 / 3, 0.7, 2.0, 1.0])


@pytest.mark.parametrize("one, two", itertools.product(MIXED, MIXED))
@settings(max_examples=20, deadline=None)
@given(scales=st.tuples(ODD, ODD, ODD), ranks=st.tuples(*[st.integers(1, 4)] * 2, st.just(3)))
def test_every_scale_survives_every_pair_of_formats(one, two, scales, ranks):
    there = read(formats.write(adapter(ranks, scales), one))
    same(adapter(ranks, scales), read(formats.write(there, two)))


@pytest.mark.parametrize("one, two", itertools.product(UNIFORM, UNIFORM))
@settings(max_examples=10, deadline=None)
@given(scale=ODD, r=st.integers(1, 3))
def test_one_scale_survives_the_formats_that_hold_one(one, two, scale, r):
    first = adapter((r, r, r), (scale, scale, scale))
    same(first, read(formats.write(read(formats.write(first, one)), two)))


@given(scale=ODD, r=st.integers(1, 512))
def test_an_alpha_gives_the_nearest_scale(scale, r):
    alpha = alpha_of(scale, r)
    assert abs(alpha / r - scale) <= 2 * math.ulp(scale)
    single = torch.tensor(scale, dtype=torch.float32).item()
    assert alpha_of(single, r) / r == single  # a scale out of a model in single precision


def test_a_changed_alpha_wins_over_the_recorded_scale():
    scale, r = next(
        (s / 100, r) for s in range(1, 99) for r in (3, 5) if alpha_of(s / 100, r) / r != s / 100
    )
    first = adapter((r, r, 3), (scale, scale, 1.0))
    content = formats.write(first, "kohya")
    assert "paramlora_scales" in content.metadata
    same(first, read(content))
    content.state["lora_unet_head.alpha"].fill_(6.0)
    content.state["lora_unet_block_a.alpha"].mul_(2)
    found = read(content).updates
    assert found["head"].scale == 2.0 and found["block.b"].scale == scale
    assert found["block.a"].scale == alpha_of(scale, r) * 2 / r
