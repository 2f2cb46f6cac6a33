"""One layer at a time: R for every way to compute it, at every shape.

``python -m benchmarks.layers --out FOLDER`` writes ``layers.json`` and prints a table. R is the
time of forward and backward with the adapter over that of the frozen layer's forward and
input gradient, in one process, interleaved, on the same tensors.
"""

import argparse
import gc
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

import torch

from benchmarks import cases, timing
from benchmarks.machine import device
from benchmarks.opponents import ON_REQUEST, WAYS, Way, switches, take_steps
from benchmarks.reference import Result, bound, check, definition
from benchmarks.results import layers_table, load, save
from benchmarks.saved import saved_bytes

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32, "autocast": torch.float32}
COMPILED = ("peft compiled", "paramlora compiled")


def step(way: Way, tensors: cases.Tensors, context: AbstractContextManager[Any]) -> Result:
    """Forward and backward: exactly what is timed; the frozen layer has only ``dx``."""
    with context:
        y = called(way, tensors.x)
    wanted = [t for t in (tensors.x, way.A, way.B) if t is not None and t.is_floating_point()]
    if not y.requires_grad:  # a frozen embedding
        return Result(y, None, y, y)
    grads = list(torch.autograd.grad(y, wanted, tensors.dy))
    dx = grads.pop(0) if tensors.x.is_floating_point() else None
    return Result(y, dx, *(grads or (y, y)))


def called(way: Way, x: torch.Tensor) -> torch.Tensor:
    take_steps(way.native)
    return way.call(x)


def context_of(kind: str) -> AbstractContextManager[Any]:
    return torch.autocast(device().type, torch.bfloat16) if kind == "autocast" else nullcontext()


def prepare(
    case: cases.Case, kind: str, names: list[str]
) -> tuple[cases.Tensors, dict[str, Way], dict[str, dict[str, Any]]]:
    """The ways that met the float64 definition, and a row for each with its errors or reason."""
    dtype = DTYPES[kind]
    out = torch.bfloat16 if kind == "autocast" else dtype
    embeds = len(case.shape) == 1
    tensors = cases.make(case, dtype, device(), dtype if embeds else out)
    want = definition(tensors.layer, tensors.A, tensors.B, tensors.x, tensors.dy)
    limit = bound(out, max(case.tokens, *tensors.A.shape, *tensors.B.shape))
    ways, rows = {}, {}
    for name in names:
        rows[name] = {"case": case.name, "dtype": kind, "way": name}
        try:
            way = (WAYS | ON_REQUEST)[name](tensors.layer, tensors.A, tensors.B)
            if name != "frozen":
                result = step(way, tensors, context_of(kind))
                rows[name]["errors"] = check(Result(*map(_copy, result)), want, limit)
            rows[name]["saved_bytes"] = saved_bytes(way, tensors, context_of(kind))
            ways[name] = way
        except Exception as reason:  # recorded beside the others' numbers, never dropped
            rows[name]["refused"] = f"{type(reason).__name__}: {reason}"[:300]
    return tensors, ways, rows


def _copy(tensor: Any) -> Any:
    return None if tensor is None else tensor.detach().clone()


def measure(
    case: cases.Case, kind: str, names: list[str], rounds: int = 9, seconds: float = 0.02
) -> list[dict[str, Any]]:
    """Rows of one case: errors, eager and device milliseconds, R, bytes kept for backward."""
    tensors, ways, rows = prepare(case, kind, names)

    def runner(way: Way) -> timing.Step:
        return lambda: step(way, tensors, context_of(kind))

    steps = {name: runner(way) for name, way in ways.items()}
    store(rows, "eager", timing.eager(steps, device(), rounds, seconds))
    if device().type == "cuda":
        store(rows, "device", timing.replayed(steps, rounds, seconds))
    return list(rows.values())


def store(rows: dict[str, dict[str, Any]], mode: str, times: dict[str, list[float]]) -> None:
    """The median time, and the median and spread of the ratio to frozen in the same round."""
    for name, samples in times.items():
        ratios = [a / b for a, b in zip(samples, times["frozen"])]
        rows[name][f"{mode}_ms"] = median(samples)
        rows[name][f"{mode}_R"] = median(ratios)
        rows[name][f"{mode}_R_spread"] = [min(ratios), max(ratios)]


