"""A sweep of adapters beside each other: many learn at once on one base, and none of them feels
what happens to another."""

import copy
import re

import pytest
import torch
from torch import nn

import paramlora
from paramlora.model.attach import updates

NAMES = ["a", "b", "c"]
RANKS = {"a": 2, "b": 3, "c": 4, "d": 1, "e": 6, "f": 20}
ROWS = 5


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24))


def attach(model, name):
    torch.manual_seed(ord(name))
    return paramlora.attach(model, {"0": {"r": RANKS[name]}, "2": {"r": RANKS[name]}}, name)


def state(model, name, optimizer):
    own = [p.detach().clone() for _, _, u in updates(model) if u.adapter == name
           for p in u.parameters()]  # fmt: skip
    return own + [
        value.clone() for p in optimizer.state.values() for value in p.values()
        if isinstance(value, torch.Tensor)
    ]  # fmt: skip


class Run:
    """Adapters with an optimizer, a schedule and a clipping each; `event` happens before a step."""

    def __init__(self, event=lambda run, step: None, steps=6):
        self.model, self.optimizers, self.schedules = base(), {}, {}
        self.rows, self.spoiled, self.stopped = {n: n for n in NAMES}, set(), set()
        for name in NAMES:
            self.add(name)
        for step in range(steps):
            event(self, step)
            self.step(step)

    def add(self, name):
        attach(self.model, name)
        groups = paramlora.parameter_groups(self.model, 1e-2, adapter=name)
        self.optimizers[name] = torch.optim.AdamW(groups)
        self.schedules[name] = torch.optim.lr_scheduler.ExponentialLR(self.optimizers[name], 0.9)

    def take_away(self, name):
        paramlora.detach(self.model, name)
        del self.optimizers[name]

    def step(self, step):
        torch.manual_seed(step)
        x, y = torch.randn(len(NAMES) * ROWS, 7, 24), torch.randn(len(NAMES) * ROWS, 7, 24)
        routed = [name for name in self.rows.values() for _ in range(ROWS)]
        with paramlora.route(self.model, routed):
            found = self.model(x).split(ROWS)
        losses = {
            name: nn.functional.mse_loss(o, t)
            for name, o, t in zip(self.rows.values(), found, y.split(ROWS))
        }
        for name in self.spoiled:
            losses[name] = losses[name] * float("nan")
        torch.stack(
            [losses[n] for n in self.optimizers if n in losses and n not in self.stopped]
        ).sum().backward()
        for name, optimizer in self.optimizers.items():
            own = paramlora.trainable_parameters(self.model, name)
            norm = nn.utils.clip_grad_norm_(own, 1.0)
            if norm.isfinite() and name in losses and name not in self.stopped:
                optimizer.step()
                self.schedules[name].step()
            optimizer.zero_grad()

    def states(self, name):
        return state(self.model, name, self.optimizers[name])


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other))


def spoil(run, step):
    run.spoiled = {"b"} if step in (2, 3) else set()


def spoil_its_weights(run, step):
    if step == 2:
        for _, _, update in updates(run.model):
            if update.adapter == "b":
                update.lora_A.data[0, 0] = float("nan")


def stop(run, step):
    if step == 3:
        run.stopped.add("b")


def stop_and_take_away(run, step):
    if step == 3:
        run.take_away("b")
        run.rows["b"] = None


def replace(run, step):
    stop_and_take_away(run, step)
    if step == 4:
        run.add("d")
        run.rows["b"] = "d"


@pytest.mark.parametrize("event", [spoil, spoil_its_weights, stop, stop_and_take_away, replace])
def test_what_happens_to_one_adapter_leaves_the_others_bit_for_bit(event):
    plain, run = Run(), Run(event)
    for name in ("a", "c"):
        assert same(plain.states(name), run.states(name)), name
    if "b" in run.optimizers:
        assert not same(plain.states("b"), run.states("b"))
    if "d" in run.optimizers:
        assert len(run.optimizers["d"].state) == 4


