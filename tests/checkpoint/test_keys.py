"""The keys of an attached model's state dict, as torch and the layers spell them."""

import pytest
import torch
from torch import nn

import paramlora
from paramlora.checkpoint.keys import Key, weights_at, without_updates


@pytest.mark.parametrize(
    "key, weight, part, index, hard, ours",
    [
        ("a.weight", "a.weight", "", -1, True, False),
        ("a.parametrizations.weight.original", "a.weight", "original", -1, True, False),
        ("a.parametrizations.weight.original1", "a.weight", "original1", -1, True, False),
        ("parametrizations.w1.0.lora_A", "w1", "lora_A", 0, True, True),
        ("a.b.parametrizations.weight.12.lora_B", "a.b.weight", "lora_B", 12, True, True),
        ("a.parametrizations.weight.0.other", "a.weight", "other", 0, True, False),
        # no place in a list is spelled so: these are names
        ("a.parametrizations.weight.01.lora_A", None, "", -1, True, False),
        ("a.parametrizations.weight.x", None, "", -1, True, False),
        ("a\nb.parametrizations.weight.0.lora_A", "a\nb.weight", "lora_A", 0, True, True),
    ],
)
def test_a_key_is_parsed_and_spelled_again(key, weight, part, index, hard, ours):
    parsed = Key.parse(key)
    assert parsed == Key(key if weight is None else weight, part, index, hard)
    assert str(parsed) == key and parsed.of_update == ours


def test_every_key_of_an_attached_model_leads_to_its_tensor():
    model = nn.Sequential(nn.Linear(4, 3), nn.Conv2d(2, 2, 1), nn.Linear(3, 3))
    names = set(model.state_dict())
    paramlora.attach(model, {"0": {"r": 2}, "1": {"r": 1, "hard": 0}, "2.bias": {"whole": True}})
    parsed = {key: Key.parse(key) for key in model.state_dict()}
    assert {one.weight for one in parsed.values()} == names
    assert [str(one) for one in parsed.values()] == list(parsed)
    updated = {one.path for one in parsed.values() if one.of_update}
    assert updated == {"0", "1", "2.bias"}
    assert {one.hard for one in parsed.values() if one.weight == "1.weight" and one.part} == {False}


def test_a_path_means_a_modules_weight_or_a_parameter():
    assert weights_at("a.b") == ("a.b.weight", "a.b") and weights_at("") == ("weight", "")
    assert Key("weight").path == "" and Key("a.w1").path == "a.w1"


def test_of_the_metadata_only_what_merging_leaves_stays():
    model = nn.Sequential(nn.Linear(4, 3), nn.Conv2d(2, 2, 1))
    plain = model.state_dict()._metadata
    paramlora.attach(model, {"0": {"r": 2}, "1": {"r": 1, "hard": 0}})
    attached = model.state_dict()._metadata
    assert set(attached) > set(plain)
    assert without_updates(attached) == plain


def test_a_tensor_of_no_update_keeps_its_name():
    state = {"parametrizations": torch.ones(1), "a.parametrizations": torch.ones(1)}
    assert [str(Key.parse(key)) for key in state] == list(state)
    assert not any(Key.parse(key).part for key in state)
