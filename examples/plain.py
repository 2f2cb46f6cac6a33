"""Plain PyTorch: train, save the adapter, resume with the optimizer's state, merge.

python examples/plain.py
"""

from pathlib import Path

import torch
from torch import nn

import paramlora

CONFIG = {"0": {"r": 4, "alpha": 8}, "2": {"whole": True}}


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))


def batches(steps: range):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(64, 16, generator=generator)
        yield x, x[:, :4].sin()


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(paramlora.parameter_groups(model, lr=1e-2, lr_ratio=4))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> float:
    for x, y in batches(steps):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main(folder: Path = Path(".")) -> dict[str, float]:
    torch.manual_seed(1)
    model = paramlora.attach(base(), CONFIG)
    optimizer = optimizer_for(model)
    first = train(model, optimizer, range(50))
    paramlora.save_adapter(model, folder / "adapter.safetensors")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    last = train(model, optimizer, range(50, 150))  # as if it had never stopped

    resumed = paramlora.load_adapter(base(), folder / "adapter.safetensors")
    optimizer = optimizer_for(resumed)
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt"))
    again = train(resumed, optimizer, range(50, 150))
    ((x, y),) = batches(range(150, 151))
    attached = nn.functional.mse_loss(resumed(x), y).item()
    torch.save(paramlora.merge(resumed).state_dict(), folder / "merged.pt")
    plain = base()  # which needs no paramlora
    plain.load_state_dict(torch.load(folder / "merged.pt"))
    merged = nn.functional.mse_loss(plain(x), y).item()
    return {"first": first, "last": last, "resumed": again, "attached": attached, "merged": merged}


if __name__ == "__main__":
    for name, loss in main().items():
        print(f"{name:8} {loss:.4f}")
