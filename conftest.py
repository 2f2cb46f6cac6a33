"""One thread a process, and what pytest may not import where its library is missing."""

import gc
import os
from importlib.util import find_spec

import pytest

# layers this small wait for threads a hundred times longer than they compute
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # or libraries ask a hub for what lies here
# a library in C++ that somebody has built: its own tests load it, and with 1 all tests run by it
os.environ.setdefault("PARAMLORA_NATIVE", "0")
collect_ignore = ["tests/cuda/interpreted.py"]
collect_ignore_glob = [] if find_spec("triton") else ["paramlora/cuda/*/*.py"]
if not find_spec("triton"):
    collect_ignore.append("paramlora/cuda/launch.py")
for name in ("lightning", "transformers"):
    if not find_spec(name):
        collect_ignore.append(f"paramlora/integrations/{name}.py")
# the longest, which are begun first, so that two workers end together; those whose tests share what
# takes long before those that can be divided
LONG = [
    "interpreted",
    "native",
    "bounds",
    "examples",
    "compiled",
    "routed_kernels",
    "experts_kernels",
]
LONG += ["benchmark_runs", "atomic", "distributed", "experts_sharded", "compile", "stops"]


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(autouse=True, scope="module")
def _frozen():
    """Some millions of objects that the imports left are not gone through by each collection."""
    gc.freeze()
