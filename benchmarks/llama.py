"""A whole Llama 3 8B in training: tokens a second of real steps, loss and optimizer and all.

``python -m benchmarks.llama --out FOLDER`` trains transformers' ``LlamaForCausalLM`` with random
bfloat16 weights on random tokens, r 16 and alpha 32 on every projection of its blocks, dropout
0.1, AdamW, blocks compiled, and the loss over the vocabulary in chunks. NVIDIA NeMo Automodel's
table gives 12,473 tokens a second for this on one H100 of 80 GB. The ways are checked against the
dense float64 definition at a tiny size first, and no gradient may be zero. A run goes on with the
file that it finds in FOLDER, which it writes after every way.
"""

import argparse
import functools
import gc
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import paramlora
from benchmarks.machine import device
from benchmarks.models import check_tiny
from benchmarks.processes import STARTED, is_done, origin, resume, store, tell
from benchmarks.results import llama_table, load
from benchmarks.timing import synchronise
from benchmarks.zoo import ZOO

KIND = "llama"
WAYS = ("frozen", "paramlora", "peft bf16", "peft")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FIXED = ("layers", "batch", "tokens", "r", "dropout", "chunks", "compile", "tiny")
TINY = dict(layers=2, batch=2, tokens=6, r=2, chunks=3, compile=False)
SCALE = 2.0  # alpha 32 over r 16


def _summed_loss(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ head.t()).float(), labels, reduction="sum")


@functools.cache
def _compiled_loss() -> Any:
    """`_summed_loss`, whose logits are read and written once each way: their casts and the softmax
    take a fifth of its time in eager mode."""
    return torch.compile(_summed_loss, dynamic=False)


class ChunkedLoss(torch.autograd.Function):
    """Cross entropy of ``hidden · headᵀ``, of some tokens at a time: each chunk's gradient is taken
    at once, so that the logits of one chunk are there at a time, and computed once."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, chunks: int) -> Tensor:
        total, grads = hidden.new_zeros((), dtype=torch.float32), []
        summed = _compiled_loss() if hidden.is_cuda else _summed_loss
        for own, wanted in zip(hidden.chunk(chunks), labels.chunk(chunks)):
            with torch.enable_grad():
                own = own.detach().requires_grad_()
                loss = summed(own, head, wanted) / len(hidden)
            grads += torch.autograd.grad(loss, own)
            total += loss.detach()
        ctx.save_for_backward(torch.cat(grads))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.saved_tensors[0], None, None, None


def model_of(layers: int, tiny: bool) -> nn.Module:
    """transformers' Llama 3 8B, random and bfloat16 on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=4096, intermediate_size=14336, vocab_size=128256)
    sizes |= dict(num_attention_heads=32, num_key_value_heads=8, rope_theta=500000.0)
    small = dict(hidden_size=16, intermediate_size=32, vocab_size=20)
    small |= dict(num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(**(small if tiny else sizes), num_hidden_layers=layers)
    torch.manual_seed(0)
    with torch.device(device()):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)


def adapted(way: str, model: nn.Module, r: int, dropout: float) -> nn.Module:
    """The model with an update on each projection, changed in place."""
    if way == "frozen":
        return model.requires_grad_(False)
    if way == "paramlora":
        entry = {"r": r, "scale": SCALE, "dropout": dropout}
        return paramlora.attach(model, dict.fromkeys(TARGETS, entry))
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=r * SCALE, target_modules=TARGETS, lora_dropout=dropout)
    return get_peft_model(model, config, autocast_adapter_dtype=way == "peft")


