"""float16: finite and right to its roundings wherever the dense definition in float64 is finite, in
every layer that is evaluated without the dense sum, for numbers at both ends of its range."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

import paramlora
from paramlora.model.attach import updates

EPS = 2**-10
NEEDS_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)]


def conv1d_of_transformers():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(64, 48)


LAYERS = {
    "linear": (lambda: nn.Linear(48, 64), (9, 48)),
    "linear, a vector": (lambda: nn.Linear(48, 64), (48,)),
    "linear, a batch": (lambda: nn.Linear(48, 64), (2, 3, 48)),
    "transformers' Conv1D": (conv1d_of_transformers, (9, 48)),
    "convolution 1×1": (lambda: nn.Conv2d(48, 64, 1), (2, 48, 3, 3)),
    "convolution": (lambda: nn.Conv2d(12, 64, 3, padding=1), (2, 12, 6, 5)),
    "convolution, strided": (lambda: nn.Conv1d(12, 64, 3, 2), (2, 12, 11)),
    "convolution, without a batch": (lambda: nn.Conv2d(12, 64, 3, padding=1), (12, 6, 5)),
    "convolution, a kernel that meets the padding": (
        lambda: nn.Conv2d(12, 64, 1, padding=1),
        (2, 12, 3, 3),
    ),
    "convolution, circular": (
        lambda: nn.Conv2d(12, 64, 3, padding=1, padding_mode="circular"),
        (2, 12, 6, 5),
    ),
    "convolution, channels last": (
        lambda: nn.Conv2d(12, 64, 3, padding=1).to(memory_format=torch.channels_last),
        (2, 12, 6, 5),
    ),
    "convolution in groups": (lambda: nn.Conv2d(12, 64, 3, groups=4), (2, 12, 6, 5)),
    "convolution of single channels": (lambda: nn.Conv2d(32, 64, 3, groups=32), (2, 32, 6, 5)),
    "convolution in three dimensions": (lambda: nn.Conv3d(6, 64, 2), (2, 6, 3, 4, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(12, 64, 3, stride=2), (2, 12, 4, 3)),
    "transposed in groups": (lambda: nn.ConvTranspose1d(12, 64, 3, groups=2), (2, 12, 5)),
    "embedding": (lambda: nn.Embedding(30, 64), None),
    "embedding with padding": (lambda: nn.Embedding(30, 64, padding_idx=3), None),
}
NUMBERS = {  # of A, B, the scale, the input and the output's gradient
    "ordinary": (0.1, 0.1, 1.0, 1.0, 1.0),
    "a large scale": (1e-3, 1.0, 1e5, 1.0, 1.0),
    "a large scale and a large gradient": (1e-6, 1.0, 1e5, 0.1, 2000.0),
    "a large B": (1e-7, 1e6, 1.0, 1.0, 100.0),
    "a large A": (1e6, 1e-7, 1.0, 1.0, 100.0),
    "a large input": (1.0, 1e-3, 1.0, 3000.0, 1.0),
    "a large gradient": (1e-3, 1.0, 1.0, 1e-3, 2000.0),
    "a small gradient": (0.3, 0.3, 1.0, 1.0, 1e-3),
    "beyond both ends": (1e-30, 1e28, 1.0, 1.0, 1.0),
    "a small scale": (1.0, 1e7, 1e-8, 1.0, 1.0),
    "no scale": (0.1, 0.1, 0.0, 1.0, 1.0),
    "no B": (0.1, 0.0, 1.0, 1.0, 1.0),
    "no B and a large A": (1e6, 0.0, 1e5, 10.0, 1.0),
}
WAYS = {"hard": {}, "soft": {"hard": 0}, "dropping": {"dropout": 1e-9}}


def build(kind, way, numbers, device="cpu"):
    """The layer inside a model, adapted, and its input and output's gradient."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    a, b, scale, size, gradient = NUMBERS[numbers]
    layer = make()
    with torch.no_grad():
        layer.weight.div_(layer.weight.std()).mul_(0.1 / max(size, 1.0))
    entry = {"r": 2, "scale": scale or 1.0, "trainable_scale": 1, **WAYS[way]}
    model = paramlora.attach(nn.Sequential(layer).half().to(device), {"0": entry})
    ((_, _, update),) = updates(model)
    with torch.no_grad():
        update.lora_A.normal_().mul_(a)
        update.lora_B.normal_().mul_(b)
        update.lora_scale.fill_(scale)
    if shape is None:
        x = torch.randint(30, (2, 5)).to(device)
    else:
        x = (torch.randn(shape) * size).half().to(device).requires_grad_()
    y = model(x)
    return model, update, x, y, (torch.randn(y.shape) * gradient).half().to(device)


