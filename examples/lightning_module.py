"""Lightning: `AdapterCheckpoint` keeps the base out of the checkpoints.

python examples/lightning_module.py
"""

from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paramlora
from paramlora.integrations.lightning import AdapterCheckpoint

CONFIG = {"re:net.[02]": {"r": 4, "alpha": 8}}


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
        torch.manual_seed(1)
        paramlora.attach(self, CONFIG)
        self.last = float("nan")

    def training_step(self, batch, _):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.last = loss.item()
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(paramlora.parameter_groups(self, lr=1e-2))


def data() -> DataLoader:
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(x, x[:, :4].sin()), batch_size=32)


def trainer(folder: Path, epochs: int) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[AdapterCheckpoint(), ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main(folder: Path = Path("lightning")) -> dict[str, float]:
    module = Regression()
    whole = trainer(folder, 20)
    whole.fit(module, data())
    first = Regression()
    trainer(folder / "stopped", 5).fit(first, data())
    resumed = Regression()
    checkpoint = folder / "stopped" / "epoch=4.ckpt"
    trainer(folder / "resumed", 20).fit(resumed, data(), ckpt_path=checkpoint)
    paramlora.save_adapter(resumed, folder / "adapter.safetensors")
    *_, (x, y) = data()
    before = nn.functional.mse_loss(resumed.net(x), y).item()
    after = nn.functional.mse_loss(paramlora.merge(resumed).net(x), y).item()
    return {
        "first": first.last,
        "last": module.last,
        "resumed": resumed.last,
        "attached": before,
        "merged": after,
    }


if __name__ == "__main__":
    for name, loss in main().items():
        print(f"{name:8} {loss:.4f}")
