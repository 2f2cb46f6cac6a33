"""Dropout's masks are drawn from a seed, drawn again in the backward, and never stored."""

import copy
import inspect
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import paramlora
from paramlora.evaluate import dropout
from paramlora.evaluate.dropout import Drops, drops_for, masked
from paramlora.model.attach import updates

LAYERS = {
    "linear": (lambda: nn.Linear(40, 30), (50, 40)),
    "rows": (lambda: nn.Linear(40, 30, bias=False), (2, 25, 40)),
    "conv1d": (lambda: nn.Conv1d(8, 6, 3), (4, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 6, 3, padding=1, stride=2), (4, 8, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2, dilation=2), (2, 4, 5, 6, 5)),
    "groups": (lambda: nn.Conv2d(8, 6, 3, groups=2), (4, 8, 7, 7)),
    "reflect": (lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"), (4, 8, 7, 7)),
}


def adapted(layer, rates=(0.3,), hard=1, **more):
    model = nn.Sequential(layer)
    for index, rate in enumerate(rates):
        entry = {"r": 2 + index, "dropout": rate, "hard": hard, "scale": 0.7, **more}
        paramlora.attach(model, {"0": entry}, f"a{index}")
    paramlora.set_adapters(model, {f"a{index}": 1.0 + index for index in range(len(rates))})
    for _, _, low in updates(model):
        nn.init.normal_(low.lora_B, std=0.3)
    return model.train()


def reference(plain, x, updates, masks):
    """The base's output, and each update's weight applied to its own masked input."""
    y = plain(x)
    for low, mask in zip(updates, masks):
        own = copy.copy(plain)
        delta = low.lora_B @ low.lora_A * (low.lora_scale * low.strength)
        delta = delta.t() if low.layout == "transposed" else delta
        named = {"weight": delta.reshape(plain.weight.shape)}
        if plain.bias is not None:
            named["bias"] = torch.zeros_like(plain.bias)
        y = y + torch.func.functional_call(own, named, (x * mask,))
    return y


@pytest.mark.parametrize("rates", ((0.3,), (0.5, 0.0, 0.25)), ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_each_masks_outputs_and_gradients(kind, rates):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    plain, x = make().double(), torch.randn(shape).double().requires_grad_()
    model = adapted(copy.deepcopy(plain), rates, trainable_scale=1)
    lows = [low for _, _, low in updates(model)]
    wanted = [x, *(p for low in lows for p in (low.lora_A, low.lora_B, low.lora_scale))]
    torch.manual_seed(5)
    y = model(x)
    torch.manual_seed(5)
    drops = drops_for(x, rates, tuple(low.r for low in lows))
    ones = torch.ones_like(x)
    masks = [masked(ones, drops, i) / (1 - rate) for i, rate in enumerate(rates)]
    right = reference(plain, x, lows, masks)
    torch.testing.assert_close(y, right)
    weights = torch.randn_like(y)
    got = torch.autograd.grad((y * weights).sum(), wanted, create_graph=True)
    want = torch.autograd.grad((right * weights).sum(), wanted, create_graph=True)
    for one, two in zip(got, want):
        torch.testing.assert_close(one, two)
    again = torch.autograd.grad(sum(g.square().sum() for g in got), wanted[1:])
    right = torch.autograd.grad(sum(g.square().sum() for g in want), wanted[1:])
    for one, two in zip(again, right):
        torch.testing.assert_close(one, two)


def test_masks_have_their_rate_and_are_each_their_own():
    seed = torch.tensor(1234567)
    x = torch.ones(1000, 900)
    drops = Drops((0.1, 0.1), (2, 2), seed)
    one, two = (masked(x, drops, which) for which in (0, 1))
    other = masked(x, Drops((0.1,), (2,), seed + 1), 0)
    share = (0.1 * 0.9 / x.numel()) ** 0.5
    for mask in (one, two, other):
        assert abs(mask.mean() - 0.9) < 4 * share
        # by rows and by columns it varies as independent draws do
        for axis, size in ((0, 1000), (1, 900)):
            assert abs(mask.mean(axis).std() / (0.09 / size) ** 0.5 - 1) < 0.15
    for left, right in ((one, two), (one, other)):
        assert abs(((left - 0.9) * (right - 0.9)).mean() / 0.09) < 0.01
    assert torch.equal(masked(x[300:420], drops, 0, 300), one[300:420])


@pytest.mark.parametrize("groups", (1, 2))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_convolutions_keep_a_small_update_in_16_bits(dtype, groups):
    """Of the output and of the input's gradient, against the convolution of its masked input."""
    torch.manual_seed(0)
    plain = nn.Conv2d(32, 32, 3, padding=1, groups=groups)
    x, dy = torch.randn(4, 32, 12, 12).to(dtype).requires_grad_(), torch.randn(4, 32, 12, 12)
    weight = plain.weight.detach()
    model, found = adapted(plain, (0.3,)).to(dtype), []
    (low,) = (update for _, _, update in updates(model))
    size = low.lora_B @ low.lora_A * low.lora_scale
    low.lora_B.data *= 1e-3 * weight.norm() / size.norm()
    delta = (low.lora_B @ low.lora_A * low.lora_scale).detach().double().view(weight.shape)
    for _ in range(2):
        torch.manual_seed(1)
        y = model(x)
        found.append((y, torch.autograd.grad(y, x, dy.to(dtype))[0]))
        low.lora_B.data.zero_()
    torch.manual_seed(1)
    mask = masked(torch.ones(x.shape), drops_for(x, (0.3,), (2,)), 0) / 0.7
    seen = x.detach().double().requires_grad_()
    change = nn.functional.conv2d(seen * mask, delta, padding=1, groups=groups)
    (back,) = torch.autograd.grad(change, seen, dy.to(dtype).double())
    for got, none, want in zip(*found, (change, back)):
        share = ((got.double() - none.double()) * want).sum() / want.square().sum()
        assert 0.95 < share < 1.05


@pytest.mark.parametrize("rate", (0.0, 0.1))
@pytest.mark.parametrize("kind", ("linear", "conv2d"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_a_soft_update_is_kept_in_16_bits(dtype, kind, rate):
    """Of the output and of the input's gradient, on a plain layer: not added after its rounding."""
    torch.manual_seed(0)
    make, shape = {
        "linear": (lambda: nn.Linear(256, 128), (64, 256)),
        "conv2d": (lambda: nn.Conv2d(32, 32, 3, padding=1), (2, 32, 12, 12)),
    }[kind]
    plain, x = make(), torch.randn(shape).to(dtype).requires_grad_()
    weight = plain.weight.detach()
    model, found = adapted(plain, (rate,), hard=0).to(dtype), []
    (low,) = (update for _, _, update in updates(model))
    size = low.lora_B @ low.lora_A * low.lora_scale
    low.lora_B.data *= 1e-3 * weight.norm() / size.norm()
    delta = (low.lora_B @ low.lora_A * low.lora_scale).detach().double().view(weight.shape)
    dy = torch.randn(model(x).shape).to(dtype)
    for _ in range(2):
        torch.manual_seed(1)
        y = model(x)
        found.append((y, torch.autograd.grad(y, x, dy)[0]))
        low.lora_B.data.zero_()
    torch.manual_seed(1)
    mask = 1.0
    if rate:
        mask = masked(torch.ones(x.shape), drops_for(x, (rate,), (2,)), 0) / (1 - rate)
    seen = x.detach().double().requires_grad_()
    if kind == "linear":
        change = nn.functional.linear(seen * mask, delta)
    else:
        change = nn.functional.conv2d(seen * mask, delta, padding=1)
    (back,) = torch.autograd.grad(change, seen, dy.double())
    for got, none, want in zip(*found, (change, back)):
        share = ((got.double() - none.double()) * want).sum() / want.square().sum()
        assert 0.95 < share < 1.05


def test_the_mean_over_masks_is_the_update_without_dropout():
    torch.manual_seed(0)
    model, x = adapted(nn.Linear(12, 8).double(), (0.4,)), torch.randn(3, 12).double()
    with torch.no_grad():
        mean = sum(model(x) for _ in range(4000)) / 4000
        spread = torch.stack([model(x) for _ in range(200)]).std(0)
        right = model.eval()(x)
    assert ((mean - right).abs() < 5 * spread / 4000**0.5).all()


@pytest.mark.parametrize("more", ({}, {"hard": 0}, {"kind": "dora"}), ids=str)
@pytest.mark.parametrize("kind", ("linear", "conv2d"))
def test_nothing_of_an_inputs_size_is_kept_but_the_input(kind, more):
    make, shape = LAYERS[kind]
    model, x = adapted(make(), (0.3,), **more), torch.randn(shape)
    kept = []

    def keep(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(x)
    large = [t for t in kept if t.numel() >= x.numel() and t.data_ptr() != x.data_ptr()]
    weights = {p.data_ptr() for p in model.parameters()}
    assert not [t for t in large if t.data_ptr() not in weights]


@pytest.mark.parametrize("hard", (1, 0))
@pytest.mark.parametrize("kind", ("linear", "conv2d"))
@pytest.mark.parametrize("reentrant", (False, True))
def test_a_checkpointed_segment_has_the_same_mask_again(kind, hard, reentrant):
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    model, x = adapted(make(), (0.3,), hard), torch.randn(shape, requires_grad=True)
    grads = []
    for how in (False, True):
        torch.manual_seed(7)
        y = checkpoint(model, x, use_reentrant=reentrant) if how else model(x)
        model.zero_grad()
        y.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 1
    for one, two in zip(*grads):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("kind", ("linear", "conv2d"))
def test_a_small_update_is_kept_in_16_bits(kind, dtype):
    """Of an update of a thousandth of the weight, nearly all reaches the output."""
    if kind == "conv2d" and dtype == torch.float16:
        pytest.skip("float16 joins no kernels: it has no power of two for both")
    torch.manual_seed(0)
    make = (lambda: nn.Linear(256, 256)) if kind == "linear" else lambda: nn.Conv2d(32, 32, 3)
    x = torch.randn((256, 256) if kind == "linear" else (4, 32, 10, 10)).to(dtype)
    layer = make().to(dtype)
    base = layer(x).double()
    model = adapted(copy.deepcopy(layer), (0.1,))
    ((_, _, low),) = updates(model)
    with torch.no_grad():
        delta = low.lora_B @ low.lora_A * low.lora_scale
        low.lora_B.mul_(1e-3 * layer.weight.float().norm() / delta.norm())
    torch.manual_seed(5)
    y = model(x).double()
    torch.manual_seed(5)
    mask = masked(torch.ones_like(x), drops_for(x, (0.1,), (2,)), 0).double() / 0.9
    plain = copy.deepcopy(layer).double()
    change = reference(plain, x.double(), [copy.deepcopy(low).double()], [mask]) - plain(x.double())
    share = ((y - base) * change).sum() / change.square().sum()
    assert 0.97 < share < 1.03


def test_gradients_in_16_bits():
    for dtype, close in ((torch.bfloat16, 3e-2), (torch.float16, 4e-3)):
        torch.manual_seed(0)
        layer, x = nn.Linear(64, 48).to(dtype), torch.randn(70, 64).to(dtype).requires_grad_()
        model = adapted(copy.deepcopy(layer), (0.25,))
        ((_, _, low),) = updates(model)
        torch.manual_seed(5)
        model(x).float().square().sum().backward()
        torch.manual_seed(5)
        mask = masked(torch.ones_like(x), drops_for(x, (0.25,), (2,)), 0).double() / 0.75
        twin, wide = copy.deepcopy(low).double(), x.detach().double().requires_grad_()
        right = reference(copy.deepcopy(layer).double(), wide, [twin], [mask])
        right.square().sum().backward()
        pairs = ((x, wide), (low.lora_A, twin.lora_A), (low.lora_B, twin.lora_B))
        for got, want in pairs:
            far = (got.grad.double() - want.grad).norm() / want.grad.norm()
            assert far < close


@pytest.mark.parametrize("kind", ("linear", "conv2d"))
def test_compiled(kind):
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    model, x = adapted(make(), (0.3, 0.5)), torch.randn(shape, requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    grads = []
    for run in (model, compiled):
        torch.manual_seed(3)
        model.zero_grad()
        run(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, two in zip(*grads):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_many_blocks_are_one(monkeypatch):
    torch.manual_seed(0)
    x, down = torch.randn(50, 12).double(), torch.randn(3, 12).double()
    drops = drops_for(x, (0.5, 0.2), (1, 2))
    whole = dropout.thin(x, down, drops), dropout.thin_sums(x[:, :3], x, drops)
    monkeypatch.setattr(dropout, "_BLOCK", 40)
    blocks = dropout.thin(x, down, drops), dropout.thin_sums(x[:, :3], x, drops)
    for one, two in zip(whole, blocks):
        torch.testing.assert_close(one, two)


def test_evaluation_drops_nothing_and_draws_nothing():
    torch.manual_seed(0)
    model, x = adapted(nn.Linear(8, 8), (0.5,)).eval(), torch.randn(4, 8)
    before = torch.get_rng_state()
    assert torch.equal(model(x), model(x)) and torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("ranks", ((3, 20), (16, 16), (1, 16, 2), (32, 5)), ids=str)
def test_factors_are_laid_out_by_mask_for_the_kernels(ranks):
    """As many ranks for each, as many masks as a power of two; by zeros, so the update is the same
    and each gradient comes back to its own."""
    torch.manual_seed(0)
    x, weight = torch.randn(9, 12).double(), torch.randn(7, 12).double()
    a, b = torch.randn(sum(ranks), 12).double(), torch.randn(7, sum(ranks)).double()
    leaves = a.requires_grad_(), b.requires_grad_()
    drops = Drops((0.3, 0.6, 0.1)[: len(ranks)], ranks, torch.tensor(7))
    down, up, laid = dropout.shared_out(a, b, drops)
    assert laid.rates[: len(ranks)] == drops.rates and not any(laid.rates[len(ranks) :])
    share = 32 if max(ranks) > 16 else 16
    assert laid.ranks == (share,) * (4 if len(ranks) == 3 else 2)
    assert len(down) == up.shape[1] == sum(laid.ranks)
    one = torch.ones((), dtype=torch.double)
    y = dropout.dropped_by_definition(x, weight, None, down, up, one, laid)
    want = x @ weight.t()
    for which, (own, out) in enumerate(zip(a.split(ranks), b.split(ranks, 1))):
        want = want + (masked(torch.ones_like(x), drops, which) * x) @ own.t() @ out.t()
    pairs = zip((y, *torch.autograd.grad(y.sum(), leaves)),
                (want, *torch.autograd.grad(want.sum(), leaves)))  # fmt: skip
    for got, true in pairs:
        torch.testing.assert_close(got, true)


@pytest.mark.parametrize("ranks", ((2, 33), (2, 2, 2, 2, 2), (17, 17, 17)), ids=str)
def test_more_ranks_than_the_kernels_take_are_left_as_they_are(ranks):
    a, b = torch.randn(sum(ranks), 4), torch.randn(3, sum(ranks))
    drops = Drops((0.5,) * len(ranks), ranks, torch.tensor(7))
    found = dropout.shared_out(a, b, drops)
    assert found[0] is a and found[1] is b and found[2] is drops


# --- classes whose forward ends in a known one ---------------------------------------------------


def conv1d_of_transformers():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D


def scaled(known):
    class Scaled(known):
        def forward(self, x):
            return super().forward(x) * 3 + 1

    return Scaled


def mixed(known):
    class Mixin:
        def forward(self, x, more=0):
            return super().forward(x) + more

    class Mixed(Mixin, known):
        pass

    class Twice(Mixed):
        def forward(self, x):
            return super().forward(x.relu(), more=1) ** 2

    return Twice


def causal(known):
    class Causal(known):
        def forward(self, x):
            pads = [pair for k in reversed(self.kernel_size) for pair in (k - 1, 0)]
            return super().forward(F.pad(x, pads))

    return Causal


def chunked(known):
    class Chunked(known):
        def forward(self, x):
            return torch.cat([super(Chunked, self).forward(one) for one in x.split(2)])

    return Chunked


def named(known):
    by = [*inspect.signature(known.forward).parameters][1]

    class Named(known):
        def forward(self, hidden):
            return super().forward(**{by: hidden})

    return Named


KNOWN = {
    "linear": (lambda: nn.Linear, (40, 30), (6, 40)),
    "Conv1D": (conv1d_of_transformers, (30, 40), (6, 40)),
    "conv1d": (lambda: nn.Conv1d, (8, 6, 3), (4, 8, 9)),
    "conv2d": (lambda: nn.Conv2d, (8, 6, 3), (4, 8, 7, 7)),
    "conv3d": (lambda: nn.Conv3d, (4, 6, 2), (4, 4, 5, 6, 5)),
}
ENDS = (scaled, mixed, chunked, named, causal)
ENDING = [(k, e) for k in KNOWN for e in ENDS if e is not causal or k.startswith("conv")]


def ending(kind, end, rates):
    """An adapted layer, its input, and its twin of a class whose end adds each update of an input
    that is masked as it is here."""
    torch.manual_seed(0)
    known, sizes, shape = KNOWN[kind]
    known, x = known(), torch.randn(shape).double().requires_grad_()
    plain, inner = end(known)(*sizes).double(), known(*sizes).double()
    model = adapted(copy.deepcopy(plain), rates, trainable_scale=1)
    lows = [low for _, _, low in updates(model)]

    class Masked(known):
        def forward(self, x):
            drops = drops_for(x, rates, tuple(low.r for low in lows))
            ones = torch.ones_like(x)
            masks = [masked(ones, drops, i) / (1 - rate) for i, rate in enumerate(rates)]
            return reference(inner, x, lows, masks)

    twin = end(Masked)(*sizes)
    for holder in (inner.requires_grad_(False), twin.double()):
        holder.load_state_dict(plain.state_dict())
    leaves = [x, *(p for low in lows for p in (low.lora_A, low.lora_B, low.lora_scale))]
    return model, plain, twin, leaves


def outputs_and_gradients(run, leaves):
    torch.manual_seed(5)
    y = run(leaves[0])
    y.square().sum().backward()
    grads = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return y, *grads


@pytest.mark.parametrize("rates", ((0.3,), (0.5, 0.0, 0.25)), ids=str)
@pytest.mark.parametrize("kind, end", ENDING)
def test_a_forward_that_ends_in_a_known_one_drops_what_that_gets(kind, end, rates):
    model, plain, twin, leaves = ending(kind, end, rates)
    right = outputs_and_gradients(twin, leaves)
    again = partial(checkpoint, model, use_reentrant=True)
    once = partial(checkpoint, model, use_reentrant=False)
    for run in (model, again, once):
        for got, want in zip(outputs_and_gradients(run, leaves), right):
            torch.testing.assert_close(got, want)
    plain.weight.data.copy_(model[0].weight.detach())
    before = torch.get_rng_state()
    torch.testing.assert_close(model.eval()(leaves[0]), plain(leaves[0]))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("end", ENDS)
def test_so_it_does_compiled(end):
    model, _, twin, leaves = ending("conv2d", end, (0.5, 0.25))
    torch.compiler.reset()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    got, right = (outputs_and_gradients(one, leaves) for one in (run, twin))
    for one, two in zip(got, right):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("kind", KNOWN)
def test_so_it_does_row_by_row(kind):
    """An update of ones on an input of ones adds up what was not dropped."""
    known, sizes, shape = KNOWN[kind]
    layer = scaled(known())(*sizes).double()
    for name, rate in {"a": 0.0, "b": 0.5}.items():
        paramlora.attach(layer, {"weight": {"r": 1, "dropout": rate}}, name)
    for update in layer.parametrizations.weight:
        update.lora_A.data.fill_(1)
        update.lora_B.data.fill_(1)
    x = torch.ones(64, *shape[1:]).double()
    with paramlora.disable_adapters(layer):
        base = layer(x)
    with paramlora.route(layer, ["a", "b"] * 32):
        found = ((layer(x) - base) / 3).flatten(1)
    most = layer.parametrizations.weight.original[0].numel() if kind != "Conv1D" else sizes[1]
    torch.testing.assert_close(found[::2], torch.full_like(found[::2], most))
    # twice a whole number, about as often more as less
    halves = found[1::2] / 2
    torch.testing.assert_close(halves, halves.round())
    assert halves.std() > 1 and abs(found[1::2].mean() - most) < most / 10


class OwnPart(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input.abs(), weight, bias)


class EndsInOwnPart(OwnPart):
    def forward(self, x):
        return super().forward(x)


class NeverReached(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class EndsThere(NeverReached):
    def forward(self, x):
        return super().forward(x)


class NamesAnother(nn.Conv2d):
    def forward(self, x):
        return super()._conv_forward(x, self.weight, self.bias)


UNKNOWN = {
    "a convolution's part": lambda: OwnPart(3, 4, 3),
    "under an end": lambda: EndsInOwnPart(3, 4, 3),
    "its own product": lambda: NeverReached(3, 4),
    "that under an end": lambda: EndsThere(3, 4),
    "another method": lambda: NamesAnother(3, 4, 3),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_where_the_end_is_not_known_dropout_is_refused(kind):
    layer = UNKNOWN[kind]()
    with pytest.raises(paramlora.TargetError, match="cannot act at 0 of .* only its weight"):
        adapted(layer)
