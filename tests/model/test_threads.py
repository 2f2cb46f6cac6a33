"""What several threads do at once with one model: some call it, others switch its adapters."""

import copy
import sys
import threading

import pytest
import torch
from torch import nn

import paramlora
from paramlora.model.attach import updates

STRENGTHS = (0.0, 0.5, 1.0, -2.0)
KINDS = {
    "known forward": (lambda: nn.Sequential(nn.Linear(6, 5)), {"0": {"r": 2}}),
    "dense read": (lambda: nn.Sequential(nn.Bilinear(6, 6, 5)), {"0": {"r": 2}}),
    "soft": (lambda: nn.Sequential(nn.Linear(6, 5)), {"0": {"r": 2, "hard": 0}}),
    "whole": (lambda: nn.Sequential(nn.Linear(6, 5)), {"0.weight": {"whole": 1}}),
}


@pytest.fixture
def often():
    """Threads take turns at nearly every step."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def made(kind):
    torch.manual_seed(0)
    make, config = KINDS[kind]
    model = paramlora.attach(make().double(), config)
    with torch.no_grad():
        for _, _, update in updates(model):
            for parameter in update.parameters():
                parameter.normal_()
    return model


def call(model, x):
    return model[0](x, x) if isinstance(model[0], nn.Bilinear) else model(x)


def answers(model, x):
    """What a dense layer gives at each strength, with the sum formed here."""
    update = next(u for _, _, u in updates(model))
    lists = model[0]._modules.get("parametrizations")
    base = model[0].weight if lists is None else lists.weight.original
    if hasattr(update, "lora_whole"):
        delta = update.lora_whole - base
    else:
        delta = (update.lora_scale * update.lora_B @ update.lora_A).view(base.shape)
    found = []
    for strength in STRENGTHS:
        full, bias = base + strength * delta, model[0].bias
        dense = isinstance(model[0], nn.Bilinear)
        f = nn.functional
        found.append((f.bilinear(x, x, full, bias) if dense else f.linear(x, full, bias)).detach())
    return found


def together(*works):
    """Run all at once, each in a thread of its own; what one raises is raised here."""
    gate, raised = threading.Barrier(len(works)), []

    def run(work):
        try:
            gate.wait()
            work()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


@pytest.mark.parametrize("kind", KINDS)
def test_each_call_is_that_of_one_strength(kind, often):
    model, x = made(kind), torch.randn(3, 6, dtype=torch.float64)
    wanted, seen = answers(model, x), []

    def calls():
        for _ in range(150):
            y = call(model, x.clone().requires_grad_())
            y.sum().backward()
            seen.append(y.detach())

    def switches():
        for turn in range(300):
            paramlora.set_adapters(model, {"default": STRENGTHS[turn % 4]})

    def disables():
        for _ in range(300):
            with paramlora.disable_adapters(model):
                pass

    together(calls, calls, switches, disables)
    which = [[torch.allclose(y, w, rtol=1e-12, atol=1e-12) for w in wanted] for y in seen]
    assert all(map(any, which))
    paramlora.set_adapters(model, {"default": 1.0})
    torch.testing.assert_close(call(model, x), wanted[2], rtol=1e-12, atol=1e-12)


def test_different_models_may_be_changed_at_once(often):
    models = [nn.Sequential(*[nn.Linear(4, 4) for _ in range(5)]) for _ in range(4)]
    before = [copy.deepcopy(model.state_dict()) for model in models]

    def work(model):
        for _ in range(20):
            paramlora.attach(model, {"*": {"r": 1}})
            model(torch.ones(1, 4)).sum().backward()
            paramlora.detach(model)
        paramlora.merge(paramlora.attach(model, {"*": {"r": 1}}))  # B = 0: the same weights

    together(*[lambda model=model: work(model) for model in models])
    for model, state in zip(models, before):
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
        assert all(type(layer) is nn.Linear for layer in model)