def reference(kind, model, update, x, dy):
    """The same in float64 by the dense definition, and the size of the scale's gradient's terms."""
    layer = model[0]
    hard = "parametrizations" in layer._modules
    base = layer.parametrizations.weight.original if hard else layer.weight
    leaves = [t.detach().double().requires_grad_() for t in update.plain().values()]
    a, b, scale = leaves
    delta = scale * b @ a
    if update.layout == "transposed":
        delta = delta.t()
    plain = LAYERS[kind][0]().double().to(x.device)
    wide = x.detach().double().requires_grad_() if x.is_floating_point() else x
    weights = {"weight": base.detach().double() + delta.reshape(base.shape)}
    bias = getattr(layer, "bias", None)
    if bias is not None:
        weights["bias"] = bias.detach().double()
    y = functional_call(plain, weights, (wide,))
    inputs = [wide] * wide.is_floating_point() + [*leaves, weights["weight"]]
    *grads, whole = torch.autograd.grad(y, inputs, dy.double())
    return y.detach(), grads, whole.norm() * (b @ a).norm()


def error(got, want):
    assert got.isfinite().all()
    if want.abs().max() == 0:
        return got.abs().max().item()
    return ((got.double() - want).norm() / want.norm()).item()


def check(kind, way, numbers, device, prepare=lambda model: model):
    model, update, x, y, dy = build(kind, way, numbers, device)
    y = prepare(model)(x)
    leaves = [x] * x.is_floating_point() + [update.lora_A, update.lora_B, update.lora_scale]
    got = torch.autograd.grad(y, leaves, dy)
    want_y, want, terms = reference(kind, model, update, x, dy)
    largest = max(t.abs().max() for t in (want_y, *want[: x.is_floating_point()]))
    assert largest < 65504, "the case asks for more than float16 has"
    assert y.dtype == torch.float16 and error(y, want_y) < 4 * EPS
    *matrices, (dscale, true_scale) = zip(got, want)
    for name, (mine, true), leaf in zip(("x", "A", "B")[-len(matrices) :], matrices, leaves):
        assert mine.dtype == leaf.dtype
        assert error(mine, true) < 4 * EPS, name
    assert dscale.isfinite() and abs(dscale - true_scale) <= 2 * EPS * terms, "scale"


def is_there(kind, way):
    """Whether the way evaluates the kind otherwise than by the definition."""
    if way == "hard":
        return not kind.startswith("transposed")
    return not (kind.startswith("embedding") or kind.startswith("transposed") and way == "dropping")


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("device", DEVICES)
def test_every_layer_is_finite_and_right(device, way, numbers):
    failed = {}
    for kind in LAYERS:
        if is_there(kind, way):
            try:
                check(kind, way, numbers, device)
            except AssertionError as wrong:
                failed[kind] = str(wrong).splitlines()[:2]
    assert not failed, failed


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_layer_is_too(device, numbers):
    if device == "cpu" and numbers not in ("a large scale", "a large B"):
        pytest.skip("one operator fewer than on CUDA")
    backend = "aot_eager" if device == "cpu" else "inductor"
    for kind in ("linear", "convolution"):
        torch.compiler.reset()
        check(
            kind,
            "hard",
            numbers,
            device,
            lambda m: torch.compile(m, backend=backend, fullgraph=True),
        )


LARGE = ("a large scale", "a large gradient", "beyond both ends")


@pytest.mark.parametrize("numbers", LARGE)
@pytest.mark.parametrize("kind", ("linear", "convolution", "convolution in groups"))
@pytest.mark.parametrize("way", WAYS)
def test_autocast_of_a_float32_model(kind, way, numbers):
    model, update, x, _, dy = build(kind, way, numbers)
    model = copy.deepcopy(model).float()
    ((_, _, update),) = updates(model)
    x = x.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.float16):
        y = model(x)
    got = torch.autograd.grad(y, [x, update.lora_A, update.lora_B], dy)
    want_y, want, _ = reference(kind, model, update, x, dy)
    assert y.dtype == torch.float16 and error(y, want_y) < 4 * EPS
    assert all(error(mine, true) < 4 * EPS for mine, true in zip(got, want))


