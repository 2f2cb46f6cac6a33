"""Whole models: forward, backward and optimizer, after the check in float64."""

import pytest

from benchmarks.machine import device
from benchmarks.models import WAYS, make_all
from benchmarks.timing import synchronise
from benchmarks.zoo import ZOO

TINY = device().type == "cpu"
made = {}  # the last model only: a U-Net for each way fits, all models do not


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ZOO)
def test_training_step(benchmark, name, way):
    if name not in made:
        made.clear()
        made[name] = make_all(name, "bf16", list(WAYS), TINY)
    live, rows = made[name]
    benchmark.group = f"{name}, {'tiny' if TINY else 'whole'}"
    benchmark.extra_info.update(rows[way])

    def finished():
        live[way].step()
        synchronise(device())

    benchmark.pedantic(finished, rounds=5, iterations=1, warmup_rounds=1)
