"""A low-rank linear layer's tensors, its dense sum, and gradients, on any device."""

import pytest
import torch
import torch.nn.functional as F

CUDA = pytest.param("cuda", marks=[pytest.mark.gpu])


def tensors(tokens, fan_in, out, r, device="cpu", dtype=torch.float64, size=1.0):
    x = torch.randn(*tokens, fan_in, device=device).to(dtype)
    weight = (torch.randn(out, fan_in, device=device) / fan_in**0.5).to(dtype)
    bias = torch.randn(out, device=device).to(dtype)
    factor = torch.float32 if dtype.itemsize == 2 else dtype
    a = torch.randn(r, fan_in, device=device).to(factor) / fan_in**0.5
    b = torch.randn(out, r, device=device).to(factor) * size / r**0.5
    return x, weight, bias, a, b, torch.tensor(0.7, device=device).to(factor)


def dense(x, weight, bias, a, b, scale, strength=1.0):
    return F.linear(x, weight + strength * scale * (b @ a), bias)


def gradients(call, values, which, seed):
    leaves = [v.detach().clone().requires_grad_(i in which) for i, v in enumerate(values)]
    y = call(*leaves)
    y.backward(seed.to(y.dtype))
    return y.detach(), [leaf.grad for leaf in leaves]


WHICH = [(0, 3, 4), (3, 4, 5), (0, 4), (3,), (0,), (0, 1, 2, 3, 4, 5), (4, 5)]
