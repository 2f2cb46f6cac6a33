"""Layers that drop a tenth of their updates' inputs: R, beside those that drop nothing.

``python -m benchmarks.dropout --out FOLDER`` writes ``dropout.json`` after every shape and prints a
table. ``dropout`` is torch's operations with masks drawn from a seed, ``kernels dropout`` ours,
whatever the table of cards says; R is a step's time over the frozen layer's, in one process, in
turns. Kept is the share of an update of a thousandth of the weights that reaches the output, of the
rows' own masks. ``two masks`` are two updates at once, each of half of the rank and with a mask of
its own. A convolution has one way of dropping, whatever the table of cards says.
"""

import argparse
import sys
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import timing
from benchmarks.experts import Kernels
from benchmarks.machine import device
from benchmarks.results import dropout_table, save
from paramlora.evaluate import functional
from paramlora.evaluate.convolution import convolution, dropped_convolution
from paramlora.evaluate.dropout import Drops, dropped_linear, masked

RATE = 0.1
SHAPES = (  # rows, in, out, rank
    (8192, 4096, 4096, 16),
    (8192, 4096, 14336, 16),
    (16384, 1280, 1280, 8),
    (1024, 4096, 4096, 16),
)
IMAGES = ((8, 320, 64, 3, 8), (8, 320, 64, 1, 8))  # images, channels, size, kernel, rank
TINY, TINY_IMAGES = ((64, 32, 48, 4),), ((4, 16, 9, 3, 2),)
WAYS = ("frozen", "paramlora", "dropout", "kernels dropout", "kernels two masks", "peft dropout")


