"""Compiles the kernels of rows that take different updates, and DoRA's, for a device that need not
be there, and prints the bytes of shared memory that each takes; see `compiled`.
`test_routed_kernels` starts it."""

import json
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import compile as compile_for

from paramlora.cuda.decoding import plan as decoding
from paramlora.cuda.device import Card
from paramlora.cuda.launch import Launch
from paramlora.cuda.linear import plan as linear
from paramlora.cuda.operands import Operands
from paramlora.cuda.rescaled import plan as rescaled
from paramlora.cuda.routed import plan as routed
from paramlora.evaluate.routed import _sorted
from paramlora.update.choice import Choice
from tests.cuda import compiled, interpreted

LAYERS = [  # rows, positions, updates, in, out, rank
    (8, 1024, 8, 4096, 4096, 16),
    (64, 1, 64, 4096, 4096, 16),
    (9, 37, 4, 317, 211, 100),
]


def main(capability):
    shared = {}

    def compile_one(self, pointers, addresses, values=(), blocks=()):
        arguments = (*blocks, *pointers, *values, *self.tail)
        ones = tuple((n == 1, n % 16 == 0) for n in self.numbers)
        types = tuple(t.dtype for t in pointers)
        key = str((self.kernel.__name__, self.constants, ones, types, *self.options.items()))
        if key not in shared:
            source = compiled.source(self.kernel, arguments)
            target = GPUTarget("cuda", capability, 32)
            done = compile_for(source, target=target, options=dict(self.options))
            shared[key] = done.metadata.shared
            if len(sys.argv) > 2:  # for a person
                told = compiled.registers(done), done.metadata.shared
                print(self.kernel.__name__, self.constants, *told, file=sys.stderr)

    interpreted.stand_in_for_the_device()
    for planned in (linear, routed, rescaled, decoding):
        planned.card = lambda device: Card(divmod(capability, 10), 132)
    Launch.__call__ = compile_one
    for layer in LAYERS if capability >= 90 else LAYERS[:1]:
        step(*layer)
    json.dump(shared, sys.stdout)


def step(count, positions, updates, fan_in, out, r):
    """All that a forward and a backward launch; nothing is computed."""
    new = torch.empty((), dtype=torch.bfloat16)
    names, index = tuple(map(str, range(updates))), torch.arange(count) % updates
    rows = Choice(names, (r,) * updates, index, 0)
    by = _sorted(rows, positions)
    M, ranks = count * positions, sum(rows.ranks) + 1
    x, dy, weight = new.new_empty(M, fan_in), new.new_empty(M, out), new.new_empty(out, fan_in)
    down, up, bias = new.new_empty(ranks, fan_in), new.new_empty(out, ranks).t(), new.new_empty(out)
    u = routed.thin(x, down, by)
    routed.product(x, weight.t(), u, up, by, bias)
    v = routed.thin(dy, up, by)
    routed.product(dy, weight, v, down, by)
    routed.sums(x, v, dy, u, by, ranks, (True, True))
    if M <= 128 and r <= 64:
        for kind in (torch.bfloat16, torch.float32):
            parts = decoding.Part(
                torch.empty(r, fan_in, dtype=kind), torch.empty(out, r, dtype=kind),
                torch.ones((), dtype=kind), torch.ones(()),
            )  # fmt: skip
            table = decoding.table_of([parts] * updates, weight)
            decoding.product(x, weight, None, rows.taken, rows.held, table, positions)
            mixed = table._replace(rank=0)
            decoding.product(x, weight, bias, rows.taken, rows.held, mixed, positions)
            routed.packed(table, by, ranks - 1, x, (fan_in, out))
            routed.sums(x, v, dy, u, by, ranks - 1, (True, True), table)
    a, b, m = (torch.empty(shape) for shape in ((r, fan_in), (out, r), (out,)))
    norm = rescaled.lengths(weight, a, b, torch.ones(()))
    rescaled.rescale(dy, m, norm, bias)
    rescaled.rescale_backward(dy, dy, m, norm)
    interpreted.captured = True  # whose product rescales its sum itself
    rescaled.forward(Operands(x, weight, bias, a, b, torch.ones(())), m, norm)
    interpreted.captured = False


if __name__ == "__main__":
    main(int(sys.argv[1]))
