"""One layer: every way to compute it, at every shape, in each type and mode.

Each test first asserts outputs and gradients against the dense float64 definition (``prepare``),
and records R from interleaved rounds of all ways beside its own time.
"""

from functools import lru_cache, partial

import pytest

from benchmarks import cases, timing
from benchmarks.inference import ways_of
from benchmarks.layers import COMPILED, DTYPES, context_of, forward_only, prepare, step, store
from benchmarks.machine import device
from benchmarks.opponents import WAYS

SIZES = cases.CUDA if device().type == "cuda" else cases.CPU
MODES = ["eager", "graph"] if device().type == "cuda" else ["eager"]
ALL = [case for group in SIZES.values() for case in group]
LINEAR = [case for group in ("linear", "small") for case in SIZES[group]]
EAGER = [name for name in WAYS if name not in COMPILED]


@lru_cache(maxsize=1)
def prepared(case, kind, names):
    """The checked ways, what is timed for each, and their rows with R from shared rounds."""
    tensors, ways, rows = prepare(case, kind, names)
    steps = {name: partial(step, way, tensors, context_of(kind)) for name, way in ways.items()}
    store(rows, "eager", timing.eager(steps, device(), rounds=5, seconds=0.002))
    return steps, rows


def run(benchmark, case, kind, way, mode, names):
    steps, rows = prepared(case, kind, tuple(names))
    if way not in steps:
        assert not way.startswith("paramlora"), rows[way]["refused"]
        pytest.skip(rows[way]["refused"])
    act = timing.capture(steps[way]) if mode == "graph" else steps[way]
    benchmark.group = f"{case.name} {kind} {mode}"
    benchmark.extra_info.update(rows[way])

    def finished():
        act()
        timing.synchronise(device())

    benchmark.pedantic(finished, rounds=5, iterations=2, warmup_rounds=1)


@pytest.mark.parametrize("way", EAGER)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_forward_and_backward(benchmark, case, kind, mode, way):
    run(benchmark, case, kind, way, mode, EAGER)


@pytest.mark.parametrize("way", COMPILED)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["bf16", "float32"])
@pytest.mark.parametrize("case", LINEAR[:1] + LINEAR[-1:], ids=lambda case: case.name)
def test_compiled_forward_and_backward(benchmark, case, kind, mode, way):
    run(benchmark, case, kind, way, mode, ["frozen", *COMPILED])


@lru_cache(maxsize=1)
def inferring(case, kind):
    tensors = cases.make(case, DTYPES[kind], device(), DTYPES[kind])
    return {name: partial(forward_only, m, tensors.x) for name, m in ways_of(tensors).items()}


@pytest.mark.parametrize(
    "way", ["frozen", "peft", "loralib", "paramlora", "peft merged", "paramlora merged"]
)
@pytest.mark.parametrize("kind", ["bf16", "float32"])
@pytest.mark.parametrize("case", LINEAR, ids=lambda case: case.name)
def test_inference(benchmark, case, kind, way):
    act = inferring(case, kind)[way]
    benchmark.group = f"{case.name} {kind} inference"

    def finished():
        act()
        timing.synchronise(device())

    benchmark.pedantic(finished, rounds=5, iterations=2, warmup_rounds=1)
