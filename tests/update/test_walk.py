"""Going through a model finds what torch's own walk finds."""

from torch import nn

import paramlora
from paramlora.update.walk import paths_of


def test_a_walk_finds_what_torch_finds_in_its_order():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU()), "b": shared})
    model["c"] = nn.ModuleList([model["a"][1], nn.LSTM(2, 2)])
    model["c"].register_module("none", None)
    paramlora.attach(model, {"a.0": {"r": 1}})
    assert [(path, module) for module, path in paths_of(model).items()] == [*model.named_modules()]
