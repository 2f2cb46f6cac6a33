"""Whole models with random weights, from their configuration, and their inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Zoo:
    """A model of two sizes, what of it is adapted, and an input.

    `build(tiny)` is called with the default dtype and device set; `inputs(batch, tiny)` gives the
    model's arguments; `targets` says whether a linear layer's path is adapted.
    """

    build: Callable[[bool], nn.Module]
    inputs: Callable[[int, bool], tuple[Tensor, ...]]
    call: Callable[[nn.Module, Any], Tensor]
    targets: Callable[[str], bool]
    r: int
    batch: int

    def entries(self, model: nn.Module) -> list[str]:
        """Paths of the linear layers to adapt."""
        linear = [path for path, m in model.named_modules() if isinstance(m, nn.Linear)]
        return [path for path in linear if self.targets(path)]


def unet(tiny: bool) -> nn.Module:
    """Stable Diffusion v1-4's U-Net, 859,520,964 parameters."""
    from diffusers import UNet2DConditionModel
    from diffusers.utils import logging

    logging.set_verbosity_error()  # it advises at every cast of its random weights
    if not tiny:
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=12,
        norm_num_groups=4,
    )


def unet_inputs(batch: int, tiny: bool) -> tuple[Tensor, ...]:
    side, words, width = (8, 3, 12) if tiny else (64, 77, 768)
    times = torch.randint(1000, (batch,))
    return torch.randn(batch, 4, side, side), times, torch.randn(batch, words, width)


def vit(tiny: bool) -> nn.Module:
    """ViT-L/16 of Dosovitskiy et al. 2021, table 1."""
    from transformers import ViTConfig, ViTModel

    sizes = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
    sizes |= dict(intermediate_size=4096, image_size=224, patch_size=16)
    small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    small |= dict(intermediate_size=32, image_size=8, patch_size=4)
    config = ViTConfig(**(small if tiny else sizes), hidden_dropout_prob=0.0)
    return ViTModel(config, add_pooling_layer=False)


def vit_inputs(batch: int, tiny: bool) -> tuple[Tensor, ...]:
    side = 8 if tiny else 224
    return (torch.randn(batch, 3, side, side),)


class Block(nn.Module):
    """One block of Llama's shape: grouped queries, gated feed-forward, RMS norms, no positions."""

    def __init__(self, width: int, inner: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, size = heads, kv_heads, width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * size, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * size, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def qkv(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(h), self.k_proj(h), self.v_proj(h)

    def out(self, h: Tensor) -> Tensor:
        return self.o_proj(h)

    def mlp(self, h: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (n, -1)).transpose(1, 2)  # [batch, heads, tokens, size]
            for t, n in zip(self.qkv(self.norm1(x)), (self.heads, self.kv_heads, self.kv_heads))
        )
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(h.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def llama(tiny: bool) -> nn.Module:
    """Four blocks of Llama 3 8B's sizes."""
    sizes = (16, 32, 4, 2) if tiny else (4096, 14336, 32, 8)
    return nn.Sequential(*(Block(*sizes) for _ in range(2 if tiny else 4)))


def llama_inputs(batch: int, tiny: bool) -> tuple[Tensor, ...]:
    return (torch.randn(batch, *((6, 16) if tiny else (2048, 4096))),)


ZOO = {
    "unet": Zoo(
        unet,
        unet_inputs,
        lambda model, args: model(*args).sample,
        lambda path: any(part in path for part in (".attn1.", ".attn2.", ".ff.")),
        r=8,
        batch=4,
    ),
    "vit": Zoo(
        vit,
        vit_inputs,
        lambda model, args: model(*args).last_hidden_state,
        lambda path: True,
        r=16,
        batch=32,
    ),
    "llama": Zoo(
        llama, llama_inputs, lambda model, args: model(*args), lambda path: True, r=16, batch=4
    ),
}
