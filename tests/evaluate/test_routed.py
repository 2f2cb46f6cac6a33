"""What an adapter's rows give, and its gradients, are the same bits whichever adapters are beside
it: more or fewer of them, of smaller or larger ranks."""

from itertools import product

import pytest
import torch

from paramlora.evaluate import routed
from paramlora.update.choice import Choice

OTHERS = ((3, 4), (3, 6), (30, 4), (4, 70), (3, 4, 5, 9), (3,), ())


def choice(others, count, r):
    """Rows of which each third takes the adapter that is looked at, of rank r; and those."""
    taken = [i % 3 if i % 3 <= len(others) else len(others) + 1 for i in range(count)]
    names, index = tuple(map(str, range(len(others) + 1))), torch.tensor(taken)
    return Choice(names, (r, *others), index, 0), index == 0


def factors(ranks, fan_in, out, dtype):
    """A and B of each, and both joined."""
    pairs = []
    for at, r in enumerate(ranks):
        torch.manual_seed(100 * at + r)
        pairs.append(
            [torch.randn(s, dtype=dtype).requires_grad_() for s in ((r, fan_in), (out, r))]
        )
    return pairs


def joined(pairs, rows):
    down = routed.joined([a for a, _ in pairs], rows.ranks, 0)
    return down, routed.joined([b for _, b in pairs], rows.ranks, 1).t()


def linear(others, dtype, count, positions, r, fan_in, out):
    rows, mine = choice(others, count, r)
    pairs = factors((r, *others), fan_in, out, torch.float64 if dtype == torch.float64 else None)
    torch.manual_seed(0)
    x = torch.randn(count, positions, fan_in).to(dtype).requires_grad_()
    weight, dy = torch.randn(out, fan_in).to(dtype), torch.randn(count, positions, out).to(dtype)
    y = routed.linear(x, weight, None, *joined(pairs, rows), rows)
    dx, *own = torch.autograd.grad(y, [x, *pairs[0]], dy)
    return y[mine], dx[mine], *own


def embedding(others, dtype, count, positions, r, fan_in, out):
    rows, mine = choice(others, count, r)
    pairs = factors((r, *others), fan_in, out, None)
    torch.manual_seed(0)
    tokens, dy = torch.randint(fan_in, (count, positions)), torch.randn(count, positions, out)
    y = routed.embedding(tokens, torch.randn(fan_in, out).to(dtype), *joined(pairs, rows), rows)
    return y[mine], *torch.autograd.grad(y, pairs[0], dy.to(dtype))


def convolution(others, dtype, count, positions, r, fan_in, out):
    rows, mine = choice(others, count, r)
    pairs = factors((r, *others), fan_in * 3, out, None)
    torch.manual_seed(0)
    x = torch.randn(count, fan_in, positions + 2).to(dtype).requires_grad_()
    window = ((1,), (0,), (1,), 1)
    weight = torch.randn(out, fan_in, 3).to(dtype)
    y = routed.convolution(x, weight, None, *joined(pairs, rows), rows, window)
    dx, *own = torch.autograd.grad(y, [x, *pairs[0]], torch.ones_like(y))
    return y[mine], dx[mine], *own


def same(one, other):
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("positions", (1, 7, 20))
def test_a_linear_layer(dtype, positions):
    off = []
    for count, r, sides in product((4, 90), (2, 24), ((12, 16), (130, 150))):
        one, *rest = (linear(o, dtype, count, positions, r, *sides) for o in OTHERS)
        off += [(count, r, sides, o) for o, found in zip(OTHERS[1:], rest) if not same(one, found)]
    assert not off


@pytest.mark.parametrize("kind", (embedding, convolution))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_other_layers(kind, dtype):
    off = []
    for count, positions, r in product((4, 90), (1, 9), (2, 24)):
        one, *rest = (kind(o, dtype, count, positions, r, 16, 40) for o in OTHERS)
        off += [(count, r, o) for o, found in zip(OTHERS[1:], rest) if not same(one, found)]
    assert not off
