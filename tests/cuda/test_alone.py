"""A sweep of the kernels' parts: `benchmarks.alone` replaces what it says, and nothing else; in
Triton's interpreter."""

import pytest

from tests.cuda.started import printed

pytest.importorskip("triton")
pytest.importorskip("peft")
EPS = 2**-10  # of float16


@pytest.fixture(scope="module")
def rows():
    return printed("alone", TRITON_INTERPRET="1")


def test_each_way_computes_the_same(rows):
    for part, ways in rows.items():
        for way, row in ways.items():
            lost = part == "depthwise" and way == "two convolutions"  # which rounds twice
            assert row["distance"] < (4 if lost else 1) * EPS, (part, way)


def test_each_way_launches_what_it_says(rows):
    linear = {way: row["launches"] for way, row in rows["linear"].items()}
    rest = {"project": 1, "backward": 1}  # the input's gradient is not wanted
    assert linear == {
        "as it is": {"forward": 1, **rest},
        "no waiting": {"pack": 1, "product": 1, **rest, "project": 2},
    }
    own = {"add", "divide"}
    assert own < rows["depthwise"]["as it is"]["launches"].keys()
    for way in ("float32 sum", "two convolutions"):
        assert not own & rows["depthwise"][way]["launches"].keys()
