"""Folding the updates into the base weights: the one writer of base weights."""

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from paramlora.attach import (
    check_adapters,
    holders,
    replace,
    tidy,
    updates,
    updates_of,
)
from paramlora.errors import AdapterError
from paramlora.fold import LowRankTerm, Term, WholeTerm, folded
from paramlora.layers import parametrized
from paramlora.lowrank import LowRank
from paramlora.soft import Branch
from paramlora.switch import Switched
from paramlora.whole import Whole

_Job = tuple[nn.Module, str, list[Switched]]


@torch.no_grad()
def merge(model: nn.Module, adapters: "str | list[str] | None" = None) -> nn.Module:
    """Fold the updates into the base weights and erase them; returns the same model.

    The sum is computed in float32 (float64 for a float64 base) and rounded once to the
    weight's own type. Everything is checked before the first weight is written.

    Raises:
        AdapterError: an adapter that is not attached, one that is not finite, a soft one with
            ``"up_kernel": "same"``, or one over a parametrization that cannot hold the sum.
    """
    chosen = check_adapters(model, adapters)
    for path, _, lowrank in updates(model):
        if lowrank.adapter in chosen:
            _check_finite(path, lowrank)
            if isinstance(lowrank, Branch):
                lowrank.check_mergeable(path)
    jobs = [
        (module, name, ours)
        for module in list(model.modules())
        for name in dict.fromkeys(name for name, _ in updates_of(module))
        if (ours := _ours(module, name, chosen))
    ]
    inverted = [_inverted(*job) for job in jobs]
    _write(model, jobs, inverted)
    for module, name, ours in jobs:
        for tensor, held in updates_of(module):
            if tensor == name:
                replace(module, name, held, [p for p in held if not _among(p, ours)])
    tidy(model)
    return model


def _ours(module: nn.Module, name: str, chosen: list[str]) -> list[Switched]:
    lists = [held for tensor, held in updates_of(module) if tensor == name]
    return [p for held in lists for p in held if isinstance(p, Switched) and p.adapter in chosen]


def _among(update: nn.Module, updates: list[Switched]) -> bool:
    return any(update is one for one in updates)


def _write(model: nn.Module, jobs: list[_Job], inverted: list[list[tuple[Tensor, Tensor]]]) -> None:
    """Write every base: one that all its holders share with the same updates is written once."""
    count = holders(model)
    alike = Counter(_identity(*job) for job in jobs)
    done = set()
    for job, values in zip(jobs, inverted):
        module, name, ours = job
        for tensor, value in values:
            tensor.copy_(value)
        key = _identity(*job)
        if values or key in done:
            continue
        owner, attribute = _stored(module, name)
        base: nn.Parameter = getattr(owner, attribute)
        if alike[key] == count[id(base)]:
            done.add(key)
        else:  # tied to a holder without these updates, which must not move
            base = nn.Parameter(base.detach().clone(), base.requires_grad)
            setattr(owner, attribute, base)
        _fold(base, ours)


def _identity(module: nn.Module, name: str, ours: list[Switched]) -> tuple[int, ...]:
    owner, attribute = _stored(module, name)
    return (id(getattr(owner, attribute)), *map(id, ours))


def _stored(module: nn.Module, name: str) -> tuple[Any, str]:
    """The owner and the attribute of the tensor behind ``module.name``."""
    if name in module._parameters:
        return module, name
    plist = parametrized(module)[name]
    return plist, "original" if plist.is_tensor else "original0"


def _fold(base: Tensor, updates: list[Switched]) -> None:
    base.copy_(folded(base, [_term(update) for update in updates if update.acts]))


def _term(update: Switched) -> Term:
    if isinstance(update, LowRank):
        factor = update.lora_scale * update.gain
        return LowRankTerm(*update.factors(), factor, update.layout)
    assert isinstance(update, Whole)
    return WholeTerm(update.lora_whole, update.gain)


def _inverted(module: nn.Module, name: str, ours: list[Switched]) -> list[tuple[Tensor, Tensor]]:
    """(stored tensor, new value) where another parametrization acts before an update.

    Empty where the updates come first: they then add to the stored tensor itself.
    """
    if name in module._parameters:
        return []
    plist: Any = parametrized(module)[name]
    others = [i for i, p in enumerate(plist) if not isinstance(p, Switched)]
    first = [i for i, p in enumerate(plist) if _among(p, ours)]
    soft = [p for p in ours if isinstance(p, Branch)]
    if not others or (not soft and first[-1] < others[0]):
        return []
    names = ["original"] if plist.is_tensor else [f"original{i}" for i in range(plist.ntensors)]
    stored = [getattr(plist, n) for n in names]
    # a copy in eval mode: spectral norm steps its power iteration whenever it is read
    rules = copy.deepcopy([plist[i] for i in others])
    for rule in rules:
        rule.eval()
    chain = [
        rules[others.index(i)] if i in others else p
        for i, p in enumerate(plist)
        if i in others or _among(p, ours)
    ]
    wanted = _through(chain, stored)
    for branch in soft:
        wide = torch.promote_types(wanted.dtype, torch.float32)
        wanted = (wanted.to(wide) + branch.delta(wanted.shape, wide)).to(wanted.dtype)
    new = _back(module, name, rules, wanted)
    close = 64 * torch.finfo(wanted.dtype).eps
    if not torch.allclose(_through(rules, new), wanted, rtol=close, atol=close):
        raise AdapterError(_cannot_hold(module, name, rules))
    return list(zip(stored, new))


def _through(chain: list[Any], stored: list[Tensor]) -> Tensor:
    value: Tensor = chain[0](*stored)
    for rule in chain[1:]:
        value = rule(value)
    return value


def _back(module: nn.Module, name: str, rules: list[Any], wanted: Tensor) -> list[Tensor]:
    value: Any = wanted
    try:
        for rule in reversed(rules):
            value = rule.right_inverse(value)
    except (AttributeError, NotImplementedError) as error:
        raise AdapterError(_cannot_hold(module, name, rules)) from error
    return [value] if isinstance(value, Tensor) else list(value)


def _cannot_hold(module: nn.Module, name: str, rules: list[Any]) -> str:
    kinds = ", ".join(type(rule).__name__.lstrip("_") for rule in rules)
    return (
        f"{type(module).__bases__[0].__name__}.{name} is under {kinds}, which cannot hold the "
        "sum exactly. Nothing was merged; call torch's remove_parametrizations(layer, "
        f'"{name}", leave_parametrized=True) on it to fold both.'
    )


def _check_finite(path: str, lowrank: Switched) -> None:
    for name, tensor in lowrank.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(
                f'adapter "{lowrank.adapter}", {path}.{name}: not finite. Nothing was merged; '
                "detach the adapter or load a sound one."
            )
