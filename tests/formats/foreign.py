"""A small model of every kind of layer, its updates, and the dense sum that they must give."""

import copy

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from paramlora.update.value import Adapter, Update


class Every(nn.Module):
    """Linear, convolutions of 1, 2 and 3 dimensions, grouped ones, an embedding and Conv1D."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.linear = nn.Linear(6, 8)
        self.not_linear = nn.Linear(8, 8)
        self.hf = Conv1D(8, 8)
        self.conv1 = nn.Conv1d(8, 6, 3, padding=1)
        self.grouped = nn.Conv1d(6, 4, 3, padding=1, groups=2)
        self.conv2 = nn.Conv2d(1, 3, (3, 2), stride=(1, 2))
        self.conv3 = nn.Conv3d(1, 2, 2)

    def forward(self, tokens):
        x = self.hf(self.not_linear(self.linear(self.embedding(tokens))).tanh())  # batch time 8
        x = self.grouped(self.conv1(x.mT))  # batch 4 time
        x = self.conv2(x[:, None])  # batch 3 2 time/2
        return self.conv3(x[:, None]).flatten(1)


TOKENS = torch.arange(16).reshape(2, 8) % 11
SCALES = {"linear": 0.7, "conv1": 2.0, "conv2": 1 / 3, "conv3": 1.5, "embedding": 0.9, "hf": 1.25}
RANKS = {"linear": 2, "conv1": 3, "conv2": 2, "conv3": 1, "embedding": 2, "hf": 3, "grouped": 2}


def model(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return Every().to(dtype).requires_grad_(False).eval()


def adapter(kinds, seed=1, dtype=torch.float64):
    """A random adapter of the named layers, its shapes known and its layout left to the model."""
    torch.manual_seed(seed)
    net, updates = model(), {}
    for name in kinds:
        weight = getattr(net, name).weight
        transposed = name in ("embedding", "hf")
        out, fan_in = weight.shape[0], weight[0].numel()
        out, fan_in = (fan_in, out) if transposed else (out, fan_in)
        r = RANKS[name]
        updates[name] = Update(
            torch.randn(r, fan_in, dtype=dtype),
            torch.randn(out, r, dtype=dtype),
            SCALES.get(name, 0.6),
            tuple(weight.shape),
            "transposed" if transposed else "matrix",
        )
    return Adapter(updates)


def dense(net, adapter):
    """A copy of `net` with W + s·B·A added in float64, by each layer's own formula."""
    net = copy.deepcopy(net)
    for name, update in adapter.updates.items():
        weight = net.get_submodule(name).weight
        a, b = update.lora_A.double(), update.lora_B.double()
        if name in ("embedding", "hf"):
            delta = torch.einsum("or,ri->io", b, a)
        else:
            delta = torch.einsum("or,ri->oi", b, a).reshape(weight.shape)
        weight.data += (update.scale * delta).to(weight.dtype)
    return net
