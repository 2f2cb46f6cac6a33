"""The table of the project that this one descends from: Stable Diffusion v1-4, rank 8.

``python -m benchmarks.stable_diffusion --out FOLDER`` fills it on one device, the same under
``torchrun --nproc-per-node N -m`` on N. A run goes on with the file that it finds in FOLDER, so
that several short ones fill the table; ``--fsdp`` shards instead of DDP, into a file of its own.
Full fine-tuning, the original's formula, peft and paramlora on ``to_q`` and ``to_v`` (the
configuration's ``qkv_proj`` matches nothing in this model), with the frozen VAE encoder and CLIP
text encoder in the loop, AdamW, random weights and data. Memory is capped at 24 GiB a device;
what does not fit is recorded as OOM. The last rows checkpoint activations, which the original
held to be incompatible with LoRA.
"""

import argparse
import dataclasses
import gc
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import paramlora
from benchmarks.machine import commit, device
from benchmarks.models import check_tiny
from benchmarks.opponents import adapt, factors
from benchmarks.processes import (
    STARTED,
    elapsed,
    is_done,
    origin,
    processes,
    rank,
    resume,
    start,
    stop,
    store,
    tell,
    together,
)
from benchmarks.results import diffusion_table, load
from benchmarks.timing import synchronise
from benchmarks.zoo import ZOO, unet

RANK, TARGETS = 8, ["to_q", "to_v"]
WAYS = ("full", "original", "peft", "paramlora")
CELLS = [(512, b) for b in (8, 4, 2, 1)] + [(256, b) for b in (32, 16, 8, 4)]
CELLS += [(128, b) for b in (256, 128, 64, 32)]
CHECKPOINTED = [(512, 8), (512, 4), (256, 32), (128, 256)]
QUICK = [(512, 4), (512, 1), (256, 16), (128, 64)]
DTYPES = {"float32": torch.float32, "autocast": torch.float32, "bf16": torch.bfloat16}
DTYPES["float64"] = torch.float64
FIXED = ("dtype", "tf32", "tiny", "cap", "fsdp")  # the same for all rows of a file
LEFT, CUT = "not run: no time left", "not run: the process ended in it"
SPARE = 2**28  # bytes left by a rehearsal among several: their allocators fragment differently
Cell = tuple[int, int, bool]  # image size, batch on each device, with checkpointing
Key = tuple[str, Cell]


class Batch(dataclasses.make_dataclass("Batch", ["images", "words", "times"])):
    """This process's share of one global batch, the same data for any number of processes."""

    @staticmethod
    def draw(generator: torch.Generator, count: int, image: int, words: int) -> "Batch":
        total = count * processes()
        mine = slice(rank() * count, (rank() + 1) * count)
        images = torch.randn(total, 3, image, image, generator=generator)
        ids = torch.randint(1, words, (total, 77 if words > 1000 else 5), generator=generator)
        times = torch.randint(1000, (total,), generator=generator)
        return Batch(*(t[mine].to(device()) for t in (images, ids, times)))


class Frozen:
    """The VAE encoder and the text encoder, which turn a batch into the U-Net's arguments."""

    def __init__(self, dtype: torch.dtype, tiny: bool) -> None:
        torch.manual_seed(0)  # the same weights in every process
        with torch.device(device()):
            self.vae, self.clip = _vae(tiny), _clip(tiny)
        for model in (self.vae, self.clip):
            model.to(dtype).eval().requires_grad_(False)
        self.dtype = dtype
        beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, device=device()) ** 2
        self.kept = (1 - beta).cumprod(0)  # of the signal, at each time
        self.words = self.clip.config.vocab_size

    @torch.no_grad()
    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(noisy latents, times, text, noise)."""
        latents = self.vae.encode(batch.images.to(self.dtype)).latent_dist.mode() * 0.18215
        text = self.clip(batch.words)[0]
        # from the image itself, so that every number of processes sees the same noise
        noise = F.interpolate(batch.images[:, :1], latents.shape[-2:]).expand_as(latents)
        noise = noise.to(self.dtype)
        kept = self.kept[batch.times][:, None, None, None].to(self.dtype)
        return kept.sqrt() * latents + (1 - kept).sqrt() * noise, batch.times, text, noise


def _vae(tiny: bool) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4) if tiny else (128, 256, 512, 512),
        layers_per_block=1 if tiny else 2,
        norm_num_groups=2 if tiny else 32,
        sample_size=512,
    )


def _clip(tiny: bool) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    small = dict(vocab_size=50, hidden_size=12, intermediate_size=16)
    small |= dict(num_hidden_layers=1, num_attention_heads=2)
    whole = dict(vocab_size=49408, hidden_size=768, intermediate_size=3072)
    whole |= dict(num_hidden_layers=12, num_attention_heads=12)
    config = CLIPTextConfig(max_position_embeddings=77, **(small if tiny else whole))
    return CLIPTextModel(config)


class Loss(nn.Module):
    """The squared error of the predicted noise; what DDP wraps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, noisy: Tensor, times: Tensor, text: Tensor, noise: Tensor) -> Tensor:
        return F.mse_loss(self.model(noisy, times, text).sample.float(), noise.float())


