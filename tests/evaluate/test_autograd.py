"""A sweep of layers: an adapted one is to autograd what the plain one is: called twice, changed in
place, derived forwards, in batches and again, and holding no more than it needs."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import paramlora
from paramlora.model.attach import updates

CUDA = pytest.param("cuda", marks=[pytest.mark.gpu])
LAYERS = {
    "rows": (lambda: nn.Linear(256, 256), (64, 256)),
    "batches": (lambda: nn.Linear(256, 256), (4, 16, 256)),
    "a vector": (lambda: nn.Linear(1024, 1024), (1024,)),
    "a convolution": (lambda: nn.Conv2d(48, 48, 3, padding=1), (2, 48, 16, 16)),
    "few positions": (lambda: nn.Conv2d(256, 256, 3, padding=1), (1, 256, 4, 4)),
    "kernel 1": (lambda: nn.Conv2d(128, 128, 1), (2, 128, 8, 8)),
    "groups": (lambda: nn.Conv2d(64, 64, 3, padding=1, groups=64), (4, 64, 32, 32)),
}
pytestmark = [
    pytest.mark.parametrize("name", LAYERS),
    pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str),
    pytest.mark.parametrize("device", ("cpu", CUDA)),
]


@pytest.fixture(autouse=True)
def needs_its_device(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA")


@pytest.fixture
def layer(name, dtype, device):
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[name][0]()).to(device, dtype)
    # the scale's gradient is one sum of many numbers, of which 16 bits leave little
    trainable = int(dtype == torch.float64)
    paramlora.attach(model, {"0": {"r": 4, "alpha": 2, "trainable_scale": trainable}})
    for _, _, update in updates(model):
        nn.init.normal_(update.lora_B, std=0.1)
    return model


@pytest.fixture
def x(name, dtype, device):
    return torch.randn(LAYERS[name][1], device=device, dtype=dtype)


def dense(layer):
    """The plain layer in float64, as a function of an input and of the factors and the scale."""
    (_, _, update), plain = next(updates(layer)), copy.deepcopy(layer)
    paramlora.detach(plain)
    plain, weight = plain[0].double(), layer[0].parametrizations.weight.original.double()

    def call(x, a, b, scale):
        total = weight + (scale * b @ a).reshape(weight.shape)
        return torch.func.functional_call(plain, {"weight": total}, (x,))

    factors = (update.lora_A, update.lora_B, update.lora_scale)
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in factors]
    return call, [t for t in factors if t.requires_grad], wide


def trained(tensors):
    return [t for t in tensors if t.requires_grad]


def assert_near(got, want, dtype):
    near = 1e-10 if dtype == torch.float64 else 0.05
    for mine, true in zip(got, want, strict=True):
        assert true.norm() > 0 and (mine.double() - true).norm() <= near * true.norm()


@pytest.mark.parametrize("again", (False, True), ids=("once", "to be differentiated again"))
def test_called_twice_its_factors_get_both_gradients(layer, x, dtype, again):
    call, factors, wide = dense(layer)
    leaf, wide_x = x.clone().requires_grad_(), x.double().requires_grad_()
    y = layer(layer(leaf).tanh())
    got = torch.autograd.grad(y.sum(), (leaf, *factors), create_graph=again)
    want_y = call(call(wide_x, *wide).tanh(), *wide)
    want = torch.autograd.grad(want_y.sum(), (wide_x, *trained(wide)), create_graph=again)
    assert_near(got, want, dtype)
    if again:
        got = torch.autograd.grad(sum(g.square().sum() for g in got), (leaf, *factors))
        want = torch.autograd.grad(sum(g.square().sum() for g in want), (wide_x, *trained(wide)))
        assert_near(got, want, dtype)


def test_its_output_may_be_changed_in_place(layer, x, dtype):
    call, factors, wide = dense(layer)
    y = torch.relu_(layer(x))
    got = torch.autograd.grad(y.sum(), factors)
    assert_near(
        got, torch.autograd.grad(call(x.double(), *wide).relu().sum(), trained(wide)), dtype
    )


def test_its_bias_may_be_changed_before_the_backward(layer, x, dtype):
    call, factors, wide = dense(layer)
    y = layer(x)
    with torch.no_grad():
        layer[0].bias.add_(1)
    got = torch.autograd.grad(y.sum(), factors)
    assert_near(got, torch.autograd.grad(call(x.double(), *wide).sum(), trained(wide)), dtype)


def keeps(layer, x):
    """Whether the layer's backward holds its input."""
    addresses = []

    def note(tensor):
        addresses.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    return x.data_ptr() in addresses


def test_frozen_factors_keep_no_input(layer, x, dtype):
    call, factors, wide = dense(layer)
    layer.requires_grad_(False)
    leaf, wide_x = x.clone().requires_grad_(), x.double().requires_grad_()
    plain = copy.deepcopy(layer)
    paramlora.detach(plain)
    if not keeps(plain, leaf):  # as torch's convolutions do
        assert not keeps(layer, leaf)
    y = layer(leaf)
    seeds = torch.randn(3, *y.shape, device=y.device, dtype=dtype)
    (got,) = torch.autograd.grad(y, leaf, seeds, retain_graph=True, is_grads_batched=True)
    for one, seed in zip(got, seeds.double()):
        assert_near((one,), torch.autograd.grad(call(wide_x, *wide), wide_x, seed), dtype)
    (got,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    (want,) = torch.autograd.grad(call(wide_x, *wide).square().sum(), wide_x, create_graph=True)
    assert_near((got,), (want,), dtype)
    got = torch.autograd.grad(got.square().sum(), leaf)
    assert_near(got, torch.autograd.grad(want.square().sum(), wide_x), dtype)


def test_it_is_derived_in_forward_mode(layer, x, dtype):
    call, _, wide = dense(layer)
    direction = torch.randn_like(x)
    with forward_ad.dual_level():
        y = layer(forward_ad.make_dual(x, direction))
        got = forward_ad.unpack_dual(y).tangent
    _, want = torch.func.jvp(lambda t: call(t, *wide), (x.double(),), (direction.double(),))
    assert_near((got,), (want,), dtype)


def test_gradients_in_batches(layer, x, dtype):
    call, factors, wide = dense(layer)
    leaf, wide_x = x.clone().requires_grad_(), x.double().requires_grad_()
    y, want_y = layer(leaf), call(wide_x, *wide)
    seeds = torch.randn(3, *y.shape, device=y.device, dtype=dtype)
    got = torch.autograd.grad(y, (leaf, *factors), seeds, is_grads_batched=True)
    for i, seed in enumerate(seeds.double()):
        want = torch.autograd.grad(want_y, (wide_x, *trained(wide)), seed, retain_graph=True)
        assert_near([g[i] for g in got], want, dtype)
