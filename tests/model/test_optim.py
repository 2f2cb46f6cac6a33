"""What the optimizer is given: the adapter alone, with the decay that the caller chose."""

import pytest
import torch
from torch import nn

import paramlora
from paramlora import AdapterError, parameter_groups, trainable_parameters


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Embedding(5, 2))


def test_without_an_adapter_nothing_is_given_to_the_optimizer():
    model = net()
    for given in (lambda: trainable_parameters(model), lambda: parameter_groups(model, 1e-3)):
        with pytest.raises(AdapterError, match="no adapter is attached.*Attach one"):
            given()
    paramlora.detach(paramlora.attach(model, {"0": {"r": 2}}))
    with pytest.raises(AdapterError, match="no adapter is attached"):
        trainable_parameters(model)


def test_one_adapter_of_two_is_chosen():
    model = paramlora.attach(net(), {"0": {"r": 2}}, "a")
    paramlora.attach(model, {"0": {"r": 1, "trainable_scale": True}, "1": {"whole": True}}, "b")
    both = {id(p) for p in trainable_parameters(model)}
    one, two = (trainable_parameters(model, adapter=name) for name in "ab")
    assert [tuple(p.shape) for p in one] == [(2, 4), (3, 2)]
    assert len(two) == 5 and sum(p.numel() for p in two) == 4 + 3 + 1 + 6 + 2
    assert {id(p) for p in (*one, *two)} == both and len(both) == len(one) + len(two)
    with pytest.raises(AdapterError, match='no adapter "c" is attached. Attached: a, b'):
        trainable_parameters(model, "c")


def test_a_frozen_adapter_gives_nothing_and_a_training_backbone_everything():
    model = paramlora.attach(net(), {"0": {"r": 2}, "trainable_model": True})
    assert len(trainable_parameters(model)) == len(list(model.parameters()))
    assert len(trainable_parameters(model, "default")) == 2
    model.requires_grad_(False)
    assert trainable_parameters(model) == trainable_parameters(model, "default") == []


@pytest.mark.parametrize("named", [None, 0.0, 0.3])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_the_optimizers_decay_holds_where_the_caller_names_none(kind, named):
    config = {"0": {"r": 2, "trainable_scale": True}, "1": {"whole": True}}
    model = paramlora.attach(net(), config)
    how = {} if named is None else {"weight_decay": named}
    groups = parameter_groups(model, 0.5, lr_ratio=2, **how)
    optimizer = kind(groups, weight_decay=0.1)
    decay = 0.1 if named is None else named
    found = {
        group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups
    }
    assert found == {
        "lora_A": (0.5, decay),
        "lora_B": (1.0, decay),
        "lora_scale": (0.5, 0.0),
        "whole": (0.5, decay),
    }
    before = [p.detach().clone() for group in groups for p in group["params"]]
    for parameter in trainable_parameters(model):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = [p for group in groups for p in group["params"]]
    rates = [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups for _ in g["params"]]
    for old, new, (rate, by) in zip(before, after, rates):
        torch.testing.assert_close(new.detach(), old * (1 - rate * by))
