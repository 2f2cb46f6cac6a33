"""loralib's files: written here and loaded there, written there and read here."""

import pytest
import torch
from torch import nn

from paramlora import formats
from paramlora.errors import FileError, ParamloraWarning
from paramlora.formats import Content, Options, Slot
from tests.formats.linears import LINEAR, adapter


def test_what_loralib_writes_acts_here():
    loralib = pytest.importorskip("loralib")
    torch.manual_seed(0)
    layers = {
        "linear": loralib.Linear(6, 8, r=2, lora_alpha=3),
        "table": loralib.Embedding(7, 6, r=2, lora_alpha=3),
        "conv": loralib.Conv2d(6, 4, 3, r=2, lora_alpha=3),
        "merged": loralib.MergedLinear(6, 9, r=2, lora_alpha=3, enable_lora=[True, False, True]),
    }
    net = nn.ModuleDict(layers)
    for name, parameter in net.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    plain = {name: getattr(layer, "conv", layer) for name, layer in layers.items()}
    before = {name: layer.weight.detach().clone() for name, layer in plain.items()}
    state = loralib.lora_state_dict(net)
    base = {
        "linear": Slot((8, 6), "matrix", "linear", 1),
        "table": Slot((7, 6), "transposed", "embedding", 1),
        "conv": Slot((4, 6, 3, 3), "matrix", "convolution", 1),
        "merged": Slot((9, 6), "matrix", "linear", 1),
    }
    options = Options(alpha=3, enable=(True, False, True))
    found = formats.read(Content(state), base, options).updates
    net.eval()  # loralib merges its terms into the weights
    for name, layer in plain.items():
        torch.testing.assert_close(before[name] + found[name].delta(), layer.weight)
    with pytest.raises(FileError, match="2 of 3 parts of a fused projection were trained"):
        formats.read(Content(state), base, Options(alpha=3))
    with pytest.warns(ParamloraWarning, match="the scale is not in this file"):
        formats.read(Content({k: v for k, v in state.items() if "linear" in k}), base)


def test_what_is_written_here_acts_in_loralib():
    loralib = pytest.importorskip("loralib")
    ours = adapter(scales=(1.0, 1.0, 1.0))
    state = formats.write(ours, "loralib").state
    for path, (out, fan_in) in LINEAR.items():
        layer = loralib.Linear(fan_in, out, r=2, lora_alpha=2)
        before = layer.weight.detach().clone()
        layer.load_state_dict(
            {k.removeprefix(f"{path}."): v for k, v in state.items() if k.startswith(path)},
            strict=False,
        )
        layer.eval()
        update = ours.updates[path]
        torch.testing.assert_close(layer.weight.detach() - before, update.lora_B @ update.lora_A)


def test_loralib_has_no_place_for_a_scale():
    with pytest.raises(FileError, match="block.a: scale 0.7; loralib's files have no place"):
        formats.write(adapter(), "loralib")
