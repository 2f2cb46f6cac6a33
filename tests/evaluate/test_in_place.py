"""A sweep of layers whose output is changed in place, as ``embeddings *= scale`` and
``nn.ReLU(inplace=True)`` do: of a view that an autograd function gave torch refuses it."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import paramlora

LAYERS = {
    "rows": (lambda: nn.Linear(6, 4), (3, 6)),
    "batches": (lambda: nn.Linear(6, 4), (2, 3, 6)),
    "signals": (lambda: nn.Conv1d(6, 4, 3), (2, 6, 9)),
    "kernel 1": (lambda: nn.Conv2d(6, 4, 1), (2, 6, 5, 5)),
    "images": (lambda: nn.Conv2d(6, 4, 3), (2, 6, 5, 5)),
    "groups": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 5, 5)),
    "padded embedding": (lambda: nn.Embedding(9, 6, padding_idx=0), None),
    "embedding": (lambda: nn.Embedding(9, 6), None),
}
ENTRIES = {
    "hard": {"r": 2},
    "soft": {"r": 2, "hard": 0},
    "dropout": {"r": 2, "dropout": 0.1},
    "dora": {"r": 2, "kind": "dora"},
    "loha": {"r": 2, "kind": "loha"},
    "lokr": {"r": 2, "kind": "lokr"},
    "rows": {"rows": [1, 3]},
    "whole": {"whole": True},
}


@pytest.mark.parametrize("routed", (False, True), ids=("alone", "routed"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", LAYERS)
def test_what_a_layer_gives_may_be_changed_in_place(name, entry, dtype, routed):
    if "embedding" in name and entry in ("soft", "dropout"):
        pytest.skip("adds no branch to an embedding")
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = paramlora.attach(make().to(dtype), {"weight": ENTRIES[entry]})
    trained = [*paramlora.trainable_parameters(layer)]
    for parameter in trained:
        nn.init.normal_(parameter)
    x = torch.tensor([[0, 1, 3], [3, 0, 8]]) if shape is None else torch.randn(shape).to(dtype)

    def gradients(in_place):
        torch.manual_seed(1)
        with paramlora.route(layer, ["default"] * len(x)) if routed else nullcontext():
            y = layer(x)
            if in_place:
                y *= 2
                y += 1
            else:
                y = y * 2 + 1
        return torch.autograd.grad(y.float().square().sum(), trained)

    for got, want in zip(gradients(True), gradients(False)):
        torch.testing.assert_close(
            got, want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-9, atol=0
        )
