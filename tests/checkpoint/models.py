"""Small models of each layout, trained, and when two state dicts are the same."""

import copy

import pytest
import torch
from torch import nn

from paramlora import attach
from paramlora.model.attach import updates


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(3, 5, 4))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.wte.weight


def gpt2_layer():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 6)


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)), {"0": {"r": 2}}),
    "root": (lambda: nn.Linear(4, 3), {"weight": {"r": 2, "scale": 0.3}}),
    "root soft": (lambda: nn.Linear(4, 3), {"weight": {"r": 2, "hard": 0}}),
    "conv": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), {"0": {"r": 3}}),
    "soft conv": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3)), {"0": {"r": 3, "hard": 0}}),
    "transposed conv": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3)), {"0": {"r": 3}}),
    "square embedding": (lambda: nn.Sequential(nn.Embedding(5, 5)), {"0": {"r": 2}}),
    "square gpt-2": (lambda: nn.Sequential(gpt2_layer()), {"0": {"r": 2}}),
    "soft square gpt-2": (lambda: nn.Sequential(gpt2_layer()), {"0": {"r": 2, "hard": 0}}),
    "attention": (
        lambda: nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2)}),
        {"attn.in_proj_weight": {"r": 2}, "out_proj": {"r": 1, "scale": -2}},
    ),
    "lstm": (
        lambda: nn.ModuleDict({"rnn": nn.LSTM(3, 4)}),
        {"weight_ih_l0": {"r": 2}, "weight_hh_l0": {"r": 1, "trainable_scale": 1}},
    ),
    "experts": (lambda: nn.ModuleDict({"mlp": Experts()}), {"w1": {"r": 2}}),
    "tied": (Tied, {r"re:wte|head": {"r": 2}}),
    "whole": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 3)),
        {"0": {"whole": 1}, "1": {"whole": 1}, "2": {"r": 1}},
    ),
    "whole and tied": (Tied, {r"re:(wte|head).weight": {"whole": 1}}),
    "started from the weight": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.ConvTranspose2d(4, 4, 1)),
        {"0": {"r": 2, "init": "pissa"}, "1": {"r": 1, "init": "olora"}},
    ),
    "narrow factors": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)),
        {"0": {"r": 2, "scale": 0.3, "adapter_dtype": "bfloat16"}, "1": {"r": 1, "dropout": 0.1}},
    ),
    "batch norm": (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), {"0": {"r": 1}}),
}


def trained(build, config, dtype=torch.float32, adapter="default"):
    """(base state dict, attached model), with every factor random."""
    torch.manual_seed(0)
    model = build().to(dtype)
    base = copy.deepcopy(model).state_dict()
    attach(model, config, adapter)
    for _, _, update in updates(model):
        nn.init.normal_(update.lora_whole if hasattr(update, "lora_whole") else update.lora_B)
    return base, model


def equal(one, other):
    assert list(one) == list(other)
    for key in one:
        assert one[key].dtype == other[key].dtype, key
        assert torch.equal(one[key], other[key]), key


def sorted_keys(state):
    return {key: state[key] for key in sorted(state)}
