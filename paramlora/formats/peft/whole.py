"""What PEFT trains whole: its ``modules_to_save``, and biases; written."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Optional

from torch import Tensor

from paramlora.errors import FileError
from paramlora.formats.base import Base, vectors_of
from paramlora.update.value import Adapter

# of a module with buffers: what BatchNorm has beside its weight and bias
_BESIDE = ("bias", "running_mean", "running_var", "num_batches_tracked")


def saved_whole(
    adapter: Adapter, base: Optional[Base], stem: Callable[[str], str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and what the configuration says of them.

    Args:
        adapter: whose `whole` is meant.
        base: tells what else is in a module, of which peft wants all.
        stem: where peft has the layer of a bias, by its path.

    Raises:
        FileError: a tensor that is neither a bias nor of a module that is saved whole.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for path, tensor in adapter.whole.items():
        module, name = _parted(path)
        modules.setdefault(module, {})[name] = tensor
    state: dict[str, Tensor] = {}
    # a bias alone goes by the switch `bias`; a whole module by its name in modules_to_save
    saved, biased = [], []
    for module, held in modules.items():
        if held.keys() == {"bias"}:
            biased.append(module)
            state[f"{stem(module)}.bias"] = held["bias"]
        else:
            _check_saved(module, held, adapter, base)
            saved.append(module)
            state |= {f"{module}.{name}": tensor for name, tensor in held.items()}
    adapted = adapter.updates.keys() | adapter.others.keys()
    config: dict[str, Any] = {}
    if saved:
        _check_alone(saved, base)
        config["modules_to_save"] = saved
    if biased:
        # lora_only is peft's word for biases of adapted layers alone
        config["bias"] = "lora_only" if adapted.issuperset(biased) else "all"
    return state, config


def _parted(path: str) -> tuple[str, str]:
    """(module, name of the tensor in it) of a path, as `Target.path` spells it."""
    module, _, name = path.rpartition(".")
    return (module, name) if name in _BESIDE else (path, "weight")


def _check_saved(
    module: str, held: Mapping[str, Tensor], adapter: Adapter, base: Optional[Base]
) -> None:
    """Refuse what is no whole module: peft would find none of it, or ask for the rest."""
    vectors = vectors_of(base)
    slot = {**(base or {}), **vectors}.get(module)
    parameter = slot is not None and slot.kind == "parameter"
    if not module or parameter or (base is not None and slot is None and "weight" in held):
        raise FileError(
            f"{module or 'weight'}: a parameter that is trained whole, and PEFT keeps biases and "
            "whole modules only. Keep the native format, or leave it out."
        )
    lacking = [n for n in ("weight", "bias") if n not in held and _has(module, n, base, vectors)]
    if lacking:
        raise FileError(
            f"{module}: PEFT saves whole modules, and its {lacking[0]} is not trained whole. Train "
            f'all of it ("{module}": {{"whole": true}}), or keep the native format.'
        )
    if module in adapter.updates or module in adapter.others:
        raise FileError(
            f"{module}: trained whole in part, and adapted, which PEFT does not have. Keep the "
            "native format."
        )


def _has(module: str, name: str, base: Optional[Base], vectors: Base) -> bool:
    """Whether the model's layer has such a tensor, as far as is known."""
    path = module if name == "weight" else f"{module}.{name}"
    return base is not None and (path in base or path in vectors)


def _check_alone(saved: Collection[str], base: Optional[Base]) -> None:
    """Refuse names that end another module's, which peft would then save too: it compares the ends
    of names letter by letter (utils/other.py's ``_set_trainable``)."""
    layers = {_parted(path)[0] for path in (*(base or ()), *vectors_of(base))}
    known = {".".join(one.split(".")[:n]) for one in layers for n in range(1, one.count(".") + 2)}
    rest = sorted(known.difference(saved))
    for module in saved:
        other = next((one for one in rest if one.endswith(module)), None)
        if other is not None:
            raise FileError(
                f"{module}: trained whole, and its name ends that of {other}, which PEFT would "
                "take for it too. Keep the native format."
            )
