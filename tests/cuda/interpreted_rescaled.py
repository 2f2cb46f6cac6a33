"""Runs DoRA's kernels, and LoKr's layer on the low-rank ones, in Triton's interpreter and prints
their errors against float64.

`rescaled/test_plan` starts it in a process of its own; see `interpreted`. As there, of
float16 alone.
"""

import itertools
import json
import sys
import warnings

import torch

from paramlora.cuda.linear import tiles
from paramlora.cuda.rescaled import plan
from paramlora.evaluate import functional, kronecker, rescaled
from tests.cuda import interpreted
from tests.cuda.interpreted import error, launched

NORMS = {  # out, in, rank, weight
    "even": (64, 256, 16, lambda w: w),
    "odd": (37, 45, 3, lambda w: w),
    "transposed": (50, 130, 5, lambda w: w.t().contiguous().t()),
    "a high rank": (40, 96, 100, lambda w: w),
    "one": (1, 1, 1, lambda w: w),
}
LAYERS = {"rows": (70, 48), "a batch": (2, 33, 300), "one": (1, 1), "many": (600, 64)}


def norms(case):
    out, fan_in, r, laid = NORMS[case]
    weight = laid(torch.randn(out, fan_in).half())
    a, b, scale = torch.randn(r, fan_in), torch.randn(r, out).t(), torch.tensor(0.3)
    got = rescaled.norms_of(weight, a, b, scale)
    want = (weight.double() + 0.3 * b.double() @ a.double()).norm(dim=1)
    return {"norm": error(got, want)}


def layer(case, with_bias):
    """Errors of the output and of both gradients, of a batch whose first norm is zero."""
    shape = LAYERS[case]
    z, out = torch.randn(shape).half().requires_grad_(), shape[-1]
    m, norm = torch.randn(out).requires_grad_(), torch.rand(out) + 0.5
    norm[0] = 0
    bias = torch.randn(out).half().requires_grad_() if with_bias else None
    y = rescaled.rescaled(z, m, norm, bias)
    dy = torch.randn(*shape[:-1], 2 * out).half()[..., :out]
    leaves = [t for t in (z, m, bias) if t is not None]
    got = torch.autograd.grad(y, leaves, dy)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    length = torch.where(norm == 0, 1, norm).double()
    true = wide[0] * (wide[1] / length) + (wide[2] if with_bias else 0)
    want = torch.autograd.grad(true, wide, dy.double())
    names = ("z", "m", "bias")
    return {"y": error(y, true)} | {k: error(*pair) for k, *pair in zip(names, got, want)}


WHOLE = {
    "rows": (70, 64, 48),
    "a batch": (2, 33, 40, 136),
    "one": (1, 1, 1),
    "a high rank": (33, 96, 64),
    "aligned": (192, 128, 256),
}


def whole(case, with_bias):
    """Errors of the whole layer in one node of autograd, and which kernels ran."""
    *rows, fan_in, out = WHOLE[case]
    r = 200 if case == "a high rank" else 3  # whose norms no kernel forms
    x, weight = torch.randn(*rows, fan_in).half(), torch.randn(out, fan_in).half()
    bias = torch.randn(out).half() if with_bias else None
    a, b, m = torch.randn(r, fan_in) / r, torch.randn(out, r), torch.rand(out, 1) + 0.5
    leaves = [x, a, b, torch.tensor(0.3), m, *([bias] if with_bias else [])]
    leaves = [t.requires_grad_() for t in leaves]
    y = rescaled.linear(x, weight, bias, *leaves[1:5])
    dy = torch.randn(*rows, out).half()
    got = torch.autograd.grad(y, leaves, dy)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    total = weight.double() + wide[3] * wide[2] @ wide[1]
    total = wide[4] * total / total.detach().norm(dim=1, keepdim=True)
    true = torch.nn.functional.linear(wide[0], total, wide[5] if with_bias else None)
    want = torch.autograd.grad(true, wide, dy.double())
    names = ("x", "a", "b", "scale", "m", "bias")
    return {"y": error(y, true)} | {k: error(*pair) for k, *pair in zip(names, got, want)}


def frozen(case):
    """Errors of a layer whose magnitude is not trained, how many of its outputs were kept, and
    which kernels ran."""
    *rows, fan_in, out = WHOLE[case]
    x, weight = torch.randn(*rows, fan_in).half(), torch.randn(out, fan_in).half()
    a, b, m = torch.randn(3, fan_in) / 3, torch.randn(out, 3), torch.rand(out) + 0.5
    leaves, shapes = [t.requires_grad_() for t in (x, a, b)], []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: shapes.append(t.shape) or t, lambda t: t
    ):
        y = rescaled.linear(x, weight, None, a, b, torch.tensor(0.3), m)
    dy = torch.randn(*rows, out).half()
    got = torch.autograd.grad(y, leaves, dy)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    total = weight.double() + 0.3 * wide[2] @ wide[1]
    total = m.double()[:, None] * total / total.detach().norm(dim=1, keepdim=True)
    true = wide[0] @ total.t()
    want = torch.autograd.grad(true, wide, dy.double())
    kept = [shape for shape in shapes if shape == (x[..., 0].numel(), out)]
    errors = {"y": error(y, true), "kept": len(kept)}
    return errors | {k: error(*pair) for k, *pair in zip("xab", got, want)}