@pytest.mark.parametrize("kind", ("linear", "convolution", "embedding"))
def test_factors_in_float16_themselves(kind):
    """Their product with the scale need not be finite, their update is."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    entry = {"r": 2, "scale": 30000, "adapter_dtype": "float16"}
    model = paramlora.attach(nn.Sequential(make()).half(), {"0": entry})
    ((_, _, update),) = updates(model)
    with torch.no_grad():
        update.lora_A.normal_().mul_(1e-5)
        update.lora_B.normal_().mul_(3)
    x = torch.randint(30, (2, 5)) if shape is None else torch.randn(shape).half()
    y = model(x)
    dy = torch.randn(y.shape).half()
    got = torch.autograd.grad(y, [update.lora_A, update.lora_B], dy * 1e-4)
    want_y, want, _ = reference(kind, model, update, x, dy * 1e-4)
    assert error(y, want_y) < 4 * EPS
    assert all(error(m, t) < 4 * EPS for m, t in zip(got, want[x.is_floating_point() :]))
    weight = model[0].weight
    a, b = update.lora_A.double(), update.lora_B.double()
    delta = 30000 * (b @ a)
    delta = delta.t() if update.layout == "transposed" else delta
    base = model[0].parametrizations.weight.original.double()
    assert error(weight, base + delta.reshape(base.shape)) < EPS


@pytest.mark.parametrize("numbers", LARGE)
def test_two_convolutions_in_a_row(numbers):
    a, b, scale, size, gradient = NUMBERS[numbers]
    torch.manual_seed(0)
    for make in (lambda: nn.Conv2d(4, 6, 3, padding=1), lambda: nn.ConvTranspose2d(4, 6, 3)):
        entry = {"r": 2, "hard": 0, "up_kernel": "same", "scale": scale}
        model = paramlora.attach(nn.Sequential(make()).half(), {"0": entry})
        ((_, _, update),) = updates(model)
        with torch.no_grad():
            update.lora_A.normal_().mul_(a)
            update.lora_B.normal_().mul_(b)
        wide = copy.deepcopy(model).double()
        x = (torch.randn(2, 4, 6, 5) * size).half()
        y, want = model(x), wide(x.double())
        assert error(y, want) < 4 * EPS
        dy, leaves = torch.randn(y.shape).half(), [update.lora_A, update.lora_B]
        ((_, _, other),) = updates(wide)
        got = torch.autograd.grad(y, leaves, dy)
        true = torch.autograd.grad(want, [other.lora_A, other.lora_B], dy.double())
        assert all(error(mine, t) < 4 * EPS for mine, t in zip(got, true))


@pytest.mark.parametrize("numbers", ("ordinary", *LARGE[:2]))
@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_gradients_and_many_at_once(way, numbers):
    """By plain operations; the first against the second way to the same gradients."""
    for kind in LAYERS:
        if not is_there(kind, way) or kind.startswith("embedding"):
            continue
        model, update, x, y, dy = build(kind, way, numbers)
        leaves = [x, update.lora_A, update.lora_B]
        _, want, _ = reference(kind, model, update, x, dy)
        again = torch.autograd.grad(y, leaves, dy, create_graph=True)
        many = torch.autograd.grad(model(x), leaves, torch.stack([dy, -dy]), is_grads_batched=True)
        for one, two, true in zip(again, many, want):
            assert one.requires_grad and error(one.detach(), true) < 4 * EPS, kind
            assert error(two[0], true) < 4 * EPS and error(-two[1], true) < 4 * EPS, kind


def test_a_row_does_not_see_what_the_others_hold():
    """Nor infinity, nor what is no number."""
    for kind in ("linear", "convolution"):
        model, update, x, y, _ = build(kind, "hard", "ordinary")
        bad = x.detach().clone()
        bad[-1] = torch.tensor([torch.inf, torch.nan]).repeat(bad[-1].numel() // 2).view_as(bad[-1])
        got = model(bad)
        assert error(got[:-1], y[:-1].detach().double()) < EPS
        assert not got[-1].isfinite().any()


RESCALED = {  # of A, B, the scale, the input and the output's gradient; DoRA has every sum's length
    "a sum beyond the range": (1.0, 1.0, 1e5, 1000.0, 1.0),
    "a large gradient": (1e-6, 1.0, 1e5, 0.1, 2000.0),
    "beyond both ends": (1e-30, 1e28, 1.0, 1.0, 1.0),
}
OF_DORA = ("linear", "transformers' Conv1D", "convolution in groups", "embedding with padding")


def rescaled_reference(model, update, base, x, dy, strength):
    """DoRA's output and gradients in float64, by its definition (a norm gets no gradient)."""
    leaves = [t.detach().double().requires_grad_() for t in update.plain().values()]
    magnitude, a, b, scale = (
        dict(zip(update.plain(), leaves))[f"lora_{name}"]
        for name in ("magnitude", "A", "B", "scale")
    )
    delta = (scale * b @ a).t() if update.layout == "transposed" else scale * b @ a
    base = base.double()
    total = base + delta.reshape(base.shape)
    dims = [dim for dim, size in enumerate(magnitude.shape) if size == 1]
    norm = torch.linalg.vector_norm(total.detach(), dim=dims, keepdim=True)
    weights = {"weight": torch.lerp(base, magnitude * total / norm, strength)}
    if getattr(model[0], "bias", None) is not None:
        weights["bias"] = model[0].bias.detach().double()
    wide = x.detach().double().requires_grad_() if x.is_floating_point() else x
    y = functional_call(model[1], weights, (wide,))
    inputs = [wide] * wide.is_floating_point() + [a, b, magnitude]
    return y.detach(), torch.autograd.grad(y, inputs, dy.double())


