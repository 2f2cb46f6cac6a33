"""FSDP2 over any number of processes: shard base and adapter together, save only the adapter.

torchrun --nproc-per-node 2 examples/many_processes.py
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import paramlora

CONFIG = {"up": {"r": 4, "alpha": 8}, "down": {"r": 4, "alpha": 8}}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(16, 4))


def main(folder: Path = Path(".")) -> dict[str, float]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    torch.manual_seed(1)
    model = paramlora.attach(base().to(device), CONFIG)  # first the adapter ...
    for block in model[:2]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)  # ... then the shards
    optimizer = torch.optim.AdamW(paramlora.trainable_parameters(model), lr=1e-2)
    for step in range(60):
        draw = torch.Generator().manual_seed(step)
        x = torch.randn(48, 16, generator=draw).to(device)
        mine = x.chunk(dist.get_world_size())[dist.get_rank()]
        loss = nn.functional.mse_loss(model(mine), mine[:, :4].sin())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 0:
            first = loss.item()
    path = folder / "adapter.safetensors"
    paramlora.save_adapter(model, path)  # by all processes; the first one writes
    alone = paramlora.merge(paramlora.load_adapter(base().to(device), path))
    merged = nn.functional.mse_loss(alone(mine), mine[:, :4].sin()).item()
    sharded = nn.functional.mse_loss(model(mine), mine[:, :4].sin()).item()
    main_process = dist.get_rank() == 0
    dist.destroy_process_group()
    return {"first": first, "attached": sharded, "merged": merged} if main_process else {}


if __name__ == "__main__":
    for name, loss in main().items():
        print(f"{name:8} {loss:.4f}")
