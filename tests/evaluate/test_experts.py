"""Grouped products of experts' rows with their updates, against a loop in float64."""

import pytest
import torch

from paramlora.evaluate import experts as grouped
from paramlora.evaluate.dropout import Drops, drops_for, masked


@pytest.mark.parametrize("rates", ((0.4,), (0.4, 0.0, 0.2)), ids=str)
@pytest.mark.parametrize("transposed", (False, True))
def test_dropout_of_a_grouped_product(rates, transposed):
    """Each mask's outputs and gradients, against a loop over the experts."""
    torch.manual_seed(0)
    ranks, ends = tuple(range(1, len(rates) + 1)), torch.tensor([4, 4, 9, 12], dtype=torch.int32)
    x, r = torch.randn(12, 6).double(), sum(ranks)
    weight, a, b = (torch.randn(4, *s).double() for s in ((5, 6), (r, 6), (5, r)))
    scale = torch.tensor(0.6).double()
    values = [t.requires_grad_() for t in (x, weight, a, b, scale)]
    drops = drops_for(x, rates, ranks)
    y = grouped.grouped_linear(x, weight, ends, a, b, scale, 1.5, drops)
    expert, at = torch.tensor([0] * 4 + [2] * 5 + [3] * 3), 0
    right = torch.einsum("si,soi->so", x, weight[expert])
    for which, rank in enumerate(ranks):
        seen, own = masked(x, drops, which), slice(at, at + rank)
        delta = b[:, :, own] @ a[:, own] * scale * 1.5
        right, at = right + torch.einsum("si,soi->so", seen, delta[expert]), at + rank
    torch.testing.assert_close(y, right)
    g = torch.randn_like(y)
    got = torch.autograd.grad((y * g).sum(), values, retain_graph=True)
    want = torch.autograd.grad((right * g).sum(), values, create_graph=True)
    for one, two in zip(got, want):
        torch.testing.assert_close(one, two)
    twice = torch.autograd.grad((y * g).sum(), values, create_graph=True)
    some = [values[0], values[2], values[3]]
    got = torch.autograd.grad(sum(t.square().sum() for t in twice), some)
    want = torch.autograd.grad(sum(t.square().sum() for t in want), some)
    for one, two in zip(got, want):
        torch.testing.assert_close(one, two)


def test_a_small_update_is_kept_in_16_bits():
    torch.manual_seed(0)
    x, weight = torch.randn(256, 128), torch.randn(4, 96, 128) / 128**0.5
    a, b = torch.randn(4, 4, 128), torch.randn(4, 96, 4)
    b = b * 1e-3 * weight.norm() / (b @ a).norm()
    ends, one = torch.tensor([64, 128, 192, 256], dtype=torch.int32), torch.ones(())
    for dtype in (torch.bfloat16, torch.float16):
        low, w = x.to(dtype), weight.to(dtype)
        base = grouped.grouped_linear(low, w, ends, a[:, :0], b[..., :0], one)
        for drops in (None, Drops((0.1,), (4,), torch.tensor(7))):
            y = grouped.grouped_linear(low, w, ends, a, b, one, 1.0, drops)
            seen = low if drops is None else masked(low, drops, 0)
            change = torch.cat([seen[i * 64 : i * 64 + 64].double() @ (b @ a)[i].double().t()
                                for i in range(4)])  # fmt: skip
            share = ((y.double() - base.double()) * change).sum() / change.square().sum()
            assert 0.97 < share < 1.03


@pytest.mark.parametrize("rates", (None, (0.4,), (0.4, 0.0)), ids=str)
@pytest.mark.parametrize("transposed", (False, True))
def test_the_way_of_a_device_is_that_of_a_loop(rates, transposed, monkeypatch):
    """torch's grouped product, which a device gets, also runs on a CPU; ranks are padded there."""
    torch.manual_seed(0)
    ends = torch.tensor([4, 4, 9, 12], dtype=torch.int32)
    sizes = (16, 24) if transposed else (24, 16)
    weight, x = torch.randn(4, *sizes), torch.randn(12, 16)
    weight = weight.mT if transposed else weight
    a, b, scale = torch.randn(4, 3, 16), torch.randn(4, 24, 3), torch.tensor(0.6)
    values = [t.requires_grad_() for t in (x, weight.detach(), a, b, scale)]
    ranks = {None: (), 1: (3,), 2: (1, 2)}[rates and len(rates)]
    drops = None if rates is None else drops_for(x, rates, ranks)
    found = []
    for on_device in (False, True):

        def serves(x, *sizes, on_device=on_device):
            return on_device and not any(n % 8 for n in sizes)

        monkeypatch.setattr(grouped, "grouped_serves", serves)
        y = grouped.grouped_linear(x, values[1], ends, a, b, scale, 1.5, drops)
        (y * torch.arange(24)).square().sum().backward()
        found.append([y, *(t.grad.clone() for t in values)])
        for t in values:
            t.grad = None
    for one, two in zip(*found):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-3)


def test_gradients_in_float16_beyond_its_range():
    """An update whose factors alone would overflow."""
    torch.manual_seed(0)
    x, weight = torch.randn(8, 16).half().requires_grad_(), torch.randn(2, 12, 16).half()
    a, b = torch.randn(2, 2, 16) * 1e-4, torch.randn(2, 12, 2) * 0.1
    a, b = a.requires_grad_(), b.requires_grad_()
    ends, scale = torch.tensor([5, 8], dtype=torch.int32), torch.tensor(1e5)
    grouped.grouped_linear(x, weight, ends, a, b, scale).float().square().sum().backward()
    wide = [t.detach().double().requires_grad_() for t in (x, a, b)]
    total = weight.double() + 1e5 * wide[2] @ wide[1]
    right = torch.cat([wide[0][:5] @ total[0].t(), wide[0][5:] @ total[1].t()])
    right.square().sum().backward()
    for got, want in zip((x, a, b), wide):
        assert (got.grad.double() - want.grad).norm() < 1e-2 * want.grad.norm()
