"""Mixture-of-experts layers: a step of transformers' `Qwen3MoeExperts` alone, frozen and adapted.

``python -m benchmarks.experts --out FOLDER`` writes ``experts.json`` and prints a table. A step is
a forward and a backward in bfloat16 with gradients of the input, the routing weights and the
factors of ``gate_up_proj`` and ``down_proj``; R is its time over the frozen layer's. All ways have
the same values, and take turns in one process:

- ``frozen``: no update.
- ``paramlora``: as the table of cards has it; ``operations``: in torch's; ``kernels``: in ours, and
  with other tiles where a way names some; ``... dropout``: with 0.1.
- ``peft``: its `target_parameters`, factors in float32; ``definition``: the dense sums, in
  autograd.
- ``unfused``: three grouped products for each tensor, base, down and up, whose outputs are added
  after they were rounded.
- ``unsloth``: peft's model by unsloth's functions, where it is installed and named.

Those of other libraries are first checked, tiny and in float32, against the sums in float64.

The last rows are a whole Qwen3-MoE, see `benchmarks.moe`. The file is written after every row: what
stops early keeps what it has. ``--quick`` leaves out what does not decide between both ways.

A case ends in the implementation that transformers was asked for. Memory is what a step takes
beside what was allocated before it; kept is the share of an update of a thousandth of the weights
that reaches the output. Errors are against the loop over the experts in float32 with dense sums.
"""

import argparse
import functools
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from types import SimpleNamespace
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import paramlora
from benchmarks import moe, timing, unsloth_experts
from benchmarks.machine import device, version
from benchmarks.results import experts_table, save
from paramlora.evaluate import choose

STACKS = ("gate_up_proj", "down_proj")
Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes of the layer, the tokens that it reads, and how transformers computes it."""

    experts: int
    hidden: int
    inner: int
    tokens: int
    top: int
    implementation: str = "grouped_mm"

    def __str__(self) -> str:
        sizes = f"{self.experts}×{self.hidden}×{self.inner}"
        return f"{sizes}, {self.tokens} tokens, top {self.top}, {self.implementation}"


CASES = (
    Case(128, 2048, 768, 4096, 8),
    Case(128, 2048, 768, 16384, 8),
    Case(32, 2880, 2880, 8192, 4),
    Case(128, 2048, 768, 4096, 8, "eager"),
)
TINY = (Case(4, 32, 24, 64, 2), Case(4, 32, 24, 64, 2, "eager"))


Tile = tuple[int, int, int, int, int, int, bool]  # as of `paramlora.cuda.linear.tiles.Tiling`
TILES: dict[str, Tile] = {
    "128×128 4 warps": (128, 128, 64, 8, 3, 4, True),
    "128×128 4 stages": (128, 128, 64, 8, 4, 8, True),
    "128×256 4 stages": (128, 256, 64, 8, 4, 8, True),
    "128×256 ungrouped": (128, 256, 64, 1, 3, 8, True),
    "64×256": (64, 256, 64, 8, 4, 4, True),
}


class Kernels:
    """Whether ours compute the products of experts and those under dropout, None for what the table
    of cards says of this device; and with which tiles, those of the plan's table without any."""

    def __init__(self, on: Optional[bool], tile: Optional[Tile] = None) -> None:
        self.on, self.tile, self.plans = on, tile, {}  # type: ignore[var-annotated]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if device().type != "cuda":
            yield
            return
        from paramlora.cuda.experts import plan

        index = torch.cuda.current_device()
        own = choose.thresholds_of(torch.zeros((), device=device()))
        tiling, plans = plan.tiling, plan._PLANS
        if self.on is not None:
            choose._SEEN[index] = replace(own, experts=self.on, dropout=self.on)
        plan._PLANS = self.plans
        plan.tiling = self._tiling(tiling)
        try:
            yield
        finally:
            choose._SEEN[index], plan._PLANS, plan.tiling = own, plans, tiling

    def _tiling(self, table: Callable[..., Any]) -> Callable[..., Any]:
        from paramlora.cuda.linear.tiles import Tiling

        def chosen(rows: int, N: int, hopper: bool, drop: bool) -> Any:
            return Tiling(*self.tile) if self.tile and hopper else table(rows, N, hopper, drop)

        return chosen


class Layer(nn.Module):
    """One layer of experts below a model, where peft wants it."""

    def __init__(self, case: Case) -> None:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        super().__init__()
        config = SimpleNamespace(
            num_experts=case.experts,
            hidden_size=case.hidden,
            moe_intermediate_size=case.inner,
            hidden_act="silu",
            _experts_implementation=case.implementation,
        )
        self.experts = Qwen3MoeExperts(config)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, index, weights)  # type: ignore[no-any-return]


