"""What the optimizer trains, and at which learning rates."""

import math
import re
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any, Optional

from torch import nn

from paramlora.errors import AdapterError, spelled
from paramlora.model.attach import check_adapters, placed, updates
from paramlora.model.targets import (
    Places,
    closest_in,
    holders_of,
    own_path,
    specificity,
    unwrapped,
)
from paramlora.update.attached import answer
from paramlora.update.sharded import check_own_parameters

# what torch puts into the path of a parametrized tensor
_BASE = re.compile(r"(?:^|(?<=\.))parametrizations\.([^.]+)\.original\d*$")


def trainable_parameters(model: nn.Module, adapter: Optional[str] = None) -> list[nn.Parameter]:
    """The parameters that require a gradient, each once, for the optimizer.

    Args:
        model: with at least one adapter attached.
        adapter: only this one's; without it everything that trains, such as a backbone under
            ``"trainable_model"``.

    Raises:
        AdapterError: nothing is attached, where everything would train, or no `adapter`, or it is
            in flat parameters of FSDP1, which hold more than that.
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
    # in a flat parameter the adapter has none of its own
    check_own_parameters(model, {adapter: own})
    return [p for p in own if p.requires_grad]


def parameter_groups(
    model: nn.Module,
    lr: float,
    lr_ratio: float = 1.0,
    weight_decay: Optional[float] = None,
    adapter: Optional[str] = None,
    rates: Optional[Mapping[str, float]] = None,
) -> list[dict[str, Any]]:
    """Groups for any ``torch.optim`` optimizer; empty ones are left out.

    Args:
        model: with at least one adapter attached.
        lr: of ``lora_A``, and of everything else that trains.
        lr_ratio: ``lora_B`` trains at ``lr · lr_ratio``; LoRA+ (Hayou et al. 2024,
            arXiv:2402.12354, section 4) recommends more than 1.
        weight_decay: of everything but scales, which have none; the optimizer's own where None.
        adapter: only this one's, for an optimizer of its own; without it everything that trains.
        rates: another `lr` for parts of the model, by names and patterns as of the entries of a
            configuration. What lies in a module that one names has its rate; of several the
            longest name counts, as of entries. Regular expressions are followed in bounded time.

    Returns:
        Groups called ``lora_A``, ``lora_B``, ...; with a name of `rates` behind it in brackets,
        such as ``lora_A (down_blocks)``, where that gives the rate.

    Raises:
        AdapterError: nothing is attached, or no `adapter`, or it is in flat parameters of FSDP1,
            of one rate each; a name in `rates` of nothing that trains, two that mean one tensor
            equally, or a rate that is no number of at least 0.

    Example:
        >>> import torch, paramlora
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        >>> model = paramlora.attach(model, {"*": {"r": 2}})
        >>> groups = parameter_groups(model, lr=1e-3, lr_ratio=16, rates={"1": 1e-4})
        >>> [(group["name"], group["lr"]) for group in groups]
        [('lora_A', 0.001), ('lora_A (1)', 0.0001), ('lora_B', 0.016), ('lora_B (1)', 0.0016)]
    """
    told = _Rates(model, lr, rates or {}, adapter)
    named: dict[str, dict[str, list[nn.Parameter]]] = {}
    for update, paths in _updates(model, adapter):
        groups = answer(update, "groups")
        check_own_parameters(model, groups)
        for name, members in groups.items():
            group = named.setdefault(name, {}).setdefault(told.pattern(paths, members), [])
            group.extend(members)
    if not named:
        check_adapters(model, adapter)
        raise AdapterError("no adapter is attached, so there is nothing to group. Attach one.")
    if adapter is None:
        # by identity: a tied tensor has several paths and is one parameter
        known = {id(p) for held in named.values() for group in held.values() for p in group}
        for path, p in unwrapped(model).named_parameters():
            if id(p) not in known:
                # as files spell it, so that patterns mean the same for bases and updates
                paths = [own_path(_BASE.sub(r"\1", path))]
                named.setdefault("model", {}).setdefault(told.pattern(paths, [p]), []).append(p)
    told.check_used()
    return [
        _group(name, pattern, params, told, lr_ratio, weight_decay)
        for name, held in named.items()
        for pattern, members in held.items()
        if (params := [p for p in members if p.requires_grad])
    ]


def _updates(model: nn.Module, adapter: Optional[str]) -> Iterator[tuple[Any, list[str]]]:
    """Every update of an adapter (of all where None) once, and the paths of all its holders."""
    paths: dict[int, list[str]] = {}
    for path, _, update in placed(model):
        paths.setdefault(id(update), []).append(path)
    for _, _, update in updates(model):
        if adapter is None or update.adapter == adapter:
            yield update, paths[id(update)]


def _group(
    name: str,
    pattern: str,
    params: list[nn.Parameter],
    told: "_Rates",
    lr_ratio: float,
    weight_decay: Optional[float],
) -> dict[str, Any]:
    # LoRA+ has but one ratio, of B
    rate = told.rate(pattern) * lr_ratio if name == "lora_B" else told.rate(pattern)
    spelled_out = f"{name} ({pattern})" if pattern else name
    group = {"name": spelled_out, "params": params, "lr": rate}
    # a scale of 0 means no update at all, to which decay would draw it
    decay = 0.0 if name == "lora_scale" else weight_decay
    return group if decay is None else {**group, "weight_decay": decay}


class _Rates:
    """The learning rates of the parts of a model.

    Args:
        model: with updates, or a wrapper of one.
        lr: of what no pattern names.
        rates: by pattern.
        adapter: whose parameters are asked for, for messages.
    """

    def __init__(
        self, model: nn.Module, lr: float, rates: Mapping[str, float], adapter: Optional[str]
    ) -> None:
        if not isinstance(rates, Mapping):
            raise AdapterError(f'expected rates such as {{"head": 1e-4}}, got {spelled(rates)}.')
        self._model, self._lr, self._rates, self._adapter = unwrapped(model), lr, rates, adapter
        places = Places(self._model) if rates else None
        self._at = {name: _named(places, name, rate) for name, rate in rates.items()}
        self._unused = set(rates)

    def pattern(self, paths: list[str], members: list[nn.Parameter]) -> str:
        """The pattern that gives the rate of what has a path in files; empty without one.

        Args:
            paths: of each holder.
            members: what it gives the rate of; it counts as used where one of them trains.
        """
        if not self._at:
            return ""
        # a path in files leaves "weight" out; a pattern may name it
        within = {
            one for path in paths for one in holders_of(f"{path}.weight" if path else "weight")
        }
        found = [name for name, at in self._at.items() if not at.isdisjoint(within)]
        if any(p.requires_grad for p in members):
            # frozen tensors use no rate: a pattern that names only these is told of
            self._unused -= set(found)
        best = max(map(specificity, found), default=0)
        top = [name for name in found if specificity(name) == best]
        if len(top) > 1:
            raise AdapterError(
                f'{paths[0] or "the model"}: "{top[0]}" and "{top[1]}" in rates claim it equally. '
                "Remove one, or make one path longer."
            )
        return top[0] if top else ""

    def rate(self, pattern: str) -> float:
        """The learning rate of a pattern, or of what has none."""
        return self._rates[pattern] if pattern else self._lr

    def check_used(self) -> None:
        """Refuse a pattern that gives no rate to anything."""
        for name in (one for one in self._rates if one in self._unused):
            if self._at[name]:
                whose = f' of adapter "{self._adapter}"' if self._adapter is not None else ""
                raise AdapterError(
                    f'"{name}" in rates names nothing{whose} that trains. Remove it, or attach '
                    "an update there."
                )
            raise AdapterError(
                f'"{name}" in rates matches nothing.{closest_in(self._model, name)} Remove it, or '
                "name what is there."
            )


def _named(places: Optional[Places], name: Any, rate: Any) -> set[str]:
    """The paths that a pattern means, without what wrappers put into them."""
    if not isinstance(name, str) or not name or places is None:
        raise AdapterError(f'a name in rates must be such as "down_blocks", got {spelled(name)}.')
    sound = isinstance(rate, Real) and not isinstance(rate, bool)
    if not sound or not math.isfinite(rate) or rate < 0:
        raise AdapterError(
            f'"{name}" in rates: a rate must be a finite number of at least 0, got {spelled(rate)}.'
        )
    try:
        return {own_path(path) for path in places.meant(name)}
    except ValueError as error:
        raise AdapterError(f"rates: {error}. Give a plain name, or several.") from error
