"""Forms weights with a low-rank update in Triton's interpreter and prints how far they are from
float64, in units in the last place of each element.

`test_sum_kernels` starts it in a process of its own; see `interpreted`. There a number comes into
bfloat16 by cutting it off, which is up to a whole unit.
"""

import json
import sys
import warnings

import torch
from torch import nn

import paramlora
from paramlora.cuda import operators
from paramlora.update.sum import LowRankTerm, WholeTerm
from tests.cuda import interpreted
from tests.update.test_sum import off

HALF, LOW = torch.float16, torch.bfloat16
FLOAT, DOUBLE = torch.float32, torch.float64
CASES = {  # weight, rank, layout, types of A, B and the scale, whether the factors are transposed
    "even": ((128, 192), 16, "matrix", (FLOAT,) * 3, False),
    "odd": ((37, 131), 17, "matrix", (FLOAT,) * 3, False),
    "one": ((1, 1), 1, "matrix", (FLOAT,) * 3, False),
    "a high rank": ((70, 65), 64, "matrix", (FLOAT,) * 3, False),
    "transposed factors": ((66, 130), 5, "matrix", (FLOAT,) * 3, True),
    "a transposed weight": ((33, 100), 17, "transposed", (FLOAT,) * 3, False),
    "a convolution": ((24, 5, 3, 3), 3, "matrix", (FLOAT,) * 3, False),
    "narrow factors": ((20, 70), 16, "matrix", (LOW, HALF, DOUBLE), False),
}


def update(shape, r, layout, types, transposed):
    """A low-rank term; what it adds in float64, and the sum of its products' sizes."""
    out, fan_in = shape[0], torch.Size(shape[1:]).numel()
    out, fan_in = (fan_in, out) if layout == "transposed" else (out, fan_in)
    a, b = torch.randn(r, fan_in).to(types[0]), (torch.randn(out, r) * 0.3).to(types[1])
    if transposed:
        a, b = (t.t().contiguous().t() for t in (a, b))
    scale = torch.tensor(0.7, dtype=types[2])
    up, down = scale.double() * b.double(), a.double()
    told = up @ down, up.abs() @ down.abs()
    told = (t.t() if layout == "transposed" else t for t in told)
    return LowRankTerm(a, b, scale, layout), *(t.reshape(shape) for t in told)


def distance(shape, r, layout, types, transposed, dtype):
    torch.manual_seed(0)
    base, (term, delta, sizes) = (
        torch.randn(shape).to(dtype),
        update(shape, r, layout, types, transposed),
    )
    before = base.clone()
    got = operators.summed(base, [term])
    assert got.dtype == dtype and got.shape == base.shape and torch.equal(base, before)
    # what float32's additions round
    added = (r + 2) * 2**-24 * (base.double().abs() + sizes)
    return off(got, base.double() + delta, added)


def not_served():
    """What is left to `Fold`, by name: whether it is."""
    torch.manual_seed(0)
    (term, *_), base = update((8, 6), 2, "matrix", (FLOAT,) * 3, False), torch.randn(8, 6).half()
    short = LowRankTerm(term.lora_A[:, :4], term.lora_B, term.factor)
    stack = LowRankTerm(term.lora_A[None], term.lora_B[None], term.factor, "stack")
    stored = LowRankTerm(term.lora_A.to(torch.float8_e5m2), term.lora_B, term.factor)
    asked = {
        "float32": (base.float(), [term]),
        "strided": (base.t().contiguous().t(), [term]),
        "nothing": (base, []),
        "two": (base, [term, term]),
        "a whole tensor": (base, [WholeTerm(base, torch.ones(()))]),
        "a stack": (base[None], [stack]),
        "eight bits": (base, [stored]),
        "other sizes": (base, [short]),
        "no elements": (base[:0], [LowRankTerm(term.lora_A, term.lora_B[:0], term.factor)]),
    }
    return {name: operators.summed(*of) is None for name, of in asked.items()}


def layers():
    """Distances of the layers of a merged model: three that are served, and two beside them."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(40, 24, dtype=HALF) for _ in range(5))
    paramlora.attach(model, {"*": {"r": 4, "scale": 0.75}})
    paramlora.attach(model, {"3": {"r": 2}}, "more")
    model[4].float()
    want, added = [], []
    for layer in model:
        weight = layer.parametrizations.weight.original.detach().double()
        sizes = weight.abs()
        for one in layer.parametrizations.weight:
            nn.init.normal_(one.lora_B, std=0.3)
            up, down = one.factor()[1] * one.lora_B.detach().double(), one.lora_A.detach().double()
            weight, sizes = weight + up @ down, sizes + up.abs() @ down.abs()
        want.append(weight)
        added.append(8 * 2**-24 * sizes)
    interpreted.launched.clear()
    paramlora.merge(model)
    return [off(layer.weight.detach(), *of) for layer, *of in zip(model, want, added)]


def refused():
    """Whether a model whose last layer's factor is not finite is as it was, and no kernel ran."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(8, 8, dtype=HALF) for _ in range(2))
    paramlora.attach(model, {"*": {"r": 2}})
    model[1].parametrizations.weight[0].lora_A.data[0, 0] = float("inf")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    interpreted.launched.clear()
    try:
        paramlora.merge(model)
    except paramlora.AdapterError as error:
        after = model.state_dict()
        same = all(torch.equal(t, after[name]) for name, t in before.items())
        return same and not interpreted.launched and "not finite" in str(error)
    return False


def main():
    interpreted.stand_in_for_the_device()
    operators.served = lambda x: x.dtype in (HALF, LOW)
    warnings.simplefilter("error")
    units = {name: [distance(*of, dtype) for dtype in (HALF, LOW)] for name, of in CASES.items()}
    found = {"units": units, "launched": interpreted.launched[:], "left": not_served()}
    found |= {"layers": layers(), "of layers": interpreted.launched[:], "refused": refused()}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
