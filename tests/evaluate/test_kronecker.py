"""LoKr's linear layer by each of its ways, against the dense weight in float64, written out."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import paramlora
from paramlora.evaluate import kronecker

# rows, w1, w2: a weight whose sum is formed, and one whose is not
SIZES = {
    "small": (6, (3, 2), (4, 5)),
    "large": (7, (12, 16), (24, 20)),
    "wide": (5, (2, 40), (9, 99)),
}
PARTS = ("whole", "low rank", "both")
NAMES = ("x", "weight", "bias", "scale")


def operands(size, parts="low rank", dtype=torch.float64, leading=()):
    """x, weight, bias, the factors by name, and the scale."""
    torch.manual_seed(0)
    rows, (a, b), (c, d) = SIZES[size]
    x, weight, bias = (
        torch.randn(*leading, rows, b * d),
        torch.randn(a * c, b * d),
        torch.randn(a * c),
    )
    held = {"lokr_w1": torch.randn(a, b), "lokr_w2": torch.randn(c, d)}
    if parts != "whole":
        del held["lokr_w2"]
        held |= {"lokr_w2_a": torch.randn(c, 2), "lokr_w2_b": torch.randn(2, d)}
    if parts == "both":
        del held["lokr_w1"]
        held |= {"lokr_w1_a": torch.randn(a, 2), "lokr_w1_b": torch.randn(2, b)}
    held = {name: one.to(dtype) for name, one in held.items()}
    return [t.to(dtype) for t in (x, weight, bias)] + [held, torch.tensor(0.7, dtype=dtype)]


def definition(x, weight, bias, parts, scale):
    """Every block of the Kronecker product written out."""
    one = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    two = parts["lokr_w2"] if "lokr_w2" in parts else parts["lokr_w2_a"] @ parts["lokr_w2_b"]
    rows = [torch.cat([number * two for number in row], 1) for row in one]
    return F.linear(x, weight + scale * torch.cat(rows), bias)


def leaves_of(made, wanted):
    """The operands with those that need a gradient, and these."""
    x, weight, bias, parts, scale = made
    named = {"x": x, "weight": weight, "bias": bias, "scale": scale, **parts}
    named = {n: t.clone().requires_grad_(wanted(n)) for n, t in named.items() if t is not None}
    own = [
        named["x"],
        named["weight"],
        named.get("bias"),
        {n: named[n] for n in parts},
        named["scale"],
    ]
    return own, [t for t in named.values() if t.requires_grad]


WANTED = {
    "all": lambda n: True,
    "as trained": lambda n: n == "x" or "lokr" in n,
    "the input": lambda n: n == "x",
    "the first": lambda n: "w1" in n,
    "the second": lambda n: "w2" in n,
    "the base": lambda n: n in ("weight", "bias"),
    "nothing": lambda n: False,
}


@pytest.mark.parametrize("leading", [(), (2,)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients_are_those_of_the_definition(size, parts, wanted, with_bias, leading):
    made = operands(size, parts, leading=leading)
    made[2] = made[2] if with_bias else None
    both = []
    for compute in (kronecker.linear, definition):
        own, leaves = leaves_of(made, WANTED[wanted])
        y = compute(*own)
        torch.manual_seed(1)
        both.append((y, *(torch.autograd.grad(y, leaves, torch.randn_like(y)) if leaves else ())))
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("size", SIZES)
def test_factors_of_sixteen_bits_beside_a_wider_weight(size):
    """Only they themselves are rounded, as in the weight that a merge gives."""
    x, weight, bias, parts, scale = operands(size)
    narrow = {name: one.bfloat16() for name, one in parts.items()}
    wide = {name: one.double() for name, one in narrow.items()}
    got, want = (
        f(x, weight, bias, own, scale)
        for f, own in ((kronecker.linear, narrow), (definition, wide))
    )
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("size", SIZES)
def test_gradients_of_gradients_and_many_at_once(size):
    both = []
    for compute in (kronecker.linear, definition):
        own, leaves = leaves_of(operands(size), WANTED["all"])
        y = compute(*own)
        torch.manual_seed(1)
        many = torch.randn(3, *y.shape, dtype=y.dtype)
        found = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in many]
        if compute is kronecker.linear:
            found = torch.autograd.grad(y, leaves, many, retain_graph=True, is_grads_batched=True)
        else:
            found = [torch.stack(one) for one in zip(*found)]
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        both.append([*found, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)])
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()))


def attached(size, dtype=torch.float64, **entry):
    """A layer with a trained LoKr, its base, and its change in float64."""
    torch.manual_seed(0)
    _, (a, b), (c, d) = SIZES[size]
    layer = nn.Linear(b * d, a * c).to(dtype)
    before = copy.deepcopy(layer)
    sizes = [[a, c], [b, d]]
    paramlora.attach(layer, {"weight": {"kind": "lokr", "r": 2, "sizes": sizes, **entry}})
    update = layer.parametrizations.weight[0]
    for p in update.parameters():
        nn.init.normal_(p)
    parts = {name: one.detach().double() for name, one in update.plain().items()}
    scale = parts.pop("lora_scale")
    wide = before.double()
    change = definition(
        torch.eye(b * d).double(), torch.zeros(a * c, b * d).double(), None, parts, scale
    ).T
    return layer, wide, change, update


@pytest.mark.parametrize("transform", ["vmap", "grad", "forward mode", "compile"])
@pytest.mark.parametrize("size", SIZES)
def test_transforms_and_the_compiler(size, transform):
    layer, base, change, _ = attached(size)
    weight, x = base.weight + change, torch.randn(4, base.in_features).double()

    def under(compute):
        if transform == "vmap":
            return torch.func.vmap(compute)(torch.stack([x, 2 * x]))
        if transform == "grad":
            return torch.func.grad(lambda x: compute(x).sum())(x)
        if transform == "compile" and compute is layer:
            torch.compiler.reset()
            return torch.compile(compute, fullgraph=True, backend="aot_eager")(x)
        return torch.func.jvp(compute, (x,), (x,))[1] if transform == "forward mode" else compute(x)

    torch.testing.assert_close(under(layer), under(lambda x: F.linear(x, weight, base.bias)))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("full", [False, True])
def test_a_small_update_arrives_whole_in_sixteen_bits(full, dtype, autocast):
    """Of ``‖Δ‖ = ‖W‖/1000``, where rounding the base first would leave half of it or less."""
    layer, base, change, update = attached("large", torch.float32, full_matrix=full)
    layer, rows = layer.to(torch.float32 if autocast else dtype), 4000
    weight = layer.parametrizations.weight.original.detach().to(dtype).double()
    bias = layer.bias.detach().to(dtype).double()
    small = 1e-3 * weight.norm() / change.norm()
    update.lora_scale.mul_(small.item())
    change = small * change
    x = torch.randn(rows, base.in_features).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = layer(x)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    wide, back = x.detach().double(), dy.double()
    for got, without, true in (
        (y, wide @ weight.T + bias, wide @ change.T),
        (dx, back @ weight, back @ change),
    ):
        share = ((got.double() - without) * true).sum() / true.square().sum()
        assert abs(share - 1) < 0.02
        error = (got.double() - without - true).norm() / (without + true).norm()
        assert error < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_gradients_in_sixteen_bits(size, dtype):
    layer, base, change, update = attached(size, dtype)
    x = torch.randn(50, base.in_features).to(dtype)
    leaves = dict(update.named_parameters())
    y = layer(x)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, leaves.values(), dy)
    wide = {n: t.detach().double().requires_grad_() for n, t in leaves.items()}
    want_y = definition(x.double(), base.weight, base.bias, wide, update.lora_scale.double())
    want = torch.autograd.grad(want_y, wide.values(), dy.double())
    for one, other in zip((y, *got), (want_y, *want), strict=True):
        assert (one.double() - other).norm() < 3 * torch.finfo(dtype).eps * other.norm()


@pytest.mark.parametrize("scale", [1e5, 1e-8])
@pytest.mark.parametrize("size", SIZES)
def test_a_scale_beyond_float16s_range_with_factors_of_it(size, scale):
    x, weight, bias, parts, _ = operands(size, dtype=torch.float16)
    parts = {name: one / (scale if "w1" in name else 1) ** 0.5 for name, one in parts.items()}
    parts = {n: one / (scale if n == "lokr_w2_a" else 1) ** 0.5 for n, one in parts.items()}
    got = kronecker.linear(x, weight, bias, parts, torch.tensor(scale))
    wide = {name: one.double() for name, one in parts.items()}
    want = definition(x.double(), weight.double(), bias.double(), wide, scale)
    assert (got.double() - want).norm() < 2**-10 * want.norm()


def test_factors_beyond_float16s_range():
    layer, base, change, update = attached("large", torch.float16)
    with torch.no_grad():
        update.lokr_w1.mul_(1e5)
        update.lokr_w2_a.mul_(1e-5)
    x = torch.randn(5, base.in_features).half()
    want = F.linear(x.double(), base.weight + change, base.bias)
    assert (layer(x).double() - want).norm() < 2**-9 * want.norm()


@pytest.mark.parametrize("reentrant", [True, False])
def test_it_is_checkpointed(reentrant):
    layer, _, _, update = attached("large")
    x = torch.randn(4, 320).double().requires_grad_()
    own = [x, *update.parameters()]
    want = torch.autograd.grad(layer(x).square().sum(), own)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    for one, other in zip(own, want, strict=True):
        torch.testing.assert_close(one.grad, other)


class Counted(TorchDispatchMode):
    """Counts operators but for views, and the elements that they write."""

    def __init__(self):
        super().__init__()
        self.names, self.written = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if not func.is_view:
            self.names.append(func.name())
            self.written += sum(t.numel() for t in (out if isinstance(out, tuple) else (out,)))
        return out


def test_few_operators_and_few_passes():
    """What it writes is what a layer in whose time memory counts costs."""
    layer, base, _, update = attached("large")
    x = torch.randn(2000, base.in_features).double().requires_grad_()
    with Counted() as forward:
        y = layer(x)
    dy = torch.randn_like(y)
    with Counted() as backward:
        y.backward(dy)
    assert len(forward.names) <= 6 and len(backward.names) <= 12
    passes = (forward.written / y.numel(), backward.written / y.numel())
    assert passes[0] < 3.5 and passes[1] < 5.5  # the base's own products are 1 and 1.1
