"""One thread a process, and what pytest may not import where its library is missing."""

import os
from importlib.util import find_spec

# layers this small wait for threads a hundred times longer than they compute
os.environ.setdefault("OMP_NUM_THREADS", "1")
collect_ignore = ["tests/interpreted.py"]
if not find_spec("triton"):
    cuda = ("linear_kernels", "launch", "tiles", "fused", "joined")
    collect_ignore += [f"paramlora/{name}.py" for name in cuda]
for name in ("lightning", "transformers"):
    if not find_spec(name):
        collect_ignore.append(f"paramlora/integrations/{name}.py")
