"""The command line: what it prints, and how it exits."""

import json

import pytest
from torch import nn

pytest.importorskip("typer")

from paramlora.cli import main


def factory():
    return nn.Sequential(nn.Linear(4, 3), nn.Conv2d(2, 2, 1))


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "lora.json"
    path.write_text(json.dumps({"0": {"r": 2}, "1": {"r": 1, "hard": 0}}))
    return path


def test_targets_lists_what_would_be_adapted(capsys, config):
    code, out, _ = run(capsys, "targets", config, "--model", f"{__name__}:factory")
    assert code == 0
    assert "3×4" in out and "soft" in out and "2 tensors, 18 parameters" in out


@pytest.mark.parametrize(
    "text, model, message",
    [
        ('{"0": {"r": 0}}', "factory", '"r" must be a whole number'),
        ('{"0": {"r": 2},}', "factory", "line 1, column"),
        ('{"9": {"r": 2}}', "factory", "nothing to adapt"),
        ('{"0": {"r": 2}}', "missing", "Give module:factory"),
        ('{"0": {"r": 2}}', "dict_factory", "not a torch.nn.Module"),
    ],
)
def test_wrong_input_is_one_line_and_exits_with_2(capsys, config, text, model, message):
    config.write_text(text)
    code, out, err = run(capsys, "targets", config, "--model", f"{__name__}:{model}")
    assert code == 2 and out == "" and "Traceback" not in err
    assert message in " ".join(err.split())


def dict_factory():
    return {}


def test_help_and_wrong_use(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and "demo" in out and "targets" in out
    assert run(capsys, "targets")[0] == 2


def attending():
    layers = {f"layer{i}": nn.TransformerEncoderLayer(8, 2, 16) for i in range(2)}
    return nn.ModuleDict(layers)


def test_targets_spells_out_what_a_preset_and_a_class_mean(capsys, tmp_path):
    path = tmp_path / "presets.json"
    entries = {"attention": {"r": 2}, "type:Linear": {"r": 4}, "exclude": ["layer1.linear2"]}
    path.write_text(json.dumps(entries))
    code, out, _ = run(capsys, "targets", str(path), "--model", f"{__name__}:attending")
    assert code == 0
    assert '\n"attention": in_proj_weight, out_proj (2 layers each)\n' in out
    assert '\n"type:Linear": linear1 (2 layers); linear2 (1 layer)\n' in out
