"""Small models of tied layers, stacks and convolutions."""

import torch
from torch import nn


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(3, 20, 16) / 4)


def model():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "fc": nn.Linear(300, 200),
            "conv": nn.Conv2d(8, 12, 3),
            "one": nn.Conv1d(8, 12, 3),
            "emb": nn.Embedding(50, 8),
            "experts": Experts(),
            "norm": nn.LayerNorm(8),
            "same": nn.Linear(8, 8),
        }
    )


class Tied(nn.Module):
    """An embedding with its head, and two vectors that are one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.fc = nn.Embedding(30, 12), nn.Linear(12, 12)
        self.norm, self.last = nn.LayerNorm(12), nn.LayerNorm(12)
        self.lm_head = nn.Linear(12, 30, bias=False)
        self.lm_head.weight, self.last.weight = self.wte.weight, self.norm.weight
