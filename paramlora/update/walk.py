"""Going through a model, which every change of one does several times."""

from torch import nn


def paths_of(model: nn.Module) -> dict[nn.Module, str]:
    """Every module with its path, each once, in the order of ``named_modules``; which hands each of
    them up through all modules that it lies in, and takes several times as long."""
    out: dict[nn.Module, str] = {}
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if module not in out:
            out[module] = path
            inside = module._modules
            if inside:  # most have none
                stem, last_first = path and path + ".", reversed([*inside.items()])
                waiting += [(stem + name, one) for name, one in last_first if one is not None]
    return out
