"""One 16-bit convolution on CUDA beside float64, and how near the kernels must come."""

import pytest
import torch

from paramlora.evaluate.convolution import convolution, dropped_convolution
from paramlora.evaluate.dropout import Drops, masked
from paramlora.evaluate.functional import image_of, positions


def convolved(sizes, shape, r, stride, padding, dilation, dtype, formats):
    """x, the weight, a bias, both factors and a scale; stride, padding and dilation; what gives an
    output its gradient."""
    (batch, *sizes), (out, inner, *kernel) = sizes, shape
    n, last = len(kernel), {2: torch.channels_last, 3: torch.channels_last_3d}
    if n == 1 and {*formats} & {*"xwy"}:
        pytest.skip("a signal has no such format")
    torch.manual_seed(0)
    where = tuple(v if isinstance(v, tuple) else (v,) * n for v in (stride, padding, dilation))
    fan_in = inner * torch.Size(kernel).numel()

    def random(*shape):
        return torch.randn(*shape, device="cuda")

    x = random(batch, out if inner == 1 else inner, *sizes)
    weight = random(out, inner, *kernel) / fan_in**0.5
    x, weight = (
        t.to(dtype, memory_format=last[n] if f in formats else torch.contiguous_format)
        for t, f in ((x, "x"), (weight, "w"))
    )
    bias, a, b = random(out).to(dtype), random(r, fan_in) / fan_in**0.5, random(r, out).t() / r**0.5
    leaves = [t.requires_grad_() for t in (x, weight, bias, a, b, torch.tensor(0.7, device="cuda"))]

    def seed(y):
        dy = torch.randn_like(y)
        dy = dy.to(memory_format=last[n]) if "y" in formats else dy
        return dy[:, :1].expand_as(dy) if "e" in formats else dy

    return leaves, where, seed


def dropped(leaves, where, rates):
    """The output of a convolution whose updates drop inputs, each of half of the ranks if there are
    two; and for each where its ranks lie and the input's mask."""
    x, weight, bias, a, b, scale = leaves
    share = len(a) // len(rates)
    ranks = [share] * (len(rates) - 1) + [len(a) - share * (len(rates) - 1)]
    drops = Drops(rates, tuple(ranks), torch.tensor(7, device="cuda"))
    y = dropped_convolution(x, lambda x: x, weight, bias, a, b, scale, (*where, 1), drops)
    seen, masks, start = torch.ones_like(x, dtype=torch.float64), [], 0
    for which, rank in enumerate(ranks):
        if weight.shape[2:].numel() == 1 and not any(where[1]) and set(where[0]) == {1}:
            # one position is a linear layer's row
            mask = image_of(masked(positions(seen), drops, which), x.shape)
        else:
            mask = masked(seen, drops, which)
        masks.append((slice(start, start + rank), mask))
        start += rank
    return y, masks


def compare_convolutions(leaves, where, seed, groups, one_rounding, rates=()):
    y, masks = (
        dropped(leaves, where, rates) if rates else (convolution(*leaves, *where, groups), None)
    )
    dy, eps = seed(y), torch.finfo(y.dtype).eps
    wide = [t.detach().double().requires_grad_() for t in leaves]
    conv = getattr(torch.nn.functional, f"conv{y.dim() - 2}d")
    want_y = conv(wide[0], wide[1], wide[2], *where, groups)
    for ranks, mask in masks or [(slice(None), 1.0)]:
        delta = wide[5] * wide[4][:, ranks] @ wide[3][ranks]
        want_y = want_y + conv(wide[0] * mask, delta.reshape(wide[1].shape), None, *where, groups)
    want = torch.autograd.grad(want_y, wide, dy.double())
    assert (y.double() - want_y).norm() <= (eps if one_rounding else 2 * eps) * want_y.norm()
    for subset in (range(6), (0, 3, 4), (3, 4), (0,), (4,)):
        some = [leaves[i] for i in subset]
        for i, mine in zip(subset, torch.autograd.grad(y, some, dy, retain_graph=True)):
            assert mine.dtype == leaves[i].dtype
            # the scale's is one sum, of terms that cancel
            size = want[i].norm() if i < 5 else want[4].norm() * wide[4].norm() / wide[5]
            assert (mine.double() - want[i]).norm() <= 2 * eps * size, (subset, i)
