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


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = lambda: nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)})  # noqa: E731
        self.down, self.up = nn.ModuleList([layer(), layer()]), nn.ModuleList([layer()])
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)


def rated(model, groups):
    """The rate of each parameter that a group has, by its name."""
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in groups)
    assert len({group["name"] for group in groups}) == len(groups)
    return {name.replace(".parametrizations.weight.0", ""): rate for name, rate in rates.items()}


CONFIG = {"type:Linear": {"r": 2}, "head": {"r": 1, "trainable_scale": 1}, "norm": {"whole": 1}}


def test_parts_of_a_model_have_rates_of_their_own():
    model = paramlora.attach(Blocks(), CONFIG)
    rates = {"down": 1e-4, "down.1.q.weight": 2e-4, "re:.*k": 3e-5, "type:LayerNorm": 7e-3}
    found = rated(model, parameter_groups(model, 1e-3, lr_ratio=4, rates={**rates, "head": 0}))
    want = {
        "down.0.q": 1e-4,
        "down.0.k": 1e-4,  # the longer name counts, and a pattern is the shortest
        "down.1.q": 2e-4,
        "down.1.k": 1e-4,
        "up.0.q": 1e-3,
        "up.0.k": 3e-5,
        "head": 0.0,
    }
    for path, rate in want.items():
        assert found.pop(f"{path}.lora_A") == rate and found.pop(f"{path}.lora_B") == 4 * rate, path
    assert found.pop("head.lora_scale") == 0
    assert len(found) == 2 and set(found.values()) == {7e-3}  # the norm's weight and bias


def test_the_optimizer_steps_at_those_rates():
    model = paramlora.attach(Blocks(), {"q": {"r": 2}})
    groups = parameter_groups(model, 0.5, lr_ratio=2, rates={"up": 0.25}, weight_decay=0.1)
    assert {group["name"] for group in groups} == {
        *("lora_A", "lora_A (up)", "lora_B", "lora_B (up)"),
    }
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in trainable_parameters(model):
        p.grad = torch.ones_like(p)
    torch.optim.SGD(groups, lr=1.0).step()
    for name, p in model.named_parameters():
        if p.requires_grad:
            rate = (0.25 if name.startswith("up") else 0.5) * (2 if name.endswith("B") else 1)
            want = before[name] - rate * (1 + 0.1 * before[name])
            torch.testing.assert_close(p.detach(), want)


def test_a_training_backbone_and_one_adapter_of_two_have_rates_too():
    model = paramlora.attach(Blocks(), {"q": {"r": 2}, "trainable_model": True}, "a")
    found = rated(model, parameter_groups(model, 1.0, rates={"down.0": 0.5, "norm.bias": 0.25}))
    assert found["down.0.q.parametrizations.weight.original"] == found["down.0.k.bias"] == 0.5
    assert found["norm.bias"] == 0.25 and found["norm.weight"] == found["head.weight"] == 1
    assert len(found) == len(list(model.parameters()))
    paramlora.attach(model, {"up.0.k": {"r": 2}}, "b")
    groups = parameter_groups(model, 1.0, adapter="b", rates={"up": 0.5})
    assert set(rated(model, groups).values()) == {0.5}
    with pytest.raises(AdapterError, match='"down" in rates names nothing of adapter "b" that tr'):
        parameter_groups(model, 1.0, adapter="b", rates={"down": 0.5})


def test_tied_and_wrapped_layers_have_the_rate_of_their_names():
    tied = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    tied["b"].weight = tied["a"].weight
    paramlora.attach(tied, {"re:[ab]": {"r": 1}})
    assert {g["lr"] for g in parameter_groups(tied, 1.0, rates={"b": 0.5})} == {0.5}
    inner = Blocks()
    paramlora.attach(inner, {"q": {"r": 2}})
    compiled = torch.compile(inner)
    found = rated(inner, parameter_groups(compiled, 1.0, rates={"down.0": 0.5}))
    assert found["down.0.q.lora_A"] == 0.5 and found["up.0.q.lora_A"] == 1.0


@pytest.mark.parametrize(
    "rates, told",
    [
        ({"dwon": 1e-4}, '"dwon" in rates matches nothing ... Remove it, or name what is there'),
        ({"re:zz": 1e-4}, '"re:zz" in rates matches nothing'),
        ({"norm": 1e-4}, '"norm" in rates names nothing that trains. Remove it, or attach'),
        ({"re:(": 1e-4}, "rates:  ... no regular expression ... Give a plain name"),
        ({r"re:(a)\1": 1e-4}, "rates:  ... bounded time ... Give a plain name"),
        ({"down": -1.0}, '"down" in rates: a rate must be a finite number of at least 0, got -1.0'),
        ({"down": float("nan")}, '"down" in rates: a rate must be a finite number'),
        ({"down": True}, '"down" in rates: a rate must be a finite number'),
        ({"down": "1e-4"}, '"down" in rates: a rate must be a finite number'),
        ({"": 1e-4}, 'a name in rates must be such as "down_blocks"'),
        ({3: 1e-4}, 'a name in rates must be such as "down_blocks", got 3'),
        ([("down", 1e-4)], 'expected rates such as {"head": 1e-4}, got'),
        ({"re:.*q": 1e-4, "re:down.*": 1e-4}, 'down.0.q: "re:.*q" and "re:down.*" in rates claim'),
    ],
)
def test_rates_of_nothing_are_refused(rates, told):
    model = paramlora.attach(Blocks(), {"q": {"r": 2}})
    with pytest.raises(AdapterError) as raised:
        parameter_groups(model, 1e-3, rates=rates)
    assert all(part in str(raised.value) for part in told.split(" ... "))


def test_a_rates_pattern_takes_bounded_time():
    """Python's own matcher would try for longer than the world is old."""
    model = paramlora.attach(nn.ModuleDict({"a" * 60: nn.Linear(2, 2)}), {"*": {"r": 1}})
    with pytest.raises(AdapterError, match="matches nothing"):
        parameter_groups(model, 1e-3, rates={"re:((a+)+)+c": 1e-4})
