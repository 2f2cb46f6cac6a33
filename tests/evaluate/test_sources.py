"""Grouped products whose rows are made of tokens or of an activation, against a loop in float64."""

import pytest
import torch
import torch.nn.functional as F

from paramlora.evaluate import experts as grouped
from paramlora.evaluate import sources
from paramlora.evaluate.dropout import drops_for, masked
from paramlora.evaluate.sources import Chosen, Computed

TOKENS, TOP, EXPERTS, FAN_IN, OUT = 7, 3, 4, 6, 5


def gated(y):
    gate, up = y.chunk(2, -1)
    return F.silu(gate) * up


def choices(partial):
    """Each token's experts, of which one gets nothing, and perhaps some that are not here."""
    torch.manual_seed(0)
    few = torch.stack([torch.randperm(EXPERTS)[:TOP] for _ in range(TOKENS)])
    few[few == 1] = EXPERTS if partial else 0
    return few


def sorted_rows(index, partial):
    ids, order = torch.sort(index.reshape(-1))
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    ends = torch.searchsorted(ids, torch.arange(EXPERTS), right=True, out_int32=True)
    return ids, order, ends, Chosen(order, back, TOP, partial)


def values(kind):
    torch.manual_seed(1)
    x = torch.randn(TOKENS if kind == "chosen" else TOKENS * TOP, (1 + (kind != "chosen")) * FAN_IN)
    weight, a, b = (torch.randn(EXPERTS, *s) for s in ((OUT, FAN_IN), (2, FAN_IN), (OUT, 2)))
    return [t.double().requires_grad_() for t in (x, weight, a, b, torch.tensor(0.6))]


