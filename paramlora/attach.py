"""Attaching, detaching and switching adapters: the one place that registers and freezes."""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from paramlora.config import ConfigLike, as_config
from paramlora.errors import AdapterError, ParamloraWarning
from paramlora.init import initialise
from paramlora.inputs import checkpoints_reentrantly, disable_input_grads, enable_input_grads
from paramlora.layers import Shared, parametrized, refresh, shared
from paramlora.lowrank import LowRank
from paramlora.soft import BRANCHES, Branch, add_branch, kernel_of, remove_branches
from paramlora.switch import Switched
from paramlora.targets import Target, shown, targets
from paramlora.whole import Whole


def attach(
    model: nn.Module, config: ConfigLike, adapter: str = "default", strict: bool = False
) -> nn.Module:
    """Adapt `model` in place and return it; all or nothing.

    Args:
        model: any module; layers keep their places, names and ``isinstance``.
        config: a `LoRAConfig`, a dict, or a path to JSON.
        adapter: the name of this set of updates.
        strict: an entry that matches nothing is an error instead of a warning.

    Raises:
        ConfigError: the configuration is wrong.
        TargetError: the configuration does not fit the model.
        AdapterError: `adapter` is attached already.

    Example:
        >>> model = attach(nn.Sequential(nn.Linear(4, 3)), {"0": {"r": 2}})
        >>> assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (4 + 3)
    """
    parsed = as_config(config)
    _check_new(model, adapter)
    chosen = targets(model, parsed, strict)
    return attach_targets(model, chosen, adapter, parsed.trainable_model)


def attach_targets(
    model: nn.Module, chosen: list[Target], adapter: str, trainable_model: bool = False
) -> nn.Module:
    """Adapt the chosen tensors in place; all or nothing.

    Raises:
        AdapterError: `adapter` is attached already, or another one has a tensor to itself.
    """
    _check_new(model, adapter)
    for target in chosen:
        _check_alone(model, target)
    fresh = _fresh(model, chosen, adapter)
    frozen = not trainable_model and not adapter_names(model)
    with _all_or_nothing(model, [model.get_submodule(target.module) for target in chosen]):
        if frozen:
            model.requires_grad_(False)
        for target, lowrank in fresh:
            module = model.get_submodule(target.module)
            if isinstance(lowrank, Branch):
                add_branch(module, lowrank)
            else:
                _register(module, target.tensor, lowrank)
    if checkpoints_reentrantly(model):
        enable_input_grads(model)
    return model


def detach(model: nn.Module, adapters: "str | list[str] | None" = None) -> nn.Module:
    """Take updates off without merging; the base comes back bit for bit."""
    chosen = check_adapters(model, adapters)
    for module in list(model.modules()):
        for name, plist in updates_of(module):
            kept = [p for p in plist if not (isinstance(p, Switched) and p.adapter in chosen)]
            replace(module, name, plist, kept)
    tidy(model)
    return model


def tidy(model: nn.Module) -> None:
    """After the last adapter nothing of ours stays on the model."""
    if not adapter_names(model):
        disable_input_grads(model)