class Training:
    """One way's U-Net in training, under DDP or FSDP2 where there are several processes."""

    def __init__(self, way: str, options: argparse.Namespace) -> None:
        self.way, self.options = way, options
        torch.manual_seed(0)  # every way and process starts from the same weights
        with torch.device(device()):
            self.unet = unet(options.tiny).to(DTYPES[options.dtype])
        model = adapt("frozen" if way == "full" else way, self.unet, TARGETS, _rank(options))
        self.unet.requires_grad_(True) if way == "full" else None
        self.loss: nn.Module = Loss(model)
        self.reduced = 0
        if options.fsdp:
            _shard(self.unet)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        fused = device().type == "cuda"
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, fused=fused)
        self._make_moments()
        self.wrapped: Optional[nn.Module] = None

    def _make_moments(self) -> None:
        """AdamW's, which it makes in its first step: what fits beside them fits in every step."""
        for p in self.parameters:
            p.grad = torch.zeros_like(p)
        self.optimizer.step()  # by nothing, as the rate is zero
        self.optimizer.zero_grad()
        self.optimizer.param_groups[0]["lr"] = 1e-4

    def prepare(self, checkpointing: bool) -> None:
        act = "enable" if checkpointing else "disable"
        getattr(self.unet, f"{act}_gradient_checkpointing")()
        self.unet.train()

    def start(self) -> None:
        """Ready for one cell; DDP is made anew, since an OOM leaves it in the middle of a step."""
        self.wrapped = self.loss
        if processes() > 1 and not self.options.fsdp:
            self.wrapped = DistributedDataParallel(self.loss, gradient_as_bucket_view=True)
            self.wrapped.register_comm_hook(self, _counted)

    def rehearse(self, arguments: tuple[Tensor, ...]) -> None:
        """Forward and backward without an exchange, where an OOM leaves no process waiting.

        They need the memory of a step: DDP's buckets are there, and as a step moves each gradient
        into them, each is dropped.
        """
        spare = torch.empty(SPARE if processes() > 1 else 0, dtype=torch.uint8, device=device())
        dropping = [p.register_post_accumulate_grad_hook(_drop) for p in self.parameters]
        try:
            self.backward(self.loss, arguments)
        finally:
            for hook in dropping:
                hook.remove()
        del spare
        _empty()

    def step(self, arguments: tuple[Tensor, ...]) -> Tensor:
        self.optimizer.zero_grad()
        self.reduced = 0
        assert self.wrapped is not None
        loss = self.backward(self.wrapped, arguments)
        self.optimizer.step()
        return loss

    def backward(self, model: nn.Module, arguments: tuple[Tensor, ...]) -> Tensor:
        with _autocast(self.options.dtype):
            loss: Tensor = model(*arguments)
        loss.backward()
        return loss

    def release(self) -> None:
        self.optimizer.zero_grad()
        self.wrapped = None
        _empty()

    def checkpoint_bytes(self) -> int:
        """The size of the file that the user of this way keeps."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint"
            if self.way == "paramlora":
                paramlora.save_adapter(self.unet, path)
            elif self.way == "peft":
                self.loss.model.save_pretrained(folder)
                path = Path(folder) / "adapter_model.safetensors"
            elif self.way == "original":
                torch.save({n: p for n, p in self.unet.named_parameters() if p.requires_grad}, path)
            else:
                return sum(t.nbytes for t in self.unet.state_dict().values())
            return path.stat().st_size


def _drop(p: Tensor) -> None:
    p.grad = None


def _empty() -> None:
    gc.collect()
    if device().type == "cuda":
        torch.cuda.empty_cache()


def _counted(training: Training, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's own reduction, counting its bytes."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    training.reduced += bucket.buffer().nbytes
    return allreduce_hook(dist.group.WORLD, bucket)


def _shard(model: nn.Module) -> None:
    """FSDP2 over the U-Net's blocks; it takes no scalar, such as the original's scale."""
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.ndim == 0:
                setattr(module, name, nn.Parameter(p.detach().reshape(1), p.requires_grad))
    for block in (*model.down_blocks, model.mid_block, *model.up_blocks):
        fully_shard(block)
    fully_shard(model)


def _autocast(kind: str) -> AbstractContextManager[Any]:
    return torch.autocast(device().type, torch.bfloat16) if kind == "autocast" else nullcontext()


def _rank(options: argparse.Namespace) -> int:
    return 2 if options.tiny else RANK


def run_cell(training: Training, frozen: Frozen, cell: Cell) -> dict[str, Any]:
    """Iterations a second and peak memory of one cell, or OOM."""
    row, started = _row(training.way, cell), time.perf_counter()
    try:
        row.update(_timed(training, frozen, cell))
    except torch.OutOfMemoryError:
        row["outcome"] = "OOM"
    except RuntimeError as reason:  # recorded, so that one cell does not lose the others
        row["outcome"] = f"{type(reason).__name__}: {reason}"[:120]
    training.release()
    row["cell_seconds"] = time.perf_counter() - started
    return row | origin()


def _timed(training: Training, frozen: Frozen, cell: Cell) -> dict[str, Any]:
    image, batch, checkpointing = cell
    data = Batch.draw(torch.Generator().manual_seed(0), batch, image, frozen.words)
    training.prepare(checkpointing)
    together(training.start)
    if not training.options.fsdp:  # whose forward exchanges already
        together(lambda: training.rehearse(frozen(data)))
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    loss = together(lambda: training.step(frozen(data)))
    assert loss.isfinite(), "the loss is not finite"
    together(lambda: training.step(frozen(data)))  # the first has no gradient of A: B is zero
    assert all(p.grad.norm() > 0 for p in training.parameters), "a gradient is zero"
    synchronise(device())
    start, count = time.perf_counter(), 0
    while count < 2 or (elapsed(start) < training.options.seconds and count < 100):
        training.step(frozen(data))
        synchronise(device())
        count += 1
    found = {"per_second": count / (time.perf_counter() - start), "steps": count, "peak_mib": 0.0}
    if device().type == "cuda":
        found["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        found["reserved_mib"] = torch.cuda.max_memory_reserved() / 2**20
    return found


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """(image size, batch on each device, with checkpointing)"""
    if options.tiny:
        chosen, checkpointed = [(64, 2)], [(64, 2)]
    elif options.cells:
        chosen, checkpointed = [tuple(map(int, c.split("x"))) for c in options.cells], []
    elif options.fsdp:
        chosen, checkpointed = [(512, 4)], []
    else:
        chosen, checkpointed = (QUICK, [(512, 8)]) if options.quick else (CELLS, CHECKPOINTED)
    yield from ((*cell, False) for cell in chosen)
    yield from ((*cell, True) for cell in checkpointed)


def plan(options: argparse.Namespace) -> list[Key]:
    """(way, cell), those that tell most before the others, for every way."""
    every = list(cells(options))
    first = [cell for cell in every if cell[0] == 512 and cell[1] >= 4]
    rest = [cell for cell in every if cell not in first]
    return [(way, cell) for stage in (first, rest) for way in options.ways for cell in stage]


def _row(way: str, cell: Cell) -> dict[str, Any]:
    return {"way": way, **dict(zip(("image", "batch", "checkpointing"), cell))}


def _key(row: dict[str, Any]) -> Key:
    return row["way"], (row["image"], row["batch"], row["checkpointing"])


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    """Where a row stands in the table: large images and batches first, checkpointing last."""
    return row["checkpointing"], -row["image"], -row["batch"], WAYS.index(row["way"])


class Table:
    """The rows of this run and of those before, written after every cell."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.folder, self.kind = options.out, kind_of(options)
        fixed = {name: getattr(options, name) for name in FIXED}
        self.content = resume(self.folder, self.kind, fixed)
        self.rows = {_key(row): row for row in self.content["rows"]}
        self.ways = self.content.setdefault("ways", {})
        wanted = [key for key in plan(options) if not is_done(self.rows.get(key))]
        # a cell that failed or ended a run is tried again last, so that it cannot end every run
        self.todo = sorted(wanted, key=lambda k: self.rows.get(k, {}).get("outcome", LEFT) != LEFT)
        for key in wanted:
            self.rows.setdefault(key, _row(*key) | {"outcome": LEFT})

    def put(self, row: dict[str, Any]) -> None:
        self.rows[_key(row)] = row
        self.write()

    def write(self) -> None:
        self.content["rows"] = sorted(self.rows.values(), key=_place)
        store(self.folder, self.kind, self.content)

    def check(self, way: str) -> None:
        """The way's formula against float64 in the first process, once for each commit."""
        known = self.ways.setdefault(way, {})
        if way == "full" or (known.get("checked") == commit() != "unknown"):
            return
        if rank() == 0:
            zoo = dataclasses.replace(ZOO["unet"], targets=lambda p: p.split(".")[-1] in TARGETS)
            check_tiny(zoo, way)
        known["checked"] = commit()
        tell(f"{way} is right")

    def begin(self, way: str, options: argparse.Namespace) -> Training:
        """The way's model; what it trains and saves is told once."""
        self.check(way)
        training = Training(way, options)
        sizes = self.ways[way]
        sizes["trainable"] = sum(p.numel() for p in training.parameters)
        if not options.fsdp and "checkpoint_bytes" not in sizes:
            sizes["checkpoint_bytes"] = training.checkpoint_bytes()
        tell(f"{way} is built")
        return training


