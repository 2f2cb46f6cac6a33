"""Adapter files: the round trip, and every way in which a file can be wrong."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import paramlora
from paramlora.attach import lowranks

CONFIG = {
    "0": {"r": 2, "scale": 1.7, "trainable_scale": 1},
    "2": {"r": 1, "alpha": 3, "hard": 0, "up_kernel": "same"},
}


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 3))


def trained(adapter="style"):
    model = paramlora.attach(net(), CONFIG, adapter)
    for _, _, low in lowranks(model):
        nn.init.normal_(low.lora_B)
    return model


def state_of(model):
    return [(n, id(p), p.requires_grad) for n, p in model.named_parameters()], [
        type(m) for m in model.modules()
    ]


def test_a_file_describes_itself(tmp_path):
    path = tmp_path / "a.safetensors"
    model = trained()
    paramlora.save_adapter(model, path, "style")
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["paramlora"])
        assert set(file.keys()) == {f"{i}.lora_{n}" for i in "02" for n in ("A", "B", "scale")}
    assert about["format"] == 1 and about["adapter"] == "style"
    plain = net()
    plain.load_state_dict(paramlora.detach(trained()).state_dict())
    other = paramlora.load_adapter(plain, path)
    model.load_state_dict(other.state_dict())
    x = torch.randn(1, 3, 6, 6)
    assert torch.equal(model(x), other(x))
    for (_, _, a), (_, _, b) in zip(lowranks(model), lowranks(other)):
        assert torch.equal(a.lora_scale, b.lora_scale) and a.adapter == b.adapter == "style"
        assert a.entry == b.entry
    paramlora.detach(other)
    assert paramlora.load_adapter(other, path, "renamed") is other
    assert "renamed" in str(paramlora.summary(other))


def write(path, change):
    paramlora.save_adapter(trained(), path, "style")
    with safe_open(path, "pt") as file:
        state = {k: file.get_tensor(k) for k in file.keys()}
        metadata = dict(file.metadata())
    change(state, metadata)
    save_file(state, path, metadata)


def foreign(state, metadata):
    del metadata["paramlora"]


def future(state, metadata):
    metadata["paramlora"] = metadata["paramlora"].replace('"format": 1', '"format": 9')


def damaged(state, metadata):
    metadata["paramlora"] = metadata["paramlora"][:-3]


def bad_config(state, metadata):
    metadata["paramlora"] = metadata["paramlora"].replace('"r": 2', '"r": 0')


def missing(state, metadata):
    del state["0.lora_A"]


def unexpected(state, metadata):
    state["7.lora_A"] = torch.zeros(1)


def shape(state, metadata):
    state["0.lora_A"] = torch.ones(2, 9)


@pytest.mark.parametrize(
    "change, text",
    [
        (foreign, r"2: factors of \[1, 36\] and \[5, 1, 3, 3\] are not"),
        (future, "format 9; this paramlora reads 1"),
        (damaged, "metadata is damaged"),
        (bad_config, "its configuration is damaged"),
        (missing, "missing: 0.lora_A"),
        (unexpected, "unexpected: 7.lora_A"),
        (shape, r"0.lora_A: shape \[2, 9\] does not fit \[2, 3\]"),
    ],
)
def test_a_wrong_file_leaves_the_model_untouched(tmp_path, change, text):
    path = tmp_path / "a.safetensors"
    write(path, change)
    model = net()
    before = state_of(model)
    with pytest.raises(paramlora.FileError, match=text):
        paramlora.load_adapter(model, path)
    assert state_of(model) == before


@pytest.mark.parametrize("keep", [0, 4, 40, -5])
def test_a_truncated_file(tmp_path, keep):
    path = tmp_path / "a.safetensors"
    paramlora.save_adapter(trained(), path, "style")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(paramlora.FileError, match="not a whole safetensors file"):
        paramlora.load_adapter(net(), path)


def test_a_missing_file_and_an_unwritable_place(tmp_path):
    with pytest.raises(paramlora.FileError, match="cannot be read"):
        paramlora.load_adapter(net(), tmp_path / "none.safetensors")
    with pytest.raises(paramlora.FileError, match="cannot be written"):
        paramlora.save_adapter(trained(), tmp_path / "none" / "a.safetensors", "style")


def test_an_interrupted_save_keeps_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"older")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        paramlora.save_adapter(trained(), path, "style")
    assert path.read_bytes() == b"older"
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_file_for_another_model_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    paramlora.save_adapter(trained(), path, "style")
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    before = state_of(model)
    with pytest.raises(paramlora.FileError, match="what the model does not have: 2"):
        paramlora.load_adapter(model, path)
    assert state_of(model) == before


def test_an_adapter_of_that_name_is_there_already(tmp_path):
    path = tmp_path / "a.safetensors"
    model = trained()
    paramlora.save_adapter(model, path, "style")
    with pytest.raises(paramlora.AdapterError, match='"style" is attached already'):
        paramlora.load_adapter(model, path)
