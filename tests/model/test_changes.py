"""A sweep of what changes between a forward and its backward, beside a dense model of torch's own
in which the same changes: in checkpoints of either kind inside of one another, and compiled.

The reference holds the factors as parameters and computes ``W + s·B·A`` in each call. What has a
state of its own, strengths and which adapters there are, has the gradient of the forward, whatever
is computed again; values and flags have what torch's own parameters have, where that is an error
an error.
"""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import paramlora
from paramlora.model.attach import updates
from tests.model.test_types import READ, made_of

SCALE = 0.75
LAYERS = {
    "linear": (lambda: nn.Linear(6, 6), {}),
    "soft": (lambda: nn.Linear(6, 6), {"hard": 0}),
    "transposed": (lambda: nn.ConvTranspose1d(6, 6, 3, padding=1), {}),
}
# (outer, inner): checkpointed not at all, or whether reentrantly; compiled
WAYS = {
    "plain": (None, None, False),
    "checkpointed": (False, None, False),
    "reentrant": (True, None, False),
    "in another": (False, False, False),
    "reentrant in reentrant": (True, True, False),
    "other in reentrant": (True, False, False),
    "reentrant in other": (False, True, False),
    "compiled and checkpointed": (False, False, True),
}
EAGER = [way for way, (*_, compiled) in WAYS.items() if not compiled]


class Dense(nn.Module):
    """The plain layer, and its factors as parameters of their own."""

    def __init__(self, layer, low):
        super().__init__()
        self.layer = layer
        self.lora_A = nn.Parameter(low.lora_A.detach().clone())
        self.lora_B = nn.Parameter(low.lora_B.detach().clone())

    def weight(self):
        product = SCALE * self.lora_B @ self.lora_A
        product = product.mT if isinstance(self.layer, nn.ConvTranspose1d) else product
        return self.layer.weight + product.reshape(self.layer.weight.shape)

    def forward(self, x):
        return functional_call(self.layer, {"weight": self.weight()}, (x,))


class Net(nn.Module):
    """Two layers, the second in a checkpoint inside of the first one's."""

    def __init__(self, first, second, way):
        super().__init__()
        self.first, self.second, self.way = first, second, way

    def forward(self, x):
        return self.segment(self.way[0], self.outer, x)

    def outer(self, x):
        return self.segment(self.way[1], self.inner, torch.tanh(self.first(x)))

    def inner(self, x):
        return torch.tanh(self.second(x))

    def segment(self, reentrant, part, x):
        return part(x) if reentrant is None else checkpoint(part, x, use_reentrant=reentrant)


def nets(kind, way):
    """The adapted model and its dense reference."""
    torch.manual_seed(0)
    make, keys = LAYERS[kind]
    net = Net(make(), make(), WAYS[way]).double()
    plain = copy.deepcopy(net).requires_grad_(False)
    entry = {"r": 2, "scale": SCALE, **keys}
    paramlora.attach(net, {"first": entry, "second": entry})
    lows = [update for _, _, update in updates(net)]
    for low in lows:
        nn.init.normal_(low.lora_B, std=0.5)
    pair = [Dense(layer, low) for layer, low in zip((plain.first, plain.second), lows)]
    return net, Net(*pair, WAYS[way])


def factors(model):
    held = {n: p for n, p in model.named_parameters() if n.endswith(("lora_A", "lora_B"))}
    return {f"{n.split('.')[0]}.{n[-6:]}": p for n, p in held.items()}


def is_dense(model):
    return isinstance(model.first, Dense)


def scaled(model):
    with torch.no_grad():
        for factor in factors(model).values():
            factor.mul_(1.5)


def given_data(model):
    for factor in factors(model).values():
        factor.data = 1.5 * factor.data


def loaded(model):
    state = {k: v.clone() for k, v in factors(model).items()}
    if is_dense(model):
        with torch.no_grad():
            for name, factor in factors(model).items():
                factor.copy_(1.5 * state[name])
        return
    old = paramlora.adapter_state_dict(model)
    new = {k: v if k.endswith("scale") else 1.5 * v for k, v in old.items()}
    paramlora.load_adapter_state_dict(model, new)


def frozen(*ends):
    def act(model):
        for name, factor in factors(model).items():
            factor.requires_grad_(not name.endswith(ends))

    return act


def merged(model):
    if not is_dense(model):
        paramlora.merge(model)
        return
    with torch.no_grad():
        for dense in (model.first, model.second):
            dense.layer.weight.copy_(dense.weight())
    model.first, model.second = model.first.layer, model.second.layer


def detached(model):
    if is_dense(model):
        model.first, model.second = model.first.layer, model.second.layer
    else:
        paramlora.detach(model)


def another(model):
    if not is_dense(model):
        paramlora.attach(model, {"first": {"r": 1}, "second": {"r": 1}}, "other")
        for _, _, update in updates(model):
            if update.adapter == "other":
                nn.init.normal_(update.lora_B)


