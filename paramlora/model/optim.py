"""What the optimizer trains, and at which learning rates."""

from typing import Any, Optional

from torch import nn

from paramlora.errors import AdapterError
from paramlora.model.attach import check_adapters, updates
from paramlora.update.attached import answer


def trainable_parameters(model: nn.Module, adapter: Optional[str] = None) -> list[nn.Parameter]:
    """The parameters that require a gradient, each once, for the optimizer.

    Args:
        model: with at least one adapter attached.
        adapter: only this one's; without it everything that trains, such as a backbone under
            ``"trainable_model"``.

    Raises:
        AdapterError: nothing is attached, where everything would train, or no `adapter`.
    """
    attached = list(updates(model))
    if not attached:
        raise AdapterError(
            "no adapter is attached, so the whole model would train. Attach one, or use "
            "model.parameters()."
        )
    if adapter is None:
        return [p for p in model.parameters() if p.requires_grad]
    check_adapters(model, adapter)
    own = [p for _, _, u in attached if u.adapter == adapter for p in u.parameters()]
    return [p for p in own if p.requires_grad]


def parameter_groups(
    model: nn.Module,
    lr: float,
    lr_ratio: float = 1.0,
    weight_decay: Optional[float] = None,
    adapter: Optional[str] = None,
) -> list[dict[str, Any]]:
    """Groups for any ``torch.optim`` optimizer; empty ones are left out.

    Args:
        model: with at least one adapter attached.
        lr: of ``lora_A``, and of everything else that trains.
        lr_ratio: ``lora_B`` trains at ``lr · lr_ratio``; LoRA+ (Hayou et al. 2024,
            arXiv:2402.12354, section 4) recommends more than 1.
        weight_decay: of everything but scales, which have none; the optimizer's own where None.
        adapter: only this one's, for an optimizer of its own; without it everything that trains.

    Raises:
        AdapterError: nothing is attached, or no `adapter`.

    Example:
        >>> import torch, paramlora
        >>> model = paramlora.attach(nn.Sequential(nn.Linear(4, 3)), {"0": {"r": 2}})
        >>> groups = parameter_groups(model, lr=1e-3, lr_ratio=16)
        >>> [(group["name"], group["lr"]) for group in groups]
        [('lora_A', 0.001), ('lora_B', 0.016)]
    """
    named: dict[str, list[nn.Parameter]] = {}
    for _, _, update in updates(model):
        if adapter is None or update.adapter == adapter:
            for name, members in answer(update, "groups").items():
                named.setdefault(name, []).extend(members)
    if not named:
        check_adapters(model, adapter)
        raise AdapterError("no adapter is attached, so there is nothing to group. Attach one.")
    if adapter is None:
        known = {id(p) for group in named.values() for p in group}
        named["model"] = [p for p in model.parameters() if id(p) not in known]
    out = []
    for name, members in named.items():
        params = [p for p in members if p.requires_grad]
        if params:
            rate = lr * lr_ratio if name == "lora_B" else lr
            group = {"name": name, "params": params, "lr": rate}
            decay = 0.0 if name == "lora_scale" else weight_decay
            out.append(group if decay is None else {**group, "weight_decay": decay})
    return out
