"""4-bit training: memory and time of a step of a Llama against peft's QLoRA on the same base.

``python -m benchmarks.quantised --out FOLDER`` writes ``quantised.json`` and prints a table. All
linear layers but the head are quantised and adapted. Every way trains the same random weights by
the same loss and AdamW, and all take turns in one process. A name says:

- ``nf4``: bitsandbytes' `Linear4bit`, double quantisation, computing in bfloat16 (Dettmers et al.
  2023, arXiv:2305.14314); ``torchao nf4`` and ``torchao int8``: torchao's tensors; ``bf16``: a base
  that is not quantised.
- ``prepared``: after peft's `prepare_model_for_kbit_training`, as in peft's guide to quantisation,
  for both libraries: norms, embedding and head are float32, the step runs under autocast. Else
  they are bfloat16.
- ``autocast``: the step runs under bfloat16 autocast, in which peft does not cast inputs up.

Both libraries keep their factors in float32, their default. Checkpointing is transformers' own,
not reentrant.
"""

import argparse
import gc
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import paramlora
from benchmarks import timing
from benchmarks.machine import device
from benchmarks.models import fill
from benchmarks.opponents import adapt_peft, factors
from benchmarks.reference import SCALE
from benchmarks.results import quantised_table, save
from paramlora.model.quantised import dense

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Way:
    """The base, whether peft prepared it, who adapts it, and whether a step is under autocast."""

    base: str
    library: str
    prepared: bool = False
    autocast: bool = False


WAYS = {
    "bf16, peft": Way("bf16", "peft"),
    "bf16, paramlora": Way("bf16", "paramlora"),
    "nf4, peft": Way("nf4", "peft"),
    "nf4, paramlora": Way("nf4", "paramlora"),
    "nf4 autocast, peft": Way("nf4", "peft", autocast=True),
    "nf4 autocast, paramlora": Way("nf4", "paramlora", autocast=True),
    "nf4 prepared, peft": Way("nf4", "peft", prepared=True, autocast=True),
    "nf4 prepared, paramlora": Way("nf4", "paramlora", prepared=True, autocast=True),
    "torchao nf4, paramlora": Way("torchao nf4", "paramlora"),
    "torchao int8, paramlora": Way("torchao int8", "paramlora"),
}


@dataclass(frozen=True)
class Sizes:
    """Of the model, and of what it reads."""

    blocks: int
    batch: int
    tokens: int
    r: int
    tiny: bool = False

    def __str__(self) -> str:
        return f"llama {self.blocks} blocks, {self.batch}×{self.tokens} tokens, r {self.r}"


def plain(sizes: Sizes) -> Any:
    """Blocks of Llama 3 8B's sizes and a vocabulary of 32,000, in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, inner, heads, words = (128, 256, 4, 64) if sizes.tiny else (4096, 14336, 32, 32000)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=sizes.blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        vocab_size=words,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(device()):
        return LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False).train()


def inputs(sizes: Sizes) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (sizes.batch, sizes.tokens)
    return torch.randint(64 if sizes.tiny else 32000, shape, generator=generator).to(device())


def targeted(model: nn.Module) -> list[str]:
    """Paths of the layers that are quantised and adapted."""
    return [p for p, m in model.named_modules() if isinstance(m, nn.Linear) and p.endswith(LAYERS)]


def _bitsandbytes(layer: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    options = dict(compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True)
    with torch.device("meta"):
        packed = Linear4bit(layer.in_features, layer.out_features, bias=False, **options)
    kind = type(packed.weight)
    weight = kind(layer.weight.data, requires_grad=False, quant_type="nf4", module=packed)
    packed.weight = weight.to(device())
    return packed.train()


def _torchao_nf4(layer: nn.Linear) -> nn.Module:
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    scalers = min(256, layer.weight.numel() // 64)
    layer.weight = nn.Parameter(to_nf4(layer.weight.data, 64, scalers), requires_grad=False)
    return layer


def _torchao_int8(layer: nn.Linear) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(layer, Int8WeightOnlyConfig())
    return layer


QUANTISE = {"nf4": _bitsandbytes, "torchao nf4": _torchao_nf4, "torchao int8": _torchao_int8}


def based(sizes: Sizes, base: str, prepared: bool) -> Any:
    """The frozen model on its base."""
    model = plain(sizes)
    for path in targeted(model) if base != "bf16" else ():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, QUANTISE[base](model.get_submodule(path)))
    if base == "nf4":
        model.is_loaded_in_4bit = True  # how peft knows it
    if prepared:
        from peft import prepare_model_for_kbit_training

        # checkpointing is set below, for every way alike
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model


def adapted(way: Way, sizes: Sizes, checkpointing: bool) -> nn.Module:
    model = based(sizes, way.base, way.prepared)
    paths = targeted(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if way.library == "peft":
        model = adapt_peft(model, paths, sizes.r, masters=True)
    else:
        entry = {"r": sizes.r, "scale": SCALE, "hard": way.base == "bf16"}
        model = paramlora.attach(model, {path: entry for path in paths})
    fill(model)
    assert len(factors(model)) == len(paths) > 0, f"{way}: {len(factors(model))} layers adapted"
    return model


def stored_mib(model: nn.Module) -> float:
    """What parameters and buffers take, each storage once, with the scales of quantised ones."""
    held = [*model.parameters(), *model.buffers()]
    storages = [t.untyped_storage() for one in held for t in _parts(one)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values()) / 2**20


def _parts(tensor: Any) -> Iterator[Tensor]:
    """The plain tensors behind one that may stand for a weight."""
    state = getattr(tensor, "quant_state", None)
    while state is not None:  # of bitsandbytes, whose scales are quantised again
        yield from (t for t in (state.absmax, state.code, state.offset) if t is not None)
        state = state.state2
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor.data
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


class Trained:
    """One way's model with its optimizer; `step` is what is timed."""

    def __init__(self, way: Way, sizes: Sizes, checkpointing: bool) -> None:
        self.tokens, self.autocast = inputs(sizes), way.autocast
        self.model = adapted(way, sizes, checkpointing)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        # the smallest step: the work is the same, and the factors stay where they were checked
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-12, fused=True, weight_decay=0.0)

    def forward(self) -> Any:
        with torch.autocast(device().type, torch.bfloat16, enabled=self.autocast):
            return self.model(self.tokens, labels=self.tokens)

    def step(self) -> None:
        self.forward().loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def errors(self, want: "tuple[Tensor, Tensor]") -> tuple[float, float]:
        """Of the logits and of all factors' gradients, relative to the reference's size."""
        out = self.forward()
        out.loss.backward()
        gradients = gradients_of(factors(self.model))
        self.optimizer.zero_grad()
        pairs = zip((out.logits.detach().float(), gradients), want)
        first, second = (((got - ref).norm() / ref.norm()).item() for got, ref in pairs)
        return first, second


