"""An attached model under accelerate's FSDP2, by gloo: trained, saved, resumed; prints losses."""

import os
import sys

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import nn

import paramlora


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def base():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


def attached():
    model = base()
    torch.manual_seed(1)
    return paramlora.attach(model, {"up": {"r": 4}, "down": {"r": 4}})


def steps(model, optimizer, count, backward):
    x, losses = torch.ones(8, 16), []
    for _ in range(count):
        loss = (model(x) - 2).square().mean()
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def sharding():
    """accelerate has FSDP for devices alone; everything that it then does works on a CPU too."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def started(accelerator):
    model = attached()
    optimizer = torch.optim.AdamW(paramlora.trainable_parameters(model), lr=1e-2)
    return accelerator.prepare(model, optimizer)


def main(folder):
    accelerator = sharding()
    assert accelerator.is_fsdp2 and accelerator.num_processes == 2
    model, optimizer = started(accelerator)
    losses = steps(model, optimizer, 3, accelerator.backward)
    accelerator.save_state(f"{folder}/state")
    losses += steps(model, optimizer, 3, accelerator.backward)
    paramlora.save_adapter(model, f"{folder}/adapter.safetensors")
    accelerator._models.clear(), accelerator._optimizers.clear()
    model, optimizer = started(accelerator)
    accelerator.load_state(f"{folder}/state")
    assert steps(model, optimizer, 3, accelerator.backward) == losses[3:]
    if accelerator.is_main_process:
        print("losses", *losses)
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    # all has held by now; destructors of C++ behind Python's end abort about every third run
    os._exit(0)
