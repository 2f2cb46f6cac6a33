"""One thread a process, and what pytest may not import where its library is missing."""

import gc
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

# layers this small wait for threads a hundred times longer than they compute
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # or libraries ask a hub for what lies here
# a library in C++ that somebody has built: its own tests load it, and with 1 all tests run by it
os.environ.setdefault("PARAMLORA_NATIVE", "0")
pytest.register_assert_rewrite("tests")  # of what tests share, too
collect_ignore = ["tests/cuda/interpreted.py"]
collect_ignore_glob = [] if find_spec("triton") else ["paramlora/cuda/*/*.py"]
if not find_spec("triton"):
    collect_ignore.append("paramlora/cuda/launch.py")
for name in ("lightning", "transformers"):
    if not find_spec(name):
        collect_ignore.append(f"paramlora/integrations/{name}.py")
# the longest, which are begun first, so that two workers end together; those whose tests share what
# takes long before those that can be divided
TESTS = Path(__file__).parent / "tests"
LONG = [
    "cuda/native/test_steps",
    "cuda/test_interpreted",
    "files/test_bounds",
    "test_examples",
    "cuda/test_compiled",
    "cuda/routed/test_plan",
    "cuda/experts/test_plan",
    "test_benchmark_runs",
    "files/test_atomic",
    "model/test_distributed",
    "model/test_experts_sharded",
    "model/test_compile",
    "model/test_stops",
]


def pytest_collection_modifyitems(items):
    order = {TESTS / f"{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(autouse=True, scope="module")
def _frozen():
    """Some millions of objects that the imports left are not gone through by each collection."""
    gc.freeze()