def set_adapters(model: nn.Module, strengths: Mapping[str, float]) -> None:
    """Which adapters act, and how strongly; those not named are switched off.

    Raises:
        AdapterError: a name that is not attached.
    """
    check_adapters(model, list(strengths))
    for _, _, update in updates(model):
        update.strength = float(strengths.get(update.adapter, 0.0))


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block the model is the base, exactly."""
    before = [(update, update.strength) for _, _, update in updates(model)]
    try:
        for update, _ in before:
            update.strength = 0.0
        yield model
    finally:
        for update, strength in before:
            update.strength = strength


def adapter_names(model: nn.Module) -> list[str]:
    """The attached adapters, in the order of attaching."""
    return list(dict.fromkeys(update.adapter for _, _, update in updates(model)))


def lowranks(model: nn.Module) -> Iterator[tuple[str, nn.Module, LowRank]]:
    """(path of the tensor in files, owner, update) of every low-rank update, each once."""
    for stem, module, update in updates(model):
        if isinstance(update, LowRank):
            yield stem, module, update


def updates(model: nn.Module) -> Iterator[tuple[str, nn.Module, Switched]]:
    """As `lowranks`, with the tensors that are trained whole."""
    seen: set[int] = set()
    for path, module, update in placed(model):
        if id(update) not in seen:
            seen.add(id(update))
            yield path, module, update


def placed(model: nn.Module) -> Iterator[tuple[str, nn.Module, Switched]]:
    """As `updates`, with an update that tied tensors share once for each holder."""
    for path, module in model.named_modules():
        for name, plist in updates_of(module):
            stem = ".".join(part for part in (path, "" if name == "weight" else name) if part)
            yield from ((stem, module, p) for p in plist if isinstance(p, Switched))


def updates_of(module: nn.Module) -> list[tuple[str, Any]]:
    """(tensor name, torch's list of parametrizations or our list of soft branches)."""
    found = list(parametrized(module).items()) if parametrize.is_parametrized(module) else []
    branches = module._modules.get(BRANCHES)
    return found + ([("weight", branches)] if branches is not None else [])


def _check_new(model: nn.Module, adapter: str) -> None:
    if adapter in adapter_names(model):
        raise AdapterError(f'adapter "{adapter}" is attached already. Detach it, or rename this.')


def check_adapters(model: nn.Module, adapters: "str | list[str] | None") -> list[str]:
    """The named adapters (all when None), or an AdapterError that lists what is there."""
    there = adapter_names(model)
    names = there if adapters is None else [adapters] if isinstance(adapters, str) else adapters
    for name in names:
        if name not in there:
            raise AdapterError(
                f'no adapter "{name}" is attached. Attached: {", ".join(there) or "none"}.'
            )
    return list(names)


def _fresh(model: nn.Module, chosen: list[Target], adapter: str) -> list[tuple[Target, Switched]]:
    """The new updates; one for all holders of a tied tensor that one entry adapts everywhere."""
    claims: dict[int, list[Target]] = {}
    for target in chosen:
        claims.setdefault(id(base_of(model, target)), []).append(target)
    count = holders(model)
    out = []
    for key, group in claims.items():
        whole = len(group) == count[key] and len({t.entry for t in group}) == 1
        if count[key] > 1 and not whole:
            _warn_tied(model, key, group)
        shared_by_all = whole and group[0].entry.hard
        first = _new(model, group[0], adapter)
        for target in group:
            same = target is group[0] or shared_by_all
            out.append((target, first if same else _new(model, target, adapter)))
    return out


def _new(model: nn.Module, target: Target, adapter: str) -> Switched:
    module, entry = model.get_submodule(target.module), target.entry
    base = base_of(model, target)
    update: Switched
    if entry.whole:
        update = Whole(_value(module, target), adapter)
    else:
        fits = tuple(base.shape) == target.shape
        update = _low_rank(target, module, base if fits else base.new_empty(target.shape), adapter)
        if entry.init != "default":
            initialise(update, _value(module, target), entry.init)
        update.dropout = entry.dropout
    if entry.adapter_dtype is not None:
        update.to(getattr(torch, entry.adapter_dtype))
    update.entry = entry
    update.written_by_reader = getattr(module, "max_norm", None) is not None
    return update


def _low_rank(target: Target, module: nn.Module, weight: Tensor, adapter: str) -> LowRank:
    entry = target.entry
    options = (entry.r, entry.scale, target.layout, entry.trainable_scale, adapter)
    if entry.hard:
        return LowRank(weight.detach(), *options)
    return Branch(weight.detach(), *options, kernel=kernel_of(module, entry.up_kernel))


def _value(module: nn.Module, target: Target) -> Tensor:
    """What the tensor shows before this update."""
    known = module._parameters.get(target.tensor)
    return shown(module, target.tensor).detach() if known is None else known.detach()


def _check_alone(model: nn.Module, target: Target) -> None:
    module = model.get_submodule(target.module)
    there = [p for name, held in updates_of(module) if name == target.tensor for p in held]
    for update in there:
        if isinstance(update, Whole) or (target.entry.whole and isinstance(update, LowRank)):
            raise AdapterError(
                f'"{target.entry.name}" matches {target.path or "weight"}, which adapter '
                f'"{update.adapter}" adapts already: a tensor trained whole has no other update. '
                "Detach or merge that adapter first."
            )


def holders(model: nn.Module) -> "Counter[int]":
    """How many layers hold each parameter, by ``id``; a shared layer counts once."""
    return Counter(id(p) for module in model.modules() for p in module._parameters.values())


def base_of(model: nn.Module, target: Target) -> Tensor:
    """The first stored tensor behind a target: the parameter, or torch's original of it."""
    module = model.get_submodule(target.module)
    if target.tensor in module._parameters:
        return module._parameters[target.tensor]  # type: ignore[return-value]
    plist = parametrized(module)[target.tensor]
    return plist.original if plist.is_tensor else plist.original0  # type: ignore[no-any-return]


def _warn_tied(model: nn.Module, key: int, group: list[Target]) -> None:
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if id(p) == key]
    adapted = ", ".join(target.path or "weight" for target in group)
    warnings.warn(
        f"{adapted}: one tensor is held as {', '.join(names)}, and one update does not serve "
        "all of them. Merging will untie the adapted one; name every holder in one entry "
        "(re:...) to keep them tied.",
        ParamloraWarning,
        stacklevel=5,
    )


