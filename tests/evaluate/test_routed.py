"""Rows that take different updates: the same bits whichever adapters are beside, and in 16 bits the
share of small updates that is kept."""

import copy
from itertools import product

import pytest
import torch
from torch import nn

import paramlora
from paramlora.evaluate import routed
from paramlora.model.attach import updates
from paramlora.model.forwards import dropped_rows
from paramlora.update.choice import Choice

OTHERS = ((3, 4), (3, 6), (30, 4), (4, 70), (3, 4, 5, 9), (3,), ())


def choice(others, count, r):
    """Rows of which each third takes the adapter that is looked at, of rank r; and those."""
    taken = [i % 3 if i % 3 <= len(others) else len(others) + 1 for i in range(count)]
    names, index = tuple(map(str, range(len(others) + 1))), torch.tensor(taken)
    return Choice(names, (r, *others), index, 0), index == 0


def factors(ranks, fan_in, out, dtype):
    """A and B of each, and both joined."""
    pairs = []
    for at, r in enumerate(ranks):
        torch.manual_seed(100 * at + r)
        pairs.append(
            [torch.randn(s, dtype=dtype).requires_grad_() for s in ((r, fan_in), (out, r))]
        )
    return pairs


def joined(pairs, rows):
    down = routed.joined([a for a, _ in pairs], rows.ranks, 0)
    return down, routed.joined([b for _, b in pairs], rows.ranks, 1).t()


def linear(others, dtype, count, positions, r, fan_in, out):
    rows, mine = choice(others, count, r)
    pairs = factors((r, *others), fan_in, out, torch.float64 if dtype == torch.float64 else None)
    torch.manual_seed(0)
    x = torch.randn(count, positions, fan_in).to(dtype).requires_grad_()
    weight, dy = torch.randn(out, fan_in).to(dtype), torch.randn(count, positions, out).to(dtype)
    y = routed.linear(x, weight, None, *joined(pairs, rows), rows)
    dx, *own = torch.autograd.grad(y, [x, *pairs[0]], dy)
    return y[mine], dx[mine], *own


def embedding(others, dtype, count, positions, r, fan_in, out):
    rows, mine = choice(others, count, r)
    pairs = factors((r, *others), fan_in, out, None)
    torch.manual_seed(0)
    tokens, dy = torch.randint(fan_in, (count, positions)), torch.randn(count, positions, out)
    y = routed.embedding(tokens, torch.randn(fan_in, out).to(dtype), *joined(pairs, rows), rows)
    return y[mine], *torch.autograd.grad(y, pairs[0], dy.to(dtype))


def convolution(others, dtype, count, positions, r, fan_in, out):
    rows, mine = choice(others, count, r)
    pairs = factors((r, *others), fan_in * 3, out, None)
    torch.manual_seed(0)
    x = torch.randn(count, fan_in, positions + 2).to(dtype).requires_grad_()
    window = ((1,), (0,), (1,), 1)
    weight = torch.randn(out, fan_in, 3).to(dtype)
    y = routed.convolution(x, weight, None, *joined(pairs, rows), rows, window)
    dx, *own = torch.autograd.grad(y, [x, *pairs[0]], torch.ones_like(y))
    return y[mine], dx[mine], *own


def same(one, other):
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("positions", (1, 7, 20))
def test_a_linear_layer(dtype, positions):
    off = []
    for count, r, sides in product((4, 90), (2, 24), ((12, 16), (130, 150))):
        one, *rest = (linear(o, dtype, count, positions, r, *sides) for o in OTHERS)
        off += [(count, r, sides, o) for o, found in zip(OTHERS[1:], rest) if not same(one, found)]
    assert not off


@pytest.mark.parametrize("kind", (embedding, convolution))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_other_layers(kind, dtype):
    off = []
    for count, positions, r in product((4, 90), (1, 9), (2, 24)):
        one, *rest = (kind(o, dtype, count, positions, r, 16, 40) for o in OTHERS)
        off += [(count, r, o) for o, found in zip(OTHERS[1:], rest) if not same(one, found)]
    assert not off


ROWS = ["a", None, "b", "a"]
RANKS = {"a": 4, "b": 3}
DTYPES = [torch.bfloat16, torch.float16]

