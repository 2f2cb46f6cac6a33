"""Time and memory of merging a sharded checkpoint, against a plain copy of the same bytes.

    python benchmarks/merge_checkpoint.py --gigabytes 12 --folder /somewhere/large

Makes a checkpoint of random bfloat16 in the shapes of a large language model, and an adapter on
all its linear layers. Copying and merging take turns, each in a process of its own, with nothing
of the input in the page cache and all of the output on the disk. Then the result is compared with
``W + scale·B·A`` in float64, and what no update adapts with the input, bit for bit.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from paramlora import Adapter, Update
from paramlora.files import read_adapter
from paramlora.files.checkpoint import Stored
from paramlora.files.conversions import merge
from paramlora.files.native import write_native
from paramlora.files.safetensors import Spec, write_safetensors
from paramlora.update.memory import pieces_of

HIDDEN, INNER, VOCABULARY = 4096, 14336, 64000
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
    "input_layernorm": (HIDDEN,),
}


def shapes(size: int) -> dict[str, tuple[int, ...]]:
    """Layers until they are `size` bytes, with two large embeddings among them."""
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens": (VOCABULARY, HIDDEN)}
    out["lm_head"] = (VOCABULARY, HIDDEN)
    number = 0
    while sum(Spec(torch.bfloat16, s).nbytes for s in out.values()) < size:
        out |= {f"model.layers.{number}.{name}": shape for name, shape in LAYER.items()}
        number += 1
    return out


def make(folder: Path, size: int, r: int) -> None:
    """Write the checkpoint in shards of at most 4 GB, and an adapter beside it."""
    torch.manual_seed(0)
    groups: list[dict[str, Spec]] = [{}]
    for path, shape in shapes(size).items():
        spec = Spec(torch.bfloat16, shape)
        if sum(s.nbytes for s in groups[-1].values()) + spec.nbytes > 4e9:
            groups.append({})
        groups[-1][f"{path}.weight"] = spec
    weight_map = {}
    (folder / "base").mkdir()
    for i, specs in enumerate(groups):
        name = f"model-{i + 1:05}-of-{len(groups):05}.safetensors"
        weight_map |= dict.fromkeys(specs, name)
        with open(folder / "base" / name, "wb") as file:
            made = {k: s.shape for k, s in specs.items()}
            write_safetensors(
                file,
                specs,
                {"format": "pt"},
                lambda k, made=made: pieces_of(
                    torch.empty(made[k], dtype=torch.bfloat16).normal_()
                ),
            )
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    updates = {
        path: Update(torch.randn(r, shape[1]) / r, torch.randn(shape[0], r) / 100, 0.5, shape)
        for path, shape in shapes(size).items()
        if len(shape) == 2 and path != "model.embed_tokens"
    }
    write_native(Adapter(updates), folder / "adapter.safetensors")


def forget(folder: Path) -> None:
    """Take files out of the page cache."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def copy(base: Path, out: Path) -> None:
    """Read and write every byte, and flush, as the merge does."""
    out.mkdir()
    buffer = memoryview(bytearray(8 << 20))
    for path in sorted(base.iterdir()):
        with open(path, "rb") as source, open(out / path.name, "wb") as target:
            while count := source.readinto(buffer):
                target.write(buffer[:count])
            target.flush()
            os.fsync(target.fileno())


def resident(name: str) -> int:
    """VmRSS, or VmHWM (its peak), of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise ValueError(name)


def job(kind: str, folder: Path) -> None:
    """One measured copy or merge; prints seconds and the peak over the start in bytes."""
    base, out = folder / "base", folder / kind
    forget(base)
    before, start = resident("VmRSS"), time.perf_counter()
    if kind == "copy":
        copy(base, out)
    else:
        merge(base, [folder / "adapter.safetensors"], out)
    print(time.perf_counter() - start, resident("VmHWM") - before)


def check(folder: Path) -> int:
    """Compare the merged checkpoint with the definition; gives the largest tensor's bytes."""
    adapter = read_adapter(folder / "adapter.safetensors").updates
    with Stored(folder / "base") as base, Stored(folder / "merge") as merged:
        assert list(base.specs) == list(merged.specs)
        for key in base.specs:
            before, after = base.read(key), merged.read(key)
            update = adapter.get(key.removesuffix(".weight"))
            if update is None:
                assert torch.equal(before, after), key
                continue
            rows = torch.randint(len(before), (64,))
            delta = update.lora_B[rows].double() @ update.lora_A.double()
            want = before[rows].double() + update.scale * delta
            # rounded once: half a step of bfloat16, and float32's own error in the sum
            close = want.abs() * 2**-8 + 1e-5
            assert ((after[rows].double() - want).abs() <= close).all(), key
            assert not torch.equal(before, after), key
        return max(spec.nbytes for spec in base.specs.values())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=12)
    parser.add_argument("--folder", type=Path, help="where there is three times that space")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        return job(options.job, options.folder)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make(folder, int(options.gigabytes * 1e9), options.rank)
        size = sum(p.stat().st_size for p in (folder / "base").iterdir())
        seconds: dict[str, list[float]] = {"copy": [], "merge": []}
        peak = 0
        for _ in range(options.rounds):
            for kind in seconds:
                shutil.rmtree(folder / kind, ignore_errors=True)
                command = [sys.executable, __file__, "--job", kind, "--folder", name]
                text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                seconds[kind].append(float(text.split()[0]))
                peak = max(peak, int(text.split()[1])) if kind == "merge" else peak
        largest = check(folder)
    copied, merged = (statistics.median(seconds[kind]) for kind in ("copy", "merge"))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"{machine}, {torch.get_num_threads()} threads, rank {options.rank}")
    print(f"checkpoint {size / 1e9:.2f} GB, largest tensor {largest / 2**20:.0f} MiB")
    print("copy  s: " + " ".join(f"{s:.1f}" for s in seconds["copy"]))
    print("merge s: " + " ".join(f"{s:.1f}" for s in seconds["merge"]))
    print(f"merge / copy, medians: {merged / copied:.2f}")
    allowed = 3 * largest + (256 << 20)
    print(f"peak over start {peak / 2**20:.0f} MiB, allowed {allowed / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
