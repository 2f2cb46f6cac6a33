"""DoRA's linear layer by each of its ways, against its definition in float64, written out here."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import paramlora
from paramlora.evaluate import rescaled
from paramlora.evaluate.choose import Way
from paramlora.evaluate.functional import way_of
from paramlora.update.sharded import take_all

# rows, inputs, outputs: what each way serves in float32 and wider on a CPU
SIZES = {Way.SUM: (6, 8, 6), Way.DENSE: (2048, 32, 40), Way.FACTORED: (4, 260, 256)}
R = 3


def operands(way, dtype=torch.float64, seed=0):
    """x, weight, bias, A, B, scale, magnitude; one row of the sum is zero, and so is its norm."""
    torch.manual_seed(seed)
    rows, fan_in, out = SIZES[way]
    x, weight, bias = torch.randn(rows, fan_in), torch.randn(out, fan_in), torch.randn(out)
    a, b = torch.randn(R, fan_in), torch.randn(out, R)
    weight[1], b[1] = 0, 0
    scale, magnitude = torch.tensor(0.7), torch.rand(out, 1) + 0.5
    made = [t.to(dtype) for t in (x, weight, bias, a, b, scale, magnitude)]
    assert dtype.itemsize <= 2 or way_of(*made[:-1], False) is way
    return made


def definition(x, weight, bias, a, b, scale, magnitude):
    total = weight + scale * b @ a
    norm = total.detach().square().sum(1, keepdim=True).sqrt()
    weight = magnitude.reshape(-1, 1) * total / torch.where(norm == 0, 1, norm)
    return F.linear(x, weight, bias)


NAMES = ("x", "weight", "bias", "A", "B", "scale", "magnitude")
WANTED = {
    "all": NAMES,
    "as trained": ("x", "A", "B", "magnitude"),
    "the input": ("x",),
    "the magnitude": ("magnitude",),
    "the factors": ("A", "B"),
    "the scale": ("scale",),
    "the base": ("x", "weight", "bias"),
    "nothing": (),
}


@pytest.mark.parametrize("leading", [(), (2,)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("way", SIZES)
def test_values_and_gradients_are_those_of_the_definition(way, wanted, with_bias, leading):
    made = operands(way)
    made[0] = made[0].reshape(*leading, -1, made[0].shape[-1]) if leading else made[0]
    made[2] = made[2] if with_bias else None
    both = []
    for compute in (rescaled.linear, definition):
        own = [None if t is None else t.clone() for t in made]
        leaves = [
            t.requires_grad_() for n, t in zip(NAMES, own) if n in WANTED[wanted] and t is not None
        ]
        y = compute(*own)
        torch.manual_seed(1)
        both.append((y, torch.autograd.grad(y, leaves, torch.randn_like(y)) if leaves else ()))
    (y, got), (want_y, want) = both
    torch.testing.assert_close(y, want_y, rtol=1e-11, atol=1e-11)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("way", SIZES)
def test_gradients_of_gradients(way):
    made = operands(way)
    both = []
    for compute in (rescaled.linear, definition):
        own = [t.clone().requires_grad_() for t in made]
        first = torch.autograd.grad(compute(*own).square().sum(), own, create_graph=True)
        total = sum(grad.square().sum() for grad in first)
        both.append(torch.autograd.grad(total, own))
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()))


@pytest.mark.parametrize("way", SIZES)
def test_many_gradients_at_once(way):
    made = [t.requires_grad_() for t in operands(way)]
    y = rescaled.linear(*made)
    dy = torch.randn(3, *y.shape, dtype=y.dtype)
    got = torch.autograd.grad(y, made, dy, is_grads_batched=True)
    want = [torch.autograd.grad(definition(*made), made, one) for one in dy]
    for one, others in zip(got, zip(*want), strict=True):
        torch.testing.assert_close(one, torch.stack(others), rtol=1e-9, atol=1e-9)


def under(transform, compute, x):
    if transform == "vmap":
        return torch.func.vmap(compute)(torch.stack([x, 2 * x]))
    if transform == "grad":
        return torch.func.grad(lambda x: compute(x).sum())(x)
    return torch.func.jvp(compute, (x,), (x,))[1]


@pytest.mark.parametrize("transform", ["vmap", "grad", "forward mode"])
@pytest.mark.parametrize("way", SIZES)
def test_transforms_of_torch_func(way, transform):
    x, weight, bias, a, b, scale, magnitude = operands(way)
    layer = nn.Linear(*reversed(weight.shape)).double()
    layer.load_state_dict({"weight": weight, "bias": bias})
    paramlora.attach(layer, {"weight": {"r": R, "kind": "dora"}})
    update = layer.parametrizations.weight[0]
    take_all(update.taking(dict(zip(update.parts, (a, b, scale, magnitude)))))
    want = under(transform, lambda x: definition(x, weight, bias, a, b, scale, magnitude), x)
    torch.testing.assert_close(under(transform, layer, x), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", SIZES)
def test_sixteen_bits(way, dtype):
    x, weight, bias, *rest = operands(way, torch.float32)
    narrow = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
    rest = [t.requires_grad_() for t in rest]
    y = rescaled.linear(*narrow, *rest)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, [*narrow, *rest], dy)
    wide = [t.detach().double().requires_grad_() for t in (*narrow, *rest)]
    want_y = definition(*wide)
    want = torch.autograd.grad(want_y, wide, dy.double())
    for one, other in zip((y, *got), (want_y, *want), strict=True):
        error = (one.double() - other).norm() / other.norm()
        assert error < 2 * torch.finfo(dtype).eps
    assert [t.dtype for t in got] == [t.dtype for t in (*narrow, *rest)]


@pytest.mark.parametrize("way", SIZES)
def test_autocast_holds_for_the_backward_too(way):
    made = [t.requires_grad_() for t in operands(way, torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        y = rescaled.linear(*made)
        got = torch.autograd.grad(y.float().square().sum(), made)
    wide = [t.detach().double().requires_grad_() for t in made]
    want_y = definition(*wide)
    want = torch.autograd.grad(want_y.square().sum(), wide)
    assert y.dtype == torch.bfloat16
    for one, other in zip((y, *got), (want_y, *want), strict=True):
        assert (one.double() - other).norm() / other.norm() < 3 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(("way", "layout"), [*itertools.product(SIZES, ("matrix", "transposed"))])
def test_it_starts_as_the_layer_was_to_the_last_bit(way, layout):
    _, weight, bias, *_ = operands(way, torch.float32)
    x = torch.randn(*SIZES[way][:2])
    layer = nn.Linear(*SIZES[way][1:])
    if layout == "transposed":
        layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(*SIZES[way][:0:-1])
        weight = weight.T.contiguous()
    layer.load_state_dict({"weight": weight, "bias": 100 * bias})
    before = copy.deepcopy(layer)
    paramlora.attach(layer, {"weight": {"r": R, "kind": "dora"}})
    assert torch.equal(layer(x), before(x))


@pytest.mark.parametrize("way", SIZES)
def test_what_follows_may_write_to_the_output(way):
    for shape in ((-1,), (2, -1)):
        made = operands(way)
        made[0] = made[0].reshape(*shape, made[0].shape[-1])
        own = [t.requires_grad_() for t in made]
        got = torch.autograd.grad(rescaled.linear(*own).relu_().sum(), own)
        want = torch.autograd.grad(definition(*own).relu().sum(), own)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("way", SIZES)
def test_the_norm_is_of_the_base_as_it_is_now(way):
    """However it was written: nothing of it is kept from one call to the next."""
    made = operands(way)
    rescaled.linear(*made)
    made[1].data.mul_(3)
    torch.testing.assert_close(rescaled.linear(*made), definition(*made))
    made[1] = made[1] + 1
    torch.testing.assert_close(rescaled.linear(*made), definition(*made))


class Counted(TorchDispatchMode):
    """Counts operators but for views, in a forward and its backward."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(func.name())
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("way", "most"), [(Way.SUM, (8, 13)), (Way.DENSE, (8, 18)), (Way.FACTORED, (23, 17))]
)
def test_few_operators_and_one_node_of_autograd(way, most):
    """What Python takes at each call is what a narrow layer costs."""
    made = [t.requires_grad_(n in WANTED["as trained"]) for n, t in zip(NAMES, operands(way))]
    with Counted() as forward:
        y = rescaled.linear(*made)
    with Counted() as backward:
        y.backward(torch.ones_like(y))
    assert len(forward.names) <= most[0] and len(backward.names) <= most[1]
    assert way is Way.SUM or y.grad_fn.name() == "_LinearBackward"


