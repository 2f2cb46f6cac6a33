"""One thread a process, and what pytest may not import where its library is missing."""

import gc
import os
from importlib.util import find_spec

import pytest

# layers this small wait for threads a hundred times longer than they compute
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # or libraries ask a hub for what lies here
collect_ignore = ["tests/cuda/interpreted.py"]
collect_ignore_glob = [] if find_spec("triton") else ["paramlora/cuda/*/*.py"]
if not find_spec("triton"):
    collect_ignore.append("paramlora/cuda/launch.py")
for name in ("lightning", "transformers"):
    if not find_spec(name):
        collect_ignore.append(f"paramlora/integrations/{name}.py")


@pytest.fixture(autouse=True, scope="module")
def _frozen():
    """Some millions of objects that the imports left are not gone through by each collection."""
    gc.freeze()
