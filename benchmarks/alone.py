"""What each piece of the 16-bit kernels is worth alone, as a share of a whole model's step.

``python -m benchmarks.alone --out FOLDER [PART ...]`` trains adapted models, each with one piece
replaced by the simpler way, in turns in one process, and writes ``alone.json`` after every model:
the eager step, the device's time of the step in a CUDA graph, and how much longer than the code as
it is each takes (``eager_more`` and ``device_more``, medians of the same round's ratios). A piece
is kept where it wins 3 % of a step, or keeps an update that would be lost. The parts:

- ``linear``: programs that wait for programs against `pack`, `project` and `product`. A CUDA graph
  never waits, so this shows in the eager step alone;
- ``depthwise``: the kernels of single channels against the sum in float32 by cuDNN, and against
  the layer's convolution and another of the update alone, which rounds twice.

Each row counts the launches of our kernels in a step, which shows that the piece was replaced, and
how far the output and the gradients are from those of the code as it is.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.machine import device
from benchmarks.models import DTYPES, Trained, _emptied, _inputs, _made
from benchmarks.results import alone_table, save
from benchmarks.update_kept import share
from benchmarks.zoo import ZOO, Zoo
from paramlora.cuda import launches
from paramlora.cuda.operands import Operands, Wanted
from paramlora.evaluate import convolution

AS_IT_IS = "as it is"
Replaced = tuple[tuple[Any, str, Any], ...]  # a module, a name in it, what it holds meanwhile


class Everything(Zoo):
    """A model whose convolutions of single channels are adapted, too."""

    def entries(self, model: nn.Module) -> list[str]:
        """Paths of the layers to adapt."""
        return [
            path
            for path, m in model.named_modules()
            if isinstance(m, nn.Linear)
            or (isinstance(m, nn.Conv2d) and 1 < m.groups == m.in_channels)
        ]


def convnext(tiny: bool) -> nn.Module:
    """ConvNeXt-T of Liu et al. 2022, arXiv:2201.03545: kernels 7×7 of single channels."""
    from transformers import ConvNextConfig, ConvNextModel

    small = dict(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=16)
    return ConvNextModel(ConvNextConfig(**(small if tiny else {})))


def images(batch: int, tiny: bool) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 3, *((16, 16) if tiny else (224, 224))),)


MODELS = {
    **ZOO,
    "convnext": Everything(
        convnext,
        images,
        lambda model, args: model(*args).last_hidden_state,
        lambda path: True,
        r=8,
        batch=64,
    ),
}


def float32_sum(of: Operands, where: Any) -> tuple[Tensor, Tensor]:
    """The forward of single channels by cuDNN: as exact as the kernels, in more passes."""
    x, weight, bias, a, b, scale = of
    total = weight.float() + ((scale * b) @ a).view_as(weight)
    conv, wide = convolution.CONVOLUTIONS[weight.dim() - 3], None if bias is None else bias.float()
    return conv(x.float(), total, wide, *where, len(weight)).to(x.dtype), total


def float32_sum_backward(
    dy: Tensor, of: Operands, total: Tensor, wanted: Wanted, where: Any
) -> tuple[Optional[Tensor], ...]:
    """The backward of `float32_sum`, of what these models train: neither the weight nor scale."""
    assert not (wanted.weight or wanted.scale), "only the factors are trained here"
    masks, none = [wanted.x, wanted.factors, False], [0] * len(where[0])
    dx, kernel, _ = torch.ops.aten.convolution_backward(
        dy.float(), of.x.float(), total, None, *where, False, none, len(total), masks
    )
    dx = None if dx is None else dx.to(of.x.dtype)
    if kernel is None:
        return dx, None, None, None, None
    flat = of.scale * kernel.flatten(1)
    return dx, None, of.b.t() @ flat, flat @ of.a.t(), None


@dataclass(frozen=True)
class Part:
    """A piece of the code: the models that use it, and by name what is replaced in each way."""

    models: tuple[str, ...]
    ways: Callable[[], dict[str, Replaced]]


def linear_ways() -> dict[str, Replaced]:
    """Of linear layers; empty where Triton is missing. Each has plans of its own."""
    try:
        from paramlora.cuda.linear import plan
    except ImportError:
        return {}
    alone = (launches, "_is_together", lambda *_: False)
    ways: dict[str, Replaced] = {AS_IT_IS: (), "no waiting": (alone,)}
    return {
        way: (*of, (plan, "_FORWARDS", {}), (plan, "_BACKWARDS", {})) for way, of in ways.items()
    }


PARTS = {
    "linear": Part(("unet", "llama", "vit"), linear_ways),
    "depthwise": Part(
        ("convnext",),
        lambda: {
            AS_IT_IS: (),
            "float32 sum": (
                (convolution, "depthwise", float32_sum),
                (convolution, "depthwise_backward", float32_sum_backward),
            ),
            "two convolutions": ((convolution, "is_depthwise", lambda *_: False),),
        },
    ),
}


@contextmanager
def replaced(replacements: Replaced) -> Iterator[None]:
    """The named things replaced, and afterwards as they were."""
    before = [(module, name, getattr(module, name)) for module, name, _ in replacements]
    try:
        for module, name, value in replacements:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """The launches of our kernels, by name."""
    count: Counter[str] = Counter()
    try:
        from paramlora.cuda.launch import Launch
    except ImportError:
        yield count
        return
    call = Launch.__call__

    def counting(self: Any, *args: Any) -> None:
        count[getattr(self.kernel, "fn", self.kernel).__name__] += 1
        call(self, *args)

    with replaced(((Launch, "__call__", counting),)):
        yield count


def outcome(trained: Trained) -> list[Tensor]:
    """The output and every gradient of one step, in a fixed order."""
    y = trained.forward()
    y.backward(trained.dy)
    found = [y.detach(), *(p.grad.clone() for p in trained.parameters if p.grad is not None)]
    trained.model.zero_grad(set_to_none=True)
    return found


def distance(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest relative error among the output and the gradients."""
    assert len(got) == len(want)
    pairs = zip(got, want)
    return max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs)


