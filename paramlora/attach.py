"""Attaching, detaching and switching adapters: the one place that registers and freezes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from typing import Any, Optional

from torch import Tensor, nn
from torch.nn.utils import parametrize

from paramlora.config import ConfigLike, as_config
from paramlora.errors import AdapterError, TargetError
from paramlora.lowrank import LowRank
from paramlora.targets import Target, targets


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
    if adapter in adapter_names(model):
        raise AdapterError(f'adapter "{adapter}" is attached already. Detach it, or rename this.')
    chosen = targets(model, parsed, strict)
    for target in chosen:
        if not target.entry.hard:
            raise TargetError(f'"{target.entry.name}": soft ("hard": 0) is not built yet.')
    fresh = [(target, _fresh(model, target, adapter)) for target in chosen]
    if not parsed.trainable_model and not adapter_names(model):
        model.requires_grad_(False)
    for target, lowrank in fresh:
        _register(model.get_submodule(target.module), target.tensor, lowrank)
    return model


def detach(model: nn.Module, adapters: "str | list[str] | None" = None) -> nn.Module:
    """Take updates off without merging; the base comes back bit for bit."""
    chosen = check_adapters(model, adapters)
    for module, name, plist in _lists(model):
        kept = [p for p in plist if not (isinstance(p, LowRank) and p.adapter in chosen)]
        replace(module, name, kept)
    return model


def set_adapters(model: nn.Module, strengths: Mapping[str, float]) -> None:
    """Which adapters act, and how strongly; those not named are switched off.

    Raises:
        AdapterError: a name that is not attached.
    """
    check_adapters(model, list(strengths))
    for _, _, lowrank in lowranks(model):
        lowrank.strength = float(strengths.get(lowrank.adapter, 0.0))


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block the model is the base, exactly."""
    before = [(lowrank, lowrank.strength) for _, _, lowrank in lowranks(model)]
    try:
        for lowrank, _ in before:
            lowrank.strength = 0.0
        yield model
    finally:
        for lowrank, strength in before:
            lowrank.strength = strength


def adapter_names(model: nn.Module) -> list[str]:
    """The attached adapters, in the order of attaching."""
    return list(dict.fromkeys(lowrank.adapter for _, _, lowrank in lowranks(model)))


def lowranks(model: nn.Module) -> Iterator[tuple[str, nn.Module, LowRank]]:
    """(path of the tensor in files, owner, update) of every attached update."""
    for path, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for name, plist in _parametrized(module).items():
            stem = ".".join(part for part in (path, "" if name == "weight" else name) if part)
            for lowrank in plist:
                if isinstance(lowrank, LowRank):
                    yield stem, module, lowrank


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


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient, each once, for the optimizer."""
    return [p for p in model.parameters() if p.requires_grad]


def _fresh(model: nn.Module, target: Target, adapter: str) -> LowRank:
    weight: Tensor = getattr(model.get_submodule(target.module), target.tensor)
    entry = target.entry
    return LowRank(weight, entry.r, entry.scale, target.layout, entry.trainable_scale, adapter)


def _register(module: nn.Module, name: str, lowrank: LowRank) -> None:
    ours = not parametrize.is_parametrized(module) or isinstance(type(module), _Shared)
    lowrank.order = _order(module)
    parametrize.register_parametrization(module, name, lowrank, unsafe=True)
    if ours:
        base = type(module).__bases__[0]
        base = base.__bases__[0] if isinstance(base, _Shared) else base
        module.__class__ = _shared(base, frozenset(_parametrized(module)))


def _order(module: nn.Module) -> tuple[str, ...]:
    """The order of the parameters before the first registration, which a state dict shows."""
    for plist in _parametrized(module).values():
        for lowrank in plist:
            if isinstance(lowrank, LowRank):
                return lowrank.order
    return tuple(module._parameters)


def replace(module: nn.Module, name: str, kept: list[nn.Module]) -> None:
    """Keep only `kept` of the parametrizations of one tensor; the base tensor is untouched."""
    plist = _parametrized(module)[name]
    if len(kept) == len(plist):
        return
    if not kept:
        order = _order(module)
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        for key in order:
            if key in module._parameters:
                module._parameters[key] = module._parameters.pop(key)
        _refresh(module)
        return
    for index in reversed(range(len(plist))):
        if not any(plist[index] is k for k in kept):
            del plist[index]


def _lists(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Every parametrized tensor, listed first because removal changes the model."""
    return [
        (module, name, plist)
        for module in model.modules()
        if parametrize.is_parametrized(module)
        for name, plist in _parametrized(module).items()
    ]


def _parametrized(module: nn.Module) -> Any:
    """Torch's lists of parametrizations by tensor name, empty when there are none."""
    return getattr(module, "parametrizations", {})


class _Shared(type):
    """Lets one class serve many layers: torch deletes the property of the layer that it
    removes, from the class, where the other layers still need it."""

    def __delattr__(cls, name: str) -> None:
        return None


@cache
def _shared(base: type, names: frozenset[str]) -> type:
    """One class for all adapted layers of a base type, so that compilation sees one type."""
    body: dict[str, Any] = {name: _tensor_property(name) for name in names}
    body.update(
        __deepcopy__=_deepcopy, __getstate__=_refuse_pickling, _load_from_state_dict=_load(base)
    )
    return _Shared(f"Parametrized{base.__name__}", (base,), body)


def _tensor_property(name: str) -> property:
    def get(self: nn.Module) -> Optional[Tensor]:
        lists = self.__dict__["_modules"].get("parametrizations")
        if lists is not None and name in lists:
            return lists[name]()  # type: ignore[no-any-return]
        if name in self._parameters:
            return self._parameters[name]
        raise AttributeError(f"{type(self).__name__} has no {name}")

    def put(self: nn.Module, value: Tensor) -> None:
        _parametrized(self)[name].right_inverse(value)

    return property(get, put)


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    copy = type(self).__new__(type(self))
    memo[id(self)] = copy
    # an RNN also holds its weights in a list, where the adapted ones are no leaves
    state = {k: v for k, v in self.__dict__.items() if not k.startswith("_flat_weight_refs")}
    flat = state.pop("_flat_weights", None)
    copy.__dict__.update(deepcopy(state, memo))
    if flat is not None:
        _refresh(copy)
    return copy


def _refresh(module: nn.Module) -> None:
    """Have an RNN read its weights again; other layers hold no second reference."""
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def _refuse_pickling(self: nn.Module) -> None:
    raise AdapterError(
        f"an attached {type(self).__bases__[0].__name__} cannot be pickled. Save the adapter with "
        "state_dict(), or merge(model) first and then torch.save(model)."
    )


def _load(base: type) -> Any:
    """Accept a base checkpoint under its original names; the updates then keep their values."""

    def load(self: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, plist in _parametrized(self).items():
            if prefix + name in state:
                stem = f"{prefix}parametrizations.{name}."
                state[stem + "original"] = state.pop(prefix + name)
                for key, value in plist.state_dict().items():
                    state.setdefault(stem + key, value)
        base._load_from_state_dict(self, state, prefix, *args)  # type: ignore[attr-defined]

    return load
