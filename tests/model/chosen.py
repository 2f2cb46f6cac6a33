"""A small net with classes of its own, and which of its layers an entry means."""

import torch
from torch import nn

import paramlora

R = {"r": 1}


def chosen(model, config, **options):
    """The paths that each entry gets."""
    out = {}
    for target in paramlora.targets(model, config, **options):
        out.setdefault(target.entry.name, []).append(target.path)
    return out


class Mine(nn.Module):
    """A layer of the user's own, with a matrix that has a name of its own."""

    def __init__(self):
        super().__init__()
        self.table, self.shift = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return x @ self.table.t() + self.shift


class Narrow(nn.Linear):
    pass


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)
        self.mine, self.up, self.norm = Mine(), Narrow(4, 4), nn.LayerNorm(4)

    def forward(self, x):
        return self.up(self.mine(self.norm(x + self.attn(x, x, x)[0])))


def net():
    torch.manual_seed(0)
    return nn.ModuleDict({"a": Block(), "b": Block(), "head": nn.Linear(4, 2)}).double()
