"""Folding the updates into the base weights: the one writer of base weights."""

import copy
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
from paramlora.quantised import is_quantised, make_dense, tell_transformers
from paramlora.sharded import is_sharded
from paramlora.soft import Branch
from paramlora.switch import Switched
from paramlora.whole import Whole

_Job = tuple[nn.Module, str, list[Switched]]
_Values = list[tuple[Tensor, Tensor]]  # (stored tensor, new value)


@torch.inference_mode(False)
@torch.no_grad()
def merge(
    model: nn.Module, adapters: "str | list[str] | None" = None, dequantize: bool = False
) -> nn.Module:
    """Fold the updates into the base weights and erase them; returns the same model.

    The sum is computed in float32 (float64 for a float64 base) and rounded once to the
    weight's own type. Everything is checked before the first weight is written. A merge that
    is stopped half-way leaves the rest attached and the outputs as they were: merge again.
    What `attach` froze stays frozen, as ``model.requires_grad_(True)`` undoes.

    Args:
        model: with adapters attached, or none: then nothing happens.
        adapters: a name or several; all when None. Those that `set_adapters` weakened are
            folded in as strongly as they act.
        dequantize: make a quantised weight that is adapted a dense one, which takes several
            times its memory; otherwise such a merge is refused.

    Raises:
        AdapterError: an adapter that is not attached, one that is not finite, a soft one with
            ``"up_kernel": "same"``, one over a parametrization that cannot hold the sum, or one
            of a quantised weight without `dequantize`.

    Example:
        >>> import paramlora
        >>> layer = paramlora.attach(nn.Linear(4, 3), {"weight": {"r": 2}})
        >>> x, y = torch.ones(1, 4), layer(torch.ones(1, 4))
        >>> assert type(merge(layer)) is nn.Linear and torch.equal(layer(x), y)
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
    packed = [
        (module, name)
        for module, name, _ in jobs
        if (stored := module._parameters.get(name)) is not None and is_quantised(stored)
    ]
    if packed and not dequantize:
        raise AdapterError(_quantised(model, *packed[0]))
    inverted = [_inverted(*job) for job in jobs]  # the last check
    usual = _usual_type(model)
    for module, name in packed:
        make_dense(module, name, usual)
    if packed:
        tell_transformers(model, [module for module, _ in packed])
    alike: dict[tuple[int, ...], list[tuple[_Job, _Values]]] = {}
    for job, values in zip(jobs, inverted):
        alike.setdefault(_identity(*job), []).append((job, values))
    count = holders(model)
    for (base, *_), group in alike.items():
        _write(group, whole=len(group) == count[base])
        for (module, name, ours), _ in group:
            _erase(module, name, ours)
    tidy(model)
    return model


def _ours(module: nn.Module, name: str, chosen: list[str]) -> list[Switched]:
    lists = [held for tensor, held in updates_of(module) if tensor == name]
    return [p for held in lists for p in held if isinstance(p, Switched) and p.adapter in chosen]


def _usual_type(model: nn.Module) -> "torch.dtype | None":
    """The type of the first parameter that is neither packed nor an update's."""
    ours = {id(p) for _, _, update in updates(model) for p in update.parameters()}
    there = (p.dtype for p in model.parameters() if id(p) not in ours and p.is_floating_point())
    return next(there, None)


def _among(update: nn.Module, updates: list[Switched]) -> bool:
    return any(update is one for one in updates)


def _write(group: list[tuple[_Job, _Values]], whole: bool) -> None:
    """Write a base once for the holders that share it with the same updates."""
    for _, values in group:
        for tensor, value in values:
            tensor.copy_(value)
    plain = [_stored(module, name) for (module, name, _), values in group if not values]
    if not plain:
        return
    base: nn.Parameter = getattr(*plain[0])
    if not whole:  # tied to a holder without these updates, which must not move
        base = nn.Parameter(base.detach().clone(), base.requires_grad)
        for owner, attribute in plain:
            setattr(owner, attribute, base)
    _fold(base, group[0][0][2])


def _erase(module: nn.Module, name: str, ours: list[Switched]) -> None:
    for tensor, held in updates_of(module):
        if tensor == name:
            replace(module, name, held, [p for p in held if not _among(p, ours)])


def _identity(module: nn.Module, name: str, ours: list[Switched]) -> tuple[int, ...]:
    owner, attribute = _stored(module, name)
    return (id(getattr(owner, attribute)), *map(id, ours))


def _stored(module: nn.Module, name: str) -> tuple[Any, str]:
    """The owner and the attribute of the tensor behind ``module.name``."""
    if name in module._parameters:
        return module, name
    plist = parametrized(module)[name]
    return plist, "original" if plist.is_tensor else "original0"


def _fold(base: nn.Parameter, updates: list[Switched]) -> None:
    acting = [update for update in updates if update.acts]
    if is_sharded(base):
        total = _folded_together(base, acting)
    else:
        total = folded(base, [_term(update) for update in acting])
    if 0 in base.stride():  # expanded: its elements share memory, which the sum's cannot
        base.data = base.data.clone(memory_format=torch.contiguous_format)
    base.copy_(total)


def _folded_together(base: Tensor, acting: list[Switched]) -> Tensor:
    """Each process forms its own part of the sum, whose blocks the others could not follow."""
    total = base.to(torch.promote_types(base.dtype, torch.float32))
    for update in acting:
        if isinstance(update, LowRank):
            total = total + update.delta(base.shape, total.dtype)
        else:
            total = update(total)
    return total


def _term(update: Switched) -> Term:
    if isinstance(update, LowRank):
        return LowRankTerm(*update.factors(), update.scaling, update.layout)
    assert isinstance(update, Whole)
    return WholeTerm(update.lora_whole, update.gain)


def _inverted(module: nn.Module, name: str, ours: list[Switched]) -> _Values:
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


def _quantised(model: nn.Module, module: nn.Module, name: str) -> str:
    path = next(path for path, one in model.named_modules() if one is module)
    return (
        f"{path or type(module).__name__}.{name} is quantised and cannot hold the sum. Nothing was "
        "merged; merge(model, dequantize=True) makes it dense, or keep the adapter attached."
    )


def _check_finite(path: str, lowrank: Switched) -> None:
    for name, tensor in lowrank.state_dict().items():
        if not tensor.is_meta and not torch.isfinite(tensor).all():
            raise AdapterError(
                f'adapter "{lowrank.adapter}", {path}.{name}: not finite. Nothing was merged; '
                "detach the adapter or load a sound one."
            )
