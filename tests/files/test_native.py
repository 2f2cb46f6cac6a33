"""Adapter files: the round trip, and every way in which a file can be wrong."""

import json
import os
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import paramlora
from paramlora.files import safetensors as stream
from paramlora.files.native import read_native
from paramlora.model.attach import lowranks

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
        (future, "written in format 9, and this paramlora reads 1. Upgrade"),
        (damaged, "metadata is damaged"),
        (bad_config, "the configuration in its metadata is damaged"),
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
    told = "not a whole safetensors file" if keep else "an empty file"
    with pytest.raises(paramlora.FileError, match=told):
        paramlora.load_adapter(net(), path)


def test_a_file_is_read_once(tmp_path, monkeypatch):
    model = paramlora.attach(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4)), {"*": {"r": 2}})
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    read, fill = [], stream.SafeFile._fill

    def counted(self, at, buffer):
        if self._begin:  # the header is known
            read.append(len(buffer))
        fill(self, at, buffer)

    monkeypatch.setattr(stream.SafeFile, "_fill", counted)
    fresh = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))
    paramlora.load_adapter(fresh, tmp_path / "a.safetensors")
    assert read == [sum(t.nbytes for t in paramlora.adapter_state_dict(model).values())]


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


def test_a_file_from_before_it_told_shapes(tmp_path):
    """Its entries are patterns, its tensors by path: it loads, and merges into a base."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": net(), "b": net()})
    base = {key: value.clone() for key, value in model.state_dict().items()}
    paramlora.attach(model, {"0": {"r": 1, "scale": 0.3}, "re:b.2": {"r": 2, "hard": 0}}, "old")
    for _, _, low in lowranks(model):
        nn.init.normal_(low.lora_B)
    config = {"0": {"r": 1, "scale": 0.3}, "re:b.2": {"r": 2, "hard": 0}}
    about = {"format": 1, "adapter": "old", "config": config}
    path = tmp_path / "old.safetensors"
    state = paramlora.adapter_state_dict(model, "old")
    save_file({k: v.contiguous() for k, v in state.items()}, path, {"paramlora": json.dumps(about)})
    plain = nn.ModuleDict({"a": net(), "b": net()})
    plain.load_state_dict(base)
    paramlora.load_adapter(plain, path)
    kinds = {path: type(low).__name__ for path, _, low in lowranks(plain)}
    assert kinds == {"a.0": "LowRank", "b.0": "LowRank", "b.2": "Branch"}
    assert [low.entry.scale for _, _, low in lowranks(plain)] == [0.3, 0.3, 1.0]
    merged = paramlora.checkpoint.merge(base, read_native(path))
    live = paramlora.merge(plain).state_dict()
    assert all(torch.equal(merged[key], live[key]) for key in live)


def test_a_tied_adapter_comes_back_tied(tmp_path):
    def build():
        torch.manual_seed(0)  # another base would be a warning of its own
        model = nn.ModuleDict({"wte": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
        model.head.weight = model.wte.weight
        return model

    model = paramlora.attach(build(), {"re:wte|head": {"r": 2}})
    nn.init.normal_(next(lowranks(model))[2].lora_B)
    paramlora.save_adapter(model, tmp_path / "tied.safetensors")
    with safe_open(tmp_path / "tied.safetensors", "pt") as file:
        assert set(file.keys()) == {"wte.lora_A", "wte.lora_B", "wte.lora_scale"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would say that they are no longer tied
        other = paramlora.load_adapter(build(), tmp_path / "tied.safetensors")
    assert len(list(lowranks(other))) == 1
    paramlora.merge(other)
    assert other.head.weight is other.wte.weight


def test_options_of_training_come_back(tmp_path):
    config = {"0": {"r": 2, "dropout": 0.25, "adapter_dtype": "float64", "scale": 0.5}}
    model = paramlora.attach(nn.Sequential(nn.Linear(4, 3)), config)
    nn.init.normal_(next(lowranks(model))[2].lora_B)
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    other = paramlora.load_adapter(nn.Sequential(nn.Linear(4, 3)), tmp_path / "a.safetensors")
    (one,), (two,) = ([low for _, _, low in lowranks(m)] for m in (model, other))
    assert two.entry == one.entry and two.dropout == 0.25 and two.lora_A.dtype == torch.float64
    assert torch.equal(one.lora_A, two.lora_A) and torch.equal(one.lora_scale, two.lora_scale)
