"""Blocks that switch a model, opened and left in any order: `route` and `disable_adapters`."""

import itertools

import pytest
import torch
from torch import nn

import paramlora
from paramlora.model.attach import updates

ROWS = [["a", None], ["b", "a"]]  # of two blocks of route


def made():
    """A layer with two adapters, and by adapter what each row gives, formed here."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    for name in "ab":
        paramlora.attach(layer, {"weight": {"r": 2}}, name)
    held = {update.adapter: update for _, _, update in updates(layer)}
    with torch.no_grad():
        for update in held.values():
            update.lora_B.normal_()
    base, x = layer.parametrizations.weight.original, torch.randn(2, 4).double()
    delta = {n: u.lora_scale * u.lora_B @ u.lora_A for n, u in held.items()}
    weight = {None: base, "a": base + delta["a"], "b": base + delta["b"], "both": base}
    weight["both"] = base + delta["a"] + delta["b"]
    found = {n: nn.functional.linear(x, w, layer.bias).detach() for n, w in weight.items()}
    return layer, x, found


def wanted(found, opened):
    """Nothing acts in a block of disable_adapters, else the rows of the last block of route."""
    if "off" in opened:
        return found[None]
    rows = ["both"] * 2 if not opened else ROWS[opened[-1]]
    return torch.stack([found[name][at] for at, name in enumerate(rows)])


@pytest.mark.parametrize("order", list(itertools.permutations(["off", 0, 1])))
def test_blocks_are_left_in_any_order(order):
    layer, x, found = made()
    for leaving in itertools.permutations(order):
        opened, blocks = [], {}
        for name in order:
            off = name == "off"
            make = paramlora.disable_adapters(layer) if off else paramlora.route(layer, ROWS[name])
            blocks[name] = make
            make.__enter__()
            opened.append(name)
        for name in leaving:
            torch.testing.assert_close(layer(x), wanted(found, opened), rtol=1e-12, atol=1e-12)
            blocks[name].__exit__(None, None, None)
            opened.remove(name)
        torch.testing.assert_close(layer(x), found["both"], rtol=1e-12, atol=1e-12)
