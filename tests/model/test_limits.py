"""A sweep of numbers and patterns at the edge of what JSON, floats and models hold."""

import pytest
import torch
from torch import nn

import paramlora
from paramlora import ConfigError, LoRAConfig

HUGE = 10**400  # valid JSON


@pytest.mark.parametrize("key", ("scale", "alpha"))
def test_a_number_too_large_for_a_float_is_a_config_error(key):
    with pytest.raises(ConfigError):
        LoRAConfig.from_dict({"a": {"r": 1, key: HUGE}})


def test_alpha_over_a_huge_rank_is_a_config_error():
    try:
        LoRAConfig.from_dict({"a": {"r": HUGE, "alpha": 1.0}})
    except ConfigError:
        pass


@pytest.mark.parametrize("text", ('{"a": {"r": ' + "9" * 5000 + "}}", "[" * 100_000))
def test_a_file_that_json_itself_refuses_is_a_config_error(tmp_path, text):
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(ConfigError):
        LoRAConfig.from_file(path)


def test_a_broken_pattern_is_a_config_error():
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises((ConfigError, paramlora.TargetError)):
        paramlora.attach(model, {"re:(": {"r": 1}})


def test_a_scale_that_vanishes_or_overflows_in_float32():
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises((ConfigError, paramlora.TargetError)):
        paramlora.attach(model, {"0": {"r": 1, "scale": 1e300}})


@pytest.mark.parametrize("pattern", ["*", "re:.*"])
def test_a_sweeping_pattern_passes_over_biases(pattern):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    assert [t.path for t in paramlora.targets(model, {pattern: {"r": 1}})] == ["0"]


def test_disabled_max_norm_embedding_keeps_the_base():
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=0.5))
    base = model[0].weight.detach().clone()
    paramlora.attach(model, {"0": {"r": 2}})
    with paramlora.disable_adapters(model):
        model(torch.arange(9))
    assert torch.equal(model[0].parametrizations.weight.original, base)
