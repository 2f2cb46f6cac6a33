"""The demonstration: a small diffusion U-Net learns five digits, then is adapted to the others.

The model draws five kinds of image, one a row of the picture: 0 to 4 at strength 0, which is the
base, and 5 to 9 at strength 1. Pure steps; `paramlora.cli` asks and prints. The digits are the 8×8
scans inside scikit-learn. What a run needs is imported here, so that it is asked before any work.
"""

import json
import math
import os
import shlex
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from matplotlib.figure import Figure
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn

import paramlora
from paramlora.errors import FileError
from paramlora.files.atomic import new_file
from paramlora.model.undo import to_the_end

FILES = ("lora.json", "base.pt", "adapter.safetensors", "merged.pt", "samples.png")
ROWS, COLUMNS = 5, 7  # of each panel of the picture
CONFIG = {
    "trainable_model": 0,
    "to_q": {"r": 4, "scale": 1},
    "to_k": {"r": 4, "scale": 1},
    "to_v": {"r": 4, "scale": 1},
    "qkv_proj": {"r": 4, "scale": 1},
    "conv1": {"r": 4, "scale": 1},
    "conv2": {"r": 4, "scale": 1},
    "time": {"r": 4, "scale": 1},
    "row": {"r": 4, "scale": 1},
}
TOLERANCE = 1e-3  # of a pixel in [-1, 1] after 50 sampling steps in float32
BATCH = 32
LEVELS = 200  # of noise
SAMPLING_STEPS = 50
Progress = Callable[..., None]  # (stage, step, total=steps of the stage)


