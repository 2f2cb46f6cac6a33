"""The layers that are measured: shapes, inputs and factors."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """One layer and its input; `shape` is of the input, `r` the rank."""

    name: str
    layer: Callable[..., nn.Module]
    shape: tuple[int, ...]
    r: int
    tokens: int  # rows of the products, positions of a convolution


def linear(n: int, i: int, o: int, r: int, bias: bool = False) -> Case:
    name = f"linear {n}×{i}×{o} r{r}" + (" bias" if bias else "")
    return Case(name, partial(nn.Linear, i, o, bias=bias), (n, i), r, n)


def conv(name: str, batch: int, i: int, o: int, side: int, k: int, r: int, **options: int) -> Case:
    layer = partial(nn.Conv2d, i, o, k, **options)
    return Case(
        f"{name} {batch}×{i}×{side}²→{o} r{r}", layer, (batch, i, side, side), r, batch * side**2
    )


def embedding(n: int, words: int, width: int, r: int) -> Case:
    layer = partial(nn.Embedding, words, width)
    return Case(f"embedding {n} of {words}×{width} r{r}", layer, (n,), r, n)


def gemma_embedding(n: int, words: int, width: int, r: int) -> Case:
    """One whose own forward scales what `nn.Embedding`'s gives."""

    def layer(device: torch.device, dtype: torch.dtype) -> nn.Module:
        from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

        made = Gemma3TextScaledWordEmbedding(words, width, padding_idx=0, embed_scale=width**0.5)
        return made.to(device, dtype)

    return Case(f"Gemma 3's embedding {n} of {words}×{width} r{r}", layer, (n,), r, n)


def convolutions(batch: int, c: int, side: int, r: int) -> list[Case]:
    return [
        conv("conv 1×1", batch, c, c, side, 1, r),
        conv("conv 3×3", batch, c, c, side, 3, r, padding=1),
        conv("conv depthwise", batch, c, c, side, 3, r, padding=1, groups=c),
        conv("conv dilated", batch, c, c, side, 3, r, padding=2, dilation=2),
    ]


LINEAR = [  # of the table in the plan: language models, a U-Net, few tokens, a high rank
    linear(8192, 4096, 4096, 16),
    linear(8192, 4096, 14336, 16),
    linear(16384, 1280, 1280, 8),
    linear(16384, 320, 320, 8),
    linear(1024, 4096, 4096, 16),
    linear(64, 4096, 4096, 16),
    linear(8192, 4096, 4096, 128),
]
SMALL = [  # where Python, not arithmetic, takes the time
    linear(16, 64, 64, 4),
    linear(16, 64, 64, 4, bias=True),
    linear(64, 256, 256, 8, bias=True),
]
CUDA = {
    "linear": LINEAR + [linear(8192, 4096, 4096, 16, bias=True)],
    "small": SMALL,
    "other": convolutions(8, 320, 64, 8) + [embedding(16384, 50000, 1024, 16)],
}
CPU = {
    "linear": [
        linear(1024, 320, 320, 8),
        linear(256, 768, 768, 8, bias=True),
        linear(64, 1024, 1024, 16),
    ],
    "small": SMALL,
    "other": convolutions(2, 32, 16, 4)
    + [
        embedding(512, 2000, 128, 8),
        embedding(512, 50000, 640, 16),
        gemma_embedding(512, 50000, 640, 16),
    ],
}
TINY = {  # runs in a second; keeps this code from rotting
    "linear": [linear(8, 16, 24, 2, bias=True)],
    "small": [linear(2, 8, 8, 2)],
    "other": convolutions(1, 4, 5, 1) + [embedding(6, 9, 8, 2), gemma_embedding(6, 9, 8, 2)],
}


@dataclass(frozen=True)
class Tensors:
    """A case made real: the frozen layer, its input, the gradient of its output, the factors."""

    layer: nn.Module
    x: Tensor
    dy: Tensor
    A: Tensor
    B: Tensor


def make(case: Case, dtype: torch.dtype, device: torch.device, out: torch.dtype) -> Tensors:
    """Random tensors, the same for every way to compute.

    The update is about as large as the weight, so that leaving it out cannot pass; the
    factors are float32 values that bfloat16 holds exactly, so all ways start equal.

    Args:
        dtype: of the weight and the input.
        out: of the output, which autocast makes another than `dtype`.
    """
    torch.manual_seed(0)
    layer = case.layer(device=device, dtype=dtype).requires_grad_(False)
    if isinstance(layer, nn.Embedding):
        x = torch.randint(layer.num_embeddings, case.shape, device=device)
        fan_in, fan_out = layer.weight.shape
    else:
        x = torch.randn(case.shape, device=device, dtype=dtype).requires_grad_()
        fan_out, fan_in = layer.weight.shape[0], layer.weight[0].numel()
    A = torch.randn(case.r, fan_in, device=device)
    size = layer.weight.float().std() / case.r**0.5
    B = torch.randn(fan_out, case.r, device=device) * size
    dy = torch.randn_like(layer(x), dtype=out)
    return Tensors(layer, x, dy, A.bfloat16().float(), B.bfloat16().float())
