"""A crash, Ctrl-C or a full disk at any moment leaves the older output or the new one, whole, with
its modes and owner."""

import json
import os
import resource
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import paramlora
from paramlora import Adapter, FileError, Update, files
from paramlora.files import read_adapter
from paramlora.files.adapters import convert
from paramlora.files.native import write_native
from tests.files.test_conversions import write_base
from tests.files.written import filled, saved, small

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
        size = 6_291_456 + (len('{"hidden": 4}') if base.is_dir() else 0)  # its config.json
        with pytest.raises(FileError, match=f"needs {size:,} bytes, and .* are free"):
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


def converted(path):
    source = path.parent / "source.safetensors"
    saved(source)
    convert(source, path, "kohya", force=True)


def extracted(path):
    source = path.parent / "source.safetensors"
    save_file(filled(small(), {"0": {"r": 2}}).state_dict(), source)
    files.extract(source, path, force=True)


def merged(path):
    source = path.parent / "source.safetensors"
    save_file(filled(small(), {"0": {"r": 2}}).state_dict(), source)
    files.merge(source, [], path, force=True)


WRITERS = {"save": saved, "convert": converted, "extract": extracted, "merge": merged}


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o660, 0o444, 0o755])
@pytest.mark.parametrize("writer", WRITERS)
def test_the_mode_of_a_file_that_is_replaced_stays(writer, mode, tmp_path):
    path = tmp_path / "out.safetensors"
    path.write_bytes(b"old")
    path.chmod(mode)
    WRITERS[writer](path)
    assert path.read_bytes() != b"old" and stat.S_IMODE(path.stat().st_mode) == mode


def test_a_new_file_has_the_mode_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    saved(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives away")
def test_the_owner_of_a_file_that_is_replaced_stays(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    os.chown(path, 1234, 2345)
    path.chmod(0o640)
    saved(path)
    told = path.stat()
    assert (told.st_uid, told.st_gid, stat.S_IMODE(told.st_mode)) == (1234, 2345, 0o640)


def test_nobody_else_can_read_a_private_file_while_it_is_written(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    path.chmod(0o600)
    with paramlora.files.native.new_file(path) as file:
        (temporary,) = set(tmp_path.iterdir()) - {path}
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
        file.write(b"new")


def test_a_folder_that_is_replaced_keeps_its_modes(tmp_path):
    saved(tmp_path / "a.safetensors")
    out = tmp_path / "peft"
    convert(tmp_path / "a.safetensors", out, "peft")
    out.chmod(0o700)
    (out / "adapter_config.json").chmod(0o600)
    convert(tmp_path / "a.safetensors", out, "peft", force=True)
    modes = [stat.S_IMODE(p.stat().st_mode) for p in (out, out / "adapter_config.json")]
    assert modes == [0o700, 0o600]


def pipe(path):
    os.mkfifo(path)


def unix_socket(path):
    socket.socket(socket.AF_UNIX).bind(str(path))


def device(path):
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices")


SPECIAL = {"a pipe": pipe, "a socket": unix_socket, "a device": device, "a folder": os.mkdir}


@pytest.mark.skipif(os.name != "posix", reason="no such files")
@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_no_file_is_refused_and_stays(writer, kind, linked, tmp_path):
    place = tmp_path / ("there" if linked else "out.safetensors")
    SPECIAL[kind](place)
    if linked:
        (tmp_path / "out.safetensors").symlink_to(place)
    before = place.lstat()
    with pytest.raises(FileError, match=f"is {kind}, which no file replaces"):
        WRITERS[writer](tmp_path / "out.safetensors")
    after = place.lstat()
    assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "a.safetensors").symlink_to("real")
    saved(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").is_symlink() and read_adapter(tmp_path / "real").updates
