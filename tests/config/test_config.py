"""The configuration's checks, with their messages."""

import sys
from pathlib import Path

import pytest
from torch import nn

from paramlora import ConfigError, LoRAConfig, ParamloraWarning, TargetError, attach, targets


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


def block():
    return nn.ModuleDict({n: nn.Linear(4, 4) for n in ("to_q", "not_to_q")})


def test_names_match_whole_components():
    model = nn.ModuleDict({"attn1": block(), "attn2": block()})
    paths = [t.path for t in targets(model, {"to_q": {"r": 1}})]
    assert paths == ["attn1.to_q", "attn2.to_q"]
    both = {"to_q": {"r": 1}, "attn1.to_q": {"r": 2}}
    assert [t.entry.r for t in targets(model, both)] == [2, 1]


def test_empty_containers_and_claims():
    model = nn.ModuleDict({"attn1": block()})
    with pytest.raises(TargetError, match=r'"to_qq" matches nothing. Closest: "to_q" \(1 lay'):
        targets(model, {"to_qq": {"r": 1}})
    with pytest.warns(ParamloraWarning, match='"to_vv" matches nothing'):
        targets(model, {"to_q": {"r": 1}, "to_vv": {"r": 1}})
    with pytest.raises(TargetError, match="attn1, a ModuleDict"):
        targets(model, {"attn1": {"r": 1}})
    with pytest.raises(TargetError, match="claim it equally"):
        targets(model, {"attn1.to_q": {"r": 1}, "*.to_q": {"r": 1}})


def test_matching_grows_with_the_model_not_with_its_square(monkeypatch):
    """An entry for every layer, as a loaded file has: each pattern meets few paths."""
    from paramlora import targets as module

    calls = []
    original = sys.modules["paramlora.model.targets"].fits
    monkeypatch.setattr(
        sys.modules["paramlora.model.targets"], "fits", lambda *a: calls.append(a) or original(*a)
    )
    assert module is targets
    model = nn.ModuleDict({f"layer{i}": block() for i in range(50)})
    config = {f"layer{i}.to_q": {"r": 1} for i in range(50)}
    assert len(targets(model, config)) == 50
    assert len(calls) <= 50 * 50 * 2  # candidates share their last component
    calls.clear()
    named = nn.ModuleDict({f"a{i}": nn.Linear(4, 4) for i in range(50)})
    assert len(targets(named, {f"a{i}": {"r": 1} for i in range(50)})) == 50
    assert len(calls) <= 50 * 2