def alone(wanted):
    """Errors of the gradients of some of the operands alone."""
    x, weight = torch.randn(9, 16).half(), torch.randn(24, 16).half()
    bias, scale, m = torch.randn(24).half(), torch.tensor(0.3), torch.rand(24) + 0.5
    operands = {"x": x, "a": torch.randn(3, 16), "b": torch.randn(24, 3)}
    operands |= {"scale": scale, "m": m, "bias": bias}
    leaves = [operands[name].requires_grad_() for name in wanted]
    y = rescaled.linear(x, weight, bias, *(operands[name] for name in ("a", "b", "scale", "m")))
    dy = torch.randn(9, 24).half()
    got = torch.autograd.grad(y, leaves, dy)
    wide = {name: t.detach().double() for name, t in operands.items()}
    own = [wide[name].requires_grad_() for name in wanted]
    total = weight.double() + wide["scale"] * wide["b"] @ wide["a"]
    total = wide["m"][:, None] * total / total.detach().norm(dim=1, keepdim=True)
    true = torch.nn.functional.linear(wide["x"], total, wide["bias"])
    want = torch.autograd.grad(true, own, dy.double())
    return {name: error(*pair) for name, *pair in zip(wanted, got, want)}


def product(case):
    """Errors of a LoKr layer whose Kronecker product is of a low rank, and which kernels ran."""
    rows, (a, b), (c, d), r = {
        "rank 32": (140, (8, 8), (20, 24), 4),
        "both": (33, (8, 8), (9, 8), 2),
    }[case]
    x, weight, bias = torch.randn(rows, b * d), torch.randn(a * c, b * d), torch.randn(a * c)
    x, weight, bias = x.half().requires_grad_(), weight.half(), bias.half()
    held = {"lokr_w1": torch.randn(a, b)}
    if case == "both":
        held = {"lokr_w1_a": torch.randn(a, r), "lokr_w1_b": torch.randn(r, b)}
    held |= {"lokr_w2_a": torch.randn(c, r), "lokr_w2_b": torch.randn(r, d)}
    leaves = [x, *(t.requires_grad_() for t in held.values())]
    y = kronecker.linear(x, weight, bias, held, torch.tensor(0.3))
    dy = torch.randn(rows, a * c).half()
    got = torch.autograd.grad(y, leaves, dy)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    parts = dict(zip(held, wide[1:]))
    one = parts.get("lokr_w1")
    one = parts["lokr_w1_a"] @ parts["lokr_w1_b"] if one is None else one
    total = weight.double() + 0.3 * torch.kron(one, parts["lokr_w2_a"] @ parts["lokr_w2_b"])
    true = torch.nn.functional.linear(wide[0], total, bias.double())
    want = torch.autograd.grad(true, wide, dy.double())
    return {"y": error(y, true)} | {k: error(*pair) for k, *pair in zip(("x", *held), got, want)}


def main():
    interpreted.stand_in_for_the_device()
    rescaled.served = lambda x: x.dtype == torch.float16
    warnings.simplefilter("error")
    tiling = tiles.tiling

    def by_blocks(M, N, K, processors, aligned, local, alone):
        if aligned and M == 192:  # as larger layers have them
            return tiles.Tiling(64, 64, 64, 8, 3, 4, True)
        return tiling(M, N, K, processors, aligned, local, alone)

    tiles.tiling = by_blocks
    results = {}
    for number, name in enumerate(NORMS):
        torch.manual_seed(0)
        plan.card = lambda device, of=[1, 132][number % 2]: interpreted.Card((9, 0), of)
        launched.clear()
        results[f"norms, {name}"] = norms(name), launched[:]
    plan.card = lambda device: interpreted.Card((9, 0), 132)
    for name in LAYERS:
        for with_bias in (False, True):
            torch.manual_seed(0)
            launched.clear()
            results[f"layer, {name}, {with_bias}"] = layer(name, with_bias), launched[:]
    functional.served = rescaled.served
    for interpreted.captured in (False, True):
        for name in WHOLE:
            for with_bias in (False, True):
                torch.manual_seed(0)
                launched.clear()
                case = f"whole, {name}, {with_bias}, {interpreted.captured}"
                results[case] = whole(name, with_bias), launched[:]
    for interpreted.captured in (False, True):
        for name in ("rows", "a batch", "aligned"):
            torch.manual_seed(0)
            launched.clear()
            results[f"frozen, {name}, {interpreted.captured}"] = frozen(name), launched[:]
    names = ("x", "a", "b", "scale", "m", "bias")
    for count in range(1, len(names)):
        for wanted in itertools.combinations(names, count):
            torch.manual_seed(0)
            launched.clear()
            results[f"alone, {wanted}"] = alone(wanted), launched[:]
    interpreted.captured = False
    kronecker.served = rescaled.served
    for name in ("rank 32", "both"):
        torch.manual_seed(0)
        launched.clear()
        results[f"product, {name}"] = product(name), launched[:]
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
