"""What a checkpoint stores beside weights of 8 bits."""

import pytest
import torch

from paramlora import AdapterError
from paramlora.checkpoint.scales import keys_of_scales, scale_of

NARROW = torch.zeros(4, 6).to(torch.float8_e4m3fn)


def told(weight, **beside):
    state = {"l.weight": weight, **{f"l.{name}": scale for name, scale in beside.items()}}
    return scale_of(state, "l.weight", state.__getitem__)


def test_one_number_or_one_for_each_row():
    for shape in ([], [1], [1, 1]):
        assert torch.equal(told(NARROW, scale_weight=torch.full(shape, 2.0)), torch.tensor(2.0))
    rows = torch.arange(1.0, 5)
    for shape in ([4], [4, 1]):
        assert torch.equal(told(NARROW, weight_scale=rows.reshape(shape)), rows)
    assert told(NARROW, weight_scale=rows.bfloat16()).dtype == torch.float32


def test_what_is_stored_plainly_has_none():
    assert told(NARROW) is None
    assert told(torch.zeros(4, 6), weight_scale=torch.ones(4)) is None
    state = {"w": NARROW, "weight": NARROW, "weight_scale": torch.ones(())}
    assert not keys_of_scales(state, "w")
    assert keys_of_scales(state, "weight") == ["weight_scale"]


@pytest.mark.parametrize("name", ("scale_weight", "weight_scale_inv"))
@pytest.mark.parametrize("shape", ([2, 3], [6], [1, 4]), ids=str)
def test_scales_of_blocks_are_refused(name, shape):
    with pytest.raises(AdapterError, match=f"l.{name}: .* no scales of the rows of l.weight"):
        told(NARROW, **{name: torch.ones(shape)})


@pytest.mark.parametrize("value", (0.0, float("nan"), float("inf"), 1e-45))
def test_what_divides_nothing_is_refused(value):
    with pytest.raises(AdapterError, match="Give the checkpoint that it was quantised from"):
        told(NARROW, weight_scale=torch.tensor(value))
