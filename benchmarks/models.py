"""Whole models: forward, backward and optimizer, against the frozen model.

``python -m benchmarks.models --out FOLDER`` writes ``models.json`` and prints a table. The frozen
reference runs forward and backward with the lowest adapted layer's input requiring a gradient.
All ways share the base weights and take turns in one process. ``bound`` computes no update: it is
the frozen model in which each adapted layer is an autograd function that keeps its input, as every
update must for ``A``'s gradient, and whose factors the optimizer steps.
"""

import argparse
import copy
import functools
import gc
import hashlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks import timing
from benchmarks.machine import device
from benchmarks.opponents import (
    LYCORIS,
    NATIVE,
    UNSLOTH,
    adapt,
    factors,
    switches,
    take_steps,
)
from benchmarks.reference import SCALE
from benchmarks.results import models_table, save
from benchmarks.zoo import ZOO, Zoo

WAYS = (
    *("frozen", "bound", "paramlora", "peft", "peft bf16", "loralib", "original", "dense"),
    *LYCORIS,
)
UNCHECKED = ("frozen", "bound")  # which adapt nothing
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}


def fill(model: nn.Module) -> None:
    """The same factors for every way, from the layer's path; bfloat16 holds them exactly."""
    for path, (A, B) in factors(model).items():
        seed = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for factor, size in ((A, 1 / len(A)), (B, 0.02)):
                values = torch.randn(factor.shape, generator=generator) * size
                factor.copy_(values.bfloat16())


def definition(
    model: nn.Module, pairs: dict[str, tuple[Tensor, Tensor]], zoo: Zoo, args: Any
) -> Tensor:
    """The plain model's output with every adapted weight replaced by its dense sum."""
    weights = {
        f"{path}.weight": model.get_submodule(path).weight + SCALE * (B @ A)
        for path, (A, B) in pairs.items()
    }
    return zoo.call(lambda *inputs: functional_call(model, weights, inputs), args)


@functools.cache  # the same in each type that is measured
def check_tiny(zoo: Zoo, way: str) -> None:
    """Output and every factor's gradient against the dense float64 definition.

    The limit is that of float64: thousands of roundings of 1.1e-16 stay far below 1e-9. unsloth's
    kernels compute in float32 whatever they are given, and LyCORIS keeps its scale in float32, so
    these get float32, and 1e-5.
    """
    wide = way not in UNSLOTH and way not in LYCORIS
    dtype, limit = (torch.float64, 1e-9) if wide else (torch.float32, 1e-5)
    torch.manual_seed(0)
    base = _made(zoo, torch.float64, tiny=True)
    args = _inputs(zoo, torch.float64, 2, tiny=True)
    model = adapt(way, copy.deepcopy(base).to(dtype), zoo.entries(base), 2)
    fill(model)
    pairs = factors(model)
    wanted = {
        p: tuple(t.detach().clone().double().requires_grad_() for t in ab)
        for p, ab in pairs.items()
    }
    want = definition(base, wanted, zoo, args)
    got = zoo.call(model, tuple(t.to(dtype) if t.is_floating_point() else t for t in args))
    dy = torch.randn_like(want)
    ours = torch.autograd.grad(got, [t for p in wanted for t in pairs[p]], dy.to(dtype))
    theirs = torch.autograd.grad(want, [t for ab in wanted.values() for t in ab], dy)
    assert len(wanted) == len(zoo.entries(base)), f"{way}: {len(wanted)} layers adapted"
    for a, b in zip((got, *ours), (want, *theirs)):
        assert b.norm() > 0, f"{way}: a gradient is zero"
        error = ((a - b).norm() / b.norm()).item()
        assert error < limit, f"{way}: relative error {error:.1e} against float64"


def _double_leaf(factor: Tensor) -> Tensor:
    return factor.detach().clone().double().requires_grad_()


def _made(zoo: Zoo, dtype: torch.dtype, tiny: bool) -> nn.Module:
    with torch.device(device()):
        model = zoo.build(tiny)
    return model.to(dtype).eval().requires_grad_(False)


def _inputs(zoo: Zoo, dtype: torch.dtype, batch: int, tiny: bool) -> tuple[Tensor, ...]:
    args = zoo.inputs(batch, tiny)
    return tuple(t.to(device(), dtype if t.is_floating_point() else None) for t in args)


class Trained:
    """One way's model with its optimizer; `step` is what is timed."""

    def __init__(self, base: nn.Module, zoo: Zoo, way: str, r: int, args: Any, dy: Tensor) -> None:
        twin = copy.deepcopy(base, {id(p): p for p in base.parameters()})
        self.zoo, self.args, self.dy, self.native = zoo, args, dy, way == NATIVE
        self.model = adapt(way, twin, zoo.entries(base), r)
        self.parameters: list[nn.Parameter] = []
        self.optimizer = None
        if way == "frozen":
            _require_input_gradient(twin, zoo, args)
            return
        fill(self.model)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        # the smallest step: the work is the same, and the factors stay where they were checked
        cuda = device().type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=1e-12, fused=True, capturable=cuda, weight_decay=0.0
        )

    def forward(self) -> Tensor:
        take_steps(self.native)
        return self.zoo.call(self.model, self.args)

    def step(self) -> None:
        self.forward().backward(self.dy)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def check(self, want: Tensor) -> float:
        """The output's relative error to a float32 reference; every gradient is nonzero."""
        y = self.forward()
        y.backward(self.dy)
        assert all(p.grad.norm() > 0 for p in self.parameters), "a gradient is zero"
        self.model.zero_grad()
        return ((y.detach().float() - want).norm() / want.norm()).item()


