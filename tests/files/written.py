"""What is written into a folder, and that what was there stays as it was."""

import stat
from contextlib import contextmanager

import torch
from torch import nn

import paramlora


def filled(model, config, adapter="default"):
    """The model with an adapter whose tensors are all random."""
    torch.manual_seed(1)
    paramlora.attach(model, config, adapter)
    with torch.no_grad():
        for parameter in paramlora.trainable_parameters(model):
            parameter.add_(torch.randn_like(parameter))
    return model


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6))


@contextmanager
def untouched(folder):
    """Nothing below `folder` changes, appears or goes."""
    before = snapshot(folder)
    yield
    assert snapshot(folder) == before


def snapshot(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        if path.is_file()
        else stat.S_IFMT(path.lstat().st_mode)
        for path in folder.rglob("*")
    }


def saved(path):
    paramlora.save_adapter(filled(small(), {"0": {"r": 2}}), path)