def by_definition(kind, order, ids, leaves, bias, drops):
    """Each row by its own expert's sum, written out; of a row of none zeros."""
    x, weight, a, b, scale = leaves
    rows = x[order // TOP] if kind == "chosen" else gated(x)
    own = ids.clamp(max=EXPERTS - 1)
    seen = rows if drops is None else masked(rows, drops, 0)
    y = torch.einsum("si,soi->so", rows, weight[own]) + bias[own]
    y = y + torch.einsum("si,soi->so", seen, (b @ a * scale)[own])
    return y.masked_fill((ids >= EXPERTS)[:, None], 0)


@pytest.mark.parametrize("how", ("eager", "compiled", "transformed"))
@pytest.mark.parametrize("rate", (0.0, 0.4))
@pytest.mark.parametrize("kind", ("chosen", "computed"))
@pytest.mark.parametrize("partial", (False, True))
def test_outputs_and_gradients(how, rate, kind, partial):
    ids, order, ends, chosen = sorted_rows(choices(partial), partial)
    source, leaves = chosen if kind == "chosen" else Computed(gated), values(kind)
    drops = drops_for(leaves[0], (rate,), (2,)) if rate else None
    bias = torch.randn(EXPERTS, OUT).double()

    def run(x, weight, a, b, scale):
        y = grouped.grouped_linear(x, weight, ends, a, b, scale, 1.0, drops, source, bias)
        return y.masked_fill((ids >= EXPERTS)[:, None], 0)

    if how == "compiled":
        torch.compiler.reset()
        run = torch.compile(run, backend="aot_eager", fullgraph=True)
    g = torch.randn(TOKENS * TOP, OUT).double()
    want = by_definition(kind, order, ids, leaves, bias, drops)
    grads = torch.autograd.grad((want * g).sum(), leaves)
    if how == "transformed":
        y, pull = torch.func.vjp(run, *leaves)
        got = pull(g)
    else:
        y = run(*leaves)
        got = torch.autograd.grad((y * g).sum(), leaves)
    torch.testing.assert_close(y, want)
    for one, two in zip(got, grads):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("kind", ("chosen", "computed"))
def test_gradients_of_gradients(kind):
    ids, order, ends, chosen = sorted_rows(choices(False), False)
    source, leaves = chosen if kind == "chosen" else Computed(gated), values(kind)
    bias, found = torch.zeros(EXPERTS, OUT).double(), []
    for run in (
        lambda: grouped.grouped_linear(leaves[0], leaves[1], ends, *leaves[2:], source=source),
        lambda: by_definition(kind, order, ids, leaves, bias, None),
    ):
        first = torch.autograd.grad(run().square().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for one, two in zip(*found):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("only", range(5))
@pytest.mark.parametrize("compiled", (False, True))
@pytest.mark.parametrize("kind", ("chosen", "computed"))
def test_one_gradient_alone(kind, only, compiled):
    """What is not asked for is not kept, nor computed."""
    ids, order, ends, chosen = sorted_rows(choices(False), False)
    source, leaves = chosen if kind == "chosen" else Computed(gated), values(kind)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i == only)
    bias = torch.zeros(EXPERTS, OUT).double()

    def run(x, weight, a, b, scale):
        return grouped.grouped_linear(x, weight, ends, a, b, scale, source=source)

    if compiled:
        torch.compiler.reset()
        run = torch.compile(run, backend="aot_eager", fullgraph=True)
    want = by_definition(kind, order, ids, leaves, bias, None)
    (right,) = torch.autograd.grad(want.square().sum(), leaves[only])
    (got,) = torch.autograd.grad(run(*leaves).square().sum(), leaves[only])
    torch.testing.assert_close(got, right)


def test_rows_of_nobody_give_no_gradient_where_a_device_leaves_them(monkeypatch):
    """torch's grouped product does not write the rows behind the last expert's."""
    product = grouped.grouped_product

    def unwritten(x, w, offs):
        y = product(x, w, offs=offs)
        if x.dim() == w.dim() == 2:
            return y
        return y.masked_fill(torch.arange(len(y))[:, None] >= offs[-1], torch.nan)

    monkeypatch.setattr(grouped, "grouped_product", unwritten)
    monkeypatch.setattr(grouped, "grouped_serves", lambda x, *sizes: not any(n % 8 for n in sizes))
    ids, order, ends, chosen = sorted_rows(choices(True), True)
    torch.manual_seed(2)
    x, weight = torch.randn(TOKENS, 16).requires_grad_(), torch.randn(EXPERTS, 24, 16)
    a, b = torch.randn(EXPERTS, 2, 16), torch.randn(EXPERTS, 24, 2)
    one = torch.ones(())
    y = grouped.grouped_linear(x, weight, ends, a, b, one, source=chosen)
    here = (ids < EXPERTS)[:, None]
    (got,) = torch.autograd.grad(y.masked_fill(~here, 0).square().sum(), x)
    wide = x.detach().double().requires_grad_()
    total = (weight.double() + b.double() @ a.double())[ids.clamp(max=EXPERTS - 1)]
    right = torch.einsum("si,soi->so", wide[order // TOP], total).masked_fill(~here, 0)
    (want,) = torch.autograd.grad(right.square().sum(), wide)
    assert torch.isnan(y[-1]).all()
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-3)


def test_a_gradient_of_many_rows_takes_some_at_a_time(monkeypatch):
    seen, y = [], torch.randn(50, 2 * FAN_IN).double()

    def rows(y):
        seen.append(len(y))
        return gated(y)

    dx, leaf = torch.randn(50, FAN_IN).double(), y.clone().requires_grad_()
    (want,) = torch.autograd.grad(gated(leaf), leaf, dx)
    monkeypatch.setattr(sources, "_BLOCK", 16 * y[0].nbytes)
    made, pulled = Computed(rows).again(y, dx)
    assert torch.equal(made, gated(y)) and not made.requires_grad
    torch.testing.assert_close(pulled(dx), want, rtol=0, atol=0)
    assert seen == [50, 16, 16, 16, 2]
    assert Computed(rows).again(y[:0], dx)[1](dx[:0]).shape == (0, 2 * FAN_IN)
    monkeypatch.undo()
    seen.clear()
    made, pulled = Computed(rows).again(y, dx)
    assert torch.equal(made, gated(y)) and not made.requires_grad
    torch.testing.assert_close(pulled(dx), want, rtol=0, atol=0)
    assert seen == [50]  # few enough to be computed once for both
