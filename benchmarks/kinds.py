"""The kinds of update side by side: time, memory and file of one layer, against the frozen one.

``python -m benchmarks.kinds --out FOLDER`` writes ``kinds.json`` and prints a table. A step is
forward and backward with gradients of the input and of all that the kind trains; R is its time
over the frozen layer's forward and input gradient, in one process, interleaved, on the same
tensors. peft's LoRA and DoRA are beside ours. Each way is checked first: its output and its input
gradient against the layer with the kind's formula for its weight, in float64.
"""

import argparse
import copy
import gc
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import paramlora
from benchmarks import cases, timing
from benchmarks.layers import DTYPES, selection, store
from benchmarks.machine import device
from benchmarks.opponents import Way, twin
from benchmarks.reference import bound
from benchmarks.results import kinds_table, load, save
from benchmarks.saved import saved_bytes

Held = dict[str, Tensor]
Formula = Callable[[Tensor, Held], Tensor]


def _rank(held: Held) -> Tensor:
    return held["lora_B"].flatten(1) @ held["lora_A"].flatten(1)


def lora(weight: Tensor, held: Held) -> Tensor:
    return weight + _rank(held).reshape(weight.shape)


def dora(weight: Tensor, held: Held) -> Tensor:
    """Liu et al. 2024, equation 5, with a norm for each output."""
    total = lora(weight, held).flatten(1)
    length = held["magnitude"].reshape(-1, 1) / total.norm(dim=1, keepdim=True).detach()
    return (length * total).reshape(weight.shape)


def loha(weight: Tensor, held: Held) -> Tensor:
    sides = (held[f"hada_w{n}_a"] @ held[f"hada_w{n}_b"] for n in (1, 2))
    return weight + (next(sides) * next(sides)).reshape(weight.shape)


def lokr(weight: Tensor, held: Held) -> Tensor:
    small, large = held["lokr_w1"], held.get("lokr_w2")
    if large is None:
        large = held["lokr_w2_a"] @ held["lokr_w2_b"]
    if weight.dim() == 4:  # each block of the large one has a kernel
        large = large.reshape(large.shape[0], -1, *weight.shape[2:])
        product = torch.einsum("ab,cdhw->acbdhw", small, large)
        return weight + product.reshape(weight.shape)
    return weight + torch.kron(small, large)


def rows(weight: Tensor, held: Held) -> Tensor:
    return weight.index_copy(0, held["lora_ids"], held["lora_rows"])


@dataclass(frozen=True)
class Kind:
    """An entry of a configuration, for a rank, and the weight that its tensors make."""

    entry: Callable[[int], dict[str, Any]]
    formula: Formula


KINDS = {
    "lora": Kind(lambda r: {"r": r, "scale": 1.0}, lora),
    "dora": Kind(lambda r: {"r": r, "scale": 1.0, "kind": "dora"}, dora),
    "loha": Kind(lambda r: {"r": r, "scale": 1.0, "kind": "loha"}, loha),
    "lokr": Kind(lambda r: {"r": r, "scale": 1.0, "kind": "lokr"}, lokr),
    "lokr full": Kind(
        lambda r: {"r": r, "scale": 1.0, "kind": "lokr", "factor": 8, "full_matrix": True}, lokr
    ),
    "rows": Kind(lambda r: {"rows": list(range(r))}, rows),
    "whole": Kind(lambda r: {"whole": True}, lambda weight, held: held["lora_whole"]),
}


@dataclass(frozen=True)
class Built:
    """A way to compute the layer, what it trains, and the weight that it stands for."""

    call: nn.Module
    trained: list[nn.Parameter]
    wanted: Callable[[Tensor], Tensor]
    save: Callable[[Path], object]


def ours(kind: Kind, layer: nn.Module, r: int) -> Built:
    model = paramlora.attach(nn.Sequential(copy.deepcopy(layer)), {"0": kind.entry(r)})
    weight_update = model[0].parametrizations.weight[0]
    trained = list(weight_update.parameters())
    _move(trained, layer)

    def wanted(weight: Tensor) -> Tensor:
        held = {name: t.double() for name, t in weight_update.state_dict().items()}
        held["lora_ids"] = held.get("lora_ids", torch.zeros(0)).long()
        held["magnitude"] = held.get("lora_magnitude", torch.zeros(0))
        return kind.formula(weight, held)

    return Built(model[0], trained, wanted, lambda path: paramlora.save_adapter(model, path))