def strengths(model):
    if not is_dense(model):
        paramlora.set_adapters(model, {"default": 0.3})


def disabled(model):
    if not is_dense(model):
        paramlora.disable_adapters(model).__enter__()


FROZEN = {
    "A frozen": ("lora_A",),
    "B frozen": ("lora_B",),
    "one layer frozen": ("first.lora_A", "first.lora_B"),
}
OURS = {"strengths": strengths, "disabled": disabled, "another": another}
TORCHS = {
    "values": scaled,
    "other data": given_data,
    "loaded": loaded,
    "evaluation": lambda model: model.eval(),
    **{name: frozen(*ends) for name, ends in FROZEN.items()},
    "merged": merged,
    "detached": detached,
}


def gradients(model, compiled, change):
    """By name; or the error."""
    trained = factors(model)
    x = torch.linspace(-2, 2, 144, dtype=torch.float64).view(4, 6, 6).requires_grad_()
    call = torch.compile(model, backend="aot_eager") if compiled else model
    try:
        y = call(x)
        change(model)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    except (RuntimeError, paramlora.AdapterError) as error:
        return error
    return {"x": x.grad, **{name: factor.grad for name, factor in trained.items()}}


def alike(got, want):
    if isinstance(got, Exception) or isinstance(want, Exception):
        return False
    # torch gives none where it needs none, and zeros where a function needs the other factor
    zero = torch.zeros((), dtype=torch.float64)
    pairs = [[zero if g is None else g for g in (got[name], want[name])] for name in want]
    return got.keys() == want.keys() and all(
        torch.allclose(mine, true, rtol=1e-9, atol=1e-11) for mine, true in pairs
    )


def outcome(kind, way, change):
    """The adapted model's, the reference's once it is called for, and where nothing changes."""
    compiled = WAYS[way][2]
    if compiled:
        torch.compiler.reset()
    (net, dense), (_, still) = nets(kind, way), nets(kind, way)
    want = gradients(still, False, lambda model: None)
    return gradients(net, compiled, change), lambda: gradients(dense, compiled, change), want


CASES = [(kind, way) for way in WAYS for kind in LAYERS if kind != "transposed" or way in EAGER]
IN_PLACE = "modified by an inplace operation"


@pytest.mark.parametrize("kind, way", CASES)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # where it is off
def test_the_state_of_adapters_is_that_of_the_forward(kind, way):
    for name, change in OURS.items():
        if WAYS[way][2] and name == "another":
            continue  # compiled code is torch's to guard
        got, _, want = outcome(kind, way, change)
        if (kind, way, name) == ("soft", "plain", "another"):
            # a tensor's first parametrization counts as a write to it, as torch registers it
            assert IN_PLACE in str(got)
        else:
            assert alike(got, want), name


@pytest.mark.parametrize("kind, way", CASES)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # once all is frozen
def test_values_and_flags_are_those_of_torchs_parameters(kind, way):
    for name, change in TORCHS.items():
        if WAYS[way][2] and name not in ("values", "evaluation", "A frozen"):
            continue
        if name == "other data" and way == "plain":
            continue  # which autograd does not see: a gradient of either memory, as it saved one
        got, torchs, want = outcome(kind, way, change)
        if (kind, way, name) == ("soft", "plain", "merged"):
            assert IN_PLACE in str(got)  # its forward reads the base itself, which is written
        else:
            told = isinstance(got, paramlora.AdapterError)  # where torch's is of neither state
            refused = told or (isinstance(got, Exception) and isinstance(torchs(), Exception))
            ends = FROZEN.get(name, ("nothing",))
            trained = {n: None if n.endswith(ends) else grad for n, grad in want.items()}
            assert refused or alike(got, trained) or alike(got, torchs()), name


def embedded(**keys):
    return lambda: nn.Embedding(6, 5), "weight", {"r": 2, "scale": SCALE, **keys}


KINDS = {
    **READ,
    "loha embedding": embedded(kind="loha"),
    "lokr embedding": embedded(kind="lokr", full_matrix=True),
    "pissa": (lambda: nn.ConvTranspose1d(6, 5, 3), "weight", {"r": 2, "init": "pissa"}),
}


def read_by(kind, way):
    """A model of one layer, what it is called with, and what gives its gradients by name and the
    same of the sum written out, as its tensors are now."""
    torch.manual_seed(0)
    make, name, entry = KINDS[kind]
    model = Net(make(), nn.Identity(), WAYS[way]).double()
    base = getattr(model.first, name).detach().clone()
    plain = copy.deepcopy(model.first).requires_grad_(False)
    paramlora.attach(model, {f"first.{name}": entry})
    ((_, _, update),) = updates(model)
    with torch.no_grad():
        for parameter in update.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    x = torch.randn(3, 6, 6, dtype=torch.float64)
    if isinstance(plain, nn.Embedding):
        x = torch.arange(6).view(2, 3)
    elif isinstance(plain, nn.Bilinear):
        plain, x = Both(plain), torch.randn(3, 4, dtype=torch.float64)
        model.first, name = Both(model.first), f"layer.{name}"
    elif isinstance(plain, nn.LSTM):
        plain, name = First(plain), f"layer.{name}"
        model.first = First(model.first)
    return model, plain, name, x, base, update


