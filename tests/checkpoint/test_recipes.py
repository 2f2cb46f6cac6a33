"""What becomes of each key of a checkpoint, and what cannot."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from paramlora import Adapter, AdapterError, FileError, Update, adapter_of, checkpoint
from tests.checkpoint.models import MODELS, equal, sorted_keys, trained


@pytest.mark.parametrize("rule", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_under_another_parametrization(rule):
    base, model = trained(lambda: nn.Sequential(rule(nn.Linear(4, 3))), {"0": {"r": 1}})
    embedded = checkpoint.embed(base, adapter_of(model))
    equal(sorted_keys(embedded), sorted_keys(model.state_dict()))
    assert checkpoint.extract(embedded).updates["0"].r == 1
    for arguments in ((embedded,), (base, adapter_of(model))):
        with pytest.raises(AdapterError, match="0: its weight is under another parametrization"):
            checkpoint.merge(*arguments)


def test_a_state_dict_keeps_its_versions():
    base, model = trained(*MODELS["batch norm"])
    merged = checkpoint.merge(model.state_dict())
    assert merged._metadata == base._metadata
    assert checkpoint.embed(base, adapter_of(model))._metadata == base._metadata


def update(**changes):
    values = {"lora_A": torch.ones(1, 4), "lora_B": torch.ones(3, 1)}
    return Update(**(values | changes))


BASE = {"proj.weight": torch.zeros(3, 4), "count.weight": torch.zeros(3, 4, dtype=torch.int8)}


@pytest.mark.parametrize(
    "error, adapter, text",
    [
        (
            FileError,
            {"prof": update()},
            "lacks what 1 of 1 update would change, such as prof. Cl",
        ),
        (FileError, {"proj": update(lora_A=torch.ones(1, 5))}, r"lora_A of shape \[1, 5\]"),
        (FileError, {"proj": update(lora_B=torch.ones(1, 3))}, "do not fit"),
        (FileError, {"proj": update(shape=(4, 3))}, r"the adapter was made for \[4, 3\]"),
        (AdapterError, {"count": update()}, "of type torch.int8, in which no update can be stored"),
        (AdapterError, {"proj": update(scale=math.nan)}, "proj.lora_scale: not finite"),
        (AdapterError, {"proj": update(lora_A=torch.full((1, 4), math.inf))}, "proj.lora_A: not"),
    ],
)
def test_what_does_not_fit_is_refused(error, adapter, text):
    with pytest.raises(error, match=text):
        checkpoint.merge(BASE, Adapter(adapter))


def test_nothing_to_do_is_refused():
    with pytest.raises(AdapterError, match="nothing to merge"):
        checkpoint.merge(BASE)
    with pytest.raises(AdapterError, match="nothing to extract"):
        checkpoint.extract(BASE)
    with pytest.raises(AdapterError, match="nan is no finite number"):
        checkpoint.merge(BASE, (Adapter({"proj": update()}), math.nan))
    inside = checkpoint.embed(BASE, Adapter({"proj": update()}))
    with pytest.raises(AdapterError, match="is inside already"):
        checkpoint.merge(inside, Adapter({"proj": update()}))
    del inside["proj.parametrizations.weight.0.lora_B"]
    with pytest.raises(FileError, match="inside without its lora_B"):
        checkpoint.merge(inside)