def peft(use_dora: bool, layer: nn.Module, r: int) -> Built:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=r, target_modules=["0"], use_dora=use_dora)
    model = get_peft_model(nn.Sequential(twin(layer)), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    _move(trained, layer)

    def wanted(weight: Tensor) -> Tensor:
        names = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_magnitude_vector": "magnitude"}
        told = model.named_parameters()
        held = {
            ours: p.double() for key, p in told for theirs, ours in names.items() if theirs in key
        }
        return (dora if use_dora else lora)(weight, held)

    # the module itself, past peft's wrapper of the model, whose cost is not the layer's
    return Built(model.base_model.model[0], trained, wanted, lambda path: _saved(model, path))


def _saved(model: Any, path: Path) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    save_file(get_peft_model_state_dict(model), path)


def _move(trained: list[nn.Parameter], layer: nn.Module) -> None:
    """Move each from its start, so that leaving the update out cannot pass; bfloat16 holds them."""
    torch.manual_seed(1)
    size = float(layer.weight.float().std())
    with torch.no_grad():
        for p in trained:
            near = p.float() + torch.randn_like(p, dtype=torch.float32) * max(size, 0.05) * 0.5
            p.copy_(near.bfloat16())


WAYS: dict[str, Callable[[nn.Module, int], Built]] = {
    **{
        f"paramlora {name}": lambda layer, r, kind=kind: ours(kind, layer, r)
        for name, kind in KINDS.items()
    },
    "peft lora": lambda layer, r: peft(False, layer, r),
    "peft dora": lambda layer, r: peft(True, layer, r),
}


def step(built: Built, tensors: cases.Tensors) -> tuple[Tensor, ...]:
    """The output and the gradients, of the input first: exactly what is timed."""
    y = built.call(tensors.x)
    return (y, *torch.autograd.grad(y, [tensors.x, *built.trained], tensors.dy))


def check(built: Built, tensors: cases.Tensors, limit: float) -> float:
    """The largest relative error of the output and of the input's gradient.

    Raises:
        AssertionError: one is beyond `limit`.
    """
    wide = copy.deepcopy(tensors.layer).double()
    x = tensors.x.detach().double().requires_grad_()
    with torch.no_grad():
        weight = built.wanted(wide.weight)
    want = functional_call(wide, {"weight": weight}, (x,))
    (dx,) = torch.autograd.grad(want, x, tensors.dy.double())
    y, got, *_ = step(built, tensors)
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in ((y, want), (got, dx))]
    assert max(errors) < limit, f"relative error {max(errors):.2e} >= {limit:.2e}"
    return max(errors)


def measure(
    case: cases.Case, dtype: str, names: list[str], rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """A row for each of some ways at one shape."""
    kind = DTYPES[dtype]
    tensors = cases.make(case, kind, device(), kind)
    frozen = Built(twin(tensors.layer), [], lambda weight: weight, lambda path: None)
    built, told = {"frozen": frozen}, {"frozen": _row(case, dtype, "frozen")}
    for name in names:
        told[name] = _row(case, dtype, name)
        try:
            way = WAYS[name](tensors.layer, case.r)
            told[name].update(about(way, tensors, bound(kind, max(case.tokens, *_sides(tensors)))))
            built[name] = way
        except Exception as reason:  # recorded beside the others' numbers, never dropped
            told[name]["refused"] = f"{type(reason).__name__}: {reason}"[:300]
    steps = {name: lambda way=way: step(way, tensors) for name, way in built.items()}
    store(told, "eager", timing.eager(steps, device(), rounds, seconds))
    if device().type == "cuda":
        store(told, "device", timing.replayed(steps, rounds, seconds))
    return list(told.values())


def about(way: Built, tensors: cases.Tensors, limit: float) -> dict[str, Any]:
    """Its error, what it keeps for backward, what it trains, and the size of its file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        way.save(path)
        size = path.stat().st_size
    return {
        "error": check(way, tensors, limit),
        "saved_bytes": saved_bytes(Way(way.call), tensors, nullcontext()),
        "trainable": sum(p.numel() for p in way.trained),
        "file_bytes": size,
    }


def _sides(tensors: cases.Tensors) -> tuple[int, ...]:
    return tuple(tensors.layer.weight.flatten(1).shape)


def _row(case: cases.Case, dtype: str, way: str) -> dict[str, Any]:
    return {"case": case.name, "dtype": dtype, "way": way}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kinds", description=__doc__)
    parser.add_argument("--out", default="benchmark-results", help="folder of kinds.json")
    parser.add_argument("--size", choices=["cuda", "cpu", "tiny"])
    parser.add_argument("--match", default="", help="only cases with this in their names")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.02, help="of one sample")
    options = parser.parse_args(arguments)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32 for every way
    on = options.size or device().type
    dtype = "bf16" if on == "cuda" else "float32"
    found: list[dict[str, Any]] = []
    for case in selection(on, ["linear", "other"], options.match):
        if case.name.startswith(("linear", "conv 3×3")):
            found += measure(case, dtype, options.ways, options.rounds, options.seconds)
            path = save(options.out, "kinds", {"rows": found})
            gc.collect()
    print(kinds_table(load(path)))
    wrong = [r for r in found if r["way"].startswith("paramlora") and "refused" in r]
    for row in wrong:
        print("WRONG", row)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