@contextmanager
def _all_or_nothing(model: nn.Module, modules: list[nn.Module]) -> Iterator[None]:
    """Put the modules back as they were when anything stops the block, Ctrl-C included."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    inside = [m for module in modules for m in (module, *_own(module))]
    saved = [(m, type(m), m.__dict__.copy(), _containers(m)) for m in inside]
    try:
        yield
    except BaseException:
        for module, cls, state, containers in saved:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(state)
            for held, content in containers:
                held.clear()
                held.extend(content) if isinstance(held, list) else held.update(content)
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
        raise


def _own(module: nn.Module) -> list[nn.Module]:
    """The modules inside a layer that hold its updates."""
    lists = [module._modules.get(BRANCHES), module._modules.get("parametrizations")]
    return [m for held in lists if held is not None for m in held.modules()]


def _containers(module: nn.Module) -> list[tuple[Any, Any]]:
    held = [v for v in module.__dict__.values() if isinstance(v, (dict, list))]
    return [(v, v.copy()) for v in held]


def _register(module: nn.Module, name: str, lowrank: Switched) -> None:
    ours = not parametrize.is_parametrized(module) or isinstance(type(module), Shared)
    lowrank.order = _order(module)
    if isinstance(type(module), Shared):
        # else torch would put a property of this one layer on the class that many share
        names = frozenset(parametrized(module)) | {name}
        module.__class__ = shared(type(module).__bases__[0], names)
    parametrize.register_parametrization(module, name, lowrank, unsafe=True)
    if ours:
        base = type(module).__bases__[0]
        base = base.__bases__[0] if isinstance(base, Shared) else base
        module.__class__ = shared(base, frozenset(parametrized(module)))


def _order(module: nn.Module) -> tuple[str, ...]:
    """The order of the parameters before the first registration, which a state dict shows."""
    for plist in parametrized(module).values():
        for lowrank in plist:
            if isinstance(lowrank, Switched):
                return lowrank.order
    return tuple(module._parameters)


def replace(module: nn.Module, name: str, plist: Any, kept: list[nn.Module]) -> None:
    """Keep only `kept` of the updates in one list; the base tensor is untouched."""
    if len(kept) == len(plist):
        return
    soft = plist is module._modules.get(BRANCHES)
    if not kept and soft:
        remove_branches(module)
    elif not kept:
        order = _order(module)
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        for key in order:
            if key in module._parameters:
                module._parameters[key] = module._parameters.pop(key)
        refresh(module)
    else:
        for index in reversed(range(len(plist))):
            if not any(plist[index] is k for k in kept):
                del plist[index]
