"""Lightning: checkpoints that hold the adapter and the optimizer's state, not the base."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from paramlora.model.values import adapter_state_dict, load_adapter_state_dict


class AdapterCheckpoint(Callback):
    """Keeps the frozen base out of every checkpoint; resuming brings the adapter back.

    The module attaches its adapter where it builds its model, as for a fresh run. Everything else
    in the checkpoint (optimizer, scheduler, step) is Lightning's own, and so is where it goes.

    Args:
        adapter: the adapter to keep.

    Example:
        >>> import lightning.pytorch as pl  # doctest: +SKIP
        >>> trainer = pl.Trainer(callbacks=[AdapterCheckpoint()])  # doctest: +SKIP
        >>> trainer.fit(module, data, ckpt_path="last")  # doctest: +SKIP
    """

    def __init__(self, adapter: str = "default") -> None:
        self.adapter = adapter

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The base is not in the checkpoint, which a strict load would miss."""
        pl_module.strict_loading = False

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Lightning loads it all the same: empty, it changes nothing
        checkpoint["state_dict"] = {}
        checkpoint["paramlora"] = adapter_state_dict(pl_module, self.adapter)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the adapter back.

        Raises:
            AdapterError: the module has none of that name attached.
            FileError: it is another one.
        """
        load_adapter_state_dict(pl_module, checkpoint["paramlora"], self.adapter)
