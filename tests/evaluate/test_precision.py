"""A sweep of mixed and low precision: what comes out, in which type, and that nothing is cast
up."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import paramlora
from paramlora.evaluate import choose
from paramlora.model.attach import updates

HARD = pytest.mark.parametrize("hard", (1, 0))
NARROW = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
DEVICES = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
            ],
        ),
    ],
)


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


def net():
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(128, 32), nn.Linear(32, 8)
    )


ENTRIES = ("0", "3", "4")


def adapted(hard, device, dtype=torch.float32, **options):
    plain = net().to(device, dtype)
    model = copy.deepcopy(plain)
    paramlora.attach(model, {e: {"r": 2, "hard": hard, **options} for e in ENTRIES})
    for _, _, low in updates(model):
        nn.init.normal_(low.lora_B, std=0.05)
    return model, plain


def reference(model, plain, x):
    """Output and gradients of the same numbers in float64, by the dense formula."""
    dense = copy.deepcopy(plain).double().requires_grad_(False)
    factors, values = {}, dict(dense.named_parameters())
    for path, _, low in updates(model):
        a, b = (getattr(low, f"lora_{n}").detach().double().requires_grad_() for n in "AB")
        factors[path] = (a, b)
        weight = values[f"{path}.weight"]
        values[f"{path}.weight"] = weight + (b @ a).reshape(weight.shape)
    y = torch.func.functional_call(dense, values, (x.double(),))
    y.square().mean().backward()
    return y.detach(), {path: (a.grad, b.grad) for path, (a, b) in factors.items()}


def check(model, plain, x, y, eps):
    """Within some roundings of the narrow type, relative to the size of each tensor."""
    want, grads = reference(model, plain, x)
    assert (y.double() - want).norm() < 4 * eps * want.norm()
    for path, _, low in updates(model):
        for own, grad in zip((low.lora_A, low.lora_B), grads[path]):
            assert own.grad.dtype == own.dtype
            assert (own.grad.double() - grad).norm() < 8 * eps * grad.norm()


class Wide(TorchDispatchMode):
    """Collects the operations that make a wide tensor as large as an activation or a weight."""

    def __init__(self, at_least):
        super().__init__()
        self.at_least, self.found = at_least, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                if tensor.numel() >= self.at_least:
                    self.found.append((str(func), tuple(tensor.shape)))
        return out


@HARD
@NARROW
@DEVICES
def test_a_narrow_base(hard, dtype, device):
    model, plain = adapted(hard, device, dtype)
    x = torch.randn(16, 4, 4, 4, device=device, dtype=dtype)
    # the factors and their gradients are float32: at most 2·128 elements
    with Wide(at_least=600) as wide:
        y = model(x)
        assert y.dtype == dtype
        y.square().mean().backward()
    if device == "cpu":
        assert not wide.found, wide.found
    assert {low.lora_A.dtype for _, _, low in updates(model)} == {torch.float32}
    check(model, plain, x, y, torch.finfo(dtype).eps)


@HARD
@NARROW
@DEVICES
def test_everything_narrow(hard, dtype, device):
    model, plain = adapted(hard, device, dtype, adapter_dtype=str(dtype).split(".")[1])
    x = torch.randn(16, 4, 4, 4, device=device, dtype=dtype)
    with Wide(at_least=600) as wide:
        y = model(x)
        y.square().mean().backward()
    assert device == "cuda" or not wide.found, wide.found
    assert {p.dtype for p in model.parameters()} == {y.dtype} == {dtype}
    check(model, plain, x, y, torch.finfo(dtype).eps)


@HARD
@NARROW
@DEVICES
def test_autocast_of_a_float32_model(hard, dtype, device):
    model, plain = adapted(hard, device)
    x = torch.randn(16, 4, 4, 4, device=device)
    with torch.autocast(device, dtype):
        y = model(x)
        assert y.dtype == dtype
        loss = y.float().square().mean()
    loss.backward()
    check(model, plain, x, y, torch.finfo(dtype).eps)


@HARD
@NARROW
@DEVICES
def test_autocast_of_a_narrow_model(hard, dtype, device):
    model, plain = adapted(hard, device, dtype)
    x = torch.randn(16, 4, 4, 4, device=device)
    with torch.autocast(device, dtype):
        y = model(x)
        assert y.dtype == dtype
        loss = y.float().square().mean()
    loss.backward()
    check(model, plain, x, y, torch.finfo(dtype).eps)


FUNCTIONS = {  # what is no plain autograd, which computes what the context says
    "linear": (lambda: nn.Linear(256, 256), (512, 256)),
    "wide rank": (lambda: nn.Linear(256, 256), (512, 256)),
    "convolution": (lambda: nn.Conv2d(64, 64, 3, padding=1), (4, 64, 32, 32)),
    "pointwise": (lambda: nn.Conv2d(256, 256, 1), (4, 256, 16, 16)),
}


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@DEVICES
def test_autocast_around_a_backward_changes_no_gradient(kind, dtype, device, monkeypatch):
    """Only the forward's context counts, though an autograd function's operations meet this one;
    on CUDA in a thread where autocast's type is float16, which 1e5 overflows."""
    build, shape = FUNCTIONS[kind]
    monkeypatch.setattr(
        choose, "thresholds_of", lambda x: choose.Thresholds()
    )  # nothing is too small
    model = nn.Sequential(build()).to(device, dtype)
    paramlora.attach(model, {"0": {"r": 100 if kind == "wide rank" else 4}})
    for _, _, low in updates(model):
        nn.init.normal_(low.lora_B, std=0.05)
    x = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    leaves = [x, *paramlora.trainable_parameters(model)]
    dy, grads = torch.full_like(model(x), 1e5), []
    for inside in (False, True):
        y = model(x)
        with torch.autocast(device, torch.bfloat16, enabled=inside):
            grads.append(torch.autograd.grad(y, leaves, dy))
    for one, two in zip(*grads):
        assert one.isfinite().all() and torch.equal(one, two)