class Unfused(nn.Module):
    """The base's product, and the two of an update, added after their rounding."""

    def __init__(self, plain: Layer, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.plain, self.act = plain.experts, plain.experts.act_fn
        self.factors = nn.ParameterDict(
            {f"{n}_{i}": nn.Parameter(t.clone()) for n, ab in factors.items() for i, t in
             zip("AB", ab)}
        )  # fmt: skip

    def product(self, x: Tensor, name: str, ends: Tensor) -> Tensor:
        a, b = (self.factors[f"{name}_{i}"].to(x.dtype).mT for i in "AB")
        y = F.grouped_mm(x, getattr(self.plain, name).mT, offs=ends)
        return y + F.grouped_mm(F.grouped_mm(x, a, offs=ends), b, offs=ends)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        ids, order = torch.sort(index.reshape(-1))
        every = torch.arange(len(self.plain.gate_up_proj), device=x.device)
        ends = torch.searchsorted(ids, every, right=True, out_int32=True)
        gate, up = self.product(x[order // index.shape[1]], STACKS[0], ends).chunk(2, -1)
        y = self.product(self.act(gate) * up, STACKS[1], ends)
        y = y * weights.reshape(-1)[order, None]
        return y[order.argsort()].view(*index.shape, -1).sum(1).to(x.dtype)


def plain(case: Case) -> Layer:
    torch.manual_seed(0)
    with torch.device(device()):
        layer = Layer(case).to(torch.bfloat16).requires_grad_(False)
    for name in STACKS:
        weight = getattr(layer.experts, name)
        weight.normal_(std=weight.shape[-1] ** -0.5)
    return layer


def values(case: Case, r: int, size: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors of each stack, in float32, whose update has that size relative to the weights."""
    pairs = {}
    for name, (a, b) in _drawn_factors(case, r).items():
        a, b = a / a.shape[-1] ** 0.5, b * size / r**0.5
        pairs[name] = (a.to(device()), b.to(device()))
    return pairs


@functools.lru_cache(1)  # a processor draws for as long as the device computes
def _drawn_factors(case: Case, r: int) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shapes = {STACKS[0]: (2 * case.inner, case.hidden), STACKS[1]: (case.hidden, case.inner)}
    return {
        name: (
            torch.randn(case.experts, r, columns, generator=generator),
            torch.randn(case.experts, rows, r, generator=generator),
        )
        for name, (rows, columns) in shapes.items()
    }


def inputs(case: Case) -> Inputs:
    """What the layer reads: each token's experts differ, and all get about as many."""
    x, index, weights = _drawn_inputs(case)
    low = (t.to(device(), torch.bfloat16).requires_grad_() for t in (x, weights))
    return next(low), index.to(device()), next(low)


@functools.lru_cache(1)
def _drawn_inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(case.tokens, case.hidden, generator=generator)
    scores = torch.rand(case.tokens, case.experts, generator=generator)
    weights, index = scores.softmax(-1).topk(case.top)
    return x, index, weights


def _ours(case: Case, r: int, size: float, **more: Any) -> nn.Module:
    layer = paramlora.attach(plain(case), {name: {"r": r, **more} for name in STACKS})
    with torch.no_grad():
        for name, (a, b) in values(case, r, size).items():
            low = layer.experts.parametrizations[name][0]  # type: ignore[union-attr, index]
            low.lora_A.copy_(a), low.lora_B.copy_(b)  # type: ignore[operator, union-attr]
    return layer.train()


class Definition(nn.Module):
    """The dense sums, formed once a call, in autograd."""

    def __init__(self, case: Case, r: int, size: float) -> None:
        super().__init__()
        self.layer, pairs = plain(case), values(case, r, size)
        self.pairs = nn.ParameterDict(
            {f"{n}_{i}": nn.Parameter(t) for n, ab in pairs.items() for i, t in zip("AB", ab)}
        )

    def forward(self, *given: Tensor) -> Tensor:
        sums = {}
        for name in STACKS:
            delta = self.pairs[f"{name}_B"] @ self.pairs[f"{name}_A"]
            weight = getattr(self.layer.experts, name)
            sums[f"experts.{name}"] = (weight + delta).to(weight.dtype)
        return torch.func.functional_call(self.layer, sums, given)  # type: ignore[no-any-return]


def _peft(case: Case, r: int, size: float) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = [f"experts.{name}" for name in STACKS]
    config = LoraConfig(r=r, lora_alpha=r, target_modules=[], target_parameters=targets)
    model = get_peft_model(plain(case), config)
    pairs = [ab for ab in values(case, r, size).values()]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = _as_peft(p, pairs, "lora_A" in name)
    return model.train()


def _as_peft(p: Tensor, pairs: list[tuple[Tensor, Tensor]], first: bool) -> Tensor:
    """The factors of the stack whose sizes fit, as peft holds them, by experts and ranks."""
    for a, b in pairs:
        if first and p.shape == (a.shape[0] * a.shape[1], a.shape[2]):
            return a.reshape(p.shape).clone()
        if not first and p.shape == (b.shape[1], b.shape[0] * b.shape[2]):
            return b.permute(1, 2, 0).reshape(p.shape).clone()  # ranks, then experts
    raise AssertionError(f"peft holds a factor of {tuple(p.shape)}")


WAYS: dict[str, Callable[[Case, int, float], nn.Module]] = {
    "frozen": lambda case, r, size: plain(case),
    "paramlora": _ours,
    "operations": _ours,
    "kernels": _ours,
    "paramlora dropout": lambda case, r, size: _ours(case, r, size, dropout=0.1),
    "kernels dropout": lambda case, r, size: _ours(case, r, size, dropout=0.1),
    **{f"kernels {name}": _ours for name in TILES},
    "peft": _peft,
    "unfused": lambda case, r, size: Unfused(plain(case), values(case, r, size)),
    "definition": Definition,
    "unsloth": lambda case, r, size: unsloth_experts.Within(lambda: _peft(case, r, size)),
}
OTHERS = ("peft", "unsloth")
DEFAULT = [way for way in WAYS if way != "unsloth"]  # which it needs not be installed for
QUICK = ("frozen", "operations", "kernels", "paramlora dropout", "kernels dropout", "unfused")
UNCHECKED = ("frozen", "paramlora dropout", "kernels dropout", *(f"kernels {n}" for n in TILES))


def computed(way: str) -> Kernels:
    on = {"paramlora": None, "kernels": True}.get(way.split()[0], False)
    return Kernels(on, TILES.get(way.removeprefix("kernels ")))


def step_of(model: nn.Module, given: Inputs, kernels: Kernels) -> timing.Step:
    grad = torch.ones_like(given[0])
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        with kernels():
            torch.autograd.grad(model(*given), (given[0], given[2], *trained), grad)

    return step


def check_tiny(way: str) -> None:
    """Output and every gradient of another library's way, in float32, against float64."""
    case, r = TINY[0], 8
    want, (dx, dweights, *grads) = _checked(
        Definition(replace(case, implementation="eager"), r, 0.1), torch.float64
    )
    model = WAYS[way](case, r, 0.1)
    got, (their_dx, their_dweights, *theirs) = _checked(model, torch.float32)
    down, gate_up = zip(grads[::2], grads[1::2])  # in the order of their names
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    pairs = [(got, want), (their_dx, dx), (their_dweights, dweights)]
    for (name, p), grad in zip(trained, theirs, strict=True):
        pairs.append((grad, _as_peft(p, [gate_up, down], "lora_A" in name)))
    for ours, right in pairs:
        error = ((ours - right).norm() / right.norm()).item()
        assert right.norm() > 0 and error < 1e-5, f"{way}: {error:.1e} from float64"


def _checked(model: nn.Module, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output, and the gradients of the input, of the routing weights and of the factors."""
    model = model.to(dtype)
    x, index, weights = (t.detach() for t in inputs(TINY[0]))
    given = x.to(dtype).requires_grad_(), index, weights.to(dtype).requires_grad_()
    y = model(*given)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
    trained = [p for p in model.parameters() if p.requires_grad]
    return y.detach(), torch.autograd.grad(y, (given[0], given[2], *trained), dy)


@functools.lru_cache(2)
def reference(case: Case, r: int, size: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output, the input's gradient, and the output without the update, all in float32."""
    loop = Case(case.experts, case.hidden, case.inner, case.tokens, case.top, "eager")
    x, index, weights = inputs(case)
    given = x.detach().float().requires_grad_(), index, weights.detach().float()
    layer = plain(loop).float()
    with torch.no_grad():
        base = layer(*given)
        for name, (a, b) in values(case, r, size).items():
            getattr(layer.experts, name).add_(b @ a)
    y = layer(*given)
    (dx,) = torch.autograd.grad(y.sum(), given[0])
    return y.detach(), dx, base


def measured(case: Case, way: str, r: int) -> dict[str, Any]:
    """The row of one way but for its time: memory, errors and the share kept."""
    if way in OTHERS:
        check_tiny(way)
    model, given, kernels = WAYS[way](case, r, 0.1), inputs(case), computed(way)
    row: dict[str, Any] = {"case": str(case), "way": way}
    step = step_of(model, given, kernels)
    step()
    if kernels.on is not None:
        assert bool(kernels.plans) == (kernels.on and device().type == "cuda"), f"{way}: not by it"
    gc.collect()
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        row["beside_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    if way in UNCHECKED:
        return row
    want, want_dx, _ = reference(case, r, 0.1)
    trained = [p for p in model.parameters() if p.requires_grad]
    with kernels():
        y = model(*given)
        dx, *grads = torch.autograd.grad(y.float().sum(), (given[0], *trained))
    assert len(grads) == 4 and all(g.abs().sum() > 0 for g in grads), f"{way}: no gradient"
    row["output_error"] = ((y.float() - want).norm() / want.norm()).item()
    row["gradient_error"] = ((dx.float() - want_dx).norm() / want_dx.norm()).item()
    assert row["output_error"] < 0.05 and row["gradient_error"] < 0.05, row
    row["kept"] = kept(case, way, r)
    return row


def kept(case: Case, way: str, r: int) -> float:
    """The share of a small update in the output, beside that of the same way without one."""
    want, _, base = reference(case, r, 1e-3)
    with torch.no_grad(), computed(way)():
        got = WAYS[way](case, r, 1e-3)(*inputs(case)).float()
        none = WAYS[way](case, r, 0.0)(*inputs(case)).float()
    change = want - base
    return (((got - none) * change).sum() / change.square().sum()).item()


def measure(
    case: Case, ways: list[str], r: int, rounds: int, save_rows: Callable[[list[Any]], None]
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    live: dict[str, timing.Step] = {}
    for way in ways:
        try:
            rows.append(measured(case, way, r))
            live[way] = step_of(WAYS[way](case, r, 0.1), inputs(case), computed(way))
        except torch.cuda.OutOfMemoryError:
            rows.append({"case": str(case), "way": way, "refused": "out of memory"})
        except Exception as reason:  # one way does not lose the others
            told = f"{type(reason).__name__}: {reason}"[:200]
            rows.append({"case": str(case), "way": way, "refused": told})
        save_rows(rows)
        gc.collect()
    times = timing.eager(live, device(), rounds)
    devices = timing.replayed(live, rounds) if device().type == "cuda" else {}
    for row in rows:
        for kind, found in (("eager", times), ("device", devices)):
            if row["way"] in found:
                row[f"{kind}_ms"] = median(found[row["way"]])
                if "frozen" in found:
                    row[f"{kind}_R"] = row[f"{kind}_ms"] / median(found["frozen"])
    compared(rows)
    save_rows(rows)
    return rows


def compared(rows: list[dict[str, Any]]) -> None:
    """Each way's memory over that of the frozen one, the first."""
    for row in rows:
        if "beside_mib" in row and "beside_mib" in rows[0]:
            row["beside_R"] = row["beside_mib"] / rows[0]["beside_mib"]


def switches(ways: list[str]) -> dict[str, str]:
    """Version and what chooses between its own ways, of each other library."""
    told = {"peft": lambda: f"{version('peft')}, target_parameters, factors float32"}
    told["unsloth"] = unsloth_experts.told
    return {way: tell() for way, tell in told.items() if way in ways}


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    tiny, done = options.tiny or device().type == "cpu", []
    ways = [way for way in options.ways if not options.quick or way in QUICK]

    def saved(rows: list[dict[str, Any]]) -> None:
        content = {"tiny": tiny, "rows": done + rows, "switches": switches(ways)}
        path = save(options.out, "experts", content)
        print(f"{path}: {len(done + rows)} rows, the last {rows[-1]}", flush=True)

    for number, case in enumerate(TINY if tiny else CASES):
        if options.cases is None or number in options.cases:
            done += measure(case, ways, 8 if tiny else options.r, options.rounds, saved)
    if options.cases is None or len(CASES) in options.cases:
        model = [way for way in ways if way in moe.WAYS]
        done += moe.measure(model, options.r, tiny, saved, lambda way: computed(way)())
    print(experts_table({"rows": done, "switches": switches(ways)}))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", default="benchmark-results", help="folder of experts.json")
    parser.add_argument("--ways", nargs="+", default=DEFAULT, choices=WAYS)
    parser.add_argument("--cases", nargs="+", type=int, help="their places, from 0; 4: the model")
    parser.add_argument("--quick", action="store_true", help="only what decides between both ways")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tiny", action="store_true", help="the small sizes, as without CUDA")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
