"""A small U-Net of diffusers, adapted, with what it gives."""

import pytest
import torch

import paramlora
from paramlora.model.attach import updates

diffusers = pytest.importorskip("diffusers")
SOFT = {"to_q": {"r": 2, "hard": 0}, "conv1": {"r": 2, "hard": 0}}
BOTH = {"to_q": {"r": 2}, "conv1": {"r": 2}}


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=4,
    ).eval()


def outputs(model, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, 8, 8, generator=generator).to(dtype)
    text = torch.randn(1, 3, 8, generator=generator).to(dtype)
    with torch.no_grad():
        return model(x, 1, text).sample


def fill(model):
    generator = torch.Generator().manual_seed(3)
    for _, _, update in updates(model):
        value = update.lora_B
        value.data += 0.3 * torch.randn(value.shape, generator=generator)
    return model


def attached(config):
    return fill(paramlora.attach(unet(), config))