@pytest.mark.parametrize("new", ["e", "f"])
def test_one_of_a_larger_rank_than_all_others_leaves_them_bit_for_bit(new):
    """Their next steps too; beyond 16 ranks its products have another shape."""

    def grow(run, step):
        if step == 3:
            run.take_away("b")
            run.add(new)
            run.rows["b"] = new

    plain, run = Run(), Run(grow)
    for name in ("a", "c"):
        assert same(plain.states(name), run.states(name)), name


def test_more_of_them_without_rows_leave_the_others_bit_for_bit():
    def more(run, step):
        for name in "def"[: step - 2] if step > 2 else ():
            if name not in run.optimizers:
                run.add(name)

    plain, run = Run(), Run(more)
    assert [*run.optimizers] == [*"abcdef"]
    for name in NAMES:
        assert same(plain.states(name), run.states(name)), name


def test_each_learns_what_it_would_by_itself():
    plain = Run()
    for at, name in enumerate(NAMES):
        model = attach(base(), name)
        optimizer = torch.optim.AdamW(paramlora.parameter_groups(model, 1e-2))
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for step in range(6):
            torch.manual_seed(step)
            x, y = torch.randn(len(NAMES) * ROWS, 7, 24), torch.randn(len(NAMES) * ROWS, 7, 24)
            own = slice(at * ROWS, (at + 1) * ROWS)
            nn.functional.mse_loss(model(x[own]), y[own]).backward()
            nn.utils.clip_grad_norm_(paramlora.trainable_parameters(model), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        for one, other in zip(state(model, name, optimizer), plain.states(name)):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_base_does_not_move():
    before, run = base().state_dict(), Run(replace)
    after = paramlora.detach(copy.deepcopy(run.model)).state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize(
    ("make", "first"),
    [
        (lambda: nn.LSTM(4, 1), "weight_hh_l0"),
        (lambda: nn.MultiheadAttention(4, 2, kdim=5, vdim=4), "v_proj_weight"),
        (lambda: nn.LSTM(4, 1), "bias_ih_l0"),
    ],
    ids=["recurrent", "attention", "whole"],
)
def test_an_optimizer_gets_an_adapter_in_one_order_whichever_came_before(make, first):
    """By which it knows its state again, where the others are not there any more."""

    def asked(model):
        entries = {"re:.*weight(_[ih]h_l0)?": {"r": 1}}
        if isinstance(model, nn.LSTM):
            entries["bias_ih_l0"] = {"whole": True}
        model = paramlora.attach(model, entries, "mine")
        names = {id(p): own(name) for name, p in model.named_parameters()}
        groups = paramlora.parameter_groups(model, 1e-3, adapter="mine")
        mine = [paramlora.trainable_parameters(model, "mine"), *[g["params"] for g in groups]]
        return [[names[id(p)] for p in params] for params in mine]

    def own(name):
        return re.sub(r"parametrizations\.(\w+)\.\d+\.", r"\1.", name)

    entry = {"whole": True} if first.startswith("bias") else {"r": 1}
    alone, behind = asked(make()), asked(paramlora.attach(make(), {first: entry}, "other"))
    assert alone == behind
    assert len(alone[0]) > 3


def test_groups_of_one_adapter():
    run = Run(steps=1)
    groups = paramlora.parameter_groups(run.model, 0.5, lr_ratio=2.0, adapter="b")
    assert [(g["name"], g["lr"], len(g["params"])) for g in groups] == [
        ("lora_A", 0.5, 2),
        ("lora_B", 1.0, 2),
    ]
    mine = {id(p) for g in groups for p in g["params"]}
    assert mine == {id(p) for p in paramlora.trainable_parameters(run.model, "b")}
    with pytest.raises(paramlora.AdapterError, match='no adapter "e" is attached'):
        paramlora.parameter_groups(run.model, 0.5, adapter="e")
