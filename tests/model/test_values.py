"""An adapter's tensors leave one model and enter another."""

import pytest
import torch
from torch import nn

from paramlora import FileError, adapter_state_dict, attach, load_adapter_state_dict


def attached():
    return attach(nn.Sequential(nn.Linear(4, 3)), {"0": {"r": 2, "scale": 0.3}})


def test_the_tensors_carry_the_whole_update():
    source, target = attached(), attached()
    nn.init.normal_(source[0].parametrizations.weight[0].lora_B)
    state = adapter_state_dict(source)
    assert sorted(state) == ["0.lora_A", "0.lora_B", "0.lora_scale"]
    load_adapter_state_dict(target, state)
    base = target[0].parametrizations.weight.original
    want = base.double() + 0.3 * state["0.lora_B"].double() @ state["0.lora_A"].double()
    torch.testing.assert_close(target[0].weight.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"0.lora_A": None}, "missing: 0.lora_A; unexpected: none"),
        ({"1.lora_A": torch.ones(1)}, "missing: none; unexpected: 1.lora_A"),
        ({"0.lora_B": torch.ones(3, 1)}, r"0.lora_B: shape \[3, 1\] does not fit \[3, 2\]"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(change, message):
    model = attached()
    before = {k: v.clone() for k, v in adapter_state_dict(model).items()}
    state = {k: v + 1 for k, v in before.items()} | change
    with pytest.raises(FileError, match=message):
        load_adapter_state_dict(model, {k: v for k, v in state.items() if v is not None})
    assert all(torch.equal(v, before[k]) for k, v in adapter_state_dict(model).items())


@pytest.mark.parametrize(
    "value, message",
    [
        (torch.full((2, 4), float("nan")), "0.lora_A: not finite"),
        (torch.full((2, 4), 1e300, dtype=torch.float64), "0.lora_A: not finite in torch.float32"),
        (torch.ones(2, 4, dtype=torch.int64), "0.lora_A: of type torch.int64"),
        (torch.ones(2, 4, dtype=torch.complex64), "0.lora_A: of type torch.complex64"),
        ([[1.0] * 4] * 2, "0.lora_A: a list"),
    ],
)
def test_values_that_no_factor_holds_are_refused_and_change_nothing(value, message):
    model = attached()
    before = {k: v.clone() for k, v in adapter_state_dict(model).items()}
    state = {k: v + 1 for k, v in before.items()} | {"0.lora_A": value}
    with pytest.raises(FileError, match=message):
        load_adapter_state_dict(model, state)
    assert all(torch.equal(v, before[k]) for k, v in adapter_state_dict(model).items())