class Block(nn.Module):
    """Two 3×3 convolutions with the noise level added between, and a 1×1 shortcut."""

    def __init__(self, cin: int, cout: int, embed: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, cout), nn.Conv2d(cout, cout, 3, padding=1)
        self.time, self.shortcut = nn.Linear(embed, cout), nn.Conv2d(cin, cout, 1)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(level)[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Self-attention over pixels with separate projections."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        flat = rearrange(self.norm(x), "b c h w -> b (h w) c")
        q, k, v = (
            rearrange(f(flat), "b n (head d) -> b head n d", head=4)
            for f in (self.to_q, self.to_k, self.to_v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        out = self.to_out(rearrange(mixed, "b head n d -> b n (head d)"))
        image: Tensor = rearrange(out, "b (h w) c -> b c h w", h=x.shape[2])
        return x + image


class FusedAttention(nn.Module):
    """Self-attention whose query, key and value come from one 1×1 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv_proj = nn.GroupNorm(8, width), nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = rearrange(
            self.qkv_proj(self.norm(x)), "b (t head d) h w -> t b head (h w) d", t=3, head=4
        )
        mixed = F.scaled_dot_product_attention(*qkv)
        out = rearrange(mixed, "b head (h w) d -> b (head d) h w", h=x.shape[2])
        return x + self.out(out)  # type: ignore[no-any-return]


class UNet(nn.Module):
    """Predicts the velocity of ``[batch, 1, 8, 8]`` images at a level in ``[0, 1]``.

    `row` in ``[0, 5)`` names one of five kinds of image: which digit that is, training decides.
    """

    def __init__(self, width: int = 16, deep: int = 128) -> None:
        super().__init__()
        embed = 4 * width
        self.width = width
        self.embed = nn.Sequential(nn.Linear(width, embed), nn.SiLU(), nn.Linear(embed, embed))
        self.row = nn.Embedding(ROWS, embed)
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.down1 = Block(width, width, embed)
        self.shrink = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.down2, self.attention = Block(width, deep, embed), Attention(deep)
        self.middle, self.fused = Block(deep, deep, embed), FusedAttention(deep)
        self.up2 = Block(2 * deep, width, embed)
        self.up1 = Block(2 * width, width, embed)
        self.norm, self.last = nn.GroupNorm(8, width), nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor, level: Tensor, row: Tensor) -> Tensor:
        rates = torch.exp(torch.linspace(0, math.log(1000), self.width // 2))
        waves = level[:, None] * rates
        emb = F.silu(self.embed(torch.cat([waves.sin(), waves.cos()], 1)) + self.row(row))
        a = self.down1(self.first(x), emb)
        b = self.attention(self.down2(self.shrink(a), emb))
        h = self.fused(self.middle(b, emb))
        h = self.up2(torch.cat([h, b], 1), emb)
        h = self.up1(torch.cat([F.interpolate(h, scale_factor=2.0), a], 1), emb)
        return self.last(F.silu(self.norm(h)))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Digits:
    """Images ``[n, 1, 8, 8]`` in ``[-1, 1]`` and the row that each belongs to, ``[n]``."""

    images: Tensor
    rows: Tensor

    def take(self, which: Tensor) -> "Digits":
        """The images and rows at the given indices."""
        return Digits(self.images[which], self.rows[which])


def digits() -> tuple[Tensor, Tensor]:
    """Images ``[n, 1, 8, 8]`` in ``[-1, 1]`` and their labels ``[n]``."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return images, torch.tensor(data.target)


def split(seed: int) -> tuple[Digits, Digits, Digits]:
    """(0 to 4, 5 to 9 to train on, 5 to 9 held out)."""
    images, labels = digits()
    # 5 to 9 get the rows of 0 to 4: adapting changes what a row means
    every = Digits(images, labels % ROWS)
    (old,), (new,) = torch.where(labels < ROWS), torch.where(labels >= ROWS)
    new = new[torch.randperm(len(new), generator=torch.Generator().manual_seed(seed))]
    cut = len(new) // 5
    return every.take(old), every.take(new[cut:]), every.take(new[:cut])


def signal(level: Tensor) -> Tensor:
    """What is left of the image's variance at a level: the cosine schedule of Nichol and
    Dhariwal 2021 (arXiv:2102.09672), equation 17."""
    return torch.cos((level + 0.008) / 1.008 * math.pi / 2).square().clamp(1e-4, 1)


def loss_of(model: nn.Module, digits: Digits, noise: Tensor, level: Tensor) -> Tensor:
    """Mean squared error of the velocity, Salimans and Ho 2022 (arXiv:2202.00512), section 4."""
    kept = signal(level)[:, None, None, None]
    noisy = kept.sqrt() * digits.images + (1 - kept).sqrt() * noise
    velocity = kept.sqrt() * noise - (1 - kept).sqrt() * digits.images
    return F.mse_loss(model(noisy, level, digits.rows), velocity)


def train(
    model: nn.Module,
    digits: Digits,
    steps: int,
    lr: float,
    seed: int,
    progress: Callable[[int], None],
) -> None:
    """AdamW on whatever trains in `model`, with a cosine learning rate."""
    generator = torch.Generator().manual_seed(seed)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.0, foreach=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1)
    for step in range(steps):
        batch = digits.take(torch.randint(len(digits.rows), (BATCH,), generator=generator))
        noise = torch.randn(batch.images.shape, generator=generator)
        level = torch.randint(1, LEVELS + 1, (BATCH,), generator=generator) / LEVELS
        loss = loss_of(model, batch, noise, level)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        progress(step + 1)


@torch.no_grad()
def evaluate(model: nn.Module, digits: Digits, seed: int) -> float:
    """The loss on fixed noise at evenly spread levels, eight for each image."""
    generator = torch.Generator().manual_seed(seed)
    many = digits.take(torch.arange(len(digits.rows)).repeat(8))
    noise = torch.randn(many.images.shape, generator=generator)
    level = (torch.arange(len(many.rows)) % LEVELS + 1) / LEVELS
    return float(loss_of(model, many, noise, level))


@torch.no_grad()
def sample(model: nn.Module, seed: int) -> Tensor:
    """`COLUMNS` images of every row, ``[35, 1, 8, 8]``.

    Deterministic sampling, Song et al. 2021 (arXiv:2010.02502), equation 12 with σ = 0.
    """
    rows = torch.arange(ROWS).repeat_interleave(COLUMNS)
    x = torch.randn(len(rows), 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    levels = torch.linspace(1, 0, SAMPLING_STEPS + 1)
    for now, then in zip(levels[:-1], levels[1:]):
        kept, later = signal(now), signal(then)
        velocity = model(x, now.expand(len(rows)), rows)
        image = (kept.sqrt() * x - (1 - kept).sqrt() * velocity).clamp(-1, 1)
        noise = (x - kept.sqrt() * image) / (1 - kept).sqrt()
        x = later.sqrt() * image + (1 - later).sqrt() * noise
    return x.clamp(-1, 1)


def examples(digits: Digits) -> Tensor:
    """The first `COLUMNS` real images of every row, ``[35, 1, 8, 8]``."""
    return torch.cat([digits.images[digits.rows == row][:COLUMNS] for row in range(ROWS)])


def draw(path: Path, panels: dict[str, Tensor]) -> None:
    """Grids of `ROWS` by `COLUMNS` images side by side, one panel for each title."""
    figure = Figure(figsize=(4 * len(panels), 3.3))  # without pyplot, so that no window is asked
    axes = figure.subplots(1, len(panels))
    for axis, (title, images) in zip(axes, panels.items()):
        framed = F.pad(images, (1, 1, 1, 1), value=-0.6)
        axis.imshow(
            rearrange(framed, "(a b) 1 h w -> (a h) (b w)", a=ROWS).numpy(),
            cmap="gray",
            vmin=-1,
            vmax=1,
            interpolation="nearest",
        )
        axis.set_title(title)
        axis.axis("off")
    figure.tight_layout()
    with new_file(path) as file:
        # without the version of matplotlib, so that one seed gives one file
        figure.savefig(file, dpi=110, metadata={"Software": None}, format="png")


@dataclass(frozen=True)
class Result:
    """What the demonstration measured; sizes in bytes, time in seconds.

    `restored` and `difference` are the largest ones of a pixel in ``[-1, 1]``: between the base and
    strength 0, and between strength 1 and the merged file in a plain model.
    """

    trainable: int
    total: int
    adapter_bytes: int
    merged_bytes: int
    loss_before: float
    loss_after: float
    restored: float
    difference: float
    seconds: float


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: on layers this small, several mostly wait for each other, without end
    where another program holds a core. Also the same files on any number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def taken(out: Path) -> list[str]:
    """Which of the demonstration's files are in `out` already."""
    return [name for name in FILES if (out / name).exists()]


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to fill with `FILES`, which take their places in `out` when the block ends well.

    An error, or Ctrl-C, in the block leaves `out` as it was, or no folder where there was none.

    Raises:
        FileError: `out`, or a file's place in it, cannot be written.
    """
    for name in FILES:
        if (out / name).is_dir():
            raise FileError(
                f"{out / name}: is a folder, which no file replaces. Give another --out."
            )
    # on the same disk, so that moving is renaming
    near = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
    with _told(out), tempfile.TemporaryDirectory(prefix=".paramlora-demo-", dir=near) as temporary:
        yield Path(temporary)
        to_the_end(lambda: _move(Path(temporary), out))  # no mixture of two runs


def _move(folder: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        os.replace(file, out / file.name)


@contextmanager
def _told(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FileError(
            f"--out {out}: cannot be written: {error.strerror or error}. Give a folder of your own."
        ) from error


@one_thread()
def run(out: Path, steps: int, seed: int, progress: Progress, pretrain_steps: int = 1000) -> Result:
    """Pre-train, adapt, save, merge, and compare; write `FILES` into the folder `out`."""
    start = time.monotonic()
    torch.manual_seed(seed)
    old, new, held_out = split(seed)
    write_config(out)
    model = UNet()
    ahead = partial(progress, "pre-train", total=pretrain_steps)
    train(model, old, pretrain_steps, 2e-3, seed, ahead)
    keep(model, out / "base.pt")
    base, loss_before = sample(model, seed), evaluate(model, held_out, seed)
    total = sum(p.numel() for p in model.parameters())
    paramlora.attach(model, out / "lora.json")
    trainable = sum(p.numel() for p in paramlora.trainable_parameters(model))
    train(model, new, steps, 1e-2, seed + 1, partial(progress, "adapt", total=steps))
    loss_after = evaluate(model, held_out, seed)
    paramlora.save_adapter(model, out / "adapter.safetensors")
    zero, half, one = (at_strength(model, strength, seed) for strength in (0.0, 0.5, 1.0))
    keep(paramlora.merge(model), out / "merged.pt")
    plain = UNet()
    plain.load_state_dict(torch.load(out / "merged.pt", weights_only=True))
    draw(out / "samples.png", panels(zero, half, one, examples(held_out)))
    return Result(
        trainable,
        total,
        (out / "adapter.safetensors").stat().st_size,
        (out / "merged.pt").stat().st_size,
        loss_before,
        loss_after,
        float((zero - base).abs().max()),
        float((sample(plain, seed) - one).abs().max()),
        time.monotonic() - start,
    )


def at_strength(model: nn.Module, strength: float, seed: int) -> Tensor:
    """What the model draws with its adapter that strong; it stays so."""
    paramlora.set_adapters(model, {"default": strength})
    return sample(model, seed)


def panels(*images: Tensor) -> dict[str, Tensor]:
    """The picture's four panels under their titles."""
    strengths = ("strength 0: the base is back", "strength 0.5", "strength 1: adapted")
    return dict(zip((*strengths, "real 5 to 9, held out"), images))


def keep(model: nn.Module, path: Path) -> None:
    """Write a model's tensors as ``torch.save`` does."""
    with new_file(path) as file:
        torch.save(model.state_dict(), file)


def config_text() -> str:
    """The configuration as JSON, one entry a line."""
    entries = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in CONFIG.items())
    return f"{{\n{entries}\n}}\n"


def write_config(out: Path) -> None:
    """Write ``lora.json`` into `out`."""
    with new_file(out / "lora.json") as file:
        file.write(config_text().encode())


def commands(out: Path) -> list[str]:
    """What to try next on the files in `out`, as a shell takes it."""
    names = ("adapter.safetensors", "base.pt", "half.pt", "peft")
    adapter, base, half, peft = (shlex.quote(str(out / name)) for name in names)
    return [
        f"paramlora inspect {adapter}",
        f"paramlora merge {base} {adapter}:0.5 -o {half}",
        f"paramlora convert {adapter} --to peft -o {peft}",
    ]