def gradients_of(pairs: "dict[str, tuple[Tensor, Tensor]]") -> Tensor:
    assert all(t.grad is not None for pair in pairs.values() for t in pair), "no gradient"
    return torch.cat([t.grad.flatten().float() for path in sorted(pairs) for t in pairs[path]])


@cache
def reference(sizes: Sizes, base: str) -> tuple[Tensor, Tensor]:
    """Logits and factors' gradients by ``dequantised W + scale·B·A``, all in float32."""
    model = based(sizes, base, False)
    weights = {path: dense(m := model.get_submodule(path), m.weight) for path in targeted(model)}
    probe = adapted(Way(base, "paramlora"), sizes, False)
    pairs = {p: tuple(t.detach().requires_grad_() for t in ab) for p, ab in factors(probe).items()}
    sums = {f"{p}.weight": weights[p].float() + SCALE * (b @ a) for p, (a, b) in pairs.items()}
    wide = plain(sizes).float()
    out = functional_call(wide, sums, (inputs(sizes),), {"labels": inputs(sizes)})
    out.loss.backward()
    return out.logits.detach(), gradients_of(pairs)  # type: ignore[arg-type]


def _allocated() -> int:
    """Bytes on the device, without the garbage that a later step would free."""
    gc.collect()
    return torch.cuda.memory_allocated() if device().type == "cuda" else 0


def measured(name: str, sizes: Sizes, checkpointing: bool) -> tuple[Trained, dict[str, Any]]:
    """A way after two steps, and its row: memory beyond what lived before it, and errors."""
    before, way = _allocated(), WAYS[name]
    trained = Trained(way, sizes, checkpointing)
    row: dict[str, Any] = {"case": str(sizes), "way": name, "checkpointing": checkpointing}
    row["trainable"] = sum(p.numel() for p in trained.parameters)
    row["stored_mib"] = stored_mib(trained.model)
    trained.step()  # the optimizer makes its state
    if device().type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        trained.step()
        row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    row["output_error"], row["gradient_error"] = trained.errors(reference(sizes, way.base))
    assert row["output_error"] < 0.1 and row["gradient_error"] < 0.1, row
    return trained, row


def measure(names: list[str], sizes: Sizes, checkpointing: bool, rounds: int) -> list[Any]:
    """Rows of all ways, which live side by side while their steps take turns."""
    _warm_up(names)
    live, rows = {}, []
    for name in names:
        live[name], row = measured(name, sizes, checkpointing)
        rows.append(row)
    steps: dict[str, timing.Step] = {name: trained.step for name, trained in live.items()}
    for row, samples in zip(rows, timing.eager(steps, device(), rounds, 0.0).values()):
        row["eager_ms"] = median(samples)
    return rows


def _warm_up(names: list[str]) -> None:
    """Libraries take workspaces at their first call, which are nobody's in particular."""
    for name in names:
        Trained(WAYS[name], _TINY, False).step()
    gc.collect()
    if device().type == "cuda":
        torch.cuda.empty_cache()


_TINY = Sizes(1, 2, 8, 4, tiny=True)


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    tiny = options.tiny or device().type == "cpu"
    sizes = _TINY if tiny else Sizes(options.blocks, options.batch, options.tokens, options.r)
    started, rows = time.monotonic(), []
    for checkpointing in options.checkpointing:
        rows += measure(options.ways, sizes, checkpointing == "yes", options.rounds)
        path = save(options.out, "quantised", {"tiny": tiny, "rows": rows})
    print(quantised_table({"rows": rows}))
    print(f"{time.monotonic() - started:.0f} s, {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantised",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", default="benchmark-results", help="folder of quantised.json")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--checkpointing", nargs="+", default=["no", "yes"], choices=["no", "yes"])
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tiny", action="store_true", help="the small sizes, as without CUDA")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
