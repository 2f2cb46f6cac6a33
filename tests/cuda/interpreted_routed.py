"""Runs the kernels of rows that take different updates in Triton's interpreter and prints their
errors against float64.

`routed/test_plan` starts it in a process of its own; see `interpreted`. As there, of
float16 alone.
"""

import json
import sys
import warnings

import torch
from triton.runtime.interpreter import InterpreterBuilder

from paramlora.cuda.decoding import kernels as decoding_kernels
from paramlora.cuda.decoding import plan as decoding
from paramlora.cuda.routed import kernels, plan
from paramlora.evaluate import routed
from paramlora.update.choice import Choice
from tests.cuda import interpreted
from tests.cuda.interpreted import dot_by_16, error, launched

# the update of each row (the last is none), positions of each, ranks, in, out
CASES = {
    "sorted": ([0] * 3 + [1] * 2 + [2], 40, (4, 16, 3), 64, 48),
    "mixed": ([1, 0, 2, 1, 2, 0, 1], 33, (5, 3), 64, 80),
    "one position": ([k * 7 % 4 for k in range(150)], 1, (2, 9, 1), 128, 272),
    "one update": ([0, 0], 70, (16,), 45, 37),
    "none's rows": ([2, 2, 0, 2], 20, (4, 4), 64, 64),
    "a high rank": ([0, 1, 1, 0], 17, (100, 7), 64, 96),
    "long": ([0, 1] * 3, 400, (8, 8), 64, 32),
}
LAYOUTS = [lambda w: w, lambda w: w.t().contiguous().t()]


def computed(case, laid):
    """Errors of all that the kernels compute of one case."""
    taken, P, ranks, fan_in, out = CASES[case]
    rows = Choice(tuple(map(str, ranks)), ranks, torch.tensor(taken), 0)
    by, ranks = rows.sorted_by(P), rows.ranks
    M, total = len(taken) * P, sum(ranks) + 1
    x, dy = torch.randn(M, fan_in).half(), torch.randn(M, out).half()
    weight, bias = laid((torch.randn(out, fan_in) / fan_in**0.5).half()), torch.randn(out).half()
    down = (torch.randn(total, fan_in) / fan_in**0.5).half()
    up = torch.randn(out, total).half().t() / 4
    launched.clear()
    u = plan.thin(x, down, by)
    y = plan.product(x, weight.t(), u, up, by, bias)
    v = plan.thin(dy, up, by)
    dx = plan.product(dy, weight, v, down, by)
    da, db = plan.sums(x, v, dy, u, by, total, (True, True))
    assert torch.equal(da, plan.sums(x, v, dy, None, by, total, (True, False))[0])
    assert torch.equal(db, plan.sums(x, None, dy, u, by, total, (False, True))[1])
    masks = torch.zeros(M, total).double()  # whose each rank is
    for row, which in enumerate(taken):
        start = sum(ranks[:which])
        if which < len(ranks):
            masks[row * P : row * P + P, start : start + ranks[which]] = 1
    X, DY, W, A, B = (t.double() for t in (x, dy, weight, down, up))
    U, V = masks * (X @ A.t()), masks * (DY @ B.t())
    pairs = {
        "y": (y, X @ W.t() + U @ B + bias.double()), "x": (dx, DY @ W + V @ A),
        "A": (da, V.t() @ X), "B": (db, U.t() @ DY),
    }  # fmt: skip
    return {name: error(*pair) for name, pair in pairs.items()}


FEW = {  # the update of each row (the last is none), positions of each, ranks, in, out, factors
    "each its own": (list(range(9)) + [3], 1, (4,) * 9, 300, 130, torch.half),
    "some": ([1, 0, 2, 1, 2], 3, (5, 17), 256, 80, torch.float32),
    "none's": ([1, 1], 1, (16,), 128, 64, torch.half),
    "many": ([k % 3 for k in range(40)], 2, (16, 16, 16), 700, 48, torch.float32),
}


