"""The table of the project that this one descends from: Stable Diffusion v1-4, rank 8.

``python -m benchmarks.stable_diffusion --out FOLDER`` fills it on one device, the same under
``torchrun --nproc-per-node N -m`` on N. Full fine-tuning, the original's formula, peft and
paramlora on ``to_q`` and ``to_v`` (the configuration's ``qkv_proj`` matches nothing in this
model), with the frozen VAE encoder and CLIP text encoder in the loop, AdamW, random weights and
data. Memory is capped at 24 GiB a device; what does not fit is recorded as OOM. The
last rows checkpoint activations, which the original held to be incompatible with LoRA.
"""

import argparse
import dataclasses
import gc
import os
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
from benchmarks.machine import device
from benchmarks.models import check_tiny
from benchmarks.opponents import adapt, factors
from benchmarks.results import diffusion_table, load, save
from benchmarks.zoo import ZOO, unet

RANK, TARGETS = 8, ["to_q", "to_v"]
WAYS = ("full", "original", "peft", "paramlora")
CELLS = [(512, b) for b in (8, 4, 2, 1)] + [(256, b) for b in (32, 16, 8, 4)]
CELLS += [(128, b) for b in (256, 128, 64, 32)]
CHECKPOINTED = [(512, 8), (256, 32), (128, 256)]
QUICK = [(512, 4), (512, 1), (256, 16), (128, 64)]
DTYPES = {"float32": torch.float32, "autocast": torch.float32, "bf16": torch.bfloat16}
DTYPES["float64"] = torch.float64


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
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=fused)
        self.wrapped: Optional[nn.Module] = None

    def start(self, checkpointing: bool) -> None:
        """Ready for one cell; DDP is made anew, since an OOM leaves it in the middle of a step."""
        act = "enable" if checkpointing else "disable"
        getattr(self.unet, f"{act}_gradient_checkpointing")()
        self.unet.train()
        self.wrapped = self.loss
        if processes() > 1 and not self.options.fsdp:
            self.wrapped = DistributedDataParallel(self.loss, gradient_as_bucket_view=True)
            self.wrapped.register_comm_hook(self, _counted)

    def step(self, arguments: tuple[Tensor, ...]) -> Tensor:
        assert self.wrapped is not None
        self.optimizer.zero_grad()
        self.reduced = 0
        with _autocast(self.options.dtype):
            loss = self.wrapped(*arguments)
        loss.backward()
        self.optimizer.step()
        return loss

    def release(self) -> None:
        self.optimizer.zero_grad()
        self.wrapped = None
        gc.collect()
        if device().type == "cuda":
            torch.cuda.empty_cache()

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