def _require_input_gradient(model: nn.Module, zoo: Zoo, args: Any) -> None:
    """Have the layer that runs first among the targets ask for its input's gradient."""
    called: list[nn.Module] = []
    layers = [model.get_submodule(path) for path in zoo.entries(model)]
    hooks = [m.register_forward_pre_hook(lambda m, _: called.append(m)) for m in layers]
    with torch.no_grad():
        zoo.call(model, args)
    for hook in hooks:
        hook.remove()
    called[0].register_forward_pre_hook(lambda _, inputs: (_leaf(inputs[0]), *inputs[1:]))


def _leaf(x: Tensor) -> Tensor:
    return x if x.requires_grad else x.detach().requires_grad_()


def peak_mib(trained: Trained) -> float:
    """Weights, factors, optimizer state, and what a step takes beside them (CUDA only)."""
    trained.step()  # the optimizer makes its state
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    trained.step()
    torch.cuda.synchronize()
    states = trained.optimizer.state.values() if trained.optimizer else ()
    held = [*trained.model.parameters(), *trained.model.buffers()]
    held += [t for state in states for t in state.values() if isinstance(t, Tensor)]
    own = sum(t.nbytes for t in {id(t): t for t in held}.values())
    return (torch.cuda.max_memory_allocated() - before + own) / 2**20


def make_all(
    name: str, kind: str, ways: list[str], tiny: bool
) -> tuple[dict[str, Trained], dict[str, dict[str, Any]]]:
    """The checked ways on one set of base weights, and a row for each with its peak memory."""
    zoo, dtype = ZOO[name], DTYPES[kind]
    r = 2 if tiny else zoo.r
    torch.manual_seed(0)
    base = _made(zoo, dtype, tiny)
    args = _inputs(zoo, dtype, 2 if tiny else zoo.batch, tiny)
    with torch.no_grad():
        dy = torch.randn_like(zoo.call(base, args))
    want = _float32_output(base, zoo, r, args)
    rows: dict[str, dict[str, Any]] = {}
    live: dict[str, Trained] = {}
    for way in ways:
        rows[way] = {"case": name, "dtype": kind, "way": way}
        try:
            if way not in UNCHECKED:
                check_tiny(zoo, way)
            trained = Trained(base, zoo, way, r, args, dy)
            rows[way] |= about(trained, None if way in UNCHECKED else want)
            live[way] = trained
        except Exception as reason:  # recorded beside the others' numbers, never dropped
            rows[way]["refused"] = f"{type(reason).__name__}: {reason}"[:300]
    return live, rows


def about(trained: Trained, want: "Tensor | None") -> dict[str, Any]:
    """What it trains, how far its output is from `want`, and its peak.

    Raises:
        AssertionError: a tenth or more.
    """
    found: dict[str, Any] = {"trainable": sum(p.numel() for p in trained.parameters)}
    if want is not None:
        found["output_error"] = trained.check(want)
        assert found["output_error"] < 0.1, found
    if device().type == "cuda":
        found["peak_mib"] = peak_mib(trained)
    return found


def measure(name: str, kind: str, ways: list[str], tiny: bool, rounds: int) -> list[dict[str, Any]]:
    """Rows of one model: time of a step, R, peak memory, trainable parameters."""
    live, rows = make_all(name, kind, ways, tiny)
    steps: dict[str, timing.Step] = {way: trained.step for way, trained in live.items()}
    _store(rows, "eager", timing.eager(steps, device(), rounds, 0.0))
    if device().type == "cuda":
        _store(rows, "device", timing.replayed(steps, rounds, 0.0))
    return list(rows.values())


@torch.no_grad()
def _float32_output(base: nn.Module, zoo: Zoo, r: int, args: Any) -> Tensor:
    wide = copy.deepcopy(base).float()
    probe = adapt("paramlora", copy.deepcopy(base), zoo.entries(base), r)
    fill(probe)
    pairs = {p: (A.float(), B.float()) for p, (A, B) in factors(probe).items()}
    args = tuple(t.float() if t.is_floating_point() else t for t in args)
    return definition(wide, pairs, zoo, args)


def _store(rows: dict[str, dict[str, Any]], mode: str, times: dict[str, list[float]]) -> None:
    for way, samples in times.items():
        ratios = [a / b for a, b in zip(samples, times["frozen"])]
        rows[way][f"{mode}_ms"] = median(samples)
        rows[way][f"{mode}_R"] = median(ratios)


@contextmanager
def _emptied() -> Iterator[None]:
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    torch.backends.cudnn.allow_tf32 = False
    started, rows = time.monotonic(), []
    tiny = options.tiny or device().type == "cpu"
    for name in options.models:
        for kind in options.dtypes:
            with _emptied():
                ways = [w for w in options.ways if w not in UNSLOTH or name == "llama"]
                rows += measure(name, kind, ["frozen", *ways], tiny, options.rounds)
            content = {"tiny": tiny, "rows": rows, "switches": switches(options.ways)}
            path = save(options.out, "models", content)
    print(models_table(content))
    print(f"{time.monotonic() - started:.0f} s, {path}")
    wrong = [r for r in rows if r["way"].startswith("paramlora") and "refused" in r]
    for row in wrong:
        print("WRONG", row)
    return int(bool(wrong))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    parser.add_argument("--out", default="benchmark-results", help="folder of models.json")
    parser.add_argument("--models", nargs="+", default=list(ZOO), choices=ZOO)
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=DTYPES)
    parser.add_argument(
        "--ways", nargs="+", default=list(WAYS[1:]), choices=(*WAYS, *UNSLOTH, NATIVE)
    )
    parser.add_argument("--tiny", action="store_true", help="the small sizes, as without CUDA")
    parser.add_argument("--rounds", type=int, default=15)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
