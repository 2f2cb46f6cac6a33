"""A model with layers of all kinds and a norm with statistics, and an adapter trained on it."""

import torch
from torch import nn

import paramlora
from tests.formats import foreign


class Net(nn.Module):
    """Layers of all kinds, a norm with statistics, and names that end one in another."""

    def __init__(self):
        super().__init__()
        self.every = foreign.Every()
        self.norm, self.bn = nn.LayerNorm(6), nn.BatchNorm1d(6)
        self.head, self.last = nn.Linear(6, 5), nn.Sequential(nn.Linear(5, 5))
        self.last.other_norm = nn.LayerNorm(5)
        self.table = nn.Parameter(torch.randn(5, 5))

    def forward(self, tokens):
        x = self.every(tokens)[:, :6]
        return self.last(self.head(self.bn(self.norm(x)))) @ self.table


def net():
    torch.manual_seed(0)
    return Net().double().requires_grad_(False).eval()


def trained(config, seed=1, name="default", model=None):
    model = net() if model is None else model
    paramlora.attach(model, config, name)
    torch.manual_seed(seed)
    for parameter in paramlora.trainable_parameters(model, adapter=name):
        parameter.data += torch.randn_like(parameter) * 0.3
    return model