@HARD
@DEVICES
def test_a_scaler_unscales_and_skips_a_step_that_overflows(hard, device):
    model, plain = adapted(hard, device, torch.float16)
    twin = copy.deepcopy(model)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    optimizer = torch.optim.SGD(paramlora.trainable_parameters(model), lr=0.1)
    x = torch.randn(16, 4, 4, 4, device=device)

    def step(data):
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            loss = model(data).float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        grads = [p.grad.clone() for p in paramlora.trainable_parameters(model)]
        scaler.step(optimizer)
        scaler.update()
        return grads

    grads = step(x)
    _, want = reference(twin, plain, x.half())
    flat = [g for pair in want.values() for g in pair]
    assert len(flat) == len(grads)
    for own, grad in zip(grads, flat):
        assert (own.double() - grad).norm() < 0.02 * grad.norm()
    assert not torch.equal(
        paramlora.adapter_state_dict(model)["3.lora_B"],
        paramlora.adapter_state_dict(twin)["3.lora_B"],
    )
    before = {k: v.clone() for k, v in paramlora.adapter_state_dict(model).items()}
    step(x * 1e5)
    assert scaler.get_scale() < 2.0**10
    assert all(torch.equal(v, before[k]) for k, v in paramlora.adapter_state_dict(model).items())


@HARD
def test_small_updates_of_a_narrow_model_add_up(hard):
    """A thousand steps far below a bfloat16 rounding move the factors as far as in float64."""
    model = nn.Sequential(nn.Linear(4, 4)).to(torch.bfloat16)
    paramlora.attach(model, {"0": {"r": 2, "hard": hard}})
    ((_, _, low),) = updates(model)
    nn.init.ones_(low.lora_A)
    nn.init.ones_(low.lora_B)
    optimizer = torch.optim.SGD(paramlora.trainable_parameters(model), lr=1e-5)
    for _ in range(1000):
        low.lora_A.grad, low.lora_B.grad = torch.ones(2, 4), torch.ones(4, 2)
        optimizer.step()
    torch.testing.assert_close(low.lora_A.detach(), torch.full((2, 4), 0.99), rtol=1e-4, atol=0)