def trained_model(zoo: Zoo, tiny: bool, dtype: torch.dtype) -> Trained:
    """A model with random weights, adapted."""
    torch.manual_seed(0)
    base = _made(zoo, dtype, tiny)
    args = _inputs(zoo, dtype, 2 if tiny else zoo.batch, tiny)
    with torch.no_grad():
        dy = torch.randn_like(zoo.call(base, args))
    return Trained(base, zoo, "paramlora", 2 if tiny else zoo.r, args, dy)


def stepping(trained: Trained, replacements: Replaced) -> timing.Step:
    def step() -> None:
        with replaced(replacements):
            trained.step()

    return step


def compared(
    trained: Trained, ways: dict[str, Replaced]
) -> tuple[dict[str, dict[str, Any]], dict[str, timing.Step]]:
    """A row for each way, with its launches and its distance from the first, and its step."""
    rows: dict[str, dict[str, Any]] = {}
    steps, want = {}, None
    for way, replacements in ways.items():
        with replaced(replacements), counted() as count:
            got = outcome(trained)
        want = want or got
        rows[way] = {"launches": dict(count), "distance": distance(got, want)}
        steps[way] = stepping(trained, replacements)
    return rows, steps


def measure(part: str, name: str, tiny: bool, rounds: int, dtype: torch.dtype) -> list[Any]:
    """A row for each way in which one model computes a part."""
    rows, steps = compared(trained_model(MODELS[name], tiny, dtype), PARTS[part].ways())
    _store(rows, "eager", timing.eager(steps, device(), rounds, 0.0))
    if device().type == "cuda":
        _store(rows, "device", timing.replayed(steps, rounds, 0.0))
    return [{"case": name, "part": part, "way": way, **row} for way, row in rows.items()]


def _store(rows: dict[str, dict[str, Any]], mode: str, times: dict[str, list[float]]) -> None:
    """The median time, and how much longer than the code as it is: median, least and most."""
    for way, samples in times.items():
        more = sorted(a / b - 1 for a, b in zip(samples, times.get(AS_IT_IS, samples)))
        rows[way][f"{mode}_ms"], rows[way][f"{mode}_more"] = median(samples), median(more)
        rows[way][f"{mode}_more_spread"] = [more[0], more[-1]]


def kept(dtype: torch.dtype, channels: int = 320, side: int = 32) -> dict[str, float]:
    """The share of an update of 1e-3 that reaches the output of a convolution of single channels
    by each way."""
    torch.manual_seed(0)
    x = torch.randn(8, channels, side, side, device=device(), dtype=dtype)
    weight = torch.randn(channels, 1, 3, 3, device=device(), dtype=dtype) / 3
    a, b = torch.randn(8, 9, device=device()), torch.randn(channels, 8, device=device())
    b *= 1e-3 * weight.double().norm() / (b @ a).double().norm()
    one, where = torch.ones((), device=device()), ((1, 1), (1, 1), (1, 1), channels)
    kernels = (w.double().view(channels, 1, 3, 3) for w in (weight, b @ a))
    base, true = (F.conv2d(x.double(), kernel, None, *where) for kernel in kernels)
    shares = {}
    for way, replacements in PARTS["depthwise"].ways().items():
        with replaced(replacements):
            y = convolution.convolution(x, weight, None, a, b, one, *where)
        shares[way] = share(y, base, true)
    return shares


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    tiny, started = options.tiny or device().type == "cpu", time.monotonic()
    content: dict[str, Any] = {"tiny": tiny, "rows": [], "kept": {}, "left_out": []}
    parts = options.parts or list(PARTS)
    for part, name in [(one, name) for one in parts for name in PARTS[one].models]:
        if time.monotonic() - started > options.seconds:
            content["left_out"].append([part, name])
            continue
        with _emptied():
            dtype = DTYPES[options.dtype]
            content["rows"] += measure(part, name, tiny, options.rounds, dtype)
            if part == "depthwise":
                content["kept"] = kept(dtype)
        content["taken_s"] = time.monotonic() - started
        path = save(options.out, "alone", content)
        print(f"{part}, {name}: {content['taken_s']:.0f} s, {path}", flush=True)
    print(alone_table(content))
    print(f"kept by single channels: {content['kept']}; left out: {content['left_out']}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.alone", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--out", default="benchmark-results", help="folder of alone.json")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--tiny", action="store_true", help="the small sizes, as without CUDA")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=200, help="after which no model is begun")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
