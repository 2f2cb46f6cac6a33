"""Native adapter files: the round trip of any name, and every way in which a file can be wrong."""

import json
import os
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import paramlora
from paramlora import Adapter, FileError, Update
from paramlora.files import read_adapter
from paramlora.files import safetensors as stream
from paramlora.files.native import write_native
from paramlora.model.attach import updates
from tests.files import hostile_files
from tests.files.fuzzed import FUZZ, json_values, tried
from tests.files.written import filled, saved, small, untouched

CONFIG = {
    "0": {"r": 2, "scale": 1.7, "trainable_scale": 1},
    "2": {"r": 1, "alpha": 3, "hard": 0, "up_kernel": "same"},
}


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 3))


def trained(adapter="style"):
    model = paramlora.attach(net(), CONFIG, adapter)
    for _, _, low in updates(model):
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
    for (_, _, a), (_, _, b) in zip(updates(model), updates(other)):
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
    for _, _, low in updates(model):
        nn.init.normal_(low.lora_B)
    config = {"0": {"r": 1, "scale": 0.3}, "re:b.2": {"r": 2, "hard": 0}}
    about = {"format": 1, "adapter": "old", "config": config}
    path = tmp_path / "old.safetensors"
    state = paramlora.adapter_state_dict(model, "old")
    save_file({k: v.contiguous() for k, v in state.items()}, path, {"paramlora": json.dumps(about)})
    plain = nn.ModuleDict({"a": net(), "b": net()})
    plain.load_state_dict(base)
    paramlora.load_adapter(plain, path)
    kinds = {path: type(low).__name__ for path, _, low in updates(plain)}
    assert kinds == {"a.0": "LowRank", "b.0": "LowRank", "b.2": "Branch"}
    assert [low.entry.scale for _, _, low in updates(plain)] == [0.3, 0.3, 1.0]
    merged = paramlora.checkpoint.merge(base, read_adapter(path))
    live = paramlora.merge(plain).state_dict()
    assert all(torch.equal(merged[key], live[key]) for key in live)


def test_a_tied_adapter_comes_back_tied(tmp_path):
    def build():
        torch.manual_seed(0)  # another base would be a warning of its own
        model = nn.ModuleDict({"wte": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
        model.head.weight = model.wte.weight
        return model

    model = paramlora.attach(build(), {"re:wte|head": {"r": 2}})
    nn.init.normal_(next(updates(model))[2].lora_B)
    paramlora.save_adapter(model, tmp_path / "tied.safetensors")
    with safe_open(tmp_path / "tied.safetensors", "pt") as file:
        assert set(file.keys()) == {"wte.lora_A", "wte.lora_B", "wte.lora_scale"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would say that they are no longer tied
        other = paramlora.load_adapter(build(), tmp_path / "tied.safetensors")
    assert len(list(updates(other))) == 1
    paramlora.merge(other)
    assert other.head.weight is other.wte.weight


def test_options_of_training_come_back(tmp_path):
    config = {"0": {"r": 2, "dropout": 0.25, "adapter_dtype": "float64", "scale": 0.5}}
    model = paramlora.attach(nn.Sequential(nn.Linear(4, 3)), config)
    nn.init.normal_(next(updates(model))[2].lora_B)
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    other = paramlora.load_adapter(nn.Sequential(nn.Linear(4, 3)), tmp_path / "a.safetensors")
    (one,), (two,) = ([low for _, _, low in updates(m)] for m in (model, other))
    assert two.entry == one.entry and two.dropout == 0.25 and two.lora_A.dtype == torch.float64
    assert torch.equal(one.lora_A, two.lora_A) and torch.equal(one.lora_scale, two.lora_scale)


@given(about=st.fixed_dictionaries({k: json_values for k in ("format", "adapter", "config")}))
@FUZZ
def test_any_metadata_is_read_or_refused(about, tmp_path):
    path = tmp_path / "any.safetensors"
    about = {**about, "format": 1, "config": {"a": about["config"], "re:.*": {"r": 1}}}
    tensors = {f"a.{part}": shape for part, shape in hostile_files.NATIVE_PARTS}
    path.write_bytes(hostile_files.safe(tensors, {"paramlora": json.dumps(about)}))
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 3)})
    tried(lambda: paramlora.load_adapter(model, path))


NAMES = [
    "weight", "bias", "trainable_model", "lora_A", "lora_B", "lora_scale", "lora_whole", "original",
    "original0", "0", "default", "module", "base_layer", "config", "é", "名", "a b", "re:x", "re:(",
    "*", "\\", '"', "x\ny", "paramlora", "__metadata__",
]  # fmt: skip
ENTRIES = {"hard": {"r": 2}, "soft": {"r": 2, "hard": 0}, "whole": {"whole": True}}


# names