LAYERS = {
    "linear": (lambda: nn.Linear(256, 128), (64, 256)),
    "linear, short rows": (lambda: nn.Linear(256, 1024, bias=False), (256,)),
    "convolution": (lambda: nn.Conv2d(32, 32, 3, padding=1), (32, 12, 12)),
    "strided": (lambda: nn.Conv2d(32, 48, 3, stride=2, bias=False), (32, 15, 15)),
    "groups": (lambda: nn.Conv2d(32, 32, 3, padding=1, groups=4), (32, 12, 12)),
    "reflected": (lambda: nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect"), (32, 9, 9)),
    "one dimension": (lambda: nn.Conv1d(32, 64, 5, padding="same"), (32, 80)),
}


def small_updates(layer, **entry):
    """Adapters whose updates are a thousandth of the weight."""
    for name, r in RANKS.items():
        paramlora.attach(layer, {"weight": {"r": r, **entry}}, name)
    deltas = {}
    for _, _, update in updates(layer):
        weight = next(p for n, p in layer.named_parameters() if n.endswith(("original", "weight")))
        update.lora_B.data.normal_()
        size = 1e-3 * weight.double().norm() / (update.lora_B @ update.lora_A).norm()
        update.lora_B.data *= size
        deltas[update.adapter] = (update.lora_B @ update.lora_A).double().reshape(weight.shape)
    return deltas


def kept(got, plain, term):
    """The share of a term that a result holds beside the plain one, in float64."""
    return float(((got.double() - plain) * term).sum() / term.square().sum())


def exact(plain, rows, x, dy, deltas):
    """(output, gradient of the input) of each row by its dense weight."""
    x, found = x.double().requires_grad_(), []
    for i, name in enumerate(rows):
        weight = plain.weight + deltas.get(name, torch.zeros(()).double())
        found.append(torch.func.functional_call(plain, {"weight": weight}, (x[i : i + 1],)))
    y = torch.cat(found)
    return y.detach(), torch.autograd.grad(y, x, dy.double())[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hard", [1, 0])
@pytest.mark.parametrize("name", LAYERS)
def test_a_small_update_is_kept(name, hard, dtype):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    rows = ROWS * (16 if len(shape) == 1 else 2)
    layer = make().to(dtype)
    plain, x = copy.deepcopy(layer).double(), torch.randn(len(rows), *shape).to(dtype)
    deltas = small_updates(layer, hard=hard)
    x.requires_grad_()
    with paramlora.route(layer, rows):
        y = layer(x)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    want, base = (exact(plain, rows, x.detach(), dy, some) for some in (deltas, {}))
    assert 0.95 < kept(y.detach(), base[0], want[0] - base[0]) < 1.05
    if hard:  # a branch's gradient joins the layer's own where both are rounded
        assert 0.95 < kept(dx, base[1], want[1] - base[1]) < 1.05


@pytest.mark.parametrize("name", ["linear", "convolution"])
def test_a_small_update_is_kept_where_inputs_are_dropped(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make().bfloat16()
    plain, x = copy.deepcopy(layer).double(), torch.randn(32, *shape).bfloat16()
    deltas = small_updates(layer, dropout=0.1)
    with torch.no_grad(), paramlora.route(layer.train(), ROWS * 8):
        y = layer(x)
    want, base = (exact(plain, ROWS * 8, x, torch.ones_like(y), some) for some in (deltas, {}))
    assert 0.93 < kept(y, base[0], want[0] - base[0]) < 1.07


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_each_row(name, dtype):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    rows = ROWS * (16 if len(shape) == 1 else 2)
    layer = make().to(dtype)
    plain, x = copy.deepcopy(layer).double(), torch.randn(len(rows), *shape).to(dtype)
    small_updates(layer)
    for _, _, update in updates(layer):
        update.lora_B.data *= 1e3
    with paramlora.route(layer, rows):
        y = layer(x)
    dy = torch.randn_like(y)
    own = {u.adapter: (u.lora_A, u.lora_B) for _, _, u in updates(layer)}
    found = torch.autograd.grad(y, [t for pair in own.values() for t in pair], dy)
    leaves = {n: [t.detach().double().requires_grad_() for t in pair] for n, pair in own.items()}
    deltas = {n: (b @ a).reshape(plain.weight.shape) for n, (a, b) in leaves.items()}
    each = [
        torch.func.functional_call(
            plain, {"weight": plain.weight + deltas.get(n, 0)}, (x[i : i + 1].double(),)
        )
        for i, n in enumerate(rows)
    ]
    want = torch.autograd.grad(
        torch.cat(each), [t for pair in leaves.values() for t in pair], dy.double()
    )
    for got, true in zip(found, want):
        assert got.dtype == torch.float32
        assert (got.double() - true).norm() < 4 * torch.finfo(dtype).eps * true.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rate", [1e-3, 0.05])
def test_inputs_are_dropped_at_their_rate(dtype, rate):
    """Of numbers of 16 bits one in 256 is zero, which is below any rate."""
    torch.manual_seed(0)
    layer = paramlora.attach(
        nn.Linear(4096, 8).to(dtype), {"weight": {"r": 2, "dropout": rate}}, "a"
    )
    x = torch.ones(64, 4096, dtype=dtype)
    with paramlora.route(layer, ["a", None] * 32):
        update = layer.parametrizations.weight[0]
        y = dropped_rows(True, x, [update], update.current().rows)
    gone = (y[::2] == 0).double().mean()
    assert abs(gone - rate) < 5 * (rate / y[::2].numel()) ** 0.5
    assert y.dtype == dtype and torch.equal(y[1::2], x[1::2])
    assert (y[::2][y[::2] != 0] == torch.tensor(1 / (1 - rate), dtype=dtype)).all()


def test_gradients_of_gradients_of_16_bits():
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 16).bfloat16(), torch.randn(4, 3, 16).bfloat16().requires_grad_()
    small_updates(layer)
    with paramlora.route(layer, ROWS):
        y = layer(x)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert torch.autograd.grad(first.sum(), x)[0].abs().sum() > 0
