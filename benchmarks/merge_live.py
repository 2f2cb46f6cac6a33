"""Merging a live model on its device: eight blocks of Llama 3 8B's sizes, rank 16 on all linears.

``python -m benchmarks.merge_live --out FOLDER`` writes ``merge_live.json``: seconds, the most
memory beside the model, and how far the result is from the sum in float64, with and without TF32.
"""

import argparse
import sys
import time
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.machine import device
from benchmarks.many import merged
from benchmarks.opponents import adapt, factors
from benchmarks.results import merge_table as table
from benchmarks.results import save

SIZES = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)}
SIZES |= {"gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336)}
RANK = 16


def blocks(count: int, shrink: int) -> nn.Sequential:
    with torch.device(device()):
        made = [
            nn.ModuleDict(
                {
                    name: nn.Linear(
                        fan_in // shrink, out // shrink, bias=False, dtype=torch.bfloat16
                    )
                    for name, (out, fan_in) in SIZES.items()
                }
            )
            for _ in range(count)
        ]
    return nn.Sequential(*made).requires_grad_(False)


def measured(way: str, options: argparse.Namespace, tf32: bool) -> dict[str, Any]:
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    times, peaks, error = [], [], 0.0
    for _ in range(options.rounds):
        torch.manual_seed(0)
        model = adapt(way, blocks(options.blocks, options.shrink), list(SIZES), RANK)
        with torch.no_grad():
            for _, B in factors(model).values():
                B.normal_(std=0.01)
        want = _wanted(model)
        _synchronise()
        before = torch.cuda.memory_allocated() if device().type == "cuda" else 0
        if device().type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        model = merged(model)
        _synchronise()
        times.append(time.perf_counter() - start)
        if device().type == "cuda":
            peaks.append((torch.cuda.max_memory_allocated() - before) / 2**20)
        error = _error(model, want)
        del model
    return {
        "way": way,
        "tf32": tf32,
        "seconds": median(times),
        "beside_mib": max(peaks, default=0.0),
        "units": error,
    }


def _wanted(model: nn.Module) -> torch.Tensor:
    """Some rows of the first layer's sum in float64."""
    A, B = (factor.detach() for factor in next(iter(factors(model).values())))
    first = next(p.detach() for n, p in model.named_parameters() if "lora" not in n)
    scale = 1.0
    return first[:64].double() + scale * B[:64].double() @ A.double()


def _error(model: nn.Module, want: torch.Tensor) -> float:
    """The largest distance from it, in units in the last place of each element."""
    got = next(p for p in model.parameters())[:64].detach().double()
    eps = torch.finfo(torch.bfloat16).eps
    return float(((got - want).abs() / (eps * want.abs().clamp(min=1e-3))).max())


def _synchronise() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merge_live")
    parser.add_argument("--out", default="benchmark-results", help="folder of the JSON")
    parser.add_argument("--ways", nargs="+", default=["peft bf16", "paramlora"])
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shrink", type=int, default=1, help="divides every size, for a CPU")
    options = parser.parse_args(arguments)
    rows = [measured(way, options, tf32) for tf32 in (False, True) for way in options.ways]
    chosen = {k: v for k, v in vars(options).items() if k != "out"}
    content = {"options": chosen, "rows": rows}
    path = save(options.out, "merge_live", content)
    print(table(content))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
