"""Looks up tables with a low-rank update in Triton's interpreter and prints errors against float64.

`embedding/test_plan` starts it in a process of its own; see `interpreted`. As there, of float16
alone, which the kernels take as they take bfloat16.
"""

import json
import sys
import warnings

import torch

from paramlora.cuda.embedding import plan
from tests.cuda import interpreted
from tests.cuda.interpreted import error

CASES = {  # indices, rows and width of the table, rank, how A and B lie, the indices' type
    "even": (128, 64, 256, 16, lambda t: t, torch.int64),
    "odd": (75, 50, 37, 3, lambda t: t, torch.int64),
    "one": (1, 1, 1, 1, lambda t: t, torch.int64),
    "one row": (200, 1, 20, 5, lambda t: t, torch.int64),
    "short indices": (75, 50, 37, 17, lambda t: t, torch.int32),
    "transposed factors": (70, 90, 130, 16, lambda t: t.t().contiguous().t(), torch.int64),
    "narrow factors": (70, 90, 40, 33, torch.Tensor.half, torch.int64),
    "a high rank": (33, 20, 40, 100, lambda t: t, torch.int64),
}
SIZES = {  # by what the gradient's rows are multiplied, the first and all others
    "alike": (1.0, 1.0),
    "large beside small": (2.0**10, 2.0**-14),
    "tiny": (2.0**-14, 2.0**-14),
    "nothing": (0.0, 0.0),
}


def operands(name, strength=0.75):
    torch.manual_seed(0)
    count, num, width, r, laid, dtype = CASES[name]
    ids = torch.randint(num, (count,), dtype=dtype)
    a, b = laid(torch.randn(r, num)), laid(torch.randn(width, r) / r**0.5)
    return ids, a, b, torch.tensor(0.7), strength


def looked_up(name):
    """Errors of the rows, and of A's columns, of which the ranks that pad it are zero."""
    ids, a, b, scale, strength = operands(name)
    y = torch.randn(len(ids), len(b)).half()
    want = y.double() + 0.7 * strength * (b.double() @ a.double()).t()[ids.long()]
    u = plan.add(y, ids, a, b, scale, strength)
    own = u[:, : len(a)]
    assert not u[:, len(a) :].any()
    return {"y": error(y, want), "u": error(own, a.double().t()[ids.long()])}


def learned(name, sizes):
    """The error of A's gradient where programs start in either order, and whether both are the same
    to the bit."""
    ids, a, b, scale, strength = operands(name)
    first, others = SIZES[sizes]
    dy = torch.randn(len(ids), 2 * len(b))[:, : len(b)].half()  # rows with something between them
    dy *= torch.where(torch.arange(len(ids)) == 0, first, others)[:, None]
    up = (b.float() * (0.7 * strength)).half().double()  # rounded as the kernel has it
    want = torch.zeros(a.shape[1], len(a)).double()
    want.index_add_(0, ids.long(), dy.double() @ up)
    got = []
    for interpreted.last_first in (False, True):
        got.append(plan.gradient(dy, ids, a, b, scale, strength))
    assert got[0].dtype == a.dtype and got[0].stride() == a.stride()
    # of each row by itself, which large ones must not drown
    off = (got[0].double() - want.t()).norm(dim=0) / want.norm(dim=1).clamp(min=2.0**-149)
    return {"a": float(off.max()), "same": torch.equal(*got)}


def not_finite(value):
    """Whether such a number is in the gradient where it belongs, and nowhere else."""
    ids, a, b, scale, strength = operands("odd")
    dy = torch.randn(len(ids), len(b)).half()
    dy[3, 5] = value
    got = plan.gradient(dy, ids, a, b, scale, strength)
    want = torch.zeros(a.shape[1], len(a)).double()
    want.index_add_(0, ids.long(), dy.double() @ (0.7 * strength * b.double()))
    same = torch.equal(torch.isfinite(got), torch.isfinite(want.t()))
    finite = torch.isfinite(got)
    off = (got.double() - want.t())[finite].norm() / want.t()[finite].norm()
    return {"same": same, "some": bool(finite.any() and not finite.all()), "a": float(off)}


def main():
    interpreted.stand_in_for_the_device()
    interpreted.start_in_order()
    warnings.simplefilter("error")
    results = {"rows": {name: looked_up(name) for name in CASES}}
    results["launched"] = interpreted.launched[:]
    cases = [(name, sizes) for name in CASES for sizes in SIZES]
    results["gradients"] = {", ".join(case): learned(*case) for case in cases}
    warnings.simplefilter("ignore")  # numpy's, of products that are not finite
    values = (float("inf"), float("-inf"), float("nan"))
    results["not finite"] = {str(value): not_finite(value) for value in values}
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