def named(name, nested):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4)) if nested else nn.Linear(4, 3)
    model = nn.Module()
    model.add_module(name, layer)
    model.register_parameter(
        "weight" if name != "weight" else "other", nn.Parameter(torch.randn(3, 4))
    )
    return model


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ENTRIES)
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_of_any_name_reads_back(name, kind, nested, tmp_path):
    model, again = named(name, nested), named(name, nested)
    pattern = r"re:(?s:.+)\.weight"
    config = {pattern: ENTRIES[kind]}
    if name != "weight" and kind != "soft":
        config["re:weight"] = ENTRIES[kind]  # the model's own parameter
    filled(model, config)
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    paramlora.load_adapter(again, tmp_path / "a.safetensors")
    want, got = model.state_dict(), again.state_dict()
    assert list(want) == list(got) and all(torch.equal(want[key], got[key]) for key in want)
    told = read_adapter(tmp_path / "a.safetensors")
    assert {**told.updates, **told.whole}.keys() == paths(model)


def paths(model):
    return {path for path, *_ in paramlora.attach.__globals__["updates"](model)}


@pytest.mark.parametrize("name", ["parametrizations", "lora_branches"])
def test_a_layer_under_a_name_of_parametrizations_own_is_refused_by_name(name):
    model = nn.Module()
    model.add_module(name, nn.Linear(4, 3))
    with pytest.raises(paramlora.TargetError, match=rf'"{name}".*Rename'):
        paramlora.attach(model, {name: {"r": 2}})


def test_a_name_that_is_no_text_is_refused_before_anything_is_written(tmp_path):
    model = nn.Module()
    model.add_module("a\udc80", nn.Linear(4, 3))
    filled(model, {r"re:.*weight": {"r": 2}})
    (tmp_path / "a.safetensors").write_bytes(b"old")
    with untouched(tmp_path), pytest.raises(FileError, match=r"a\\udc80.*no text"):
        paramlora.save_adapter(model, tmp_path / "a.safetensors")


def older(adapter, path):
    """The file as 0.1.0 wrote it: paths as they are, also where they mean something else."""
    write_native(adapter, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    about = json.loads(metadata["paramlora"])
    del about["holders"]
    about["config"] = {"trainable_model": False}
    about["config"] |= {p or "weight": u.entry(p).to_dict() for p, u in adapter.updates.items()}
    save_file(load_file(path), path, {**metadata, "paramlora": json.dumps(about)})


@pytest.mark.parametrize("name", ["weight", "trainable_model", "", "re:x", "*", "a.b"])
def test_files_of_the_first_release_are_read(name, tmp_path):
    update = Update(torch.randn(2, 4), torch.randn(3, 2), 0.3, (3, 4), kind="linear")
    older(Adapter({name: update}), tmp_path / "a.safetensors")
    again = read_adapter(tmp_path / "a.safetensors")
    assert again.updates.keys() == {name} and again.updates[name].scale == 0.3
    assert torch.equal(again.updates[name].lora_A, update.lora_A)


# numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("entry", "tensor"), [
    ({"r": 2}, "lora_A"), ({"r": 2}, "lora_B"), ({"r": 2, "trainable_scale": True}, "lora_scale"),
    ({"r": 2, "hard": 0}, "lora_B"), ({"whole": True}, "lora_whole"),
])  # fmt: skip
def test_numbers_that_are_not_finite_are_refused_and_the_old_file_stays(
    entry, tensor, value, tmp_path
):
    path = tmp_path / "a.safetensors"
    model = filled(small(), {"1": entry})
    paramlora.save_adapter(model, path)
    broken = next(p for name, p in model.named_parameters() if name.endswith(tensor))
    with torch.no_grad():
        broken.view(-1)[-1] = value
    with (
        untouched(tmp_path),
        pytest.raises(FileError, match=rf"1\.(bias\.)?{tensor} is not finite.*{value}"),
    ):
        paramlora.save_adapter(model, path)


def test_values_on_the_meta_device_are_refused(tmp_path):
    model = paramlora.attach(nn.Sequential(nn.Linear(4, 3, device="meta")), {"0": {"r": 2}})
    with untouched(tmp_path), pytest.raises(FileError, match="0.lora_A lies on the meta device"):
        paramlora.save_adapter(model, tmp_path / "a.safetensors")


def test_a_scale_beyond_the_type_written_is_refused(tmp_path):
    update = Update(torch.ones(2, 4), torch.ones(3, 2), 1e39, (3, 4), kind="linear")
    with untouched(tmp_path), pytest.raises(FileError, match="the scale of 0, 1e.39, is beyond"):
        write_native(Adapter({"0": update}), tmp_path / "a.safetensors")
    wide = replace(update, lora_A=update.lora_A.double(), lora_B=update.lora_B.double())
    write_native(Adapter({"0": wide}), tmp_path / "a.safetensors")
    assert read_adapter(tmp_path / "a.safetensors").updates["0"].scale == 1e39


@pytest.mark.parametrize("ending", ["pt", "pth", "bin", "ckpt"])
def test_a_name_of_another_kind_of_file_is_refused(ending, tmp_path):
    with untouched(tmp_path), pytest.raises(FileError, match=r"ends in \.safetensors"):
        saved(tmp_path / f"a.{ending}")
