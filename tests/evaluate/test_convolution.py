"""Low-rank convolutions against float64: values and every gradient."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import paramlora
from paramlora.evaluate import choose, convolution
from paramlora.model.attach import updates
from tests.evaluate.layers import CUDA, WHICH, gradients

pytestmark = pytest.mark.usefixtures("needs_its_device")


@pytest.mark.parametrize("small", (0, choose.CARDS["cpu"].small))
def test_convolution_and_its_gradient_can_be_differentiated_again(small, monkeypatch):
    monkeypatch.setattr(choose, "_CPU", choose.Thresholds(small=small, light=2**17))
    x, weight = torch.randn(2, 4, 5).double(), torch.randn(4, 2, 3).double()
    a, b = torch.randn(2, 6).double(), torch.randn(4, 2).double()
    values = [x, weight, torch.randn(4).double(), a, b, torch.tensor(0.5).double()]
    values = [v.requires_grad_() for v in values]
    call = lambda *v: convolution.convolution(*v, (1,), (1,), (1,), 2)  # noqa: E731
    assert torch.autograd.gradcheck(call, values)
    assert torch.autograd.gradgradcheck(call, values)


@pytest.mark.parametrize("side", (2, 9))  # few positions take a branch, many the dense kernel
@pytest.mark.parametrize("groups", (1, 4))
@pytest.mark.parametrize("way", ("few", "own", "thin"))
@pytest.mark.parametrize("which", WHICH)
def test_convolution_and_only_the_wanted_gradients(side, groups, way, which, monkeypatch):
    if way != "few":
        monkeypatch.setattr(choose, "_CPU", choose.Thresholds())
    if way == "thin" and groups == 1:  # what a GPU takes

        def on_a_gpu(kernel, a, scaled, wanted):
            return convolution._from_thin(seed, values[0], a, scaled, shape, where, wanted)

        monkeypatch.setattr(convolution, "_from_kernel", on_a_gpu)
    x, weight = torch.randn(2, 8, side, side).double(), torch.randn(12, 8 // groups, 3, 3).double()
    shape, where = weight.shape, ((2, 1), (1, 2), (1, 2), groups)
    a, b = torch.randn(2, 72 // groups).double(), torch.randn(12, 2).double()
    values = [x, weight, torch.randn(12).double(), a, b, torch.tensor(0.7).double()]

    def reference(x, weight, bias, a, b, scale):
        return F.conv2d(x, weight + (scale * b @ a).reshape(shape), bias, *where)

    seed = torch.randn_like(reference(*values))
    y, got = gradients(lambda *v: convolution.convolution(*v, *where), values, which, seed)
    want_y, want = gradients(reference, values, which, seed)
    torch.testing.assert_close(y, want_y, rtol=1e-11, atol=1e-11)
    assert [g is not None for g in got] == [i in which for i in range(6)]
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("small", (0, choose.CARDS["cpu"].small))
@pytest.mark.parametrize("kind", ("bfloat16", "float64"))
def test_a_convolution_takes_factors_of_another_type(kind, small, monkeypatch):
    monkeypatch.setattr(choose, "_CPU", choose.Thresholds(small=small, light=2**17))
    layer = nn.Conv2d(4, 6, 3)
    model = paramlora.attach(nn.Sequential(layer), {"0": {"r": 2, "adapter_dtype": kind}})
    (_, _, update), x = next(updates(model)), torch.randn(2, 4, 9, 9)
    nn.init.normal_(update.lora_B)
    y = model(x)
    y.sum().backward()
    base = model[0].parametrizations.weight.original
    delta = (update.lora_B.float() @ update.lora_A.float()).reshape(base.shape)
    torch.testing.assert_close(y, F.conv2d(x, base + delta, layer.bias), rtol=1e-5, atol=1e-5)
    for factor in (update.lora_A, update.lora_B):
        assert factor.grad.dtype == factor.dtype and factor.grad.norm() > 0


@pytest.mark.parametrize("groups", (1, 8))
@pytest.mark.parametrize("device", ("cpu", CUDA))
def test_sixteen_bit_convolutions(groups, device):
    model = nn.Sequential(nn.Conv2d(8, 16, 3, groups=groups)).to(device, torch.bfloat16)
    wide = copy.deepcopy(model).double()
    paramlora.attach(model, {"0": {"r": 2}})
    ((_, _, low),) = updates(model)
    nn.init.normal_(low.lora_B, std=0.3)
    a, b = (t.detach().double().requires_grad_() for t in (low.lora_A, low.lora_B))
    total = wide[0].weight + (b @ a).reshape(wide[0].weight.shape)
    x = torch.randn(4, 8, 9, 9, device=device).bfloat16()
    want = F.conv2d(x.double(), total, wide[0].bias, groups=groups)
    y = model(x)
    seed = torch.randn_like(y)
    assert y.dtype == torch.bfloat16 and (y.double() - want).norm() < 0.01 * want.norm()
    y.backward(seed)
    want.backward(seed.double())
    for mine, true in ((low.lora_A.grad, a.grad), (low.lora_B.grad, b.grad)):
        assert mine.dtype == torch.float32 and (mine.double() - true).norm() < 0.02 * true.norm()


GEOMETRIES = [  # kernel, stride, padding, dilation, input
    ((3, 3), (1, 1), (1, 1), (1, 1), (7, 6)),
    ((3, 3), (2, 2), (1, 1), (1, 1), (8, 9)),
    ((4, 2), (2, 1), (1, 0), (1, 2), (8, 9)),
    ((3, 1), (1, 3), (4, 0), (2, 1), (6, 5)),  # a middle that meets the padding
    ((5,), (1,), (0,), (1,), (9,)),
    ((3, 2, 1), (1, 2, 1), (1, 0, 0), (1, 1, 1), (4, 5, 3)),
]


@pytest.mark.parametrize("kernel, stride, padding, dilation, size", GEOMETRIES, ids=str)
def test_joined_kernels_are_the_sum_and_their_gradients_too(
    kernel, stride, padding, dilation, size
):
    conv = convolution.CONVOLUTIONS[len(size) - 1]
    x, weight = torch.randn(2, 3, *size).double(), torch.randn(4, 3, *kernel).double()
    a, b = torch.randn(3, weight[0].numel()).double(), torch.randn(4, 3).double()
    values = (x, weight, torch.randn(4).double(), a, b, torch.tensor(0.7).double())
    where = (stride, padding, dilation)

    def definition(x, weight, bias, a, b, scale):
        return conv(x, weight + (scale * b @ a).reshape(weight.shape), bias, *where)

    def joined(*values):
        return convolution._Joined.apply(*values, *where)

    seed = torch.randn_like(definition(*values))
    y, got = gradients(joined, values, range(6), seed)
    want_y, want = gradients(definition, values, range(6), seed)
    torch.testing.assert_close(y, want_y, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    directions = [torch.randn_like(value) for value in values]

    def second(function):
        """Of the gradients along the directions; by every input and the seed."""
        *leaves, dy = (t.detach().requires_grad_() for t in (*values, seed))
        first = torch.autograd.grad(function(*leaves), leaves, dy, create_graph=True)
        return torch.autograd.grad(first, (*leaves, dy), directions, materialize_grads=True)

    torch.testing.assert_close(second(joined), second(definition), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("device", ("cpu", CUDA))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("stride", (1, 2))
def test_a_convolution_keeps_a_small_update(dtype, stride, device):
    weight = (torch.randn(64, 64, 3, 3, device=device) / 576**0.5).to(dtype)
    a, b = torch.randn(4, 576, device=device), torch.randn(64, 4, device=device)
    b *= 1e-3 * weight.double().norm() / (b @ a).norm()
    update = (b.double() @ a.double()).reshape(weight.shape)
    x = torch.randn(4, 64, 32, 32, device=device).to(dtype).requires_grad_()
    where = ((stride, stride), (1, 1), (1, 1), 1)
    y = convolution.convolution(x, weight, None, a, b, torch.ones((), device=device), *where)
    seed = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, seed)

    def exact(kernel):
        wide = x.detach().double().requires_grad_()
        out = F.conv2d(wide, kernel, None, *where)
        return out.detach(), torch.autograd.grad(out, wide, seed.double())[0]

    for got, base, part in zip((y, dx), exact(weight.double()), exact(update)):
        kept = ((got.double() - base) * part).sum() / part.square().sum()
        assert 0.98 < kept < 1.02, kept