def few(case, spoilt=None):
    """The error of few rows, which read the factors where they lie; of those that do not take an
    update that is spoilt, and whether all others are no numbers."""
    taken, P, ranks, fan_in, out, kind = FEW[case]
    rows = Choice(tuple(map(str, ranks)), ranks, torch.tensor(taken), 0)
    x, weight = torch.randn(len(taken) * P, fan_in).half(), torch.randn(out, fan_in).half()
    bias = torch.randn(out).half() if P > 1 else None
    parts = [
        decoding.Part(
            torch.randn(r, fan_in, dtype=kind) / 8, torch.randn(out, r, dtype=kind),
            torch.tensor(0.5 + which, dtype=kind), torch.tensor(1 / (1 + which)),
        )
        for which, r in enumerate(ranks)
    ]  # fmt: skip
    if spoilt is not None:
        parts[spoilt].a[0, 0], parts[spoilt].b[1, 0] = float("nan"), float("inf")
        parts[spoilt].scale.fill_(float("nan"))
    launched.clear()
    table = decoding.table_of(*zip(*parts), weight)
    assert table.at is decoding.table_of(*zip(*parts), weight).at
    y = decoding.product(x, weight, bias, rows.taken, rows.held, table, P).double()
    want = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    for row, which in enumerate(taken):
        if which < len(ranks) and which != spoilt:
            a, b, scale, gain = (t.double() for t in parts[which])
            own = slice(row * P, row * P + P)
            want[own] += scale * gain * x[own].double() @ a.t() @ b.t()
    if spoilt is None:
        return error(y, want), launched[:]
    other = torch.tensor(taken).repeat_interleave(P) != spoilt
    return error(y[other], want[other]), bool(y[~other].isnan().all())


def given(ranks, fan_in, out):
    """Updates of such ranks: A, B, scale and strength of each."""
    updates = []
    for which, r in enumerate(ranks):
        factors = torch.randn(r, fan_in) / fan_in**0.5, torch.randn(out, r)
        numbers = torch.tensor(0.5 + which), torch.tensor(1 / (1 + which))
        updates.append([*(f.requires_grad_() for f in factors), *numbers])
    return updates


def off(updates, taken, P, weight, spoil=False):
    """The largest error of a layer of factors where they lie, through autograd; None where it is
    not served."""
    (out, fan_in), rows = weight.shape, rows_of(updates, taken)
    x, dy = torch.randn(len(taken), P, fan_in).half(), torch.randn(len(taken), P, out).half()
    x, bias = x.requires_grad_(), torch.randn(out).half()
    leaves = [x, *(f for a, b, *_ in updates for f in (a, b))]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    true = wide[0] @ weight.double().t() + bias.double()
    own = [
        s.double() * g.double() * wide[0] @ wide[1 + 2 * i].t() @ wide[2 + 2 * i].t()
        for i, (_, _, s, g) in enumerate(updates)
    ]
    own.append(torch.zeros_like(true))
    true = true + torch.stack([own[which][row] for row, which in enumerate(taken)])
    want = torch.autograd.grad(true, wide, dy.double(), materialize_grads=True)
    launched.clear()
    y = routed.in_place(x, weight, bias, tuple(zip(*updates)), rows)
    if y is None:
        return None
    if spoil:
        updates[0][1].data.zero_()  # as an optimizer may, before another's backward
    got = torch.autograd.grad(y, leaves, dy)
    assert all(g.is_contiguous() and g.dtype == leaf.dtype for g, leaf in zip(got, leaves))
    pairs = zip((y, *got), (true.detach(), *want))
    return max(error(mine, real) for mine, real in pairs)


def rows_of(updates, taken):
    ranks = tuple(len(a) for a, *_ in updates)
    return Choice(tuple(map(str, range(len(ranks)))), ranks, torch.tensor(taken), 0)


def in_place(case):
    """The error of one case and what it launched."""
    taken, P, ranks, fan_in, out = CASES[case]
    weight = torch.randn(out, fan_in).half() / 8
    return off(given(ranks, fan_in, out), taken, P, weight, True), launched[:]


def changes():
    """Errors of one layer's steps, before each of which something of its updates, or of the rows,
    changes that was looked up before."""
    torch.manual_seed(0)
    weight, taken = torch.randn(24, 16).half() / 8, [0, 2, 1, 1, 0]
    updates = given((16, 4, 16), 16, 24)
    errors = {"first": off(updates, taken, 20, weight)}
    with torch.no_grad():
        updates[0][0].mul_(-2)
        updates[0][2].fill_(3)
    errors["values"] = off(updates, taken, 20, weight)
    updates[1][1].data = torch.randn(24, 4)
    errors["memory"] = off(updates, taken, 20, weight)
    updates[2][0] = torch.randn(16, 16).requires_grad_()
    updates[2][3] = torch.tensor(0.125)
    errors["parameter and strength"] = off(updates, taken, 20, weight)
    a, b = (f.data.flatten() for f in updates[1][:2])  # less of both, where they lie
    updates[1][:2] = a[: 3 * 16].view(3, 16), b[: 24 * 3].view(24, 3)
    for f in updates[1][:2]:
        f.requires_grad_()
    errors["rank"] = off(updates, taken, 20, weight)
    errors["one rank"] = off([updates[0], *given((16,), 16, 24), updates[2]], taken, 20, weight)
    errors["rows"] = off(updates, [3, 1, 0, 0, 2], 20, weight)
    errors["positions"] = off(updates, taken, 7, weight)
    errors["one less"] = off(updates[:2], [1, 0, 2], 20, weight)
    errors["one more"] = off([*updates, *given((8,), 16, 24)], [3, 1, 0, 4], 20, weight)
    updates = [[a.data.half().requires_grad_(), b.data.half().requires_grad_(), s.half(), g]
               for a, b, s, g in updates]  # fmt: skip
    errors["type"] = off(updates, taken, 20, weight)
    updates[0][0].requires_grad_(False)
    updates[0][0].data = updates[0][0].data.t()  # at the same address and of the same shape
    leaf = torch.randn(len(taken), 20, 16).half()
    rows = rows_of(updates, taken)
    laid = routed.in_place(leaf, weight, None, tuple(zip(*updates)), rows)
    return errors, laid is None


