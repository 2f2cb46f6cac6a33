"""A sweep of every operation on a whole model: twice the layers take twice the work."""

import sys
import warnings

import pytest
import torch
from torch import nn

import paramlora

LOW, WHOLE = {"re:.*": {"r": 1}}, {"*": {"whole": 1}}


def lone(count):
    return nn.Sequential(*[nn.Linear(2, 2) for _ in range(count)])


def tied(count):
    model = lone(count)
    for layer in model:
        layer.weight = model[0].weight
    return model


def overlapping(count):
    model = lone(count)
    for layer in model:
        layer.weight.data = model[0].weight.data
    return model


MODELS = {
    "lone": (lone, LOW),
    "soft": (lone, {"re:.*": {"r": 1, "hard": 0}}),
    "tied": (tied, LOW),
    "overlapping": (overlapping, LOW),
    "norms": (lambda count: nn.Sequential(*[nn.BatchNorm1d(2) for _ in range(count)]), WHOLE),
    "held": (lambda count: lone(count).half(), LOW),
}


def calls(act):
    """How many functions, of Python and of C, an operation calls."""
    count = 0

    def profile(frame, event, arg):
        nonlocal count
        count += 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.setprofile(profile)
        try:
            act()
        finally:
            sys.setprofile(None)
    return count


def costs(kind, size, folder):
    make, config = MODELS[kind]
    model, file = make(size), folder / "a.safetensors"
    torch.manual_seed(0)
    steps = {
        "attach": lambda: paramlora.attach(model, config),
        "set_adapters": lambda: paramlora.set_adapters(model, {"default": 0.5}),
        "summary": lambda: paramlora.summary(model),
        "save_adapter": lambda: paramlora.save_adapter(model, file),
        "detach": lambda: paramlora.detach(model),
        "load_adapter": lambda: paramlora.load_adapter(model, file),
        "merge": lambda: paramlora.merge(model),
    }
    return {name: calls(step) for name, step in steps.items()}


@pytest.mark.parametrize("kind", MODELS)
def test_the_work_grows_with_the_layers(kind, tmp_path):
    costs(kind, 2, tmp_path)  # fills the caches
    small, large = (costs(kind, size, tmp_path) for size in (50, 200))
    for name, count in small.items():
        assert large[name] < 5 * count, name
