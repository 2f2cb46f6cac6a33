"""What is in an adapter file of any tool."""

import json
import math

import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file

pytest.importorskip("typer")


import paramlora
from paramlora import formats
from paramlora.files.inspection import inspect
from paramlora.update.value import Adapter, Update
from tests.files.test_adapters import native
from tests.formats import foreign


def test_an_inspection(tmp_path):
    update = Update(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0], [0.0]]), 0.5, (2, 2))
    bad = Update(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0], [0.0]]), 0.5, (2, 2))
    idle = Update(torch.tensor([[3.0, 4.0]]), torch.zeros(2, 1), 0.5, (2, 2))
    content = formats.write(Adapter({"a": update, "b": bad, "c": idle}), "kohya")
    content.state["lora_unet_b.lora_down.weight"][0, 0] = math.nan  # no writer would
    save_file(dict(content.state), tmp_path / "k.safetensors", dict(content.metadata))
    found = inspect(tmp_path / "k.safetensors")
    assert found.format == "kohya" and found.metadata["ss_network_module"] == "networks.lora"
    first, second, third = found.rows
    assert (first.path, first.r, first.scale, first.norm) == ("lora_unet_a", 1, 0.5, 5.0)
    assert (first.flag, second.flag, third.flag) == ("", "not finite", "all zero")
    text = str(found)
    assert "format: kohya" in text and "3 updates, 2 flagged" in text and "all zero" in text
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["rows"][1]["norm"] is None and data["flagged"] == 2


def test_an_inspection_tells_what_is_no_update(tmp_path):
    content = formats.write(foreign.adapter(["linear"]), "kohya")
    state = {**content.state, "lora_unet_x.oft_blocks": torch.ones(2)}
    save_file(state, tmp_path / "k.safetensors")
    (note,) = inspect(tmp_path / "k.safetensors").notes
    assert "lora_unet_x.oft_blocks" in note


def test_a_native_file_is_inspected_too(tmp_path):
    _, path = native(tmp_path)
    found = inspect(path)
    assert found.format == "native" and [row.path for row in found.rows] == ["linear", "conv2"]
    weight = foreign.model().linear.weight
    delta = paramlora.load_adapter(foreign.model(), path).linear.weight - weight
    assert abs(found.rows[0].norm - delta.norm().item()) < 1e-9


def test_a_damaged_whole_tensor_is_flagged(folder):
    with safetensors.safe_open("a.safetensors", "pt") as file:
        metadata = file.metadata()
    state = safetensors.torch.load_file("a.safetensors")
    state["1.lora_whole"][0] = torch.nan
    safetensors.torch.save_file(state, "a.safetensors", metadata)
    found = inspect("a.safetensors")
    assert {row.path: row.flag for row in found.rows}["1"] == "not finite"
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["flagged"] == 2
