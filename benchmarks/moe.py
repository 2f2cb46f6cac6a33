"""A whole Qwen3-MoE of 30B-A3B's sizes, cut to 8 layers: tokens a second, adapted and not.

Random bfloat16 weights, 4 rows of 2048 tokens, the loss over the vocabulary, rank 16 on all linear
layers and on the experts; forward and backward, no optimizer. `benchmarks.experts` runs it.
"""

import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

import paramlora
from benchmarks import unsloth_experts
from benchmarks.machine import device
from benchmarks.timing import synchronise

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
STACKS = ("gate_up_proj", "down_proj")
WAYS = ("frozen", "paramlora", "kernels", "kernels dropout", "peft", "unsloth")
Way = Callable[[str], AbstractContextManager[None]]


def plain(tiny: bool) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    small = dict(hidden_size=32, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
    small |= dict(num_attention_heads=2, num_key_value_heads=2, head_dim=16, vocab_size=64)
    small |= dict(intermediate_size=32)
    sizes = dict(hidden_size=2048, moe_intermediate_size=768, num_experts=128)
    sizes |= dict(num_experts_per_tok=8, num_attention_heads=32, num_key_value_heads=4)
    sizes |= dict(head_dim=128, vocab_size=151936, intermediate_size=6144)
    config = Qwen3MoeConfig(**(small if tiny else sizes), num_hidden_layers=2 if tiny else 8)
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    with torch.device(device()):
        model = Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)
    return model.requires_grad_(False)  # type: ignore[no-any-return]


def adapted(way: str, r: int, tiny: bool) -> nn.Module:
    model = plain(tiny)
    if way == "frozen":
        return model
    if way == "unsloth":
        return unsloth_experts.Within(lambda: adapted("peft", r, tiny))
    if way == "peft":
        from peft import LoraConfig, get_peft_model

        targets = [f"experts.{name}" for name in STACKS]
        config = LoraConfig(r=r, lora_alpha=r, target_modules=[*LINEARS], target_parameters=targets)
        model = get_peft_model(model, config)
    else:
        entry: dict[str, Any] = {"r": r, "dropout": 0.1} if "dropout" in way else {"r": r}
        paramlora.attach(model, {f"experts.{name}": entry for name in STACKS}
                         | {name: entry for name in LINEARS})  # fmt: skip
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.01)  # else the gradients of A are zero
    return model


def step_of(model: nn.Module, tiny: bool, seen: dict[str, Any]) -> Callable[[], None]:
    rows = torch.randint(64, (2, 8) if tiny else (4, 2048), device=device())
    embedding = next(m for m in model.modules() if isinstance(m, nn.Embedding))
    x = embedding(rows).detach().requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        loss: Tensor = model(inputs_embeds=x, labels=rows, use_cache=False).loss
        seen["loss"], seen["grads"] = loss, torch.autograd.grad(loss, [x, *trained])

    return step


def measure(
    ways: list[str], r: int, tiny: bool, save_rows: Callable[[list[Any]], None], computed: Way
) -> list[dict[str, Any]]:
    """One row for each way, one after the other: not all of them fit the device at a time."""
    rows: list[dict[str, Any]] = []
    for way in ways:
        row: dict[str, Any] = {"case": "Qwen3-MoE, 8 layers, 4×2048 tokens", "way": way}
        try:
            with computed(way):
                row |= _timed(adapted(way, r, tiny), tiny)
        except torch.cuda.OutOfMemoryError:
            row["refused"] = "out of memory"
        except Exception as reason:  # one way does not lose the others
            row["refused"] = f"{type(reason).__name__}: {reason}"[:200]
        rows.append(row)
        for kind, ratio in (("eager_ms", "eager_R"), ("beside_mib", "beside_R")):
            if kind in row and kind in rows[0]:
                row[ratio] = row[kind] / rows[0][kind]
        save_rows(rows)
        gc.collect()
        if device().type == "cuda":
            torch.cuda.empty_cache()
    return rows


def _timed(model: nn.Module, tiny: bool) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    step, repeats = step_of(model.train(), tiny, seen), 1 if tiny else 5
    step(), step()
    assert seen["loss"].isfinite(), "the loss is not finite"
    assert all(g.abs().sum() > 0 for g in seen["grads"]), "a gradient is zero"
    seen.clear()
    cuda = device().type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    synchronise(device())
    begun = time.perf_counter()
    for _ in range(repeats):
        step()
    synchronise(device())
    seconds = (time.perf_counter() - begun) / repeats
    row = {"eager_ms": 1e3 * seconds, "tokens_per_second": (16 if tiny else 8192) / seconds}
    if cuda:
        row["beside_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return row
