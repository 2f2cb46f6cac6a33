"""A thousand layers: attach, save, load, swap and merge; and what the import costs.

``python -m benchmarks.many --out FOLDER`` writes ``many.json`` and prints a table.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import paramlora
from benchmarks.opponents import adapt, factors
from benchmarks.results import many_table, save

WIDTH, RANK = 64, 4


class Block(nn.Module):
    """One linear layer under one name, as in the blocks of any transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def layers(count: int) -> nn.Module:
    return nn.Sequential(*(Block() for _ in range(count)))


def attach(way: str, count: int) -> nn.Module:
    model = adapt(way, layers(count), ["proj"], RANK)
    with torch.no_grad():
        for _, B in factors(model).values():
            B.normal_()
    return model


def merged(model: nn.Module) -> nn.Module:
    if isinstance(model, nn.Sequential):
        return paramlora.merge(model)
    return model.merge_and_unload()  # type: ignore[operator]


def write(model: nn.Module, folder: Path) -> None:
    if isinstance(model, nn.Sequential):
        paramlora.save_adapter(model, folder / "adapter.safetensors")
    else:
        model.save_pretrained(folder)  # type: ignore[operator]


def read(way: str, model: nn.Module, folder: Path) -> nn.Module:
    if way == "paramlora":
        return paramlora.load_adapter(model, folder / "adapter.safetensors")
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder)


def swap(model: nn.Module, folder: Path) -> None:
    """Another file's values into the attached adapter, by each library's way that compiles no
    model again."""
    if isinstance(model, nn.Sequential):
        paramlora.load_adapter(model, folder / "adapter.safetensors", into="default")
    else:
        from peft.utils.hotswap import hotswap_adapter

        hotswap_adapter(model, folder, "default")


def check(way: str, count: int, folder: Path) -> None:
    """Attached, loaded, swapped and merged models compute ``W + B·A`` to float64's accuracy.

    The limit is relative to a chain of `count` products, each rounded at 1.1e-16.
    """
    base = layers(count).double()
    model = adapt(way, base, ["proj"], RANK)
    with torch.no_grad():
        for A, B in factors(model).values():
            A.normal_(std=WIDTH**-0.5), B.normal_(std=RANK**-0.5 / 2)
    weights = [_base(model, i) + B @ A for i, (A, B) in enumerate(factors(model).values())]
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    want = x
    for weight in weights:
        want = want @ weight.T
    assert want.norm() > 0
    assert _close(model(x), want)
    write(model, folder)
    plain, fresh = plain_of(model, count), plain_of(model, count)
    assert _close(read(way, plain, folder)(x), want)
    other = adapt(way, fresh, ["proj"], RANK)
    swap(other, folder)
    assert _close(other(x), want)
    assert _close(merged(model)(x), want)


def plain_of(model: nn.Module, count: int) -> nn.Module:
    """The layers without an update."""
    plain = layers(count).double()
    for i, layer in enumerate(plain):
        layer.proj.weight.data.copy_(_base(model, i))
    return plain


def _base(model: nn.Module, index: int) -> Tensor:
    names = (
        f"{index}.proj.parametrizations.weight.original",
        f"base_model.model.{index}.proj.base_layer.weight",
    )
    params = dict(model.named_parameters())
    return next(params[name].detach() for name in names if name in params)


def _close(got: Tensor, want: Tensor) -> bool:
    return ((got - want).norm() / want.norm()).item() < 1e-9


def seconds(make: Callable[[], Any], act: Callable[[Any], object]) -> float:
    made = make()
    start = time.perf_counter()
    act(made)
    return time.perf_counter() - start


def measure(way: str, count: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Seconds of each act, the median of `repeats`; of attaching by one name, and by one each."""
    check(way, min(count, 20), folder)

    def typical(make: Callable[[], Any], act: Callable[[Any], object]) -> float:
        return median(seconds(make, act) for _ in range(repeats))

    row: dict[str, Any] = {"way": way, "layers": count}
    row["attach"] = typical(lambda: layers(count), lambda m: adapt(way, m, ["proj"], RANK))
    each = [f"{index}.proj" for index in range(count)]
    row["attach each"] = typical(lambda: layers(count), lambda m: adapt(way, m, each, RANK))
    row["save"] = typical(lambda: attach(way, count), lambda m: write(m, folder))
    row["load"] = typical(lambda: layers(count), lambda m: read(way, m, folder))
    row["swap"] = typical(lambda: attach(way, count), lambda m: swap(m, folder))
    row["merge"] = typical(lambda: attach(way, count), merged)
    row["import"] = median(import_seconds(way) for _ in range(repeats))
    return row


def import_seconds(package: str) -> float:
    """What ``import package`` adds to ``import torch``, in a process of its own."""
    code = (
        "import time, torch; start = time.perf_counter(); "
        f"import {package}; print(time.perf_counter() - start)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many", description=__doc__)
    parser.add_argument("--out", default="benchmark-results", help="folder of many.json")
    parser.add_argument("--layers", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        for way in ("paramlora", "peft"):
            (Path(folder) / way).mkdir()
        rows = [
            measure(way, options.layers, options.repeats, Path(folder) / way)
            for way in ("paramlora", "peft")
        ]
    path = save(options.out, "many", {"rows": rows})
    print(many_table({"rows": rows}))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