def fill(options: argparse.Namespace) -> None:
    """Every cell of every way that no earlier run has measured, while there is time."""
    table, frozen, training = Table(options), None, None
    for way, cell in table.todo[: options.count]:
        if elapsed(STARTED) >= options.limit:
            break
        frozen = frozen or Frozen(DTYPES[options.dtype], options.tiny)
        if training is None or training.way != way:
            training = None  # which frees the last way's memory before the next is built
            gc.collect()
            training = table.begin(way, options)
        table.put(_row(way, cell) | {"outcome": CUT})
        row = run_cell(training, frozen, cell)
        if processes() > 1 and not options.fsdp and training.reduced:
            table.ways[way]["reduced_bytes"] = training.reduced
        table.put(row)
        tell(f"{way} {cell}: {row.get('outcome') or row['per_second']}")
        if options.fsdp and "outcome" in row:
            training = None  # it may have stopped with its shards gathered
    table.write()


def dump(options: argparse.Namespace) -> dict[str, Any]:
    """First gradients and the factors after three steps, for a comparison between processes."""
    frozen, training = Frozen(DTYPES[options.dtype], options.tiny), Training("paramlora", options)
    for _, B in factors(training.unet).values():
        nn.init.normal_(B, std=0.1)
    image, count = (64, options.joint // processes())
    generator = torch.Generator().manual_seed(1)
    training.prepare(checkpointing=False)
    training.start()
    gradients: list[Tensor] = []
    for _ in range(3):
        training.step(frozen(Batch.draw(generator, count, image, frozen.words)))
        gradients = gradients or [p.grad.clone() for p in training.parameters]
    return {
        "gradients": gradients,
        "factors": [p.detach() for p in training.parameters],
        "reduced": training.reduced,
    }


def kind_of(options: argparse.Namespace) -> str:
    return "stable_diffusion_fsdp" if options.fsdp else "stable_diffusion"


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.tf32
    start(options.timeout)
    if device().type == "cuda":
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.cap * 2**30 / total))
    if options.dump:
        torch.save(dump(options), f"{options.dump}.{rank()}")
    else:
        fill(options)
        if rank() == 0:
            path = Path(options.out) / f"{kind_of(options)}.json"
            print(diffusion_table(load(path)))
            tell(str(path))
    stop()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stable_diffusion")
    parser.add_argument("--out", default="benchmark-results", help="folder of the JSON")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--no-tf32", dest="tf32", action="store_false")
    parser.add_argument("--quick", action="store_true", help="a few cells")
    parser.add_argument("--cells", nargs="+", help="such as 512x4: image size x batch, only these")
    parser.add_argument("--tiny", action="store_true", help="tiny models, for the CPU")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timed steps in a cell")
    parser.add_argument("--limit", type=float, default=450, help="seconds, then no cell is begun")
    parser.add_argument("--count", type=int, help="measure at most this many cells")
    parser.add_argument("--timeout", type=float, default=120, help="seconds to wait for a process")
    parser.add_argument("--cap", type=float, default=24, help="GiB of device memory")
    parser.add_argument("--fsdp", action="store_true", help="FSDP2 instead of DDP")
    parser.add_argument("--dump", help="write gradients and factors of a few steps, and stop")
    parser.add_argument("--joint", type=int, default=4, help="global batch of --dump")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