class Training:
    """One way's model, its data and its optimizer."""

    def __init__(self, way: str, options: argparse.Namespace) -> None:
        self.base = model_of(options.layers, options.tiny)
        self.model = adapted(way, self.base, options.r, options.dropout).train()
        if options.compile:
            for layer in self.base.model.layers:
                layer.compile(dynamic=False)
        words = self.base.config.vocab_size
        shape = (options.batch, options.tokens + 1)
        self.words = torch.randint(words, shape, device=device())
        self.chunks = options.chunks
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        # the frozen model's reason for a backward
        self.x = self.base.model.embed_tokens(self.words[:, :-1]).detach()
        self.x.requires_grad_(not self.parameters)
        self.learning = self.parameters or [self.x]
        self.optimizer = torch.optim.AdamW(self.learning, lr=1e-4, fused=device().type == "cuda")

    def step(self) -> Tensor:
        self.optimizer.zero_grad()
        given = (
            {"inputs_embeds": self.x} if not self.parameters else {"input_ids": self.words[:, :-1]}
        )
        hidden = self.base.model(**given, use_cache=False).last_hidden_state.flatten(0, 1)
        labels, head = self.words[:, 1:].flatten(), self.base.lm_head.weight
        if self.chunks > 1:
            loss = ChunkedLoss.apply(hidden, head, labels, self.chunks)
        else:
            loss = F.cross_entropy((hidden @ head.t()).float(), labels)
        loss.backward()
        if self.parameters:
            self.optimizer.step()
        return loss


def run_way(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second and peak memory of one way, or OOM."""
    row: dict[str, Any] = {"way": way}
    try:
        training = Training(way, options)
        row["trainable"] = sum(p.numel() for p in training.parameters)
        row.update(_timed(training, options))
    except torch.OutOfMemoryError:
        row["outcome"] = "OOM"
    return row | origin()


def _timed(training: Training, options: argparse.Namespace) -> dict[str, Any]:
    first = training.step()
    training.step()  # the first has no gradient of A, since B starts as zero
    assert first.isfinite(), "the loss is not finite"
    assert all(p.grad is not None and p.grad.norm() > 0 for p in training.learning), (
        "a gradient is zero"
    )
    training.step()
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    synchronise(device())
    begun = time.perf_counter()
    for _ in range(options.steps):
        loss = training.step()
    synchronise(device())
    seconds = time.perf_counter() - begun
    peak = torch.cuda.max_memory_allocated() / 2**20 if device().type == "cuda" else 0.0
    tokens = options.steps * options.batch * options.tokens
    losses = {"loss_first": first.item(), "loss_last": loss.item()}
    return {
        "tokens_per_second": tokens / seconds,
        "peak_mib": peak,
        "steps": options.steps,
    } | losses


def fill(options: argparse.Namespace) -> None:
    """Every way that no earlier run has measured, while there is time."""
    content = resume(options.out, KIND, {name: getattr(options, name) for name in FIXED})
    rows = {row["way"]: row for row in content["rows"]}
    todo = [way for way in options.ways if not is_done(rows.get(way))]
    for way in todo:
        rows.setdefault(way, {"way": way, "outcome": "not run: no time left"})
    for way in todo:
        if time.perf_counter() - STARTED < options.limit:
            if way != "frozen":
                check_tiny(ZOO["llama"], way)
            rows[way] = run_way(way, options)
            _empty()
            tell(f"{way}: {rows[way].get('outcome') or rows[way]['tokens_per_second']}")
        content["rows"] = sorted(rows.values(), key=lambda row: WAYS.index(row["way"]))
        store(options.out, KIND, content)


def _empty() -> None:
    gc.collect()
    torch._dynamo.reset()
    if device().type == "cuda":
        torch.cuda.empty_cache()


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.tiny:
        vars(options).update(TINY)
    fill(options)
    path = Path(options.out) / f"{KIND}.json"
    print(llama_table(load(path)))
    tell(str(path))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.llama", description=__doc__)
    parser.add_argument("--out", default="benchmark-results", help="folder of the JSON")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096, help="of a sequence")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--chunks", type=int, default=8, help="of the loss; 1: all tokens at once")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--steps", type=int, default=20, help="timed, after three")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, for the CPU")
    parser.add_argument("--limit", type=float, default=450, help="seconds, then no way is begun")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
