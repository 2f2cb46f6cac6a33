"""A sweep of hostile values in sound files: one clear error, no output, bounded memory."""

import json

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import paramlora
from paramlora import Adapter, AdapterError, FileError, Update, files
from paramlora.files import read_adapter
from paramlora.files.inspection import inspect
from paramlora.files.native import write_native
from tests.files.damaged import ADAPTER, LONG_FUZZ, STATE

pytestmark = pytest.mark.usefixtures("bounded")


def spoil(path, key, tensor):
    """Put another tensor into a safetensors file."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = {**safetensors.torch.load_file(path), key: tensor}
    safetensors.torch.save_file(state, path, metadata)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(bad, tmp_path):
    path = tmp_path / "base.safetensors"
    a = torch.ones(1, 4)
    a[0, 2] = bad
    sound = Adapter({"a": Update(torch.ones(1, 4), torch.ones(3, 1))})
    write_native(sound, tmp_path / "adapter.safetensors")
    spoil(tmp_path / "adapter.safetensors", "a.lora_A", a)  # no writer of ours would
    safetensors.torch.save_file(STATE, path)
    out = tmp_path / "out.safetensors"
    told = "adapter.safetensors: not finite: a.lora_A. It was damaged .* give a sound copy"
    with pytest.raises(FileError, match=told):
        files.merge(path, [tmp_path / "adapter.safetensors"], out)
    with pytest.raises(FileError, match=told):
        files.embed(path, tmp_path / "adapter.safetensors", tmp_path / "in.safetensors")
    files.embed(path, sound, tmp_path / "in.safetensors")
    spoil(tmp_path / "in.safetensors", "a.parametrizations.weight.0.lora_A", a)
    with pytest.raises(AdapterError, match="a.lora_A: not finite. Nothing was merged"):
        files.merge(tmp_path / "in.safetensors", [], out)
    assert not out.exists()
    # the base's own are the base's affair
    state = {"a.weight": torch.full((3, 4), bad)}
    safetensors.torch.save_file(state, path)
    files.merge(path, [ADAPTER], out)
    assert not torch.isfinite(safetensors.torch.load_file(out)["a.weight"]).any()


@pytest.mark.parametrize(
    "dtype",
    [torch.float8_e4m3fn, torch.float8_e5m2, torch.int32, torch.bool, torch.complex64, torch.int64],
    ids=str,
)
@pytest.mark.parametrize("name", ["a.lora_A", "a.lora_B", "a.lora_scale", "a.bias.lora_whole"])
def test_a_type_in_which_nothing_is_computed(name, dtype, tmp_path):
    path, base, inside = (tmp_path / f"{n}.safetensors" for n in ("adapter", "base", "inside"))
    layer = nn.ModuleDict({"a": nn.Linear(4, 3)})
    safetensors.torch.save_file(layer.state_dict(), base)
    paramlora.attach(layer, {"a": {"r": 2}, "a.bias": {"whole": True}})
    paramlora.save_adapter(layer, path)
    safetensors.torch.save_file(layer.state_dict(), inside)
    told = safetensors.torch.load_file(path)[name]
    spoil(path, name, told.to(dtype))
    _, owner, leaf = f".{name}".replace(".a.bias.", ".bias.").replace(".a.", ".weight.").split(".")
    spoil(inside, f"a.parametrizations.{owner}.0.{leaf}", told.to(dtype))
    calls = (
        lambda: paramlora.load_adapter(nn.ModuleDict({"a": nn.Linear(4, 3)}), path),
        lambda: files.merge(base, [path], tmp_path / "out.safetensors"),
        lambda: files.embed(base, path, tmp_path / "out.safetensors"),
        lambda: files.merge(inside, [], tmp_path / "out.safetensors"),
        lambda: files.extract(inside, tmp_path / "out.safetensors"),
        lambda: inspect(path),
    )
    counts = name.endswith("whole") and dtype == torch.int64  # as BatchNorm's, which are sound
    for call in calls[:-1] if counts else calls:
        with pytest.raises(paramlora.ParamloraError, match=rf"{str(dtype).split('.')[1]}"):
            call()
    assert not (tmp_path / "out.safetensors").exists()


values = st.none() | st.booleans() | st.integers(-1, 5) | st.floats() | st.text(max_size=3)
values = st.recursive(
    values, lambda v: st.lists(v, max_size=2) | st.dictionaries(st.text(max_size=3), v, max_size=2)
)


@given(
    key=st.sampled_from(["format", "adapter", "config", "shapes", "ties"]),
    deep=st.sampled_from([None, "a", "shape", "layout", "r", "scale"]),
    value=values,
)
@LONG_FUZZ
def test_metadata_of_an_adapter_that_says_anything(key, deep, value, tmp_path):
    path = tmp_path / "adapter.safetensors"
    write_native(ADAPTER, path)
    state = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["paramlora"])
    if deep is None or not isinstance(about[key], dict):
        about[key] = value
    elif deep == "a":
        about[key]["a"] = value
    else:
        about[key].setdefault("a", {})[deep] = value
    safetensors.torch.save_file(state, path, {"paramlora": json.dumps(about)})
    base = tmp_path / "base.safetensors"
    safetensors.torch.save_file(STATE, base)
    try:
        files.merge(base, [path], tmp_path / "out.safetensors", force=True)
        paramlora.attach_adapter(nn.ModuleDict({"a": nn.Linear(4, 3)}), read_adapter(path))
    except paramlora.ParamloraError:
        return
