"""What pytest may not import: the kernels, where Triton is not installed."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("triton") else ["paramlora/kernels.py", "paramlora/launch.py"]
