"""Measures where one way of computing a layer overtakes another, and writes the device's table.

``python -m benchmarks.tune [--write]`` times each shape in the ways between which
`paramlora.evaluate.choose` chooses, and prints the thresholds that lose the least time over all of
them, beside those of the table in use. ``--write`` puts them into ``paramlora/evaluate/cards.json``
under the device's name, for every later process; a card's ``experts`` and ``dropout``, which
`benchmarks.experts` and `benchmarks.dropout` tell, stay as they are. ``--never-run`` measures
nothing and writes what follows for the cards of `NEVER_RUN`, by `estimated`.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import paramlora
from benchmarks.machine import device
from benchmarks.timing import eager
from paramlora.evaluate import choose
from paramlora.evaluate.choose import Thresholds


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor of a compute capability holds at once.

    Args:
        shared: bytes of shared memory that one block may have, which the kernels' tiles must fit.
        held: bytes of it for all blocks together, each of which takes `RESERVED` more.
        threads: of all blocks together.
        blocks: at most.
    """

    shared: int
    held: int
    threads: int
    blocks: int

    def resident(self, shared: int, warps: int, registers: int) -> int:
        """How many blocks of a kernel run on it at once; zero if not one fits.

        Args:
            shared: bytes that each block takes.
            warps: of each block, 32 threads each.
            registers: of each thread.
        """
        if shared > self.shared:
            return 0
        per_warp = -(-registers * 32 // UNIT) * UNIT
        by_registers = REGISTERS // (per_warp * (warps + -warps % 4))
        by_memory = self.held // (shared + RESERVED)
        return min(self.blocks, self.threads // (32 * warps), by_registers, by_memory)


# By NVIDIA's own library of them, cuda::arch_traits of CCCL 3 (libcudacxx,
# cuda/__device/arch_traits.h), which holds the numbers of the CUDA programming guide's table
# "Technical Specifications per Compute Capability". Registers go to warps in units of 256, and to
# blocks for four warps at a time, one of each quarter of a multiprocessor.
REGISTERS, UNIT, RESERVED = 65536, 256, 1024
_KIB = 1024
LIMITS = {
    (8, 0): Limits(163 * _KIB, 164 * _KIB, 2048, 32),
    (8, 6): Limits(99 * _KIB, 100 * _KIB, 1536, 16),
    (8, 9): Limits(99 * _KIB, 100 * _KIB, 1536, 24),
    (9, 0): Limits(227 * _KIB, 228 * _KIB, 2048, 32),
    (10, 0): Limits(227 * _KIB, 228 * _KIB, 2048, 32),
    (12, 0): Limits(99 * _KIB, 100 * _KIB, 1536, 24),
}


@dataclass(frozen=True)
class Figures:
    """What a maker says of a card.

    Args:
        capability: CUDA's.
        processors: its multiprocessors.
        teraflops: of float32 outside of tensor cores, at the highest clock.
    """

    capability: tuple[int, int]
    processors: int
    teraflops: float


MEASURED = "NVIDIA H100 80GB HBM3"
H100 = Figures((9, 0), 132, 67)  # H100 data sheet, SXM
# By NVIDIA's data sheets (A100, A10, L4, L40S, HGX B200) and the architectures' whitepapers (GA102
# for the RTX 3090, Ada for the 4090, RTX Blackwell for the 5090).
NEVER_RUN = {
    "NVIDIA A100-SXM4-80GB": Figures((8, 0), 108, 19.5),
    "NVIDIA A10": Figures((8, 6), 72, 31.2),
    "NVIDIA GeForce RTX 3090": Figures((8, 6), 82, 35.6),
    "NVIDIA L4": Figures((8, 9), 58, 30.3),
    "NVIDIA GeForce RTX 4090": Figures((8, 9), 128, 82.6),
    "NVIDIA L40S": Figures((8, 9), 142, 91.6),
    "NVIDIA B200": Figures((10, 0), 148, 75),
    "NVIDIA GeForce RTX 5090": Figures((12, 0), 170, 104.8),
}
TABLE = Path(choose.__file__).with_name("cards.json")
ALWAYS, NEVER = 2**62, 0
CPU_LINEAR = list(itertools.product((1, 16, 256, 2048), (32, 64, 128, 256, 512), (4, 16)))
CUDA_LINEAR = list(itertools.product((16, 256, 2048, 16384), (256, 1024, 4096), (16,)))
CONVOLUTIONS = [  # side, channels, and a rank that they hold
    (side, channels, r)
    for side, channels, r in itertools.product((4, 16, 64), (8, 32, 64, 256), (4, 16))
    if r <= channels
]
Timed = tuple[int, float, float]  # the work, seconds of the simple way, of the function


def step_of(layer: nn.Module, x: torch.Tensor, r: int) -> Callable[[], None]:
    """One forward and backward of an adapted layer."""
    model = paramlora.attach(nn.Sequential(layer), {"0": {"r": r}}).to(x.device)
    dy = torch.ones_like(model(x))

    def step() -> None:
        model(x).backward(dy)
        model.zero_grad(set_to_none=True)

    return step


def timed(step: Callable[[], None], simple: Thresholds, x: torch.Tensor) -> tuple[float, float]:
    """Milliseconds by a card's choice, and by one that takes nothing for small."""

    def by(card: Thresholds) -> Callable[[], None]:
        def called() -> None:
            choose.thresholds_of = lambda x: card
            step()

        return called

    own = choose.thresholds_of
    try:
        found = eager({"simple": by(simple), "function": by(Thresholds())}, x.device, rounds=5)
    finally:
        choose.thresholds_of = own
    return min(found["simple"]), min(found["function"])


def linears(on_cpu: bool) -> Iterable[Timed]:
    """Of linear layers, their work as `choose` counts it."""
    for tokens, side, r in CPU_LINEAR if on_cpu else CUDA_LINEAR:
        x = torch.randn(tokens, side, device=device(), requires_grad=True)
        work = (tokens * side + 3 * (r + 16) * side) * side if on_cpu else tokens * side * side
        simple = Thresholds(tiny=ALWAYS) if on_cpu else Thresholds(brief=ALWAYS)
        yield work, *timed(step_of(nn.Linear(side, side), x, r), simple, x)


def convolutions() -> Iterable[Timed]:
    """Of convolutions 3×3, their work as `choose` counts it."""
    for side, channels, r in CONVOLUTIONS:
        x = torch.randn(2, channels, side, side, device=device(), requires_grad=True)
        layer = nn.Conv2d(channels, channels, 3, padding=1)
        work = 2 * side * side * layer.weight.numel()
        yield work, *timed(step_of(layer, x, r), Thresholds(small=ALWAYS, light=ALWAYS), x)


def threshold(rows: list[Timed]) -> int:
    """The power of two below which the simple way is taken, with the least time lost over all
    shapes, each as a share of its better way."""

    def lost(least: int) -> float:
        picked = [
            (simple if work < least else other, simple, other) for work, simple, other in rows
        ]
        return sum(math.log(taken / min(both)) for taken, *both in picked)

    return min((2**n for n in range(10, 40)), key=lost)


def measured(on_cpu: bool) -> Thresholds:
    """The device's thresholds; what other benchmarks measured of it stays."""
    if on_cpu:
        old = choose.CARDS["cpu"]
        return replace(old, tiny=threshold([*linears(True)]), small=threshold([*convolutions()]))
    about = torch.cuda.get_device_properties(device())
    brief = threshold([*linears(False)])
    return replace(
        choose.CARDS.get(about.name, Thresholds()),
        brief=brief,
        capability=(about.major, about.minor),
        processors=about.multi_processor_count,
        never_run=False,
    )


def estimated(card: Figures) -> Thresholds:
    """A card's thresholds without the card: Python takes as long beside every one, so what a card
    does meanwhile is to what an H100 was measured to do as their rates are; to a power of two."""
    brief = choose.CARDS[MEASURED].brief * card.teraflops / H100.teraflops
    return Thresholds(
        brief=2 ** round(math.log2(brief)),
        capability=card.capability,
        processors=card.processors,
        never_run=True,
    )


def write(name: str, card: Thresholds, table: Path) -> None:
    """Put a device's thresholds into a table; the others stay."""
    cards: dict[str, Any] = json.loads(table.read_text(encoding="utf-8"))
    cards[name] = {key: value for key, value in asdict(card).items() if value not in (0, (0, 0))}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(of)}" for key, of in cards.items())
    table.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put them into the table")
    parser.add_argument("--never-run", action="store_true", help="write what follows for others")
    options = parser.parse_args(arguments)
    if options.never_run:
        for name, figures in NEVER_RUN.items():
            write(name, estimated(figures), TABLE)
        return 0
    on_cpu = device().type == "cpu"
    name = "cpu" if on_cpu else torch.cuda.get_device_name()
    found = measured(on_cpu)
    print(f"{name}: {found}\nin use: {choose.thresholds_of(torch.empty(0, device=device()))}")
    if options.write:
        write(name, found, TABLE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
