"""A crash, Ctrl-C or a full disk at any moment leaves the older output or the new one, whole."""

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from paramlora import Adapter, FileError, Update, files
from paramlora.files.native import write_native
from tests.files.test_conversions import write_base

KINDS = ["base.safetensors", "base.pt", "shards"]

# runs in one process, which forks a child for each moment of dying
MOMENTS = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from paramlora import files

base, adapter, out, how = sys.argv[1:]

def content():
    paths = sorted(Path(out).iterdir()) if Path(out).is_dir() else [Path(out)]
    return [(path.name, path.read_bytes()) for path in paths]

def litter():
    return [n for n in os.listdir(Path(out).parent) if n.startswith(".")]

def run(strength, tick):
    sys.addaudithook(lambda event, _: tick() if event.split(".")[0] in ("open", "os") else None)
    files.merge(base, [(adapter, strength)], out, force=True, progress=lambda *_: tick())

def in_child(job):
    child = os.fork()
    if child == 0:
        code = 0
        try:
            job()
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            code = 1
        # only now, as at a program's end, are the frames of the error gone, and what they held open
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def counted(result):
    ticks = []
    run(2, lambda: ticks.append(1))
    count = len(ticks)
    with open(result, "w") as file:
        file.write(str(count))

def dying(moment):
    ticks = []
    def tick():
        ticks.append(1)
        if len(ticks) == moment:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt
    run(2, tick)

def alarmed(seconds):
    if how == "interrupt":
        signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    run(2, lambda: None)

files.merge(base, [(adapter, 1)], out)
old = content()
start = time.perf_counter()
assert in_child(lambda: counted(out + ".count")) == 0
took = time.perf_counter() - start
new, moments = content(), int(Path(out + ".count").read_text())
assert new != old
random.seed(0)
jobs = [lambda m=m: dying(m) for m in range(1, moments + 1)]
jobs += [lambda s=s: alarmed(s) for s in (random.uniform(1e-4, took) for _ in range(30))]
codes, kept, now = [], {"old": 0, "new": 0}, new
for job in jobs:
    if now != old:
        files.merge(base, [(adapter, 1)], out, force=True)
    before = litter()
    codes.append(in_child(job))
    now = content()
    assert now in (old, new), "half"
    kept["old" if now == old else "new"] += 1
    if how == "interrupt":
        assert litter() == before, (codes[-1], litter())
print(json.dumps({"codes": codes, "kept": kept, "moments": moments}))
"""


@pytest.fixture
def folder(tmp_path):
    """In memory where that is possible: a flush to the disk takes long, and there are hundreds."""
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else tmp_path
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


@pytest.fixture
def paths(folder, request):
    return written(folder, request.param, 512)


def written(folder, kind, side):
    torch.manual_seed(0)
    state = {f"{i}.weight": torch.randn(side, side) for i in range(6)}
    base = write_base(kind, folder, state)
    adapter = folder / "adapter.safetensors"
    names = [f"{i}" for i in range(6)]
    update = Update(torch.randn(2, side), torch.randn(side, 2), shape=(side, side))
    write_native(Adapter(dict.fromkeys(names, update)), adapter)
    return base, adapter, folder / f"out{base.suffix}"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("how", ["kill", "interrupt"])
@pytest.mark.parametrize("kind", KINDS)
def test_dying_at_any_moment(folder, kind, how):
    paths = written(folder, kind, 128)  # hundreds of files, so small ones
    command = [sys.executable, "-c", MOMENTS, *map(str, paths), how]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    died = -9 if how == "kill" else 130
    assert set(told["codes"][: told["moments"]]) == {died}
    assert told["moments"] >= 10 and min(told["kept"].values()) > 0


@pytest.mark.parametrize("paths", KINDS, indirect=True)
def test_a_full_disk(paths):
    base, adapter, out = paths
    files.merge(base, [adapter], out)
    before = content(out)
    there = sorted(os.listdir(out.parent))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (1, 500, 1_000_000, 2_500_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(FileError, match=f"{out.name}: cannot be written: File too large"):
                files.merge(base, [(adapter, 2)], out, force=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert content(out) == before
        assert sorted(os.listdir(out.parent)) == there


@pytest.mark.parametrize("paths", KINDS, indirect=True)
def test_a_disk_that_fills_up_meanwhile(paths, tmp_path):
    base, adapter, _ = paths
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a small disk")
    try:
        out = disk / f"out{base.suffix}"
        files.merge(base, [adapter], out)
        before = content(out)
        with pytest.raises(FileError, match="needs 6,291,456 bytes, and .* are free"):
            (disk / "filler").write_bytes(b"x" * 5_000_000)
            files.merge(base, [(adapter, 2)], out, force=True)
        (disk / "filler").unlink()

        def fill(*_):
            with open(disk / "filler", "ab", buffering=0) as file:
                try:
                    file.write(b"x" * 10_000_000)
                except OSError:
                    pass

        with pytest.raises(FileError, match="cannot be written: No space left on device"):
            files.merge(base, [(adapter, 2)], out, force=True, progress=fill)
        assert content(out) == before
        assert sorted(os.listdir(disk)) == ["filler", out.name]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def content(out):
    paths = sorted(out.iterdir()) if out.is_dir() else [out]
    return [(path.name, path.read_bytes()) for path in paths]


def test_what_a_killed_process_left_hinders_nothing(tmp_path):
    base = write_base("shards", tmp_path, {"0.weight": torch.ones(4, 4)})
    adapter = Adapter({"0": Update(torch.ones(1, 4), torch.ones(4, 1), shape=(4, 4))})
    mine = tmp_path / "mine"
    mine.mkdir()
    write_native(adapter, mine / "a.safetensors")
    out = tmp_path / "out"
    files.merge(base, [adapter], out)
    sound = sorted(path.name for path in out.iterdir())
    for folder in (base, mine, out):
        (folder / ".a.safetensors.0123abcd").write_bytes((mine / "a.safetensors").read_bytes())
        (folder / ".model.0123abcd").mkdir()
        (folder / ".model.0123abcd" / "model.safetensors").write_bytes(b"half")
    files.merge(base, [mine], out, force=True)
    assert sorted(path.name for path in out.iterdir()) == sound