def infer(
    case: cases.Case, kind: str, rounds: int = 9, seconds: float = 0.02
) -> list[dict[str, Any]]:
    """Forward alone without gradients: frozen, attached and merged, here and in peft."""
    from benchmarks.inference import ways_of

    tensors = cases.make(case, DTYPES[kind], device(), DTYPES[kind])
    steps: dict[str, timing.Step] = {}
    rows = {}
    for name, module in ways_of(tensors).items():
        steps[name] = lambda module=module: forward_only(module, tensors.x)
        rows[name] = {"case": case.name, "dtype": kind, "way": name, "inference": True}
    store(rows, "eager", timing.eager(steps, device(), rounds, seconds))
    if device().type == "cuda":
        store(rows, "device", timing.replayed(steps, rounds, seconds))
    return list(rows.values())


@torch.no_grad()
def forward_only(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x)


def launches(kind: str, names: list[str]) -> list[dict[str, Any]]:
    """Microseconds of Python per layer, at a size where the device waits for Python."""
    case = cases.linear(16, 64, 64, 4)
    tensors, ways, _ = prepare(case, kind, names)
    steps: dict[str, timing.Step] = {
        name: lambda way=way: step(way, tensors, context_of(kind)) for name, way in ways.items()
    }
    forward: dict[str, timing.Step] = {
        name: lambda way=way: called(way, tensors.x) for name, way in ways.items()
    }
    both, alone = timing.enqueued(steps), timing.enqueued(forward)
    return [
        {
            "way": name,
            "dtype": kind,
            "step_us": median(both[name]),
            "forward_us": median(alone[name]),
        }
        for name in ways
    ]


def selection(size: str, groups: list[str], match: str = "") -> Iterator[cases.Case]:
    sizes = {"cuda": cases.CUDA, "cpu": cases.CPU, "tiny": cases.TINY}[size]
    for group in groups:
        yield from (case for case in sizes[group] if match in case.name)


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32 for every way
    names = [n for n in (options.ways or WAYS) if options.compile or n not in COMPILED]
    names = ["frozen"] + [n for n in names if n != "frozen"]
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    for kind in options.dtypes:
        for case in selection(options.size or device().type, options.groups, options.match):
            if time.monotonic() - started > options.limit:
                rows.append(
                    {"case": case.name, "dtype": kind, "way": "all", "refused": "no time left"}
                )
                continue
            eager_only = case.name.startswith(("conv", "embedding"))
            chosen = [n for n in names if not (eager_only and n in COMPILED)]
            if options.training:
                rows += measure(case, kind, chosen, options.rounds, options.seconds)
            if case.name.startswith("linear") and options.inference and kind != "autocast":
                rows += infer(case, kind, options.rounds, options.seconds)
            gc.collect()
            torch._dynamo.reset()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            save(options.out, "layers", {"rows": rows, "switches": switches(names)})
    content: dict[str, Any] = {"rows": rows, "switches": switches(names)}
    if options.training:
        content["launches"] = launches(options.dtypes[0], [n for n in names if n not in COMPILED])
    path = save(options.out, "layers", content)
    print(layers_table(load(path)))
    print(f"{time.monotonic() - started:.0f} s, {path}")
    wrong = [r for r in rows if r["way"].startswith("paramlora") and "refused" in r]
    for row in wrong:
        print("WRONG", row)
    return int(bool(wrong))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers", description=__doc__)
    parser.add_argument("--out", default="benchmark-results", help="folder of layers.json")
    parser.add_argument("--groups", nargs="+", default=["linear", "small", "other"])
    parser.add_argument("--match", default="", help="only cases with this in their names")
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=DTYPES)
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, *ON_REQUEST])
    parser.add_argument("--size", choices=["cuda", "cpu", "tiny"])
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--no-inference", dest="inference", action="store_false")
    parser.add_argument("--no-training", dest="training", action="store_false")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.02, help="of one sample")
    parser.add_argument("--limit", type=float, default=220, help="seconds, then cases are skipped")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