def _counted(training: Training, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's own reduction, counting its bytes."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    training.reduced += bucket.buffer().nbytes
    return allreduce_hook(dist.group.WORLD, bucket)


def _shard(model: nn.Module) -> None:
    """FSDP2 over the U-Net's blocks."""
    from torch.distributed.fsdp import fully_shard

    for block in (*model.down_blocks, model.mid_block, *model.up_blocks):
        fully_shard(block)
    fully_shard(model)


def _autocast(kind: str) -> AbstractContextManager[Any]:
    return torch.autocast(device().type, torch.bfloat16) if kind == "autocast" else nullcontext()


def _rank(options: argparse.Namespace) -> int:
    return 2 if options.tiny else RANK


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def run_cell(
    training: Training, frozen: Frozen, image: int, batch: int, checkpointing: bool
) -> dict[str, Any]:
    """Iterations a second and peak memory of one cell, or OOM."""
    row = {"way": training.way, "image": image, "batch": batch, "checkpointing": checkpointing}
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        row.update(_timed(training, frozen, image, batch, checkpointing))
    except torch.cuda.OutOfMemoryError:
        row["outcome"] = "OOM"
    except RuntimeError as reason:  # recorded, so that one cell does not lose the others
        row["outcome"] = f"{type(reason).__name__}: {reason}"[:120]
    training.release()
    return row


def _timed(
    training: Training, frozen: Frozen, image: int, batch: int, checkpointing: bool
) -> dict[str, Any]:
    data = Batch.draw(torch.Generator().manual_seed(0), batch, image, frozen.words)
    training.start(checkpointing)
    loss = training.step(frozen(data))
    assert loss.isfinite(), "the loss is not finite"
    training.step(frozen(data))  # the first one has no gradient of A, since B starts as zero
    assert all(p.grad.norm() > 0 for p in training.parameters), "a gradient is zero"
    _synchronise()
    start, count = time.perf_counter(), 0
    while count < 2 or (_elapsed(start) < training.options.seconds and count < 100):
        training.step(frozen(data))
        _synchronise()
        count += 1
    found = {"per_second": count / (time.perf_counter() - start), "peak_mib": 0.0}
    if device().type == "cuda":
        found["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        found["reserved_mib"] = torch.cuda.max_memory_reserved() / 2**20
    return found


def _elapsed(start: float) -> float:
    """Seconds since `start` on the first process, so that all take the same number of steps."""
    elapsed = torch.tensor(time.perf_counter() - start, device=device())
    if processes() > 1:
        dist.broadcast(elapsed, 0)
    return elapsed.item()


def _synchronise() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()


def cells(options: argparse.Namespace) -> Iterator[tuple[int, int, bool]]:
    """(image size, batch on each device, with checkpointing)"""
    if options.tiny:
        chosen, checkpointed = [(64, 2)], [(64, 2)]
    elif options.cells:
        chosen, checkpointed = [tuple(map(int, c.split("x"))) for c in options.cells], []
    else:
        chosen, checkpointed = (QUICK, [(512, 8)]) if options.quick else (CELLS, CHECKPOINTED)
    yield from ((*cell, False) for cell in chosen)
    yield from ((*cell, True) for cell in checkpointed)


def fill(options: argparse.Namespace) -> dict[str, Any]:
    """Every cell of every way; cells for which no time is left say so."""
    started, rows, ways = time.perf_counter(), [], {}
    for way in options.ways:
        if way != "full" and rank() == 0:
            zoo = dataclasses.replace(ZOO["unet"], targets=lambda p: p.split(".")[-1] in TARGETS)
            check_tiny(zoo, way)
    frozen = Frozen(DTYPES[options.dtype], options.tiny)
    for way in options.ways:
        training = Training(way, options)
        ways[way] = {"trainable": sum(p.numel() for p in training.parameters)}
        if not options.fsdp:
            ways[way]["checkpoint_bytes"] = training.checkpoint_bytes()
        for image, batch, checkpointing in cells(options):
            share = (options.ways.index(way) + 1) / len(options.ways)  # each way's part of the time
            if _elapsed(started) < options.limit * share:
                rows.append(run_cell(training, frozen, image, batch, checkpointing))
                if processes() > 1 and not options.fsdp:
                    ways[way]["reduced_bytes"] = training.reduced
            else:
                late = {"way": way, "image": image, "batch": batch, "checkpointing": checkpointing}
                rows.append({**late, "outcome": "not run: no time left"})
        training.release()
        del training
        gc.collect()
    chosen = {k: v for k, v in vars(options).items() if k != "out"}
    return {"options": chosen, "processes": processes(), "rows": rows, "ways": ways}


def dump(options: argparse.Namespace) -> dict[str, Any]:
    """First gradients and the factors after three steps, for a comparison between processes."""
    frozen, training = Frozen(DTYPES[options.dtype], options.tiny), Training("paramlora", options)
    for _, B in factors(training.unet).values():
        nn.init.normal_(B, std=0.1)
    image, count = (64, options.joint // processes())
    generator = torch.Generator().manual_seed(1)
    training.start(checkpointing=False)
    gradients: list[Tensor] = []
    for _ in range(3):
        training.step(frozen(Batch.draw(generator, count, image, frozen.words)))
        gradients = gradients or [p.grad.clone() for p in training.parameters]
    return {
        "gradients": gradients,
        "factors": [p.detach() for p in training.parameters],
        "reduced": training.reduced,
    }


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.tf32
    if "WORLD_SIZE" in os.environ:
        if device().type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device().type == "cuda" else "gloo")
    if device().type == "cuda":
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.cap * 2**30 / total))
    started = time.perf_counter()
    if options.dump:
        torch.save(dump(options), f"{options.dump}.{rank()}")
    else:
        content = fill(options)
        if rank() == 0:
            path = save(options.out, "stable_diffusion", content)
            print(diffusion_table(load(path)))
            print(f"{time.perf_counter() - started:.0f} s, {path}")
    if dist.is_initialized():
        dist.destroy_process_group()
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
    parser.add_argument("--limit", type=float, default=450, help="seconds, then cells are skipped")
    parser.add_argument("--cap", type=float, default=24, help="GiB of device memory")
    parser.add_argument("--fsdp", action="store_true", help="FSDP2 instead of DDP")
    parser.add_argument("--dump", help="write gradients and factors of a few steps, and stop")
    parser.add_argument("--joint", type=int, default=4, help="global batch of --dump")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
