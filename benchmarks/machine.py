"""What a measurement was made on: processor, device and versions."""

import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from paramlora.cuda.native import library

PACKAGES = (
    "paramlora",
    "torch",
    "triton",
    "peft",
    "lycoris-lora",
    "unsloth",
    "unsloth_zoo",
    "diffusers",
    "transformers",
    "bitsandbytes",
    "torchao",
    "numpy",
)


def device() -> torch.device:
    """CUDA if it is there, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> dict[str, object]:
    """The machine and the versions, as they go into every result file."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit(),
        "library": os.environ.get("PARAMLORA_NATIVE", "1") != "0" and library.place().is_file(),
        "packages": {name: version(name) for name in PACKAGES},
    }


@functools.cache
def commit() -> str:
    """The measured code: PARAMLORA_COMMIT where a copy was told what it is of, else git's word."""
    told = os.environ.get("PARAMLORA_COMMIT")
    if told:
        return told
    asked = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(asked, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def version(package: str) -> str:
    """Of an installed package, or ``absent``."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def _processor() -> str:
    """The processor's name where the system tells it (Linux), else the architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
