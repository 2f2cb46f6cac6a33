"""Runs the kernels of experts in Triton's interpreter and prints their errors against float64.

`experts/test_plan` starts it in a process of its own; see `interpreted`. As there, of
float16 alone.
"""

import json
import sys
import warnings

import torch
from triton.runtime.interpreter import InterpreterBuilder

from paramlora.cuda.experts import plan
from paramlora.cuda.operands import Drop
from paramlora.evaluate import choose, dropout, experts, routed_experts
from paramlora.evaluate.dropout import Drops, masked
from paramlora.evaluate.sources import Chosen
from tests.cuda import interpreted
from tests.cuda.interpreted import dot_by_16, error, launched

# rows of each expert, rows of none, in, out, rank, numbers in a row of thin products
CASES = {
    "two experts": ([70, 33], 0, 64, 48, 4, 8),
    "one": ([100], 0, 40, 136, 16, 16),
    "many, some without rows": ([0, 3, 0, 129, 64, 1, 0], 0, 128, 272, 16, 16),
    "rows of none": ([20, 0, 65], 90, 64, 64, 5, 8),
    "odd sizes": ([9, 8, 7], 2, 37, 45, 3, 3),
    "a high rank": ([80, 10], 0, 64, 96, 100, 104),
    "few rows each": ([2, 1, 3, 2], 0, 192, 256, 8, 8),
    "long": ([1100, 1500], 0, 64, 32, 8, 8),
}
LAYOUTS = {  # of the weights [experts, in, out]
    "columns": lambda w: w.mT.contiguous().mT,
    "rows": lambda w: w.contiguous(),
    "every other": lambda w: w.repeat_interleave(2, 0)[::2],
}


def by_expert(sizes, compute):
    """What it gives for the rows of each expert, one after the other."""
    starts = [sum(sizes[:e]) for e in range(len(sizes))]
    return torch.cat(
        [compute(e, slice(at, at + n)) for e, (at, n) in enumerate(zip(starts, sizes))]
    )


def computed(case, layout, rate):
    """Errors of all that the kernels compute of one case, and the kernels that ran."""
    sizes, beyond, fan_in, out, r, width = CASES[case]
    M, experts = sum(sizes) + beyond, len(sizes)
    ends = torch.tensor(sizes).cumsum(0).int()
    x, dy = torch.randn(M, fan_in).half(), torch.randn(M, out).half()
    w = LAYOUTS[layout]((torch.randn(experts, fan_in, out) / fan_in**0.5).half())
    a = (torch.randn(experts, r, fan_in) / fan_in**0.5).half()
    b = (torch.randn(experts, out, r) / r**0.5).half()
    bias = torch.randn(experts, out).half() if rate else None
    drop = Drop((rate,), torch.randint(2**62, ())) if rate else None
    launched.clear()
    u = plan.thin(x, a, ends, width, drop)
    y = plan.product(x, w, ends, u, b.mT, None, bias)
    v = plan.thin(dy, b.mT, ends, width, None)
    dx = plan.product(dy, w.mT, ends, v, a, drop)
    da, db = plan.sums(x, v, dy, u, ends, r, drop, (True, True))
    assert torch.equal(da, plan.sums(x, v, dy, v, ends, r, drop, (True, False))[0])
    assert torch.equal(db, plan.sums(x, v, dy, u, ends, r, drop, (False, True))[1])
    assert not y[sum(sizes) :].any() and not dx[sum(sizes) :].any(), "rows of none"
    n = sum(sizes)
    seen = x[:n].double()
    kept = torch.ones(n, fan_in)
    if rate:
        kept = masked(torch.ones(M, fan_in), Drops((rate,), (r,), drop.seed), 0)[:n]
        assert 0 < kept.mean() < 1
    wide = [t.double() for t in (w, a, b, dy, u, v)]
    W, A, B, DY, U, V = wide
    shift = 0 if bias is None else bias.double()[:, None]
    want_u = by_expert(sizes, lambda e, s: (kept * seen)[s] @ A[e].t())
    want_y = by_expert(sizes, lambda e, s: seen[s] @ W[e] + want_u[s] @ B[e].t()
                       + (shift[e] if rate else 0))  # fmt: skip
    want_v = by_expert(sizes, lambda e, s: DY[s] @ B[e])
    want_dx = by_expert(sizes, lambda e, s: DY[s] @ W[e].t() + kept[s] * (want_v[s] @ A[e]))
    want_da = by_expert(sizes, lambda e, s: (want_v[s].t() @ (kept * seen)[s])[None])
    want_db = by_expert(sizes, lambda e, s: (DY[:n][s].t() @ want_u[s])[None])
    assert not u[:n, r:].any() and not v[:n, r:].any(), "padding"
    pairs = {
        "u": (u[:n, :r], want_u), "y": (y[:n], want_y), "v": (v[:n, :r], want_v),
        "x": (dx[:n], want_dx), "A": (da, want_da), "B": (db, want_db),
    }  # fmt: skip
    return {name: error(*pair) for name, pair in pairs.items()}


