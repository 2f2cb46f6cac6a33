"""Many adapters on one base: rows that choose, against one adapter, runs in turn and a loop.

``python -m benchmarks.routed --out FOLDER`` writes ``routed.json`` and prints a table. ``layer``:
R of a linear layer whose rows take 8 adapters, beside one adapter for all. ``decode``: forward
alone, each row with an adapter of its own. ``train``: Llama 1B's sizes, 8 adapters with 512 tokens
each, in one batch, as eight runs in turn, and in a loop of `set_adapters`; the peak beside one run
of the joint batch. ``swap``: Llama 8B's linear layers, `load_adapter(into=)` beside peft's hotswap.
Each way is checked first: routed rows against each row by itself, in float64 where it is a layer.
"""

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import paramlora
from benchmarks import timing
from benchmarks.layers import store
from benchmarks.machine import device
from benchmarks.many import swap
from benchmarks.results import load, routed_table, save
from paramlora.cuda.operands import kernels
from paramlora.model.attach import updates

Row = dict[str, Any]
# positions, in, out, rank, adapters, decoded rows and layers; of Llama: width, inner, layers, words
SIZES = {
    "cuda": dict(
        n=8192, width=4096, r=16, count=8, rows=64, deep=8, tokens=512, model=1, layers=32
    ),
    "tiny": dict(n=64, width=32, r=2, count=4, rows=8, deep=2, tokens=8, model=0, layers=2),
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def names(count: int) -> list[str]:
    return [f"a{i}" for i in range(count)]


def adapted(layer: nn.Module, many: list[str], config: Callable[[], Any]) -> nn.Module:
    for name in many:
        paramlora.attach(layer, config(), name)
    for _, _, update in updates(layer):
        update.lora_B.data.normal_(std=0.02)
    return layer


def _like(layer: nn.Linear) -> nn.Linear:
    """Another layer of the same frozen weight."""
    new = nn.Linear(*layer.weight.shape[::-1], bias=False, device="meta", dtype=layer.weight.dtype)
    new.weight = nn.Parameter(layer.weight.detach(), requires_grad=False)
    return new


def check(layer: nn.Module, x: Tensor, y: Tensor, rows: list[str]) -> None:
    """Some rows of a routed output are those of their dense weights in float64."""
    weight = next(p for n, p in layer.named_parameters() if n.endswith("original")).double()
    own = {u.adapter: u for _, _, u in updates(layer)}
    for i in range(0, len(rows), max(1, len(rows) // 4)):
        update = own[rows[i]]
        want = x[i].double() @ (weight + update.lora_B.double() @ update.lora_A.double()).t()
        error = ((y[i].double() - want).norm() / want.norm()).item()
        assert error < 4 * torch.finfo(y.dtype).eps, f"row {i} is off by {error:.1e}"


def layers(size: Row, rounds: int) -> Iterator[Row]:
    """R of training one layer."""
    many, entry = names(size["count"]), {"r": size["r"], "scale": 1.0}
    dtype = torch.bfloat16
    frozen = nn.Linear(size["width"], size["width"], bias=False, device=device(), dtype=dtype)
    frozen.requires_grad_(False)
    one = adapted(_like(frozen), many[:1], lambda: {"weight": entry})
    all_ = adapted(_like(frozen), many, lambda: {"weight": entry})
    x = torch.randn(size["n"], size["width"], device=device(), dtype=dtype).requires_grad_()
    dy, steps = torch.randn_like(x), {}
    # detached: a view that autograd knows keeps what x was first used for, on the stream of then,
    # and no capture on another stream is allowed that
    sequences = x.detach().view(size["count"], -1, size["width"])
    picks = torch.randint(size["count"], (size["n"],), generator=torch.Generator().manual_seed(0))
    tokens = [many[i] for i in picks.tolist()]

    def step(layer: nn.Module, x: Tensor) -> Callable[[], Any]:
        trained = [p for p in layer.parameters() if p.requires_grad]
        return lambda: torch.autograd.grad(layer(x), [x, *trained], dy.view_as(x))

    steps = {"frozen": step(frozen, x), "one adapter": step(one, x)}
    case = f"linear {size['n']}×{size['width']}×{size['width']} r{size['r']}"
    for told, given, rows in (("sequences", sequences, many), ("tokens", x, tokens)):
        given = given.detach().requires_grad_()
        with paramlora.route(all_, rows):
            check(all_, given, all_(given), rows)
            own = steps | {f"{size['count']} adapters, {told}": step(all_, given)}
            found = {way: {"case": f"{case}, {told}", "way": way} for way in own}
            store(found, "eager", timing.eager(own, device(), rounds))
            if device().type == "cuda":
                store(found, "device", timing.replayed(own, rounds))
        yield from found.values()


def decoded(size: Row, rounds: int) -> Iterator[Row]:
    """Forward alone, each row with an adapter of its own, of 16 bits as a server's: of layers one
    after the other, so that each reads its weight from memory, as in a model, and not from a cache
    that holds the only one."""
    count, dtype, deep = size["rows"], torch.bfloat16, size["deep"]
    entry = {"r": size["r"], "scale": 1.0, "adapter_dtype": "bfloat16"}
    many, width = names(count), size["width"]
    frozen = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(deep)))
    frozen = frozen.to(device(), dtype).requires_grad_(False)
    stack = nn.Sequential(*map(_like, frozen))
    adapted(stack, many, lambda: dict.fromkeys(map(str, range(deep)), entry))
    x = torch.randn(count, width, device=device(), dtype=dtype)
    with torch.no_grad(), paramlora.route(stack, many):
        check(stack[0], x, stack[0](x), many)

        def by_torch() -> Any:
            with kernels(False):
                return stack(x)

        steps: dict[str, Callable[[], Any]] = {
            "frozen": lambda: frozen(x),
            f"{count} adapters": lambda: stack(x),
            f"{count} adapters, torch's operations": by_torch,
        }
        case = f"decode {count}×{width}×{width} r{size['r']}, {deep} layers"
        found = {way: {"case": case, "way": way} for way in steps}
        store(found, "eager", timing.eager(steps, device(), rounds))
        if device().type == "cuda":
            store(found, "device", timing.replayed(steps, rounds))
    yield from found.values()


def llama(full: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=2048, intermediate_size=8192, vocab_size=128256, num_hidden_layers=16)
    sizes |= dict(num_attention_heads=32, num_key_value_heads=8, rope_theta=500000.0)
    small = dict(hidden_size=16, intermediate_size=32, vocab_size=20, num_hidden_layers=2)
    small |= dict(num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(**(sizes if full else small))
    torch.manual_seed(0)
    with torch.device(device()):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    return model.requires_grad_(False)  # type: ignore[no-any-return]


class Run:
    """A model with some adapters, their optimizers, and the words of each."""

    def __init__(self, size: Row, many: list[str], rows: int) -> None:
        self.model, self.many = llama(size["model"]), many
        config = dict.fromkeys(PROJECTIONS, {"r": size["r"], "scale": 1.0})
        adapted(self.model, many, lambda: config)
        self.optimizers = [
            torch.optim.AdamW(
                paramlora.parameter_groups(self.model, 1e-4, adapter=name), fused=True
            )
            for name in many
        ]
        words, shape = self.model.config.vocab_size, (rows, size["tokens"] + 1)
        self.words = torch.randint(words, shape, device=device())

    def losses(self, words: Tensor) -> Tensor:
        """Of each row."""
        hidden = self.model.model(words[:, :-1], use_cache=False).last_hidden_state
        logits = self.model.lm_head(hidden).flatten(0, 1)
        each = F.cross_entropy(logits.float(), words[:, 1:].flatten(), reduction="none")
        return each.view(len(words), -1).mean(1)

    def update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def together(self) -> Tensor:
        with paramlora.route(self.model, self.many):
            found = self.losses(self.words)
            found.sum().backward()
        self.update()
        return found.detach()

    def plain(self) -> Tensor:
        """One adapter, whatever the batch."""
        found = self.losses(self.words)
        found.sum().backward()
        self.update()
        return found.detach()

    def looped(self) -> Tensor:
        found = []
        for row, name in enumerate(self.many):
            paramlora.set_adapters(self.model, {name: 1.0})
            found.append(self.losses(self.words[row : row + 1]))
            found[-1].sum().backward()
        self.update()
        return torch.cat(found).detach()


def trained(size: Row, repeats: int) -> Iterator[Row]:
    """Tokens a second of whole steps, and peaks."""
    count, many = size["count"], names(size["count"])
    case = f"Llama 1B, {count} × {size['tokens']} tokens" if size["model"] else "tiny Llama"
    run, same = Run(size, many, count), []
    with torch.no_grad():
        with paramlora.route(run.model, many):
            joint = run.losses(run.words)
        for row, name in enumerate(many):
            paramlora.set_adapters(run.model, {name: 1.0})
            same.append(run.losses(run.words[row : row + 1]))
        paramlora.set_adapters(run.model, dict.fromkeys(many, 1.0))
    assert (joint - torch.cat(same)).abs().max() < 0.02, "a routed loss is another"
    tokens = count * size["tokens"]
    yield _timed(case, "one batch of all", run.together, tokens, repeats)
    yield _timed(case, "loop of set_adapters", run.looped, tokens, repeats)
    del run
    _free()
    alone = Run(size, many[:1], 1)
    row = _timed(case, "eight runs in turn", alone.plain, tokens, repeats, count)
    yield row
    del alone
    _free()
    one = Run(size, many[:1], count)
    yield _timed(case, "one adapter, the joint batch", one.plain, tokens, repeats)


def _timed(
    case: str, way: str, step: Callable[[], Any], tokens: int, repeats: int, times: int = 1
) -> Row:
    """Of `times` steps for all tokens."""
    step(), step()
    _free()
    cuda = device().type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    timing.synchronise(device())
    found = []
    for _ in range(repeats):
        begun = time.perf_counter()
        for _ in range(times):
            step()
        timing.synchronise(device())
        found.append(time.perf_counter() - begun)
    row: Row = {"case": case, "way": way, "tokens_per_second": tokens / median(found)}
    if cuda:
        row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return row


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Block(nn.Module):
    """The linear layers of a block of Llama 3 8B, whose values nobody reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sides = [(1, 1), (1, 0.25), (1, 0.25), (1, 1), (1, 3.5), (1, 3.5), (3.5, 1)]
        for name, (i, o) in zip(PROJECTIONS, sides):
            sizes, dtype = (int(i * width), int(o * width)), torch.bfloat16
            layer = nn.Linear(*sizes, bias=False, device="meta", dtype=dtype).requires_grad_(False)
            self.add_module(name, layer.to_empty(device=device()))


def swapped(size: Row, repeats: int) -> Iterator[Row]:
    """Seconds to put a file's values into an attached adapter."""
    from benchmarks.many import write
    from benchmarks.opponents import adapt

    for way in ("paramlora", "peft"):
        model = nn.Sequential(*(Block(size["width"]) for _ in range(size["layers"])))
        model = adapt(way, model, PROJECTIONS, size["r"])
        with tempfile.TemporaryDirectory() as folder:
            write(model, Path(folder))
            times = []
            for _ in range(repeats + 1):
                timing.synchronise(device())
                begun = time.perf_counter()
                swap(model, Path(folder))
                timing.synchronise(device())
                times.append(time.perf_counter() - begun)
        count = size["layers"] * len(PROJECTIONS)
        case = f"swap of {count} linear layers of Llama 8B's sizes r{size['r']}"
        yield {"case": case, "way": way, "seconds": median(times[1:])}
        del model
        _free()


PARTS: dict[str, Callable[[Row, int], Iterator[Row]]] = {
    "layer": layers,
    "decode": decoded,
    "train": trained,
    "swap": swapped,
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routed", description=__doc__)
    parser.add_argument("--out", default="benchmark-results", help="folder of routed.json")
    parser.add_argument("--size", choices=SIZES)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    size = SIZES[options.size or ("cuda" if device().type == "cuda" else "tiny")]
    found: list[Row] = []
    for part in options.parts:
        try:
            for row in PARTS[part](size, options.rounds):
                found.append(row)
                path = save(options.out, "routed", {"rows": found})
        except Exception as reason:  # recorded beside the others' numbers, never dropped
            told = f"{type(reason).__name__}: {reason}"[:300]
            found.append({"case": part, "way": "all", "refused": told})
            path = save(options.out, "routed", {"rows": found})
        _free()
    print(routed_table(load(path)))
    return int(any("refused" in row for row in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
