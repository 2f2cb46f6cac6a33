"""A sweep on two CUDA devices: the cases of `test_distributed` over NCCL, and one model on both
devices.

Everything is float64 against the dense formula, as there; only the kernels' case is bfloat16.
"""

import pytest
import torch
from torch import nn
from torch.func import functional_call

import paramlora
from paramlora.model.attach import updates
from tests.model.test_devices import count_kernels
from tests.model.test_distributed import (
    CASES,
    CLOSE,
    CONFIG,
    adapted,
    assert_ran,
    batch,
    both,
    compare,
    dense_weights,
    half,
    here,
    net,
    state_of,
    train,
)

TWO = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def case_kernels(rank, mesh, folder):
    """A bfloat16 base in the kernels: the joint batch's gradients, float64's to 2 %."""
    from torch.distributed.fsdp import fully_shard

    def wide():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 64))
        model = paramlora.attach(model.to(here(), torch.bfloat16), {"re:[02]": {"r": 8}})
        for _, _, low in updates(model):
            nn.init.normal_(low.lora_B, std=0.05)
        return model

    ran = count_kernels(setattr)
    torch.manual_seed(4)
    x = torch.randn(64, 256).to(here(), torch.bfloat16)
    want = joint_gradients(wide(), x)
    for wrap in (nn.parallel.DistributedDataParallel, lambda m: fully_shard(m, mesh=mesh)):
        wrapped = wrap(wide())
        ran.clear()
        wrapped(*half(rank, x)).float().square().mean().backward()
        assert len(ran) == 2
        got = [p.grad for p in paramlora.trainable_parameters(wrapped)]
        assert len(got) == len(want) == 4
        for grad, exact in zip(got, want):
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            assert (grad.double() - exact).norm() < 0.02 * exact.norm()


def joint_gradients(model, x):
    """The factors' gradients from ``W + B·A`` in float64."""
    lows, weights = {path: low for path, _, low in updates(model)}, {}
    leaves = [t.detach().double().requires_grad_() for t in paramlora.trainable_parameters(model)]
    by_name = dict(zip([(p, n) for p in lows for n in "AB"], leaves))
    for path, low in lows.items():
        assert by_name[path, "A"].shape == low.lora_A.shape
        layer = model.get_submodule(path)
        base = layer.parametrizations.weight.original.double()
        weights[path] = base + by_name[path, "B"] @ by_name[path, "A"], layer.bias.double()
    hidden = torch.tanh(nn.functional.linear(x.double(), *weights["0"]))
    nn.functional.linear(hidden, *weights["2"]).square().mean().backward()
    return [leaf.grad for leaf in leaves]


NCCL = {**CASES, "kernels": case_kernels}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return both(tmp_path_factory.mktemp("nccl"), "nccl", NCCL)


@pytest.mark.parametrize("name", [pytest.param(name, marks=TWO) for name in NCCL])
def test_two_processes_over_nccl(results, name):
    assert_ran(results, NCCL, name)


# one process with both devices; the same on the CPU, where all is one device


def by_hand(model, first, second):
    """The first block on one device and the rest on the other, inputs sent after them."""
    for module, device in zip((*model.blocks, model.head), (first, second, second)):
        module.to(device)
        module.register_forward_pre_hook(lambda _, inputs, at=device: (inputs[0].to(at),))
    return model


def by_accelerate(model, first, second):
    accelerate = pytest.importorskip("accelerate")
    places = {"blocks.0": first, "blocks.1": second, "head": second}
    return accelerate.dispatch_model(model, places, main_device=first, force_hooks=True)


DEVICES = [("cpu", "cpu"), pytest.param((0, 1), marks=TWO)]
SPLITS = [by_hand, by_accelerate]


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("attach_first", (True, False))
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("hard", (1, 0))
def test_a_model_over_two_devices(tmp_path, split, attach_first, devices, hard):
    x, y = batch()
    start = state_of(adapted(hard=hard))
    if attach_first:
        model = split(adapted(hard=hard), *devices)
    else:
        config = {name: {**entry, "hard": hard} for name, entry in CONFIG.items()}
        model = paramlora.attach(split(net(), *devices), config)
        paramlora.load_adapter_state_dict(model, start)
    for path, _, low in updates(model):
        want = torch.device(devices[path != "blocks.0.up" and path != "blocks.0.down"])
        assert {t.device for t in low.parameters()} == {want}, path
    want = dense_weights(start, x, y)
    train_and_check(model, model, x, y, want, tmp_path)


@pytest.mark.parametrize("hard", (1, 0))
@pytest.mark.parametrize("checkpoint", (False, True))
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=TWO)])
def test_data_parallel(tmp_path, hard, checkpoint, device):
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("torch's DataParallel takes every device there is")
    x, y = batch()
    model = adapted(hard=hard)
    model.checkpoint = checkpoint
    want = dense_weights(state_of(model), x, y)
    wrapped = nn.DataParallel(model.to(device))
    train_and_check(wrapped, model, x, y, want, tmp_path)


def train_and_check(wrapped, model, x, y, want, folder):
    """Trained, saved, loaded elsewhere and merged where it lies, against the dense weights."""
    first = next(model.parameters()).device
    output = wrapped(x.to(first)).device
    train(wrapped, x.to(first), y.to(output))
    paramlora.save_adapter(wrapped, folder / "a.safetensors")
    compare(paramlora.load_adapter(net(), folder / "a.safetensors"), want)
    exact = functional_call(net(), want, (x,))
    torch.testing.assert_close(wrapped(x.to(first)).cpu(), exact, **CLOSE)
    places = {path: low.lora_A.device for path, _, low in updates(model)}
    paramlora.merge(model)
    for name, weight in want.items():
        merged = model.get_parameter(name)
        assert merged.device == places[name.removesuffix(".weight")]
        torch.testing.assert_close(merged.cpu(), weight, **CLOSE)
    torch.testing.assert_close(wrapped(x.to(first)).cpu(), exact, **CLOSE)