class Layer:
    """The tensors of one linear layer."""

    ways = WAYS

    def kernels(self, way: str) -> Kernels:
        """Whose kernels compute a way."""
        return Kernels(way.startswith("kernels"))

    def __init__(self, rows: int, fan_in: int, out: int, r: int) -> None:
        torch.manual_seed(0)
        with torch.device(device()):
            self.x = torch.randn(rows, fan_in).bfloat16().requires_grad_()
            self.weight = (torch.randn(out, fan_in) / fan_in**0.5).bfloat16()
            self.a = (torch.randn(r, fan_in) / fan_in**0.5).requires_grad_()
            self.b = (torch.randn(out, r) / r**0.5 / 10).requires_grad_()
            self.dy, self.one = torch.randn(rows, out).bfloat16(), torch.ones(())

    def output(self, way: str, b: Tensor, seed: Tensor) -> Tensor:
        x, weight, a = self.x, self.weight, self.a
        if way == "frozen":
            return F.linear(x, weight)
        if way == "paramlora":
            return functional.linear(x, weight, None, a, b, self.one)
        if way == "peft dropout":  # its layer's lines, with factors of the base's type
            low = F.linear(F.dropout(x, RATE), a.bfloat16())
            return F.linear(x, weight) + F.linear(low, b.bfloat16())
        masks = 2 if way == "kernels two masks" else 1
        drops = Drops((RATE,) * masks, (len(a) // masks,) * masks, seed)
        return dropped_linear(x, weight, None, a, b, self.one, 1 / (1 - RATE), drops)

    def step(self, way: str) -> timing.Step:
        leaves = [self.x] if way == "frozen" else [self.x, self.a, self.b]

        def step() -> None:
            seed = torch.randint(2**62, (), device=device())
            with self.kernels(way)():
                torch.autograd.grad(self.output(way, self.b, seed), leaves, self.dy)

        return step

    @torch.no_grad()
    def kept(self, way: str) -> float:
        """The share of a small update that arrives, by its own mask."""
        seed = torch.tensor(7, device=device())
        b = self.b * 1e-3 * self.weight.float().norm() / (self.b @ self.a).norm()
        with self.kernels(way)():
            y, none = (self.output(way, f, seed).float() for f in (b, torch.zeros_like(b)))
        change = self.change(b, seed)
        return (((y - none) * change).sum() / change.square().sum()).item()

    def seen(self, seed: Tensor) -> Tensor:
        """What the update gets of the input."""
        return masked(self.x, Drops((RATE,), (len(self.a),), seed), 0).float() / (1 - RATE)

    def change(self, b: Tensor, seed: Tensor) -> Tensor:
        """The update's part of the output, in float32."""
        return self.seen(seed) @ self.a.t() @ b.t()


class Image(Layer):
    """The tensors of one convolution."""

    ways = ("frozen", "paramlora", "dropout", "peft dropout")

    def kernels(self, way: str) -> Kernels:
        return Kernels(None)  # by the table of cards

    def __init__(self, images: int, channels: int, size: int, kernel: int, r: int) -> None:
        torch.manual_seed(0)
        fan_in, shape = channels * kernel**2, (images, channels, size, size)
        with torch.device(device()):
            self.x = torch.randn(shape).bfloat16().requires_grad_()
            weight = torch.randn(channels, channels, kernel, kernel) / fan_in**0.5
            self.weight, self.one = weight.bfloat16(), torch.ones(())
            self.a = (torch.randn(r, fan_in) / fan_in**0.5).requires_grad_()
            self.b = (torch.randn(channels, r) / r**0.5 / 10).requires_grad_()
            self.dy = torch.randn(shape).bfloat16()

    def output(self, way: str, b: Tensor, seed: Tensor) -> Tensor:
        x, weight, a, pad = self.x, self.weight, self.a, self.weight.shape[2] // 2
        window = ((1, 1), (pad, pad), (1, 1), 1)
        if way == "frozen":
            return F.conv2d(x, weight, None, *window)
        if way == "paramlora":
            return convolution(x, weight, None, a, b, self.one, *window)
        if way == "peft dropout":  # its layer's lines, with factors of the base's type
            first = a.bfloat16().view(-1, *weight.shape[1:])
            low = F.conv2d(F.dropout(x, RATE), first, None, *window)
            return F.conv2d(x, weight, None, *window) + F.conv2d(low, b.bfloat16()[..., None, None])
        scale, drops = self.one / (1 - RATE), Drops((RATE,), (len(a),), seed)
        values = (x, lambda x: x, weight, None, a, b, scale)
        return dropped_convolution(*values, window, drops)

    def seen(self, seed: Tensor) -> Tensor:
        if self.weight.shape[2] > 1 or device().type != "cuda":
            return super().seen(seed)
        # a kernel of one position is a linear layer of every position, and has that one's masks
        rows = masked(functional.positions(self.x), Drops((RATE,), (len(self.a),), seed), 0)
        return functional.image_of(rows, self.x.shape).float() / (1 - RATE)

    def change(self, b: Tensor, seed: Tensor) -> Tensor:
        pad, first = self.weight.shape[2] // 2, self.a.view(-1, *self.weight.shape[1:])
        low = F.conv2d(self.seen(seed), first, padding=pad)
        return F.conv2d(low, b[..., None, None])


def measure(layer: Layer, case: str, rounds: int) -> list[dict[str, Any]]:
    rows = []
    live = {way: layer.step(way) for way in layer.ways}
    times = {"eager": timing.eager(live, device(), rounds)}
    if device().type == "cuda":
        times["device"] = timing.replayed(live, rounds)
    for way in layer.ways:
        row: dict[str, Any] = {"case": case, "way": way}
        for kind, found in times.items():
            if way in found:
                row[f"{kind}_ms"] = median(found[way])
                row[f"{kind}_R"] = row[f"{kind}_ms"] / median(found["frozen"])
        if way in ("dropout", "kernels dropout"):
            row["kept"] = layer.kept(way)
        rows.append(row)
    return rows


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dropout")
    parser.add_argument("--out", default="benchmark-results", help="folder of dropout.json")
    parser.add_argument("--rounds", type=int, default=9)
    options, rows = parser.parse_args(arguments), []
    large = device().type == "cuda"
    for shape in SHAPES if large else TINY:
        rows += measure(Layer(*shape), "×".join(map(str, shape)), options.rounds)
        save(options.out, "dropout", {"rows": rows})
    for shape in IMAGES if large else TINY_IMAGES:
        images, channels, size, kernel, r = shape
        case = f"conv {kernel}×{kernel} {images}×{channels}×{size}² r{r}"
        rows += measure(Image(*shape), case, options.rounds)
        save(options.out, "dropout", {"rows": rows})
    print(dropout_table({"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
