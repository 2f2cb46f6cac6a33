"""How much of a small update reaches a bfloat16 output and its input gradient.

``python -m benchmarks.update_kept --out FOLDER`` writes ``update_kept.json`` and prints a table.
With ``y_base`` and ``true = x·(scale·B·A)ᵀ`` computed in float64 from the same bfloat16
weights, the share is ``<y - y_base, true> / <true, true>``: 1 when the update arrives whole,
0 when it does not arrive. Rounding the output spreads the share by about
``2⁻⁹ · ‖y‖ / (‖true‖ · √elements)``, which is why the shapes are large.
"""

import argparse
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import cases
from benchmarks.machine import device
from benchmarks.opponents import LYCORIS, WAYS, switches
from benchmarks.reference import delta
from benchmarks.results import kept_table, save

NAMES = (
    "frozen",
    "dense",
    "original",
    "minLoRA",
    "loralib",
    "RunLoRA",
    "peft bf16",
    "peft",
    *LYCORIS,
    "paramlora",
)
SIZES = (1e-2, 1e-3, 1e-4)
SHAPES = {
    "cuda": [
        (8192, 4096, 4096, 16),
        (16384, 1280, 1280, 8),
        (16384, 320, 320, 8),
        (1024, 4096, 4096, 16),
        (64, 4096, 4096, 16),
    ],
    "cpu": [(2048, 512, 1024, 8)],
    "tiny": [(64, 32, 32, 2)],
}


def tensors_of(shape: tuple[int, int, int, int], size: float, bias: bool) -> cases.Tensors:
    """A bfloat16 layer whose update is `size` times its weight, in norm; masters are float32."""
    case = cases.linear(*shape, bias=bias)
    made = cases.make(case, torch.bfloat16, device(), torch.bfloat16)
    if bias:
        made.layer.bias.data.normal_()  # far larger than the update
    A, B = torch.randn_like(made.A), torch.randn_like(made.B)
    update = delta(made.layer, A.double(), B.double()).norm()
    B = B * (size * made.layer.weight.double().norm() / update).float()
    return cases.Tensors(made.layer, made.x, made.dy, A, B)


def share(got: Tensor, base: Tensor, true: Tensor) -> float:
    """The part of `true` in ``got - base``, as a projection in float64."""
    return (((got.double() - base) * true).sum() / true.square().sum()).item()


def shares(shape: tuple[int, int, int, int], size: float, bias: bool) -> list[dict[str, Any]]:
    """A row for each way: the shares that reach the output and the input gradient."""
    t = tensors_of(shape, size, bias)
    x, dy, W = t.x.detach().double(), t.dy.double(), t.layer.weight.double()
    update = delta(t.layer, t.A.double(), t.B.double())
    y_base = nn.functional.linear(x, W, t.layer.bias.double() if bias else None)
    dx_base, y_true, dx_true = dy @ W, x @ update.T, dy @ update
    rows = []
    for name in NAMES:
        y = WAYS[name](t.layer, t.A, t.B).call(t.x)
        (dx,) = torch.autograd.grad(y, t.x, t.dy)
        row = {"case": cases.linear(*shape, bias=bias).name, "way": name, "size": size}
        row["output"] = share(y.detach(), y_base, y_true)
        row["input_gradient"] = share(dx, dx_base, dx_true)
        rows.append(row)
    return rows


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    started, rows = time.monotonic(), []
    for shape in SHAPES[options.size or device().type]:
        for bias in (False, True):
            for size in SIZES:
                rows += shares(shape, size, bias)
        content = {"rows": rows, "switches": switches(NAMES)}
        path = save(options.out, "update_kept", content)
    print(kept_table(content))
    print(f"{time.monotonic() - started:.0f} s, {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.update_kept", description=__doc__)
    parser.add_argument("--out", default="benchmark-results", help="folder of update_kept.json")
    parser.add_argument("--size", choices=SHAPES)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
