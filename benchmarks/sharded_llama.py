"""Blocks of Llama 3 8B's sizes under FSDP2, bfloat16, rank 16 on every linear layer.

``torchrun --nproc-per-node N -m benchmarks.sharded_llama --out FOLDER`` measures tokens a second
over all N devices and the peak memory of one, for the frozen blocks (forward and backward down to
their input), paramlora and peft. Random weights are made on the device. A run goes on with the
file that it finds in FOLDER, which it writes after every way.
"""

import argparse
import gc
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import device
from benchmarks.models import check_tiny
from benchmarks.opponents import adapt
from benchmarks.processes import (
    STARTED,
    elapsed,
    is_done,
    origin,
    processes,
    rank,
    resume,
    start,
    stop,
    store,
    tell,
    together,
)
from benchmarks.results import load, sharded_table
from benchmarks.timing import synchronise
from benchmarks.zoo import ZOO

KIND = "sharded_llama"
WAYS = ("frozen", "paramlora", "peft bf16", "peft")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FIXED = ("layers", "batch", "tokens", "r", "tiny")  # the same for all rows of a file
TINY = dict(layers=2, batch=2, tokens=6, r=2)


def blocks(layers: int, tiny: bool) -> nn.Module:
    """transformers' Llama without its vocabulary, random and bfloat16 on the device."""
    from transformers import LlamaConfig, LlamaModel

    sizes = dict(hidden_size=4096, intermediate_size=14336)
    sizes |= dict(num_attention_heads=32, num_key_value_heads=8)
    small = dict(hidden_size=16, intermediate_size=32)
    small |= dict(num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(**(small if tiny else sizes), num_hidden_layers=layers, vocab_size=8)
    torch.manual_seed(0)  # the same weights in every process and way
    with torch.device(device()):
        return LlamaModel._from_config(config, dtype=torch.bfloat16)


class Sharded:
    """One way's blocks in training."""

    def __init__(self, way: str, options: argparse.Namespace) -> None:
        from torch.distributed.fsdp import fully_shard

        self.base = blocks(options.layers, options.tiny)
        self.model = adapt(way, self.base, TARGETS, options.r)
        for layer in self.base.layers:
            fully_shard(layer)
        fully_shard(self.base)
        self.base.train()
        shape = (options.batch, options.tokens, self.base.config.hidden_size)
        generator = torch.Generator(device()).manual_seed(rank())
        made = dict(generator=generator, device=device(), dtype=torch.bfloat16)
        self.x, self.target = torch.randn(shape, **made), torch.randn(shape, **made)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.x.requires_grad_(not self.parameters)  # the frozen blocks' reason for a backward
        self.learning = self.parameters or [self.x]  # whose gradients are looked at
        fused = device().type == "cuda"
        self.optimizer = torch.optim.AdamW(self.learning, lr=1e-4, fused=fused)

    def step(self) -> Tensor:
        self.optimizer.zero_grad()
        out = self.model(inputs_embeds=self.x, use_cache=False).last_hidden_state
        loss = nn.functional.mse_loss(out.float(), self.target.float())
        loss.backward()
        if self.parameters:
            self.optimizer.step()
        return loss


def run_way(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second and peak memory of one way, or OOM."""
    row: dict[str, Any] = {"way": way}
    try:
        sharded = together(lambda: Sharded(way, options))
        row["trainable"] = sum(p.numel() for p in sharded.parameters)
        row.update(_timed(sharded, options))
    except torch.OutOfMemoryError:
        row["outcome"] = "OOM"
    except RuntimeError as reason:  # recorded, so that one way does not lose the others
        row["outcome"] = f"{type(reason).__name__}: {reason}"[:120]
    return row | origin()


def _timed(sharded: Sharded, options: argparse.Namespace) -> dict[str, Any]:
    _empty()
    loss = together(sharded.step)
    assert loss.isfinite(), "the loss is not finite"
    together(sharded.step)  # the first has no gradient of A, since B starts as zero
    assert all(p.grad.norm() > 0 for p in sharded.learning), "a gradient is zero"
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    synchronise(device())
    begun = time.perf_counter()
    for _ in range(options.steps):
        sharded.step()
    synchronise(device())
    tokens = options.steps * options.batch * options.tokens * processes()
    peak = torch.cuda.max_memory_allocated() / 2**20 if device().type == "cuda" else 0.0
    found = {"tokens_per_second": tokens / elapsed(begun), "peak_mib": peak}
    return found | {"steps": options.steps}


def _empty() -> None:
    gc.collect()
    if device().type == "cuda":
        torch.cuda.empty_cache()


def fill(options: argparse.Namespace) -> None:
    """Every way that no earlier run has measured, while there is time."""
    content = resume(options.out, KIND, {name: getattr(options, name) for name in FIXED})
    rows = {row["way"]: row for row in content["rows"]}
    todo = [way for way in options.ways if not is_done(rows.get(way))]
    for way in todo:
        rows.setdefault(way, {"way": way, "outcome": "not run: no time left"})
    for way in todo[: options.count]:
        if elapsed(STARTED) >= options.limit:
            break
        if way != "frozen" and rank() == 0:
            check_tiny(ZOO["llama"], way)
        rows[way] = run_way(way, options)
        _empty()
        _write(content, rows, options)
        tell(f"{way}: {rows[way].get('outcome') or rows[way]['tokens_per_second']}")
    _write(content, rows, options)


def _write(content: dict[str, Any], rows: dict[str, Any], options: argparse.Namespace) -> None:
    content["rows"] = sorted(rows.values(), key=lambda row: WAYS.index(row["way"]))
    store(options.out, KIND, content)


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.tiny:
        vars(options).update(TINY)
    start(options.timeout)
    fill(options)
    if rank() == 0:
        path = Path(options.out) / f"{KIND}.json"
        print(sharded_table(load(path)))
        tell(str(path))
    stop()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharded_llama")
    parser.add_argument("--out", default="benchmark-results", help="folder of the JSON")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2, help="sequences on each device")
    parser.add_argument("--tokens", type=int, default=2048, help="of a sequence")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20, help="timed, after two")
    parser.add_argument("--tiny", action="store_true", help="tiny blocks, for the CPU")
    parser.add_argument("--limit", type=float, default=450, help="seconds, then no way is begun")
    parser.add_argument("--count", type=int, help="measure at most this many ways")
    parser.add_argument("--timeout", type=float, default=120, help="seconds to wait for a process")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
