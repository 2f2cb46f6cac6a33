"""Attaching to, loading into and merging many layers; both ways checked in float64 first."""

import pytest

from benchmarks import many
from benchmarks.opponents import adapt

COUNT = 1000


@pytest.fixture(params=["paramlora", "peft"])
def way(request, tmp_path):
    many.check(request.param, 20, tmp_path)
    return request.param


def test_attach(benchmark, way):
    benchmark.group = f"attach {COUNT}"
    benchmark.pedantic(
        lambda model: adapt(way, model, ["proj"], many.RANK),
        setup=lambda: ((many.layers(COUNT),), {}),
        rounds=3,
    )


def test_load(benchmark, way, tmp_path):
    many.write(many.attach(way, COUNT), tmp_path)
    benchmark.group = f"load {COUNT}"
    benchmark.pedantic(
        lambda model: many.read(way, model, tmp_path),
        setup=lambda: ((many.layers(COUNT),), {}),
        rounds=3,
    )


def test_merge(benchmark, way):
    benchmark.group = f"merge {COUNT}"
    benchmark.pedantic(many.merged, setup=lambda: ((many.attach(way, COUNT),), {}), rounds=3)
