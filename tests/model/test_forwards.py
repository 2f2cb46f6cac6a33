"""A known forward is called where it is due: not in the place of somebody else's, and by no one who
kept it."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import paramlora
from paramlora.model.attach import updates


class OwnLinear(nn.Linear):
    pass


class OwnConv(nn.Conv2d):
    pass


class OwnEmbedding(nn.Embedding):
    pass


def transformers_conv1d():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(5, 4)


LAYERS = {
    "linear": (lambda: nn.Linear(4, 5), lambda: torch.randn(3, 4)),
    "a subclass": (lambda: OwnLinear(4, 5), lambda: torch.randn(3, 4)),
    "convolution": (lambda: nn.Conv2d(4, 5, 3), lambda: torch.randn(2, 4, 5, 5)),
    "its subclass": (lambda: OwnConv(4, 5, 3), lambda: torch.randn(2, 4, 5, 5)),
    "embedding": (lambda: nn.Embedding(6, 5), lambda: torch.randint(6, (3,))),
    "another subclass": (lambda: OwnEmbedding(6, 5), lambda: torch.randint(6, (3,))),
    "Conv1D": (transformers_conv1d, lambda: torch.randn(3, 4)),
}


def adapt(layer):
    model = paramlora.attach(nn.Sequential(layer), {"0": {"r": 2}})
    for _, _, update in updates(model):
        nn.init.normal_(update.lora_B)
    return model


def plain_of(layer, make):
    """The layer as if it had the dense sum, in float64."""
    plain = make().double().requires_grad_(False)
    plain.load_state_dict(
        {"weight": layer.weight.detach()}
        | ({"bias": layer.bias.detach()} if getattr(layer, "bias", None) is not None else {})
    )
    return plain


WHERE = ("the class", "its base", "the layer")
NAMES = ("anonymous", "under its name")


@pytest.mark.parametrize("named", NAMES)
@pytest.mark.parametrize("when", ("before", "after"))
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_function_put_in_a_forwards_place_is_called(kind, where, when, named, monkeypatch):
    make, data = LAYERS[kind]
    torch.manual_seed(0)
    layer, x, called = make(), data(), []
    own = type(layer)
    place = {"the class": own, "its base": own.__mro__[1] if "subclass" in kind else own}
    holder = place.get(where, layer)
    former = layer.forward if where == "the layer" else holder.forward

    def function(*args):
        called.append(len(args))
        return former(*args) * 2 + 1

    function = functools.wraps(former)(function) if named == NAMES[1] else function

    def put():
        monkeypatch.setattr(holder, "forward", function)

    if when == "before":
        put()
    model = adapt(layer)
    if when == "after":
        former = layer.forward if where == "the layer" else former
        put()
    y = model(x)
    assert called, "bypassed"
    monkeypatch.undo()
    wide = x.double() if x.is_floating_point() else x
    want = plain_of(layer, make)(wide) * 2 + 1
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)


def test_what_is_attached_once_it_is_gone_is_computed_as_ever():
    class Fresh(nn.Linear):
        pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda self, x: x)
        first = adapt(Fresh(4, 4))
        assert first(torch.ones(1, 4)).sum() == 4
    usual = type(adapt(nn.Linear(4, 4))[0]).forward
    assert type(adapt(Fresh(4, 4))[0]).forward is usual is not nn.Linear.forward


@pytest.mark.parametrize("when", ("before", "after"))
@pytest.mark.parametrize("where", ("the class", "its base", "the layer"))
def test_so_is_one_in_the_place_of_a_convolutions_inner_part(where, when, monkeypatch):
    layer, x = OwnConv(4, 5, 3), torch.randn(2, 4, 5, 5)
    holder = {"the class": OwnConv, "its base": nn.Conv2d}.get(where, layer)

    def inner(*args):
        x, weight, bias = args[-3:]
        return F.conv2d(x, weight, bias) * 3

    put = functools.partial(monkeypatch.setattr, holder, "_conv_forward", inner)
    if when == "before":
        put()
    model = adapt(layer)
    if when == "after":
        put()
    y = model(x)
    want = F.conv2d(x.double(), layer.weight.double(), layer.bias.double()) * 3
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)


def test_one_that_was_there_before_paramlora_is_called_too():
    script = """
