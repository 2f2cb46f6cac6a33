"""The native format: what its metadata may not say."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import paramlora
from paramlora import FileError
from paramlora.files import adapters as interchange
from paramlora.files.native import write_native
from paramlora.update.value import Adapter, Update
from tests.formats.peft.language import TIES, adapted


def test_damaged_holders_are_refused(tmp_path):
    _, model = adapted(*TIES["embedding first"])
    path = tmp_path / "a.safetensors"
    paramlora.save_adapter(model, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    good = {"kind": "linear", "layout": "matrix", "groups": 1}
    for bad in ({"layout": "round"}, {"groups": 0}, {"groups": True}, {"kind": 3}, None):
        about = json.loads(metadata["paramlora"])
        about["holders"]["lm_head"] = None if bad is None else good | bad
        broken = tmp_path / "b.safetensors"
        save_file(load_file(path), broken, {"paramlora": json.dumps(about)})
        with pytest.raises(FileError, match='the "holders" in its metadata are damaged'):
            interchange.read_adapter(broken)


@pytest.mark.parametrize("bad", ([], {"0": "head"}, {"0": [3]}))
def test_damaged_names_of_layers_apart_are_refused(bad, tmp_path):
    adapter = Adapter({"0": Update(torch.ones(1, 3), torch.ones(2, 1), shape=(2, 3))})
    write_native(adapter, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        about = json.loads(file.metadata()["paramlora"])
    about["apart"] = bad
    state = load_file(tmp_path / "a.safetensors")
    save_file(state, tmp_path / "b.safetensors", {"paramlora": json.dumps(about)})
    with pytest.raises(FileError, match='the "apart" in its metadata is damaged'):
        interchange.read_adapter(tmp_path / "b.safetensors")
