"""A sweep over operations: what is done to a model while a block of `route` is open is what it is
outside of one, or is refused and leaves the model as it was."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import paramlora
from paramlora import AdapterError
from paramlora.model.attach import updates

ROWS = ["a", None, "b"]


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


def made():
    """Layers of each way to take rows: in one product, by a hook, and once for each adapter."""
    torch.manual_seed(0)
    layers = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
    model = nn.Sequential(*layers)
    model.insert(0, nn.Linear(4, 4))  # reached before any of the adapted
    for name in "ab":
        entries = {"1": {"r": 2}, "2": {"r": 2, "hard": 0}, "3": {"r": 1, "kind": "dora"}}
        paramlora.attach(model, {**entries, "4.weight": {"whole": 1}}, name)
    for p in model.parameters():
        p.data.normal_()
    paramlora.set_adapters(model, {"a": 0.7, "b": 1.0})
    return model


def own_adapter(model, folder):
    paramlora.save_adapter(model, folder / "a.safetensors", adapter="a")


def reloaded(model, folder):
    paramlora.save_adapter(model, folder / "b.safetensors", adapter="b")
    paramlora.load_adapter(model, folder / "b.safetensors", "c")


OPERATIONS = {
    "to": lambda m, f: m.to(torch.float64),
    "to bfloat16": lambda m, f: m.to(torch.bfloat16),
    "half and float": lambda m, f: m.half().float(),
    "to meta": lambda m, f: m.to("meta"),
    "share_memory": lambda m, f: m.share_memory(),
    "train": lambda m, f: m.eval().train(),
    "requires_grad_": lambda m, f: m.requires_grad_(False),
    "zero_grad": lambda m, f: m.zero_grad(),
    "apply": lambda m, f: m.apply(lambda one: one.train(False)),
    "state_dict": lambda m, f: m.state_dict(),
    "load_state_dict": lambda m, f: m.load_state_dict(
        {n: t + 1 if t.is_floating_point() else t for n, t in m.state_dict().items()}
    ),
    "named_parameters": lambda m, f: [n for n, _ in m.named_parameters()],
    "deepcopy": lambda m, f: copy.deepcopy(m),
    "pickle": lambda m, f: pickle.dumps(m),
    "a hook": lambda m, f: m[1].register_forward_hook(lambda m, x, y: 2 * y),
    "another's parametrization": lambda m, f: parametrize.register_parametrization(
        m[1], "bias", Half()
    ),
    "another's, of an adapted tensor": lambda m, f: parametrize.register_parametrization(
        m[1], "weight", Half()
    ),
    "attach": lambda m, f: paramlora.attach(m, {"1": {"r": 1}}, "c"),
    "detach": lambda m, f: paramlora.detach(m, "b"),
    "detach all": lambda m, f: paramlora.detach(m),
    "merge": lambda m, f: paramlora.merge(m),
    "set_adapters": lambda m, f: paramlora.set_adapters(m, {"a": 0.2, "b": 0.5}),
    "summary": lambda m, f: str(paramlora.summary(m)),
    "save_adapter": own_adapter,
    "load_adapter": reloaded,
    "adapter_state_dict": lambda m, f: paramlora.adapter_state_dict(m, "a"),
}


# new updates, and what wants one tensor for all rows
REFUSED = ("another's, of an adapted tensor", "attach", "merge", "load_adapter")


def seen(model):
    """All that a model is: its classes, its tensors, the updates' switches, and what it gives."""
    tensors = {
        n: (t.dtype, t.requires_grad, t.device.type, t.tolist() if not t.is_meta else None)
        for n, t in model.state_dict(keep_vars=True).items()
    }
    kinds = [
        (n, type(m).__name__, m.training, len(m._forward_hooks)) for n, m in model.named_modules()
    ]
    switches = [
        (p, u.adapter, u.strength, u.gain.dtype, u.gain.device.type) for p, _, u in updates(model)
    ]
    first = next(model.parameters())
    if first.is_meta:
        return tensors, kinds, switches, None
    x = torch.linspace(-1, 1, 12).view(3, 4).to(first.dtype)
    try:
        y = model(x).tolist()
    except RuntimeError as error:
        y = str(error)
    return tensors, kinds, switches, y


def done(operation, model, folder):
    """What an operation gives, or the words of its refusal."""
    try:
        return operation(model, folder), None
    except Exception as error:
        return None, error


@pytest.mark.parametrize("name", OPERATIONS)
def test_it_is_as_outside_or_refused(name, tmp_path):
    operation, model, other, untouched = OPERATIONS[name], made(), made(), made()
    before, error = done(operation, other, tmp_path)
    with paramlora.route(model, ROWS):
        found, refused = done(operation, model, tmp_path)
    if name in REFUSED:
        assert isinstance(refused, AdapterError) and "route" in str(refused) and error is None
        assert seen(model) == seen(untouched)
        return
    assert str(refused) == str(error)
    assert seen(model) == seen(other)
    if isinstance(found, nn.Module) and found is not model:
        assert seen(found) == seen(before)


def called(model):
    x = torch.linspace(-1, 1, 12).view(3, 4).to(next(model.parameters()))
    with torch.no_grad():
        return model(x)


MOVES = ("to", "to bfloat16", "half and float", "share_memory")


@pytest.mark.parametrize("name", MOVES)
def test_a_moved_models_rows_take_their_adapters_in_the_blocks_that_are_open(name, tmp_path):
    model, other = made(), made()
    OPERATIONS[name](other, tmp_path)
    with paramlora.route(other, ROWS):
        inner = called(other)
    with paramlora.route(other, ROWS[::-1]):
        outer = called(other)
    with paramlora.route(model, ROWS[::-1]):
        with paramlora.route(model, ROWS):
            OPERATIONS[name](model, tmp_path)
            assert torch.equal(called(model), inner)
        assert torch.equal(called(model), outer)
    assert not torch.equal(inner, outer) and torch.equal(called(model), called(other))


def test_rows_come_back_from_the_meta_device():
    model, other = made(), made()
    values = {name: t.clone() for name, t in model.state_dict().items()}
    other.to("meta").to_empty(device="cpu").load_state_dict(values)
    with paramlora.route(other, ROWS):
        want = called(other)
    with paramlora.route(model, ROWS):
        model.to("meta")
        assert called(model).is_meta
        model.to_empty(device="cpu").load_state_dict(values)
        assert torch.equal(called(model), want)
