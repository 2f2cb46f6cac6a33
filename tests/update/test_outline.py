"""A large file that fits, and is refused because of one number: before all of it is in memory."""

import math

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

import paramlora
from paramlora import FileError, files
from tests.files import resident

ROWS, COLUMNS = 96, 1 << 17  # 48 MiB of numbers of four bytes
MOST = 30  # MiB: four pieces of a file, of which one is held at a time, and what is imported late
CASES = {
    "native": ({"r": ROWS}, "native", "lora_A"),
    "dora": ({"r": ROWS, "kind": "dora"}, "native", "lora_A"),
    "whole": ({"whole": True}, "native", "lora_whole"),
    "difference": ({"kind": "difference"}, "native", "lora_diff"),
    "peft": ({"r": ROWS}, "peft", "lora_A"),
    "kohya": ({"r": ROWS}, "kohya", "lora_down"),
}


def net():
    return nn.ModuleDict({"a": nn.utils.skip_init(nn.Linear, COLUMNS, ROWS, bias=False)})


def spoiled(path, part, bad):
    """The file with the last number of its large tensor replaced; no writer of ours would do so."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = safetensors.torch.load_file(path)
    (key,) = [key for key in state if part in key]
    state[key].view(-1)[-1] = bad
    safetensors.torch.save_file(state, path, metadata)


@pytest.mark.skipif(not resident.COUNTED, reason="counts memory as Linux does")
@pytest.mark.parametrize("bad", [math.nan, -math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("case", CASES)
def test_one_number_is_found_before_all_are_read(case, bad, tmp_path, monkeypatch):
    entry, to, part = CASES[case]
    monkeypatch.setattr("paramlora.update.outline.LARGE", 1 << 20)
    attached = paramlora.attach(net(), {"a": entry})
    with torch.no_grad():
        for parameter in paramlora.trainable_parameters(attached):
            parameter.fill_(1)
    path = out = tmp_path / "a.safetensors"
    paramlora.save_adapter(attached, path)
    if to != "native":
        out = tmp_path / ("peft" if to == "peft" else "b.safetensors")
        files.convert(path, out, to, files.base_of(net()))
        path = out / "adapter_model.safetensors" if to == "peft" else out
    model, base = net(), files.base_of(net())
    assert files.read_adapter(out, base).values()  # sound until now
    spoiled(path, part, bad)
    calls = {
        "load": lambda: paramlora.load_adapter(model, out),
        "into": lambda: paramlora.load_adapter(attached, out, into="default"),
        "read": lambda: files.read_adapter(out, base),
        "convert": lambda: files.convert(out, tmp_path / "c.safetensors", "native", base),
    }
    for name, call in calls.items():
        resident.restart()
        before = resident.peak()
        with pytest.raises(FileError, match="not finite: .*give a sound copy"):
            call()
        assert resident.peak() - before < MOST, name
    assert not hasattr(model["a"], "parametrizations")


@pytest.mark.skipif(not resident.COUNTED, reason="counts memory as Linux does")
def test_a_model_without_values_takes_none_before_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("paramlora.update.outline.LARGE", 1 << 20)
    attached = paramlora.attach(net(), {"a": {"r": ROWS}})
    path = tmp_path / "a.safetensors"
    paramlora.save_adapter(attached, path)
    empty = net().to("meta")
    holding = paramlora.attach(net().to("meta"), {"a": {"r": ROWS}})
    for model, into in ((empty, None), (holding, "default")):
        resident.restart()
        before = resident.peak()
        with pytest.raises(FileError, match="^a.* lies on the meta device, where values are lost"):
            paramlora.load_adapter(model, path, into=into)
        assert resident.peak() - before < MOST, into
    assert not hasattr(empty["a"], "parametrizations")


def test_a_stranger_that_is_not_finite_is_left_out_all_the_same(tmp_path, monkeypatch):
    """What is looked at first is refused by who takes it, and by nobody else."""
    monkeypatch.setattr("paramlora.update.outline.LARGE", 0)
    path = tmp_path / "a.safetensors"
    state = {f"a.lora_{n}.weight": torch.ones(s) for n, s in {"A": (1, 4), "B": (3, 1)}.items()}
    safetensors.torch.save_file({**state, "x": torch.full((5,), math.nan)}, path)
    model = nn.ModuleDict({"a": nn.Linear(4, 3)})
    with pytest.warns(paramlora.ParamloraWarning, match="left out"):
        paramlora.load_adapter(model, path, strict=False)
    with pytest.raises(FileError, match="no update of one weight: x"):
        paramlora.load_adapter(nn.ModuleDict({"a": nn.Linear(4, 3)}), path)
