"""An adapter at other ranks."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Optional, Union

from paramlora.arithmetic.products import (
    Approximation,
    check_all_add,
    check_choice,
    decomposed,
    with_factors,
)
from paramlora.errors import AdapterError, closest, counted, listed, spelled, warn
from paramlora.model.match import Names
from paramlora.model.targets import as_pattern, specificity
from paramlora.update.contexts import own_context
from paramlora.update.value import Adapter, Update

Ranks = Union[int, Mapping[str, int]]


@own_context()
def resize(
    adapter: Adapter, rank: Optional[Ranks] = None, *, energy: Optional[float] = None
) -> Approximation:
    """The nearest adapter of lower ranks, by the singular values of each ``B·A``.

    The dense matrix is never formed (see `decomposed`). A layer that has no more than the rank
    asked for stays as it is. Whole tensors stay, and so do whole differences, with a warning.

    Args:
        adapter: the value.
        rank: of each layer; or ``{name: rank}`` of some, by names as a configuration has them.
        energy: instead, the share of ``‖scale·B·A‖²`` that each layer keeps at least.

    Returns:
        The adapter, and the relative error of each layer.

    Raises:
        AdapterError: a rank above what there is, a name of no layer, or an update that is no
            product of two matrices or not finite.

    Example:
        >>> import torch
        >>> update = Update(torch.eye(4), torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0])))
        >>> cut = resize(Adapter({"q": update}), energy=0.9)
        >>> cut.adapter.updates["q"].r, round(cut.errors["q"] ** 2 * 14, 9)
        (2, 1.0)
    """
    # the ranks of names are checked one by one, in `_ranks`
    check_choice(None if rank is None else 1 if isinstance(rank, Mapping) else rank, energy)
    check_all_add(adapter, adapter.name)
    if adapter.others:
        warn(
            f"{counted(len(adapter.others), 'whole difference')} without a rank, kept as before: "
            f"{listed(adapter.others)}."
        )
    ranks = _ranks(adapter, rank)
    made: dict[tuple[int, Optional[int]], tuple[Update, float]] = {}  # tied tensors share one
    updates, errors = dict(adapter.updates), {}
    for path, update in adapter.updates.items():
        if rank is not None and path not in ranks:
            continue
        key = (id(update), ranks.get(path))
        if key not in made:
            made[key] = _resized(update, ranks.get(path), energy)
        updates[path], errors[path] = made[key]
    return Approximation(_with(adapter, updates), errors)


def _with(adapter: Adapter, updates: dict[str, Update]) -> Adapter:
    return replace(adapter, updates=updates)


def _resized(update: Update, rank: Optional[int], energy: Optional[float]) -> tuple[Update, float]:
    if rank is not None and rank >= update.r:
        return update, 0.0
    found = decomposed(update.lora_A.double(), update.lora_B.double())
    if rank is None:
        assert energy is not None
        rank = found.rank_of(energy)
    # as it is: a decomposition of the same rank would only round
    if rank >= update.r:
        return update, 0.0
    a, b = found.factors(rank)
    error = found.error(rank) if update.scale else 0.0  # nothing of nothing is lost
    return with_factors(update, a, b, update.scale, update.lora_A.dtype), error


def _ranks(adapter: Adapter, rank: Optional[Ranks]) -> dict[str, int]:
    if rank is None:
        return {}
    own = {path: update.r for path, update in adapter.updates.items()}
    if isinstance(rank, int):
        if own and rank > max(own.values()):
            path = max(own, key=lambda path: own[path])
            raise AdapterError(
                f"rank (--rank) {rank} is above what there is: the highest is {own[path]}, of "
                f'"{path or "weight"}". Cutting adds no rank; give at most that.'
            )
        return dict.fromkeys(own, rank)
    ranks: dict[str, int] = {}
    for name, paths in named(own, rank).items():
        check_choice(rank[name], None)
        for path in sorted(paths):
            if rank[name] > own[path]:
                raise AdapterError(
                    f'"{name}": rank (--rank) {rank[name]} is above what there is: {path} has '
                    f"{own[path]}. Give at most that."
                )
            ranks[path] = rank[name]
    # what one holder of a tied tensor gets, all get that are not named themselves
    shared = {id(adapter.updates[path]): count for path, count in ranks.items()}
    tied = {path: shared[id(u)] for path, u in adapter.updates.items() if id(u) in shared}
    return {**tied, **ranks}


def named(paths: Iterable[str], names: Iterable[str]) -> dict[str, set[str]]:
    """The paths that each name means, as in a configuration: the more specific name wins.

    Raises:
        AdapterError: a name of nothing.
    """
    names = list(names)
    wrong = next((name for name in names if not isinstance(name, str)), "")
    if wrong != "":
        raise AdapterError(f"expected the name of a layer, got {spelled(wrong)}. Give a string.")
    known = Names(paths)
    found: dict[str, set[str]] = {}
    for name in sorted(names, key=specificity):  # the later ones win
        try:
            mine = known.matching(as_pattern(name))
        except ValueError as error:
            raise AdapterError(f'"{name}": {error}. Give a plain name.') from error
        if not mine:
            near = closest(name, paths)
            hint = f'Closest: "{near[0]}"' if near else f"There are: {listed(paths, 4) or 'none'}"
            raise AdapterError(f'"{name}" names no layer. {hint}. Give one of those.')
        for other in found.values():
            other -= mine
        found[name] = mine
    return found
