"""transformers: a callback of its Trainer, and so of TRL's, that logs the size of the updates."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from paramlora.integrations.progress import log_updates


class UpdateNorms(TrainerCallback):
    """Writes `update_norms` whenever the Trainer logs.

    Args:
        write: called with a name, a number and the step: a TensorBoard ``SummaryWriter``'s
            ``add_scalar``, or ``print``.
        adapter: whose updates.

    Example:
        >>> from transformers import Trainer  # doctest: +SKIP
        >>> Trainer(model, arguments, callbacks=[UpdateNorms(print)])  # doctest: +SKIP
    """

    def __init__(
        self, write: Callable[[str, float, int], object], adapter: str = "default"
    ) -> None:
        self.write, self.adapter = write, adapter

    def on_log(self, args: Any, state: Any, control: Any, **told: Any) -> None:
        """Write, once for each update."""
        log_updates(told["model"], self.write, state.global_step, self.adapter)