import functools, torch
from torch import nn
former, called = nn.Linear.forward, []
@functools.wraps(former)
def function(self, input):
    called.append(1)
    return former(self, input) + 1
nn.Linear.forward = function
import paramlora
layer, x = nn.Linear(4, 3), torch.randn(2, 4)
want = layer(x)
called.clear()
paramlora.attach(nn.Sequential(layer), {"0": {"r": 2}})
assert torch.equal(layer(x), want) and called
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Hidden(nn.Linear):
    def forward(self, hidden, times=1):
        return super().forward(hidden) * times


class Any(nn.Linear):
    def forward(self, *args, **kwargs):
        x = args[0] if args else kwargs["states"]
        return super().forward(x)


CALLS = {
    "its own name": (Hidden, lambda layer, x: layer(hidden=x)),
    "behind another": (Hidden, lambda layer, x: layer(times=1, hidden=x)),
    "in its place": (Hidden, lambda layer, x: layer(x, times=1)),
    "any name": (Any, lambda layer, x: layer(states=x)),
    "any name, behind another": (Any, lambda layer, x: layer(times=1, states=x)),
    "torch's": (nn.Linear, lambda layer, x: layer(input=x)),
}


@pytest.mark.parametrize("hard", (0, 1))
@pytest.mark.parametrize("call", CALLS)
def test_an_input_by_any_name(call, hard):
    kind, called = CALLS[call]
    model = paramlora.attach(nn.Sequential(kind(4, 5)), {"0": {"r": 2, "hard": hard}})
    ((_, _, update),) = updates(model)
    nn.init.normal_(update.lora_B)
    x, layer = torch.randn(3, 4), model[0]
    base = layer.parametrizations.weight.original if hard else layer.weight
    want = x.double() @ (base.double() + update.lora_B.double() @ update.lora_A.double()).T
    y = called(layer, x)
    torch.testing.assert_close(y.double(), want + layer.bias.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("hard", (0, 1))
def test_the_input_of_transformers_conv1d_by_name(hard):
    model = paramlora.attach(nn.Sequential(transformers_conv1d()), {"0": {"r": 2, "hard": hard}})
    ((_, _, update),) = updates(model)
    nn.init.normal_(update.lora_B)
    x = torch.randn(3, 4)
    assert torch.equal(model[0](x=x), model[0](x))


KINDS = {
    "linear": (lambda: nn.Linear(6, 5), torch.randn(3, 6).double()),
    "convolution": (lambda: nn.Conv2d(4, 6, 3), torch.randn(2, 4, 5, 5).double()),
    "uneven convolution": (
        lambda: nn.Conv2d(4, 6, (3, 2), padding="same", padding_mode="circular"),
        torch.randn(2, 4, 5, 5).double(),
    ),
    "transposed convolution": (
        lambda: nn.ConvTranspose2d(4, 6, 3),
        torch.ones(2, 4, 5, 5).double(),
    ),
    "embedding": (lambda: nn.Embedding(7, 5), torch.tensor([[1, 6], [0, 3]])),
    "Conv1D": (lambda: conv1d(), torch.randn(3, 6).double()),
}


def conv1d():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(5, 6)


SOFT = [kind for kind in KINDS if kind not in ("embedding", "transposed convolution")]
CASES = [(kind, 1) for kind in KINDS] + [(kind, 0) for kind in SOFT]


@pytest.mark.parametrize("end", ("merge", "detach"))
@pytest.mark.parametrize("kind, hard", CASES)
def test_a_kept_forward_computes_the_layer_as_it_is(kind, hard, end):
    make, x = KINDS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(make().double())
    plain = model[0](x)
    paramlora.attach(model, {"0": {"r": 2, "hard": hard}})
    for _, _, low in updates(model):
        nn.init.normal_(low.lora_B)
    kept, adapted = model[0].forward, model[0](x)
    assert (adapted - plain).abs().max() > 0.1
    getattr(paramlora, end)(model)
    want = adapted if end == "merge" else plain
    torch.testing.assert_close(model[0](x), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kept(x), want, rtol=1e-12, atol=1e-12)
