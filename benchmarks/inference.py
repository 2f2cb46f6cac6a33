"""Layers for inference: with one adapter attached, and merged."""

import copy

import torch
from torch import Tensor, nn

import paramlora
from benchmarks.cases import Tensors
from benchmarks.opponents import WAYS, Way
from benchmarks.reference import bound, definition

ATTACHED = ("frozen", "peft", "peft bf16", "loralib", "original", "paramlora")


def ways_of(tensors: Tensors) -> dict[str, nn.Module]:
    """Modules to call without gradients, each checked against the float64 definition."""
    out = {name: _build(name, tensors).call for name in ATTACHED}
    out["peft merged"] = _build("peft", tensors).call
    out["peft merged"].merge()
    out["paramlora merged"] = paramlora.merge(nn.Sequential(_build("paramlora", tensors).call))[0]
    want = definition(tensors.layer, tensors.A, tensors.B, tensors.x, tensors.dy).y
    limit = bound(tensors.dy.dtype, max(*tensors.A.shape, *tensors.B.shape))
    for name, module in out.items():
        if name != "frozen":
            _check(module, tensors.x, want, limit, name)
    return out


def _build(name: str, tensors: Tensors) -> Way:
    return WAYS[name](copy.deepcopy(tensors.layer), tensors.A, tensors.B)


@torch.no_grad()
def _check(module: nn.Module, x: Tensor, want: Tensor, limit: float, name: str) -> None:
    error = ((module(x).double() - want).norm() / want.norm()).item()
    assert error < limit, f"{name}: relative error {error:.2e} >= {limit:.2e}"
