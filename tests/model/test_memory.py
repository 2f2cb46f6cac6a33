"""A merge of safetensors files needs some megabytes, whatever the file's size."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from paramlora import Adapter, Update
from paramlora.files.native import write_native
from paramlora.files.safetensors import Spec, write_safetensors

# prints the peak over the start, in MiB
MERGE = """
import sys
from pathlib import Path
from paramlora import files

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) // 1024

start = resident("VmRSS")
files.merge(sys.argv[1], [sys.argv[2]], sys.argv[3], force=True)
print(resident("VmHWM") - start)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_the_peak_does_not_grow_with_the_file(tmp_path):
    peaks = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        for rows in (8_000, 40_000):
            base, adapter, out = (Path(name) / f"{n}.safetensors" for n in ("base", "a", "out"))
            specs = {f"{n}.weight": Spec(torch.bfloat16, (rows, 2048)) for n in ("one", "two")}
            pieces = [memoryview(bytes(range(256)) * 16)] * rows  # each one row
            with open(base, "wb") as file:
                write_safetensors(file, specs, {}, lambda key, pieces=pieces: pieces)
            update = Update(torch.ones(4, 2048), torch.ones(rows, 4), shape=(rows, 2048))
            write_native(Adapter({"one": update}), adapter)
            command = [sys.executable, "-c", MERGE, base, adapter, out]
            told = subprocess.run(command, capture_output=True, text=True)
            assert told.returncode == 0, told.stderr
            peaks.append(int(told.stdout))
            assert out.stat().st_size == base.stat().st_size
    assert specs["one.weight"].nbytes >> 20 == 156
    assert max(peaks) < 64, peaks