SCALES = {
    "ordinary": (1.0, 1.0, 1.0),
    "a large scale": (1e-4, 1.0, 1e5),
    "a large A": (1e6, 1e-7, 1.0),
}


def whole(sizes, rate, numbers, transposed):
    """Errors of `grouped_linear` and its gradients, eagerly and by the operator for compilers; of
    rows that are tokens, each taken twice, and with a bias, where `transposed`."""
    ends, M, top = torch.tensor(sizes).cumsum(0).int(), sum(sizes), 2 if transposed else 1
    x, dy = torch.randn(M // top, 40).half(), torch.randn(M, 24).half()
    order = torch.randperm(M)
    source = Chosen(order, order.argsort(), top, False) if transposed else None
    bias = torch.randn(len(sizes), 24).half() if transposed else None
    weight = (torch.randn(len(sizes), 24, 40) / 40**0.5).half()
    weight = weight.mT.contiguous().mT if transposed else weight
    size_a, size_b, scale = SCALES[numbers]
    a, b = (
        size_a * torch.randn(len(sizes), 3, 40) / 40**0.5,
        size_b * torch.randn(len(sizes), 24, 3),
    )
    leaves = [t.requires_grad_() for t in (x, a, b, torch.tensor(scale))]
    drops = Drops((rate,), (3,), torch.tensor(1234567)) if rate else None
    launched.clear()
    y = experts.grouped_linear(x, weight, ends, *leaves[1:], 0.5, drops, source, bias)
    got = [y, *torch.autograd.grad(y, leaves, dy)]
    masks = ([rate], [3], drops.seed) if rate else ([], [], None)
    chosen = (bias, *source) if transposed else (None, None, None, 1, False)
    halved = leaves[3] * 0.5
    op = torch.ops.paramlora.grouped_linear
    again, _ = op(x, weight, ends, *leaves[1:3], halved, *masks, *chosen)
    assert torch.equal(y, again)
    for one, two in zip(got[1:], torch.autograd.grad(again, leaves, dy)):
        torch.testing.assert_close(one, two)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    rows = wide[0][order // top] if transposed else wide[0]
    seen = rows * masked(torch.ones(M, 40), drops, 0) if rate else rows
    sums = weight.double(), 0.5 * wide[3] * wide[2] @ wide[1]
    shift = torch.zeros(len(sizes), 24) if bias is None else bias.double()
    want = by_expert(sizes, lambda e, s: rows[s] @ sums[0][e].t() + seen[s] @ sums[1][e].t()
                     + shift[e])  # fmt: skip
    want = [want, *torch.autograd.grad(want, wide, dy.double())]
    errors = {name: error(*pair) for name, *pair in zip("yxAB", got, want)}
    terms = (want[3].norm() * b.norm() / scale).item()  # the sum may cancel
    return errors | {"scale": (got[4].double() - want[4]).abs().item() / terms}


SEVERAL = [  # ranks and rates of a layer's adapters
    ((3, 20), (0.3, 0.6)),
    ((16, 16), (0.3, 0.0)),
    ((1, 16, 2), (0.5, 0.2, 0.4)),
]


def linear(numbers, shape, transposed, with_bias, ranks=(3,), rates=(0.3,)):
    """Errors of a linear layer under dropout and its gradients."""
    fan_in, (size_a, size_b, scale) = shape[-1], SCALES[numbers]
    x, dy = torch.randn(shape).half(), torch.randn(*shape[:-1], 24).half()
    weight = (torch.randn(24, fan_in) / fan_in**0.5).half()
    weight = weight.t().contiguous().t() if transposed else weight
    bias = torch.randn(24).half() if with_bias else None
    r = sum(ranks)
    a, b = size_a * torch.randn(r, fan_in) / fan_in**0.5, size_b * torch.randn(24, r)
    leaves = [t.requires_grad_() for t in (x, a, b, torch.tensor(scale))]
    drops = Drops(rates, ranks, torch.tensor(1234567))
    launched.clear()
    y = dropout.dropped_linear(x, weight, bias, *leaves[1:], 0.5, drops)
    got = [y, *torch.autograd.grad(y, leaves, dy)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    want = wide[0] @ weight.double().t()
    pairs = zip(wide[1].split(ranks), wide[2].split(ranks, 1))
    for which, (down, up) in enumerate(pairs):
        seen = masked(torch.ones(shape), drops, which) * wide[0]
        want = want + 0.5 * wide[3] * seen @ down.t() @ up.t()
    want = want if bias is None else want + bias.double()
    want = [want, *torch.autograd.grad(want, wide, dy.double())]
    errors = {name: error(*pair) for name, *pair in zip("yxAB", got, want)}
    terms = (want[3].norm() * b.norm() / scale).item()  # the sum may cancel
    return errors | {"scale": (got[4].double() - want[4]).abs().item() / terms}


def pairs(small, others=(3, 5)):
    """Errors of rows that take different updates of each expert's matrix, through autograd, or the
    share that is kept of small updates; and what ran."""
    torch.manual_seed(0)
    per_expert, ranks = [70, 0, 45], (4, *others)
    M, experts = 115, torch.tensor([0] * 70 + [2] * 45)
    adapters = torch.arange(M) * 5 % 4  # the last is the base
    x = torch.randn(M, 48).half().requires_grad_()
    weight, bias = torch.randn(3, 40, 48).half() / 7, torch.randn(3, 40).half()
    dy, factors = torch.randn(M, 40).half(), []
    for rank in ranks:
        torch.manual_seed(rank)
        factors.append((torch.randn(3, rank, 48) / 7, torch.randn(3, rank, 40) / rank**0.5))
    down, up = [a for a, _ in factors], [(1e-3 if small else 1) * b for _, b in factors]
    leaves = [x, *(t.requires_grad_() for t in (*down, *up))]
    sorted_by = routed_experts.pairs_of(experts, adapters, 3, 3)
    ends = torch.tensor(per_expert).cumsum(0)
    launched.clear()
    y = routed_experts.grouped_linear_of_rows(x, weight, ends, down, up, sorted_by, bias=bias)
    got = [y, *torch.autograd.grad(y, leaves, dy)]
    if others != (3, 5):  # what those of one adapter are, whatever is beside them
        return [y[adapters == 0], got[1][adapters == 0], got[2], got[5]]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    base = [wide[0][i] @ weight[e].double().t() + bias[e].double() for i, e in enumerate(experts)]
    terms = [
        wide[0][i] @ wide[1 + n][e].t() @ wide[4 + n][e] if n < 3 else 0 * base[0]
        for i, (e, n) in enumerate(zip(experts.tolist(), adapters.tolist()))
    ]
    base, term = torch.stack(base), torch.stack(terms)
    want = [base + term, *torch.autograd.grad(base + term, wide, dy.double())]
    if small:
        mine = adapters < 3
        gained = ((y.double() - base) * term)[mine].sum() / term[mine].square().sum()
        return gained.item(), (term[mine].norm() / base[mine].norm()).item()
    return max(error(*pair) for pair in zip(got, want)), launched[:]


def main():
    interpreted.stand_in_for_the_device()
    experts.served = lambda x: x.dtype == torch.float16
    dropout.has_kernel = lambda x, weight: x.dtype == torch.float16
    choose._SEEN[-1] = choose.Thresholds(dropout=True, experts=True)
    warnings.simplefilter("error")
    results = {}
    for number, case in enumerate(CASES):
        for way, of in (("hopper", (9, 0)), ("others", (8, 6))):
            plan.card = lambda device, of=of: interpreted.Card(of, 132)
            plan._PLANS.clear()
            for step, rate in enumerate((0.0, 0.4) if way == "hopper" else (0.4 * (number % 2),)):
                layout = list(LAYOUTS)[(number + step) % 3]
                torch.manual_seed(0)
                errors = computed(case, layout, rate)
                results[f"{case}, {layout}, {rate}, {way}"] = errors, launched[:]
    for numbers in SCALES:
        for rate, transposed in ((0.0, False), (0.3, True)):
            torch.manual_seed(0)
            errors = whole([10, 0, 20], rate, numbers, transposed)
            results[f"whole, {numbers}, {rate}"] = errors, launched[:]
    for numbers, *case in (
        ("ordinary", (70, 40), False, True),
        ("a large scale", (2, 33, 40), True, False),
        ("a large A", (1, 37), False, True),
    ):
        torch.manual_seed(0)
        errors = linear(numbers, *case)
        results[f"linear, {numbers}, {case}"] = errors, launched[:]
    for ranks, rates in SEVERAL:
        torch.manual_seed(0)
        case = linear("ordinary", (2, 33, 40), False, True, ranks, rates)
        results[f"several, {ranks}, {rates}"] = case, launched[:]
    for way, of in (("hopper", (9, 0)), ("others", (8, 6))):
        plan.card = lambda device, of=of: interpreted.Card(of, 132)
        plan._PLANS.clear()
        results[f"pairs, {way}"] = pairs(False), pairs(True)
    InterpreterBuilder.create_dot = dot_by_16
    one, *more = (pairs(False, others) for others in ((3, 6), (20, 1), (16, 33)))
    results["pairs, beside"] = [[torch.equal(*pair) for pair in zip(one, other)] for other in more]
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