def check_rescaled(kind, numbers, entry, strength, autocast):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    a, b, scale, size, gradient = RESCALED[numbers]
    layer, plain = make(), make().double()
    with torch.no_grad():
        layer.weight.div_(layer.weight.std()).mul_(0.1 / max(size, 1.0))
    model = nn.ModuleList([layer.half(), plain])
    paramlora.attach(model, {"0": {"r": 2, "kind": "dora", "scale": scale, **entry}})
    ((_, _, update),) = updates(model)
    with torch.no_grad():
        update.lora_A.normal_().mul_(a)
        update.lora_B.normal_().mul_(b)
    paramlora.set_adapters(model, {"default": strength})
    base = model[0].parametrizations.weight.original.detach()
    if autocast:
        model.float()
    x = torch.randint(30, (2, 5)) if shape is None else (torch.randn(shape) * size).half()
    if shape is not None:
        x = (x.float() if autocast else x).requires_grad_()
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        y = model[0](x)
    assert y.dtype == (torch.float32 if autocast and shape is None else torch.float16)
    dy = (torch.randn(y.shape) * gradient).half()
    want_y, want = rescaled_reference(model, update, base, x, dy, strength)
    leaves = [x] * x.is_floating_point() + [update.lora_A, update.lora_B, update.lora_magnitude]
    got = torch.autograd.grad(y, leaves, dy.to(y.dtype))
    assert want_y.abs().max() < 65504, "the case asks for more than float16 has"
    assert error(y, want_y) < 4 * EPS
    for name, mine, true in zip(("magnitude", "B", "A", "x"), got[::-1], want[::-1]):
        assert error(mine, true) < 4 * EPS, name


@pytest.mark.parametrize("way", ("alone", "dropping", "weaker", "autocast"))
def test_a_rescaled_sum_need_not_be_in_range_itself(way):
    failed = {}
    entry = {"dropout": 1e-9} if way == "dropping" else {}
    for kind in OF_DORA:
        if kind.startswith("embedding") and way == "dropping":
            continue
        for numbers in RESCALED:
            try:
                strength = 0.5 if way == "weaker" else 1.0
                check_rescaled(kind, numbers, entry, strength, way == "autocast")
            except AssertionError as wrong:
                failed[kind, numbers] = str(wrong).splitlines()[:2]
    assert not failed, "\n".join(map(str, failed.items()))
