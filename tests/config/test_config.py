"""The configuration's checks, with their messages."""

from pathlib import Path

import pytest
from torch import nn

from paramlora import ConfigError, LoRAConfig, TargetError, attach


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
