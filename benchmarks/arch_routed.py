"""Rows that choose, in model classes of transformers and diffusers, built tiny and adapted whole.

``python -m benchmarks.arch_routed CLASS ...`` prints a line for each: the two rows of its batch
take an adapter each, and their outputs and gradients, in float64, are compared with those of each
adapter's dense model; or the sentence by which it is refused, before or within the block. A class
whose outputs are of both rows together, as CLIP's similarities are, cannot be compared.
"""

import copy
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

import paramlora
from benchmarks import arch_checks, architectures, dense

NAMES = ("one", "two")


def examined(name: str) -> str:
    """How far a class is off, or why it is refused."""
    _, plain, inputs = architectures.able(name)
    places = dense.places(plain)
    drawn = dense.drawn(plain.requires_grad_(False), places)
    factors = (drawn, {stem: (A.flip(-1).clone(), B) for stem, (A, B) in drawn.items()})
    references = [dense.summed(plain, places, own).eval() for own in factors]
    model = copy.deepcopy(plain).eval()
    for adapter, own in zip(NAMES, factors):
        paramlora.attach(model, arch_checks.entries(places), adapter)
        state = paramlora.adapter_state_dict(model, adapter)
        told = {f"{s}.lora_{side}": f for s, pair in own.items() for side, f in zip("AB", pair)}
        paramlora.load_adapter_state_dict(model, {**state, **told}, adapter)
    wants = [step(one, inputs, row) for row, one in enumerate(references)]
    try:
        block = paramlora.route(model, NAMES)
        block.__enter__()
    except paramlora.AdapterError as error:
        return f"refused: {error}"
    try:
        got = step(model, inputs, None)
    except paramlora.AdapterError as error:
        return f"refused within: {error}"
    finally:
        block.__exit__(None, None, None)
    worst = 0.0
    for row, adapter in enumerate(NAMES):
        real = dense.gradients(references[row], places, factors[row])
        real = {key: t for key, t in real.items() if key.endswith(("lora_A", "lora_B"))}
        outputs = arch_checks.apart([t[row] for t in got], [t[row] for t in wants[row]])
        mine = gradients(model, adapter)
        worst = max(worst, outputs, arch_checks.gradients_apart(mine, real))
    limit = arch_checks.LIMITS[next(plain.parameters()).dtype]
    return f"{'exact' if worst <= limit else 'WRONG'}: {worst:.1e}"


def step(model: nn.Module, inputs: dict[str, Any], only: "int | None") -> list[Tensor]:
    """Forward and backward of a fixed random sum of all outputs, or those of one row, ``[2, ...]``
    where the rows lie in the first dimension."""
    model.zero_grad(set_to_none=True)
    with arch_checks.held(model):
        arch_checks.seed()
        every = dense.tensors_of(model(**inputs))
    outputs = [t.unflatten(0, (2, -1)) for t in every if t.dim() and t.shape[0] % 2 == 0]
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in outputs]
    for weight in weights if only is not None else ():
        weight[1 - only] = 0
    told = [pair for pair in zip(outputs, weights) if pair[0].requires_grad]
    if told:
        torch.autograd.backward([t for t, _ in told], [weight for _, weight in told])
    return [t.detach() for t in outputs]


def gradients(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Of an adapter's factors, by their names in files."""
    own = {id(p) for p in paramlora.trainable_parameters(model, adapter)}
    kept = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    held = [p.grad for p in kept]
    try:
        for p in kept:
            p.grad = None
        return arch_checks.factor_gradients(model)
    finally:
        for p, grad in zip(kept, held):
            p.grad = grad


def main(names: list[str]) -> int:
    architectures.quiet()
    wrong = 0
    for name in names:
        started = time.process_time()
        try:
            told = examined(name)
        except Exception as error:
            told = f"not compared: {arch_checks.told(error)[:200]}"
        wrong += told.startswith("WRONG")
        print(f"{name} | {told[:240]} | {time.process_time() - started:.1f} s", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
