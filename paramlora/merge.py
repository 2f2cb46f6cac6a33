"""Folding the updates into the base weights: the one writer of base weights."""

from collections import Counter

import torch
from torch import Tensor, nn

from paramlora.attach import check_adapters, lowranks, replace
from paramlora.errors import AdapterError
from paramlora.lowrank import LowRank


@torch.no_grad()
def merge(model: nn.Module, adapters: "str | list[str] | None" = None) -> nn.Module:
    """Fold the updates into the base weights and erase them; returns the same model.

    The sum is computed in float32 (float64 for a float64 base) and rounded once to the
    weight's own type. Everything is checked before the first weight is written.

    Raises:
        AdapterError: an adapter that is not attached, or one that is not finite.
    """
    chosen = check_adapters(model, adapters)
    for path, _, lowrank in lowranks(model):
        _check_finite(path, lowrank)
    for path, module, _ in lowranks(model):
        _check_alone(path, module)
    holders = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for module in list(model.modules()):
        for name, plist in list(getattr(module, "parametrizations", {}).items()):
            ours = [p for p in plist if isinstance(p, LowRank) and p.adapter in chosen]
            if ours:
                if holders[id(plist.original)] > 1:  # tied: the other holder must not move
                    plist.original = nn.Parameter(
                        plist.original.detach().clone(), plist.original.requires_grad
                    )
                _fold(plist.original, ours)
                replace(module, name, [p for p in plist if not any(p is o for o in ours)])
    return model


def _fold(base: Tensor, updates: list[LowRank]) -> None:
    total = base.to(updates[0].lora_A.dtype)
    for update in updates:
        if update.strength != 0:
            total = total + update.delta(base.shape)
    base.copy_(total)


def _check_alone(path: str, module: nn.Module) -> None:
    for plist in getattr(module, "parametrizations", {}).values():
        others = [type(p).__name__ for p in plist if not isinstance(p, LowRank)]
        if others and len(others) < len(plist):
            raise AdapterError(
                f"{path}: the tensor is also under {', '.join(others)}, which would have to be "
                "inverted to hold the update. Nothing was merged; call torch's "
                "remove_parametrizations(layer, name, leave_parametrized=True) on it to fold both."
            )


def _check_finite(path: str, lowrank: LowRank) -> None:
    for name, tensor in lowrank.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(
                f'adapter "{lowrank.adapter}", {path}.{name}: not finite. Nothing was merged; '
                "detach the adapter or load a sound one."
            )
