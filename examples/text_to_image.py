"""diffusers: the text-to-image loop (predict the noise), with checkpointing and an EMA.

python examples/text_to_image.py
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import paramlora

CONFIG = {name: {"r": 4, "alpha": 4} for name in ("to_q", "to_k", "to_v", "to_out.0")}
SCHEDULE = DDPMScheduler(num_train_timesteps=100)


def base() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=24,
        norm_num_groups=4,
    )


def batch(step: int) -> tuple[torch.Tensor, ...]:
    """What a VAE, a text encoder and the schedule would give: latents, words, noise, times."""
    draw = torch.Generator().manual_seed(step)
    words = torch.randn(4, 6, 24, generator=draw)
    latents = words[:, 0, :4, None, None].expand(4, 4, 8, 8)  # the picture follows the text
    noise = torch.randn(4, 4, 8, 8, generator=draw)
    return latents, words, noise, torch.randint(100, (4,), generator=draw)


def loss_of(unet, step: int) -> torch.Tensor:
    latents, words, noise, times = batch(step)
    noisy = SCHEDULE.add_noise(latents, noise, times)
    return F.mse_loss(unet(noisy, times, encoder_hidden_states=words).sample, noise)


def train(unet, optimizer, steps: range, ema=None) -> float:
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(unet, step)
        loss.backward()
        optimizer.step()
        if ema is not None:
            ema.update_parameters(unet)
    return loss.item()


def started(unet):
    unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(paramlora.trainable_parameters(unet), lr=1e-2)
    return unet.train(), optimizer


def main(folder: Path = Path(".")) -> dict[str, float]:
    unet = base()
    torch.manual_seed(1)
    unet, optimizer = started(paramlora.attach(unet, CONFIG))
    first = train(unet, optimizer, range(10))
    paramlora.save_adapter(unet, folder / "adapter.safetensors")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    ema = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    last = train(unet, optimizer, range(10, 30), ema)
    paramlora.save_adapter(ema.module, folder / "ema.safetensors")

    resumed, optimizer = started(paramlora.load_adapter(base(), folder / "adapter.safetensors"))
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt"))
    again = train(resumed, optimizer, range(10, 30))
    with torch.no_grad():
        attached = loss_of(resumed, 30).item()
        merged = loss_of(paramlora.merge(resumed), 30).item()
    resumed.save_pretrained(folder / "merged")
    return {"first": first, "last": last, "resumed": again, "attached": attached, "merged": merged}


if __name__ == "__main__":
    for name, loss in main().items():
        print(f"{name:8} {loss:.4f}")
