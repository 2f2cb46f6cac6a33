"""Runs the command line in this process; and the small model and the files that it is run on."""

import pytest
import safetensors.torch
import torch
from torch import nn

pytest.importorskip("typer")

import paramlora
from paramlora.cli import main

NET = f"{__name__}:net"


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))


def fill():
    """A checkpoint of it and an adapter of both layers, in the working directory."""
    model = net()
    safetensors.torch.save_file(model.state_dict(), "base.safetensors")
    paramlora.attach(model, {"0": {"r": 2}, "1": {"whole": True}})
    paramlora.save_adapter(model, "a.safetensors")