REST = {"rows": ((5, 6), ()), "rows of rows": ((2, 3, 6), ()), "an image": ((2, 6, 3, 4), (1, 1))}


@pytest.mark.parametrize("order", [1, 2, "batched"])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("case", REST)
def test_what_a_convolution_or_a_look_up_gave_is_rescaled(case, with_bias, inside, order):
    """And gives its bias a gradient, which the bias that is inside of z gets only a part of."""
    torch.manual_seed(0)
    shape, rest = REST[case]
    z, m, norm = torch.randn(shape), torch.rand(6, *rest) + 0.5, torch.rand(6, *rest) + 0.5
    norm.view(-1)[1] = 0
    bias = torch.randn(6, *rest) if with_bias else None
    leaves = [t.double().requires_grad_() for t in (z, m, bias) if t is not None]
    norm = norm.double()
    given = norm.clone()
    bias = leaves[2] if with_bias else None
    y = rescaled.rescaled(*leaves[:2], given, bias, inside)
    factor = leaves[1] / torch.where(norm == 0, 1, norm)
    want = leaves[0] * factor
    if with_bias:
        want = want + bias * (1 - factor if inside else 1)
    torch.testing.assert_close(y, want)
    assert torch.equal(given, norm)
    if order == "batched":
        dy = torch.randn(3, *shape).double()
        got = torch.autograd.grad(y, leaves, dy, is_grads_batched=True)
        each = [torch.autograd.grad(want, leaves, one, retain_graph=True) for one in dy]
        expected = [torch.stack(one) for one in zip(*each)]
    elif order == 2:
        got, expected = (
            torch.autograd.grad(
                sum(
                    g.square().sum()
                    for g in torch.autograd.grad(t.square().sum(), leaves, create_graph=True)
                ),
                leaves,
            )
            for t in (y, want)
        )
    else:
        dy = torch.randn(shape).double()
        got, expected = (torch.autograd.grad(t, leaves, dy) for t in (y, want))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_image_of_sixteen_bits_is_rounded_once(dtype, layout):
    torch.manual_seed(0)
    z = torch.randn(2, 6, 5, 4).to(dtype).to(memory_format=layout).requires_grad_()
    m, norm = torch.rand(6, 1, 1).requires_grad_(), torch.rand(6, 1, 1) + 0.5
    bias = torch.randn(6, 1, 1).to(dtype)
    y = rescaled.rescaled(z, m, norm, bias)
    factor = (m / norm).detach()
    assert y.stride() == z.stride()
    assert torch.equal(y, (z.float() * factor + bias.float()).to(dtype))
    dy = torch.randn_like(y)
    dz, dm = torch.autograd.grad(y, (z, m), dy)
    assert torch.equal(dz, (dy.float() * factor).to(dtype)) and dz.stride() == z.stride()
    want = (dy.double() * z.double()).sum((0, 2, 3))[:, None, None] / norm.double()
    torch.testing.assert_close(dm, want.float(), rtol=1e-4, atol=1e-4)
