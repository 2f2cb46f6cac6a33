"""accelerate: one loop for any number of devices, gradients accumulated and clipped.

accelerate launch examples/accelerate_loop.py
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paramlora

CONFIG = {"re:[02]": {"r": 4, "alpha": 8, "rslora": True, "dropout": 0.05}}


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))


def data() -> DataLoader:
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(x, x[:, :4].sin()), batch_size=32)


def train(accelerator, model, optimizer, loader, epochs: int) -> float:
    model.train()
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    trainable = paramlora.trainable_parameters(model)
                    accelerator.clip_grad_norm_(trainable, 1.0)
                optimizer.step()
                optimizer.zero_grad()
    return loss.item()


def prepared(accelerator, model):
    """The adapter first, then the wrappers; the optimizer knows the trainable parameters alone."""
    optimizer = torch.optim.AdamW(paramlora.trainable_parameters(model), lr=1e-2)
    return accelerator.prepare(model, optimizer, data())


def main(folder: Path = Path(".")) -> dict[str, float]:
    accelerator = Accelerator(gradient_accumulation_steps=2)
    torch.manual_seed(1)
    model, optimizer, loader = prepared(accelerator, paramlora.attach(base(), CONFIG))
    first = train(accelerator, model, optimizer, loader, 2)
    if accelerator.is_main_process:
        paramlora.save_adapter(model, folder / "adapter.safetensors")
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    accelerator.wait_for_everyone()
    torch.manual_seed(3)  # dropout draws the same below
    last = train(accelerator, model, optimizer, loader, 20)

    again = paramlora.load_adapter(base(), folder / "adapter.safetensors")
    again, optimizer, loader = prepared(accelerator, again)
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt"))
    torch.manual_seed(3)
    resumed = train(accelerator, again, optimizer, loader, 20)
    alone = accelerator.unwrap_model(again).eval()
    *_, (x, y) = loader
    attached = nn.functional.mse_loss(alone(x), y).item()
    merged = nn.functional.mse_loss(paramlora.merge(alone)(x), y).item()
    return {
        "first": first,
        "last": last,
        "resumed": resumed,
        "attached": attached,
        "merged": merged,
    }


if __name__ == "__main__":
    for name, loss in main().items():
        print(f"{name:8} {loss:.4f}")
