"""What pytest may not import: what needs Triton or Lightning, where they are not installed."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("triton") else ["paramlora/kernels.py", "paramlora/launch.py"]
if not find_spec("lightning"):
    collect_ignore.append("paramlora/integrations/lightning.py")