class Both(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(torch.cat([x, x[:, :2]], 1), x)


class First(Both):
    def forward(self, x):
        return self.layer(x)[0]


def dense(plain, name, x, base, update, entry):
    """The gradients in float64, by an update's tensors as they are now."""
    part = {key: tensor.detach().clone() for key, tensor in update.plain().items()}
    own = {key: part[key].requires_grad_() for key, _ in update.named_parameters()}
    if getattr(update, "start_A", None) is not None:  # of which a file holds both, as one
        own = {key: getattr(update, key).detach().clone().requires_grad_() for key in own}
        part["lora_A"] = torch.cat([own["lora_A"], update.start_A])
        part["lora_B"] = torch.cat([own["lora_B"], -update.start_B], 1)
    leaf = x.clone().requires_grad_(x.is_floating_point())
    weight = made_of(part, base, entry.get("scale", 1.0), update.layout)
    y = torch.tanh(torch.tanh(functional_call(plain, {name: weight}, (leaf,))))
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    return {"x": leaf.grad, **{key: tensor.grad for key, tensor in own.items()}}


def multiplied(update):
    with torch.no_grad():
        for parameter in update.parameters():
            parameter.mul_(1.5)


def with_other_data(update):
    for parameter in update.parameters():
        parameter.data = 1.5 * parameter.data


@pytest.mark.parametrize("way", ("plain", "checkpointed", "reentrant"))
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_gradient_of_one_state(kind, way):
    """Of the forward where a strength changes; where values do, of those of before or of those that
    a checkpoint computes with, or an error, but never half of each."""
    changes = {**OURS, "values": multiplied, "other data": with_other_data}
    for name, change in changes.items():
        model, plain, tensor, x, base, update = read_by(kind, way)
        if name == "another" or (name == "other data" and way == "plain"):
            continue
        if way == "reentrant" and not x.is_floating_point():
            continue  # whose output has no gradient
        reference = (plain, tensor, x, base, update, KINDS[kind][2])
        states = [dense(*reference)]
        leaf = x.clone().requires_grad_(x.is_floating_point())
        try:
            y = model(leaf)
            change(model if name in OURS else update)
            y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
        except (RuntimeError, paramlora.AdapterError) as error:
            assert name not in OURS, (name, error)
            continue
        got = {"x": leaf.grad, **{key: p.grad for key, p in update.named_parameters()}}
        if name not in OURS and way != "plain":
            states.append(dense(*reference))
        assert any(alike(got, want) for want in states), name


DROPPING = {
    "hard": (lambda: nn.Linear(6, 6), {}),
    "soft": (lambda: nn.Linear(6, 6), {"hard": 0}),
    "dora": (lambda: nn.Linear(6, 6), {"kind": "dora"}),
    "convolution": (lambda: nn.Conv1d(6, 6, 3, padding=1), {}),
    "soft convolution": (lambda: nn.Conv1d(6, 6, 3, padding=1), {"hard": 0}),
}


def dropped(kind, way, change):
    """Of an adapted model that drops inputs, with one seed."""
    torch.manual_seed(0)
    make, keys = DROPPING[kind]
    net = Net(make(), make(), WAYS[way]).double()
    entry = {"r": 2, "scale": SCALE, "dropout": 0.4, **keys}
    paramlora.attach(net, {"first": entry, "second": entry})
    for _, _, update in updates(net):
        nn.init.normal_(update.lora_B, std=0.5)
    return gradients(net, False, change)


@pytest.mark.parametrize("way", EAGER)
@pytest.mark.parametrize("kind", DROPPING)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_what_drops_inputs_keeps_the_masks_and_the_state_of_its_forward(kind, way):
    """The masks are its own, so the reference is the same model where nothing changes."""
    want = dropped(kind, way, lambda model: None)
    changes = {**OURS, **{name: TORCHS[name] for name in FROZEN}}
    if True not in WAYS[way]:  # a reentrant one computes in the mode of now, as torch's own layers
        changes["evaluation"] = TORCHS["evaluation"]
    for name, change in changes.items():
        got = dropped(kind, way, change)
        if isinstance(got, Exception):
            # frozen factors save fewer tensors, an evaluation no masks: torch refuses what differs
            assert name not in OURS or IN_PLACE in str(got), name
            continue
        # torch may still give what is frozen since the gradient that its forward asked for
        none = {n for n in want if n.endswith(FROZEN.get(name, ("nothing",))) and got[n] is None}
        assert alike(got, {n: None if n in none else grad for n, grad in want.items()}), name
