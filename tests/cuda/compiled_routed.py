"""Compiles the kernels of rows that take different updates, and DoRA's, for a device that need not
be there; see `compiled`."""

import torch

from paramlora.cuda.decoding import plan as decoding
from paramlora.cuda.device import Card
from paramlora.cuda.linear import plan as linear
from paramlora.cuda.operands import Operands, Rescale
from paramlora.cuda.rescaled import plan as rescaled
from paramlora.cuda.routed import plan as routed
from paramlora.update.choice import Choice
from tests.cuda import interpreted

LAYERS = [  # rows, positions, updates, in, out, rank
    (8, 1024, 8, 4096, 4096, 16),
    (64, 1, 64, 4096, 4096, 16),
    (9, 37, 4, 317, 211, 100),
]


def launch(capability, few):
    for planned in (linear, routed, rescaled, decoding):
        planned.card = lambda device: Card(divmod(capability, 10), 132)
    # narrow factors take as much shared memory as wide ones, and are compiled where all is
    kinds = (torch.float32,) if few else (torch.bfloat16, torch.float32)
    for layer in LAYERS[1:2] if few else LAYERS:
        step(*layer, kinds)


def step(count, positions, updates, fan_in, out, r, kinds):
    """All that a forward and a backward launch; nothing is computed."""
    new = torch.empty((), dtype=torch.bfloat16)
    names, index = tuple(map(str, range(updates))), torch.arange(count) % updates
    rows = Choice(names, (r,) * updates, index, 0)
    by = rows.sorted_by(positions)
    M, ranks = count * positions, sum(rows.ranks) + 1
    x, dy, weight = new.new_empty(M, fan_in), new.new_empty(M, out), new.new_empty(out, fan_in)
    down, up, bias = new.new_empty(ranks, fan_in), new.new_empty(out, ranks).t(), new.new_empty(out)
    u = routed.thin(x, down, by)
    routed.product(x, weight.t(), u, up, by, bias)
    v = routed.thin(dy, up, by)
    routed.product(dy, weight, v, down, by)
    routed.sums(x, v, dy, u, by, ranks, (True, True))
    if M <= 128 and r <= 64:
        for kind in kinds:
            table = table_of((r,) * updates, weight, kind)
            decoding.product(x, weight, None, rows.taken, rows.held, table, positions)
            _, kept = routed.forward(x, weight, None, table, by)
            routed.backward(dy, x, weight, kept, table, by, (True, True, True))
            mixed = table_of((r, 3) * (updates // 2), weight, kind)
            decoding.product(x, weight, bias, rows.taken, rows.held, mixed, positions)
            routed.forward(x, weight, bias, mixed, by)
    a, b, m = (torch.empty(shape) for shape in ((r, fan_in), (out, r), (out,)))
    norm = rescaled.lengths(weight, a, b, torch.ones(()))
    rescaled.rescale(dy, m, norm, bias)
    rescaled.rescale_backward(dy, dy, m, norm)
    for interpreted.captured, keeps in ((True, True), (False, True), (False, False)):
        of = Operands(x, weight, bias, a, b, torch.ones(()))
        linear.forward(of, rescale=Rescale(m, norm, keeps))
    interpreted.captured = False


def table_of(ranks, weight, kind):
    """Updates of such ranks and type."""
    out, fan_in = weight.shape
    a = [torch.empty(r, fan_in, dtype=kind) for r in ranks]
    b = [torch.empty(out, r, dtype=kind) for r in ranks]
    scale = [torch.ones((), dtype=kind) for _ in ranks]
    return decoding.table_of(a, b, scale, [torch.ones(())] * len(ranks), weight)
