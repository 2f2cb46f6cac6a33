"""Compiles the kernels of experts for a device that need not be there; see `compiled`."""

import torch

from paramlora.cuda.device import Card
from paramlora.cuda.experts import plan
from paramlora.cuda.operands import Drop

LOW, LOWEST = torch.bfloat16, torch.float16
LAYERS = [  # experts, rows, in, out, rank, whether weights are [experts, in, out], type, dropout
    (128, 32768, 2048, 1536, 16, False, LOW, 0.0),
    (32, 32768, 2880, 5760, 16, True, LOW, 0.1),
    (4, 999, 317, 211, 5, False, LOW, 0.1),
    (4, 2048, 512, 1024, 128, True, LOWEST, 0.0),
]


def launch(capability, few):
    plan.card = lambda device: Card(divmod(capability, 10), 132)
    for *layer, rate in LAYERS[1:2] if few else LAYERS:
        step(*layer, Drop((rate,), torch.zeros((), dtype=torch.int64)) if rate else None)


def step(experts, rows, fan_in, out, r, transposed, dtype, drop):
    """All that a forward and a backward launch; nothing is computed."""
    new = torch.empty((), dtype=dtype)
    x, dy = new.new_empty(rows, fan_in), new.new_empty(rows, out)
    shape = (experts, fan_in, out) if transposed else (experts, out, fan_in)
    weight = new.new_empty(shape)  # memory that nobody touches
    weight = weight.mT if transposed else weight
    a, b = new.new_empty(experts, r, fan_in), new.new_empty(experts, out, r)
    ends, width = torch.zeros(experts, dtype=torch.int32), r + -r % 8
    u = plan.thin(x, a, ends, width, drop)
    bias = None if drop is None else new.new_empty(experts, out)
    plan.product(x, weight.mT, ends, u, b.mT, None, bias)
    v = plan.thin(dy, b.mT, ends, width, None)
    plan.product(dy, weight, ends, v, a, drop)
    plan.sums(x, v, dy, u, ends, r, drop, (True, True))
    # pairs of expert and adapter
    a, b = a.repeat_interleave(4, 0), b.repeat_interleave(4, 0)
    plan.product(x, weight.mT, torch.zeros(4 * experts, dtype=torch.int32), u, b.mT, None, bias)
    plan.product(dy, weight, torch.zeros(4 * experts, dtype=torch.int32), v, a, None)
