"""Fine-tuning a small transformer in bfloat16, from one start: here, in peft, and in float32.

``python -m benchmarks.finetune_bf16 --out FOLDER`` writes ``finetune_bf16.json`` and prints a
table. The task has a known answer: a teacher, the same base with a random low-rank update of
relative size ``--size`` in every linear layer, computed in float64. All ways start from the same
weights (which bfloat16 holds exactly) and factors, see the same data, and minimise the squared
error to the teacher's output. Losses are relative to the loss at the start, on held-out inputs:

- ``computed``: of the output as the way computes it, roundings included;
- ``learned``: of the float64 definition with the factors that the way has learned, that is,
  what the adapter is worth after merging in high precision.
"""

import argparse
import copy
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.machine import device
from benchmarks.opponents import adapt, factors
from benchmarks.reference import SCALE
from benchmarks.results import finetune_table, save
from benchmarks.zoo import Block

WIDTH, RANK = 32, 8
WAYS = {  # name: (way, dtype of the model)
    "float32": ("paramlora", torch.float32),
    "paramlora bf16": ("paramlora", torch.bfloat16),
    "peft bf16, float32 factors": ("peft", torch.bfloat16),
    "peft bf16, bf16 factors": ("peft bf16", torch.bfloat16),
    "dense bf16, float32 factors": ("dense", torch.bfloat16),
}
Pairs = dict[str, tuple[Tensor, Tensor]]


def make_base() -> nn.Module:
    """Two blocks with random weights, larger than torch's default so that every layer matters."""
    model = nn.Sequential(*(Block(WIDTH, 2 * WIDTH, 4, 4) for _ in range(2))).to(device())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            parameter.copy_(parameter.bfloat16())
    return model.requires_grad_(False)


def linear_paths(model: nn.Module) -> list[str]:
    return [path for path, m in model.named_modules() if isinstance(m, nn.Linear)]


def teacher_of(base: nn.Module, size: float) -> Pairs:
    """Random factors for every linear layer with ``‖scale·B·A‖ = size · ‖W‖``."""
    pairs = {}
    for path in linear_paths(base):
        weight = base.get_submodule(path).weight.double()
        A, B = (
            torch.randn(s, device=device()).double()
            for s in ((RANK, weight.shape[1]), (len(weight), RANK))
        )
        pairs[path] = (A, B * size * weight.norm() / (SCALE * (B @ A)).norm())
    return pairs


@torch.no_grad()
def exact(base: nn.Module, pairs: Pairs, x: Tensor) -> Tensor:
    """The base with dense sums, in float64; `base` is in float64."""
    weights = {
        f"{path}.weight": base.get_submodule(path).weight + SCALE * (B.double() @ A.double())
        for path, (A, B) in pairs.items()
    }
    return functional_call(base, weights, (x.double(),))


def finetune(
    base: nn.Module, name: str, teacher: Pairs, start: dict[str, Tensor], steps: int, lr: float
) -> tuple[list[float], list[float]]:
    """(computed, learned) before training and after every tenth step."""
    way, dtype = WAYS[name]
    wide = copy.deepcopy(base).double()
    model = adapt(way, copy.deepcopy(base).to(dtype), linear_paths(base), RANK)
    pairs = factors(model)
    for path, (A, _) in pairs.items():
        A.data.copy_(start[path])
    optimizer = torch.optim.Adam([t for pair in pairs.values() for t in pair], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(7)
    held_out = inputs(generator)
    goal = exact(wide, teacher, held_out)
    unit = (exact(wide, {}, held_out) - goal).square().mean()
    computed, learned = [], []
    for step in range(steps + 1):
        if step % 10 == 0:
            with torch.no_grad():
                y = model(held_out.to(dtype)).double()
            computed.append(((y - goal).square().mean() / unit).item())
            y = exact(wide, pairs, held_out)
            learned.append(((y - goal).square().mean() / unit).item())
        x = inputs(generator)
        loss = F.mse_loss(model(x.to(dtype)).float(), exact(wide, teacher, x).float())
        optimizer.zero_grad()
        (loss / unit).backward()
        optimizer.step()
        schedule.step()
    return computed, learned


def inputs(generator: torch.Generator) -> Tensor:
    """[16, 32, WIDTH], values that bfloat16 holds exactly."""
    return torch.randn(16, 32, WIDTH, generator=generator).bfloat16().float().to(device())


def runs(seed: int, size: float, steps: int, lr: float) -> dict[str, tuple[list[float], ...]]:
    """One base and teacher; every way's two curves."""
    torch.manual_seed(seed)
    base = make_base()
    teacher = teacher_of(base, size)
    start = {p: (torch.randn(A.shape) / RANK).bfloat16().float() for p, (A, _) in teacher.items()}
    return {name: finetune(base, name, teacher, start, steps, lr) for name in WAYS}


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    started = time.monotonic()
    seeds = [runs(s, options.size, options.steps, options.lr) for s in range(options.seeds)]
    curves: list[dict[str, Any]] = []
    for name in WAYS:
        both = torch.tensor([run[name] for run in seeds])  # [seed, 2, points]
        computed, learned = both.mean(0).tolist()
        curve = {"way": name, "steps": [10 * i for i in range(len(computed))]}
        final = {"computed": both[:, 0, -1].tolist(), "learned": both[:, 1, -1].tolist()}
        curves.append({**curve, "computed": computed, "learned": learned, "final": final})
    content = {"options": vars(options), "rank": RANK, "curves": curves}
    path = save(options.out, "finetune_bf16", content)
    print(finetune_table(content))
    print(f"{time.monotonic() - started:.0f} s, {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetune_bf16", description=__doc__)
    parser.add_argument("--out", default="benchmark-results", help="folder of finetune_bf16.json")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=float, default=3e-3, help="‖Δ‖/‖W‖ of the teacher's update")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=1e-3)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
