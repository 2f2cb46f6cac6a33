"""Linear layers that drop a tenth of their updates' inputs: R, beside those that drop nothing.

``python -m benchmarks.dropout --out FOLDER`` writes ``dropout.json`` after every shape and prints a
table. ``dropout`` is torch's operations with masks drawn from a seed, ``kernels dropout`` ours,
whatever the table of cards says; R is a step's time over the frozen layer's, in one process, in
turns. Kept is the share of an update of a thousandth of the weights that reaches the output, of the
rows' own masks.
"""

import argparse
import sys
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import timing
from benchmarks.experts import Kernels
from benchmarks.machine import device
from benchmarks.results import dropout_table, save
from paramlora.evaluate import functional
from paramlora.evaluate.dropout import Drops, dropped_linear, masked

RATE = 0.1
SHAPES = (  # rows, in, out, rank
    (8192, 4096, 4096, 16),
    (8192, 4096, 14336, 16),
    (16384, 1280, 1280, 8),
    (1024, 4096, 4096, 16),
)
TINY = ((64, 32, 48, 4),)
WAYS = ("frozen", "paramlora", "dropout", "kernels dropout", "peft dropout")


class Layer:
    """The tensors of one shape."""

    def __init__(self, rows: int, fan_in: int, out: int, r: int) -> None:
        torch.manual_seed(0)
        with torch.device(device()):
            self.x = torch.randn(rows, fan_in).bfloat16().requires_grad_()
            self.weight = (torch.randn(out, fan_in) / fan_in**0.5).bfloat16()
            self.a = (torch.randn(r, fan_in) / fan_in**0.5).requires_grad_()
            self.b = (torch.randn(out, r) / r**0.5 / 10).requires_grad_()
            self.dy, self.one = torch.randn(rows, out).bfloat16(), torch.ones(())

    def output(self, way: str, b: Tensor, seed: Tensor) -> Tensor:
        x, weight, a = self.x, self.weight, self.a
        if way == "frozen":
            return F.linear(x, weight)
        if way == "paramlora":
            return functional.linear(x, weight, None, a, b, self.one)
        if way == "peft dropout":  # its layer's lines, with factors of the base's type
            low = F.linear(F.dropout(x, RATE), a.bfloat16())
            return F.linear(x, weight) + F.linear(low, b.bfloat16())
        drops = Drops((RATE,), (len(a),), seed)
        return dropped_linear(x, weight, None, a, b, self.one, 1 / (1 - RATE), drops)

    def step(self, way: str) -> timing.Step:
        leaves = [self.x] if way == "frozen" else [self.x, self.a, self.b]

        def step() -> None:
            seed = torch.randint(2**62, (), device=device())
            with Kernels(way == "kernels dropout")():
                torch.autograd.grad(self.output(way, self.b, seed), leaves, self.dy)

        return step

    @torch.no_grad()
    def kept(self, way: str) -> float:
        """The share of a small update that arrives, by its own mask."""
        seed = torch.tensor(7, device=device())
        b = self.b * 1e-3 * self.weight.float().norm() / (self.b @ self.a).norm()
        with Kernels(way == "kernels dropout")():
            y, none = (self.output(way, f, seed).float() for f in (b, torch.zeros_like(b)))
        seen = masked(self.x, Drops((RATE,), (len(self.a),), seed), 0).float() / (1 - RATE)
        change = seen @ self.a.t() @ b.t()
        return (((y - none) * change).sum() / change.square().sum()).item()


def measure(shape: tuple[int, int, int, int], rounds: int) -> list[dict[str, Any]]:
    layer, rows = Layer(*shape), []
    live = {way: layer.step(way) for way in WAYS}
    times = {"eager": timing.eager(live, device(), rounds)}
    if device().type == "cuda":
        times["device"] = timing.replayed(live, rounds)
    for way in WAYS:
        row: dict[str, Any] = {"case": "×".join(map(str, shape)), "way": way}
        for kind, found in times.items():
            if way in found:
                row[f"{kind}_ms"] = median(found[way])
                row[f"{kind}_R"] = row[f"{kind}_ms"] / median(found["frozen"])
        if way in ("dropout", "kernels dropout"):
            row["kept"] = layer.kept(way)
        rows.append(row)
    return rows


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dropout")
    parser.add_argument("--out", default="benchmark-results", help="folder of dropout.json")
    parser.add_argument("--rounds", type=int, default=9)
    options, rows = parser.parse_args(arguments), []
    for shape in SHAPES if device().type == "cuda" else TINY:
        rows += measure(shape, options.rounds)
        save(options.out, "dropout", {"rows": rows})
    print(dropout_table({"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
