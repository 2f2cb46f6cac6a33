"""Whether the kernels compute: by the device, and by the switch. The kernels themselves need CUDA
(`linear/test_plan`, and the last tests here)."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import paramlora
from paramlora.cuda import device
from paramlora.cuda import operands as served
from paramlora.evaluate import functional


@pytest.fixture
def x(monkeypatch):
    """A tensor on a device that the kernels run on; nothing is computed with it."""
    monkeypatch.setitem(device._SERVED, 0, True)
    with FakeTensorMode():
        yield torch.empty(4, 8, device="cuda:0", dtype=torch.bfloat16)


def answers(x):
    """What everything that chooses a kernel asks."""
    weight, scale = x.new_empty(8, 8), x.new_empty(())
    image, taps = x.new_empty(1, 8, 4, 4), x.new_empty(8, 1, 3, 3)
    where = ((1, 1), (1, 1), (1, 1))
    down, up = x.new_empty(1, 9), x.new_empty(8, 1)
    return (
        served.served(x),
        served.has_kernel(x, weight),
        served.is_depthwise(served.Operands(image, taps, None, down, up, scale), where, 8),
    )


ON, OFF = (True,) * 3, (False,) * 3


def test_a_call_switches_and_so_does_a_block(x):
    assert answers(x) == ON
    with paramlora.kernels(False):
        assert answers(x) == OFF
        with paramlora.kernels(True):
            assert answers(x) == ON
            paramlora.kernels(False)
            assert answers(x) == OFF
        assert answers(x) == OFF
    assert answers(x) == ON
    paramlora.kernels(False)
    try:
        assert answers(x) == OFF
        with paramlora.kernels(True):
            assert answers(x) == ON
        assert answers(x) == OFF
    finally:
        paramlora.kernels(True)
    assert answers(x) == ON


def test_a_block_is_left_by_an_error_too(x):
    with pytest.raises(KeyError), paramlora.kernels(False):
        raise KeyError
    assert answers(x) == ON


def test_blocks_that_overlap_end_as_they_began(x):
    one = paramlora.kernels(False)
    one.__enter__()
    two = paramlora.kernels(False)
    two.__enter__()
    one.__exit__(None, None, None)
    assert answers(x) == OFF
    two.__exit__(None, None, None)
    assert answers(x) == ON


def test_another_thread_sees_the_switch(x):
    found = []
    with paramlora.kernels(False):
        thread = threading.Thread(target=lambda: found.append(served.switched_on()))
        thread.start(), thread.join()
    assert found == [False] and served.switched_on()


@pytest.mark.parametrize("value, on", (("0", False), ("off", False), ("1", True), (None, True)))
def test_the_environment_switches_from_the_start(value, on):
    own = {k: v for k, v in os.environ.items() if k != "PARAMLORA_KERNELS"}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from paramlora.cuda.operands import switched_on; print(switched_on())",
        ],
        env=own if value is None else own | {"PARAMLORA_KERNELS": value},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(on), done.stderr


def test_compiled_code_is_guarded_by_the_switch():
    """What was compiled with the kernels is compiled again without them."""
    seen = []

    def backend(graph, _):
        seen.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True)
    def call(x):
        return x + 1 if served.switched_on() else x - 1

    assert call(torch.zeros(())) == 1
    with paramlora.kernels(False):
        assert call(torch.zeros(())) == -1
    assert call(torch.zeros(())) == 1 and len(seen) == 2


LAYERS = {
    "linear": (lambda: nn.Linear(64, 48), lambda: torch.randn(9, 64)),
    "convolution": (lambda: nn.Conv2d(16, 24, 3, padding=1), lambda: torch.randn(2, 16, 8, 8)),
    "pointwise": (lambda: nn.Conv2d(16, 24, 1), lambda: torch.randn(2, 16, 8, 8)),
    "depthwise": (
        lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16),
        lambda: torch.randn(2, 16, 8, 8),
    ),
}


def adapted(kind, dtype):
    torch.manual_seed(0)
    make, data = LAYERS[kind]
    model = paramlora.attach(nn.Sequential(make()).to("cuda", dtype), {"0": {"r": 2}})
    nn.init.normal_(model[0].parametrizations.weight[0].lora_B, std=0.1)
    x = data().cuda()
    return model, x.to(dtype).requires_grad_() if x.is_floating_point() else x


def step(model, x):
    y = model(x)
    y.backward(torch.ones_like(y))
    grads = [p.grad for p in paramlora.trainable_parameters(model)]
    model.zero_grad(set_to_none=True)
    return [y.detach(), *grads]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("backward_too", (True, False))
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_without_the_kernels_torch_computes_the_same(kind, dtype, backward_too, monkeypatch):
    """To roundings; and no launch at all, also in the backward of what the kernels computed."""
    launch = pytest.importorskip("paramlora.cuda.launch").Launch
    monkeypatch.setattr(functional, "_native", None)  # whose launches nobody sees here
    model, x = adapted(kind, dtype)
    want = step(model, x)
    launched, call = [], launch.__call__
    monkeypatch.setattr(
        launch, "__call__", lambda self, *args: (launched.append(self), call(self, *args))[1]
    )
    step(model, x)
    assert launched
    launched.clear()
    if backward_too:
        with paramlora.kernels(False):
            got = step(model, x)
    else:
        y = model(x)
        launched.clear()
        with paramlora.kernels(False):
            y.backward(torch.ones_like(y))
        got = [y.detach(), *(p.grad for p in paramlora.trainable_parameters(model))]
    assert not launched
    for mine, true in zip(got, want):
        assert (mine.double() - true.double()).norm() <= 0.02 * true.double().norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_without_the_kernels_no_custom_operator_is_compiled():
    model, x = adapted("linear", torch.bfloat16)
    graphs = []

    def backend(graph, _):
        graphs.append(graph.code)
        return graph.forward

    call = torch.compile(model, backend=backend, fullgraph=True)
    with paramlora.kernels(False):
        call(x)
    call(x)
    assert ["paramlora" in code for code in graphs] == [False, True]


@pytest.mark.parametrize("capability, rates, fits", [
    ((9, 0), (0.1, 0.2), True), ((10, 0), (0.1, 0.2), False), ((10, 0), (0.1,), True),
])  # fmt: skip
def test_several_masks_are_left_to_torch_on_blackwell(capability, rates, fits, monkeypatch):
    monkeypatch.setattr(served, "card", lambda index: device.Card(capability, 132))
    x = SimpleNamespace(is_cuda=True, get_device=lambda: 0)
    seed = SimpleNamespace(get_device=lambda: 0, dtype=torch.int64)
    of = SimpleNamespace(x=x, a=torch.zeros(32, 8))
    assert served.masks_fit(of, served.Drop(rates, seed)) is fits
