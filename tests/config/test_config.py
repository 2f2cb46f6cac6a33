"""The configuration's checks, with their messages, and what survives JSON."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from paramlora import ConfigError, LoRAConfig, TargetError, attach
from paramlora.config import ALLOWED, KINDS
from tests.config.generated import COMMON, FLAGS, JSON, NEARLY


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"rnk": 8}, r'"0": unknown key "rnk"\. Allowed: adapter_dtype, alpha, dropout'),
        ({}, r'"r" is missing'),
        ({"r": "8"}, "got '8'"),
        ({"r": 8.0}, r"got 8\.0"),
        ({"r": 0}, "got 0"),
        ({"r": -1}, "got -1"),
        ({"r": 2, "scale": float("nan")}, "finite, got nan"),
        ({"r": 2, "scale": "1"}, "must be a number, got '1'"),
        ({"r": 2, "scale": 1, "alpha": 2}, 'both "scale" and "alpha"'),
        ({"r": 5}, "r = 5 is more than 0 holds: its matrix is 3×4"),
    ],
)
def test_bad_entries_are_refused_and_leave_the_model(entry, message):
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises((ConfigError, TargetError), match=message):
        attach(model, {"0": entry})
    assert type(model[0]) is nn.Linear and all(p.requires_grad for p in model.parameters())


def test_invalid_json_names_line_and_column(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text('{\n  "to_q": {,}\n}')
    with pytest.raises(ConfigError, match="bad.json: invalid JSON at line 2, column 12"):
        LoRAConfig.from_file(path)


def test_the_original_file_is_read_verbatim():
    config = LoRAConfig.from_file(Path(__file__).parents[2] / "example_config.json")
    assert [e.name for e in config.entries] == ["to_q", "to_v", "qkv_proj"]
    assert all(e.r == 8 and e.scale == 1 and e.hard for e in config.entries)


NAMES = st.text(min_size=1, max_size=12).filter(lambda s: s != "trainable_model")
FLOATS = st.floats(allow_nan=False, allow_infinity=False)

ENTRIES = st.one_of(
    st.fixed_dictionaries(
        {"r": st.integers(1, 4096)},
        optional={"scale": FLOATS | st.integers(-99, 99), "trainable_scale": FLAGS},
    ),
    st.fixed_dictionaries(
        {"r": st.integers(1, 4096), "alpha": FLOATS},
        optional={"hard": st.sampled_from([1, True])},
    ),
    st.fixed_dictionaries(
        {"r": st.integers(1, 64), "hard": st.sampled_from([0, False])},
        optional={"up_kernel": st.sampled_from([1, "same"]), "trainable_scale": FLAGS},
    ),
)
GARBAGE = JSON | st.dictionaries(st.sampled_from(ALLOWED), JSON, max_size=4)


@COMMON
@given(st.dictionaries(NAMES, ENTRIES, min_size=1, max_size=4), FLAGS)
def test_a_config_survives_its_dict_and_json(entries, trainable):
    config = LoRAConfig.from_dict({"trainable_model": trainable, **entries})
    assert LoRAConfig.from_dict(config.to_dict()) == config
    assert LoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert [entry.name for entry in config.entries] == list(entries)
    assert config.trainable_model is bool(trainable)
    for entry, given_entry in zip(config.entries, entries.values()):
        assert entry.r == given_entry["r"]
        if "alpha" in given_entry:
            assert entry.scale == given_entry["alpha"] / given_entry["r"]
        else:
            assert entry.scale == given_entry.get("scale", 1)
        assert entry.hard is bool(given_entry.get("hard", 1))
        assert entry.up_kernel == given_entry.get("up_kernel", 1)


def check_valid(config):
    assert isinstance(config.trainable_model, bool) and config.entries
    for entry in config.entries:
        ranked = KINDS[entry.kind].ranked and not entry.whole
        assert type(entry.r) is int and (entry.r >= 1 if ranked else entry.r == 0)
        assert type(entry.scale) is float and abs(entry.scale) < float("inf")
        assert type(entry.hard) is bool and type(entry.trainable_scale) is bool
        assert entry.up_kernel == "same" or type(entry.up_kernel) is int and entry.up_kernel == 1
    assert LoRAConfig.from_dict(config.to_dict()) == config


@COMMON
@given(GARBAGE | NEARLY)
@example({"whole": True})
@example({"rows": [1]})
@example({"kind": "difference"})
def test_any_json_value_of_an_entry_is_valid_or_a_config_error(value):
    try:
        config = LoRAConfig.from_dict({"to_q": value})
    except ConfigError as error:
        assert str(error).startswith("config") and len(str(error)) > 20
    else:
        check_valid(config)


@COMMON
@given(GARBAGE)
def test_any_json_value_as_a_whole_is_valid_or_a_config_error(value):
    try:
        config = LoRAConfig.from_dict(value)
    except ConfigError:
        return
    check_valid(config)
