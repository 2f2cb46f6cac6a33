"""peft's folders, written, read and loaded, and how close its answers are."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from paramlora import formats

peft = pytest.importorskip("peft")

PLAIN = "linear conv1 conv2 conv3 embedding".split()


def saved(folder, content):
    folder.mkdir()
    save_file(dict(content.state), folder / "adapter_model.safetensors", dict(content.metadata))
    (folder / "adapter_config.json").write_text(json.dumps(content.config))
    return folder


def opened(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return formats.Content(load_file(folder / "adapter_model.safetensors"), {}, config)


def in_peft(net, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as a missing or an unexpected key
        warnings.filterwarnings("ignore", "LoRA adapter added to ConvNd layer with groups")
        warnings.filterwarnings("ignore", "fan_in_fan_out is set")
        # peft looks for patterns among modules only, and finds those of parameters all the same
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
        found = peft.PeftModel.from_pretrained(net, folder, autocast_adapter_dtype=False)
    return found.eval()


def close(a, b):
    assert (a - b).abs().max() <= 1e-6 * b.abs().max()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


def attention():
    torch.manual_seed(0)
    return Attention().double().requires_grad_(False).eval()
