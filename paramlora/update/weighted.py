"""Adapters with their weights, as what adds or merges several of them is given those."""

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from os import PathLike
from typing import Any

from torch import Tensor, nn

from paramlora.errors import AdapterError, counted, spelled
from paramlora.update.value import Adapter


def pairs_of(adapters: Any, files: bool = False) -> list[tuple[Any, float]]:
    """Each adapter, or what stands for one, with its weight, 1 where it has none.

    Args:
        adapters: a list of adapters, and of pairs of one and its weight.
        files: whether a path may stand for an adapter.

    Raises:
        AdapterError: it is no list, something in it is no adapter, or a weight no finite number.
    """
    if isinstance(adapters, (str, PathLike, Adapter)):
        raise AdapterError(
            "expected a list of adapters, got one alone. Give [(adapter, weight), ...]."
        )
    # the keys of a mapping would be taken in full, whatever weights it gives them
    no_list = isinstance(adapters, (Mapping, nn.Module, Tensor))
    if no_list or not isinstance(adapters, Iterable):
        raise AdapterError(
            f"expected a list of adapters, got {spelled(adapters)}. Give [(adapter, weight), ...]."
        )
    pairs = [one if isinstance(one, (tuple, list)) else (one, 1.0) for one in adapters]
    for one in pairs:
        if len(one) != 2:
            raise AdapterError(
                f"expected an adapter and its weight, got {counted(len(one), 'value')}. Give "
                "(adapter, weight)."
            )
        check_adapter(one[0], files)
    return [(one, _number(one, weight)) for one, weight in pairs]


def check_adapter(one: object, files: bool = False) -> None:
    """Refuse what is neither an adapter nor, where that may stand for one, a path.

    Raises:
        AdapterError: says what it is.
    """
    if isinstance(one, Adapter) or (files and isinstance(one, (str, PathLike))):
        return
    what = "an adapter or its file" if files else "an adapter"
    raise AdapterError(
        f"expected {what}, got {spelled(one)}. Give (adapter, weight), or the adapter alone; that "
        "of a model is adapter_of(model)."
    )


def _number(one: Any, weight: object) -> float:
    try:
        number = float(weight) if isinstance(weight, Real) else math.nan
    except OverflowError:  # of a whole number that no float holds
        number = math.inf
    if not math.isfinite(number):
        name = one.name if isinstance(one, Adapter) else one
        raise AdapterError(
            f'adapter "{name}": its weight {spelled(weight)} is no finite number. Give one, such '
            "as 0.7."
        )
    return number