def beside(others):
    """What rows of one update give, and its gradients, beside others of some ranks."""
    torch.manual_seed(0)
    taken = [1, 0, 2, 1, 2, 0, 1, 0]
    rows = Choice(tuple("abc"), (others[0], 5, others[1]), torch.tensor(taken), 0)
    x = torch.randn(8, 33, 64).half().requires_grad_()
    weight, dy = torch.randn(80, 64).half() / 8, torch.randn(8, 33, 80).half()
    own = torch.randn(5, 64) / 8, torch.randn(80, 5)
    updates = []
    for which, r in enumerate((others[0], 5, others[1])):
        factors = own if which == 1 else (torch.randn(r, 64) / 8, torch.randn(80, r))
        updates.append((*(f.requires_grad_() for f in factors), torch.ones(()), torch.ones(())))
    y = routed.in_place(x, weight, None, tuple(zip(*updates)), rows)
    mine = torch.tensor(taken) == 1
    dx, da, db = torch.autograd.grad(y, [x, *updates[1][:2]], dy)
    with torch.no_grad():
        few = routed.in_place(x[:, :2], weight, None, tuple(zip(*updates)), rows)
    return y[mine], dx[mine], da, db, few[mine]


def spoiled():
    """Rows that another update's infinities and NaNs reach, and own ones that they do not."""
    taken, P, ranks, fan_in, out = CASES["mixed"]
    rows = Choice(("0", "1"), ranks, torch.tensor(taken), 0)
    by = rows.sorted_by(P)
    x = torch.randn(len(taken) * P, fan_in).half()
    down, up = torch.randn(33, fan_in).half(), torch.randn(33, out).half()
    up[17, 3], up[18, 5] = float("nan"), float("inf")
    y = plan.product(x, torch.randn(fan_in, out).half(), plan.thin(x, down, by), up, by)
    own = torch.tensor(taken).repeat_interleave(P) == 1
    return [int((~y[~own].isfinite()).sum()), bool(y[own][:, [3, 5]].isfinite().any())]


def main():
    interpreted.stand_in_for_the_device()
    warnings.simplefilter("error")
    nothing = interpreted.nothing
    for module in (decoding_kernels, kernels):
        module.gdc_wait = module.gdc_launch_dependents = nothing
    results = {}
    for number, case in enumerate(CASES):
        of = [(9, 0), (8, 6)][number % 2]
        plan.card = lambda device, of=of: interpreted.Card(of, 132)
        torch.manual_seed(0)
        results[case] = computed(case, LAYOUTS[number % 4 // 2]), launched[:]
    routed._has_kernel = lambda *_: True
    results["changes"] = changes()
    results["in place"] = {name: in_place(name) for name in ("mixed", "none's rows", "one update")}
    plan.card = lambda device: interpreted.Card((9, 0), 132)
    decoding.card = lambda device: interpreted.Card((9, 0), 4)
    own_dot, InterpreterBuilder.create_dot = InterpreterBuilder.create_dot, dot_by_16
    one, *others = (beside(ranks) for ranks in ((5, 5), (13, 20), (15, 7), (32, 1)))
    results["beside"] = [[torch.equal(*pair) for pair in zip(one, other)] for other in others]
    InterpreterBuilder.create_dot = own_dot
    results["few"] = {}
    for number, case in enumerate(FEW):
        of = [(9, 0), (8, 6)][number % 2]
        decoding.card = lambda device, of=of: interpreted.Card(of, 4)
        results["few"][case] = few(case)
    results["few, spoiled"] = [few("some", which) for which in (0, 1)]  # the last as the first
    results["spoiled"] = spoiled()
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
