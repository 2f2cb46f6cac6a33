"""Folding the updates into the base weights: the one writer of base weights."""

import copy
import math
from collections.abc import Callable
from typing import Any, Literal, Optional, Union, overload

import torch
from torch import Tensor, nn

from paramlora.cuda.operators import summed
from paramlora.errors import AdapterError, warn
from paramlora.model.attach import (
    adapted_modules,
    check_adapters,
    replace,
    stored,
    tidy,
    uncollected,
    updates,
    updates_of,
    with_lists,
)
from paramlora.model.classes import Model
from paramlora.model.forwards import adds_what_its_weight_gains, own_class
from paramlora.model.layer_class import parametrized
from paramlora.model.quantised import is_quantised, make_dense, tell_transformers
from paramlora.model.targets import stem
from paramlora.model.ties import holders, overlapping
from paramlora.model.undo import to_the_end, unchanged_on_error
from paramlora.update.attached import AttachedUpdate, adds, answer, applied, most
from paramlora.update.casts import is_storage
from paramlora.update.contexts import as_made, own_context
from paramlora.update.memory import largest
from paramlora.update.rounding import KeptReport, Rounding
from paramlora.update.sharded import (
    check_not_flat,
    distributed,
    gathered,
    is_sharded,
    reshard,
    under_fully_shard,
)
from paramlora.update.sum import Fold, bound_of, folded, near_overflow, overflows, waited_for

_Job = tuple[nn.Module, str, list[AttachedUpdate]]
_Values = list[tuple[Tensor, Tensor]]  # (stored tensor, new value)
_Group = list[tuple[_Job, _Values]]  # the holders of one tensor with the same updates
_Step = Callable[[], None]
_Round = Callable[[], Optional[Rounding]]


@overload
def merge(
    model: Model,
    adapters: "str | list[str] | None" = None,
    dequantize: bool = False,
    report: Literal[False] = False,
    seed: Optional[int] = None,
) -> Model: ...
@overload
def merge(
    model: Model,
    adapters: "str | list[str] | None" = None,
    dequantize: bool = False,
    *,
    report: Literal[True],
    seed: Optional[int] = None,
) -> KeptReport: ...
# one context for both: a merge gives the same bits wherever it is called
@own_context()
# a weight that is made under inference mode could never train again
@torch.inference_mode(False)
@torch.no_grad()
def merge(
    model: Model,
    adapters: "str | list[str] | None" = None,
    dequantize: bool = False,
    report: bool = False,
    seed: Optional[int] = None,
) -> Union[Model, KeptReport]:
    """Fold the updates into the base weights and erase them; returns the same model.

    The sum is computed in float32 (float64 for a float64 base), outside of any autocast, and
    rounded once to the weight's own type. Everything is checked before the first weight is written.
    What stops a merge, Ctrl-C included, before that leaves the model as it was; what stops it
    later is raised when the merge has ended. What `attach` froze stays frozen, as
    ``model.requires_grad_(True)`` undoes.

    Args:
        model: with adapters attached, or none: then nothing happens.
        adapters: a name or several; all when None. Those that `set_adapters` weakened are
            folded in as strongly as they act.
        dequantize: make a quantised weight that is adapted a dense one, which takes several
            times its memory; otherwise such a merge is refused.
        report: return a `KeptReport` instead: for each tensor and of all the share of the update
            that the base's type keeps. Weights that are sharded, or whose sum goes back through
            another parametrization, are not in it.
        seed: round sums up or down at random instead of to the nearest number of a type of 8 or 16
            bits, so that of a small update its mean is kept. One seed gives one result.

    Raises:
        AdapterError: an adapter that is not attached, one that is not finite or whose sum is
            beyond the weight's type, one that acts on the result of another that stays where the
            two do not add up (a DoRA over a plain update), a soft one with
            ``"up_kernel": "same"``, one over a parametrization that cannot hold the sum, one of a
            quantised weight without `dequantize`, or a model under FSDP1.

    Example:
        >>> import paramlora
        >>> layer = paramlora.attach(nn.Linear(4, 3), {"weight": {"r": 2}})
        >>> x, y = torch.ones(1, 4), layer(torch.ones(1, 4))
        >>> assert type(merge(layer)) is nn.Linear and torch.equal(layer(x), y)
    """
    # a step for each tensor makes thousands of short-lived containers
    with uncollected():
        return _merged(model, adapters, dequantize, report, seed)


def _merged(
    model: Model,
    adapters: "str | list[str] | None",
    dequantize: bool,
    report: bool,
    seed: Optional[int],
) -> Union[Model, KeptReport]:
    chosen = check_adapters(model, adapters)
    if chosen:
        check_not_flat(model, "merge")
        # gathered tensors that a call left would take the sums, and be thrown away
        reshard(model)
    acting = [(path, one) for path, _, one in updates(model) if one.adapter in chosen]
    # one look at all numbers, which the bounds below use again
    most_of_all = _check_finite(acting)
    for path, update in acting:
        update.check_mergeable(path)
    jobs = [
        (module, name, ours)
        for _, module in adapted_modules(model)
        for name in dict.fromkeys(name for name, _ in updates_of(module))
        if (ours := _ours(module, name, chosen))
    ]
    for job in jobs:
        _check_order(model, *job)
    packed = [
        (module, name)
        for module, name, _ in jobs
        # only branches act on packed weights, whose layer holds the tensor itself
        if (held := module._parameters.get(name)) is not None and is_quantised(held)
    ]
    if packed and not dequantize:
        raise AdapterError(_quantised(model, *packed[0]))
    inverted = [_inverted(*job) for job in jobs]
    rounding = Rounding(seed, counts=report) if report or seed is not None else None
    _check_held(
        model,
        # what goes back through an inverse has been compared already; packed weights are dense in
        # no type yet
        [job for job, values in zip(jobs, inverted) if not values and job[:2] not in packed],
        rounding is not None,
        most_of_all,
    )
    steps = [*_unpacking(model, packed), *_merging(model, jobs, inverted, rounding)]
    for job in jobs:
        if job[:2] not in packed:  # which becomes torch's own layer
            _warn_of_own_forward(model, *job)
    # from here on nothing is undone, see `_take_all`
    to_the_end(lambda: _take_all(steps))
    return rounding.report() if report and rounding is not None else model


def _check_order(
    model: nn.Module, module: nn.Module, name: str, ours: list[AttachedUpdate]
) -> None:
    """Refuse to fold in what acts on the result of an update that stays, where the two do not add
    up: that one would then act on another base, and the model be another."""
    every = [
        p for tensor, held in updates_of(module) if tensor == name for p in held
        if isinstance(p, AttachedUpdate) and p.strength != 0
    ]  # fmt: skip
    for index, one in enumerate(every):
        before = every if one.alone else every[:index]
        for other in before if _among(one, ours) else ():
            if not _among(other, ours) and not (adds(one) and adds(other)):
                kinds = " and ".join(f'"{each.method}"' for each in (other, one))
                raise AdapterError(
                    f'{_full(model, module, name)}: adapter "{one.adapter}" acts on what adapter '
                    f'"{other.adapter}" makes of it, and {kinds} do not add up, so folding in the '
                    f"former alone would change the model. Nothing was merged. Merge both, or "
                    f'switch "{other.adapter}" off (set_adapters).'
                )


def _warn_of_own_forward(
    model: nn.Module, module: nn.Module, name: str, ours: list[AttachedUpdate]
) -> None:
    """Say so where what acted behind a layer's forward will act inside of one that nobody knows."""
    kind = own_class(module)
    if any(one.beside for one in ours) and not adds_what_its_weight_gains(kind):
        warn(
            f"{_full(model, module, name)}: a soft update acts behind the forward of "
            f"{kind.__name__}, which is one of its own, and merged it acts inside, so outputs "
            "differ if that does more than multiply by the weight. Compare them, or attach the "
            'update with "hard": 1.'
        )


def _take_all(steps: list[_Step]) -> None:
    """A step leaves a model that is whole and, taken again, does the same, so that a merge that has
    begun can always be ended."""
    # the step is taken off the list only behind its end: a stop in it has it done again
    while steps:
        steps[0]()
        del steps[0]


def _unpacking(model: nn.Module, packed: list[tuple[nn.Module, str]]) -> list[_Step]:
    """The steps that make quantised weights dense."""
    if not packed:
        return []
    usual = _usual_type(model)

    def unpack(module: nn.Module, name: str) -> None:
        # of a step that is stopped half-way the layer is as it was, so that it can be taken again
        with unchanged_on_error([module]):
            make_dense(module, name, usual)

    # `at=at`: a closure would see the last place alone
    steps: list[_Step] = [lambda at=at: unpack(*at) for at in packed]  # type: ignore[misc]
    return [*steps, lambda: tell_transformers(model, [module for module, _ in packed])]


def _merging(
    model: nn.Module, jobs: list[_Job], inverted: list[_Values], rounding: Optional[Rounding]
) -> list[_Step]:
    """The steps that write each sum and erase its updates."""
    alike: dict[tuple[int, ...], _Group] = {}
    for job, values in zip(jobs, inverted):
        alike.setdefault(_identity(*job), []).append((job, values))
    # before the first write: both are told by identities, which a merge changes
    count, shared = holders(model), overlapping(model)
    for (base, *_), group in alike.items():
        # some holders without these updates: the sum is of the others only
        if len(group) != count[base]:
            _check_untied(model, *group[0][0][:2])
    paths = {} if rounding is None else {id(one): path for path, one in model.named_modules()}
    steps: list[_Step] = [
        _step(group, len(group) == count[base], base in shared, _named(rounding, paths, group))
        for (base, *_), group in alike.items()
    ]
    return [*steps, lambda: tidy(model)]


def _check_untied(model: nn.Module, module: nn.Module, name: str) -> None:
    """Refuse to give one holder of a tied tensor its own, where torch puts one into all of them."""
    if is_sharded(getattr(*_stored(module, name))) and under_fully_shard(model):
        raise AdapterError(
            f"{_full(model, module, name)}: another layer holds the same tensor without this "
            "update, and fully_shard keeps one for both. Nothing was merged. Merge before "
            "sharding, or in a model that is not sharded, into which the adapter is loaded."
        )


def _named(rounding: Optional[Rounding], paths: dict[int, str], group: _Group) -> _Round:
    """What gives the rounding of one tensor, under its name."""

    def named() -> Optional[Rounding]:
        if rounding is not None:
            module, name, _ = group[0][0]
            # a step that is taken again counts its tensor from the start
            rounding.start(stem(paths[id(module)], name) or name)
        return rounding

    return named


def _step(group: _Group, alone: bool, shares: bool, rounding: _Round) -> _Step:
    """The step of one tensor: form its sum, write it, erase the updates.

    Args:
        group: the holders that share the tensor with the same updates.
        alone: whether no layer else holds it.
        shares: whether another tensor lies in the same memory, which must not move.
        rounding: gives how the sum is rounded.
    """
    formed: list[Optional[Tensor]] = []  # the sum, formed once, from the base as it was

    def step() -> None:
        # kept from the first try: a step that is done again must not add to what it has written
        if not formed:
            formed.append(_total(group, rounding()))
        touched = [one for (module, _, _), _ in group for one in with_lists(module)]
        # values are written below, which doing again repeats; the structure is what is undone
        with unchanged_on_error(touched):
            _write(group, formed[0], alone, shares)
            for (module, name, ours), _ in group:
                _erase(module, name, ours)

    return step


def _ours(module: nn.Module, name: str, chosen: list[str]) -> list[AttachedUpdate]:
    lists = [held for tensor, held in updates_of(module) if tensor == name]
    return [
        p for held in lists for p in held if isinstance(p, AttachedUpdate) and p.adapter in chosen
    ]


def _usual_type(model: nn.Module) -> "torch.dtype | None":
    """The type of the first parameter that is neither packed nor an update's."""
    # packed weights are whole numbers, and an update's type is its own
    ours = {id(p) for _, _, update in updates(model) for p in update.parameters()}
    there = (p.dtype for p in model.parameters() if id(p) not in ours and p.is_floating_point())
    return next(there, None)


def _among(update: nn.Module, updates: list[AttachedUpdate]) -> bool:
    return any(update is one for one in updates)


def _write(group: _Group, total: Optional[Tensor], alone: bool, shares: bool) -> None:
    """Write a base once for the holders that share it with the same updates."""
    for _, values in group:
        for tensor, value in values:
            with as_made(tensor):  # it may have been made under inference mode
                tensor.copy_(value)
    if total is None:
        return
    plain = _plain(group)
    base: Any = getattr(*plain[0])
    if not alone:  # tied to a holder without these updates, which must not move
        # a tensor of its own, in the same layout, that trains as it did
        own = nn.Parameter(_laid_out(total, base), base.requires_grad)
        for owner, attribute in plain:
            setattr(owner, attribute, own)
    elif shares or 0 in base.stride():  # expanded: its elements share memory, the sum's cannot
        # `.data`, so that the Parameter and what an optimizer holds of it stay
        base.data = _laid_out(total, base)
    else:
        with as_made(base):
            base.copy_(total)


def _laid_out(total: Tensor, base: Tensor) -> Tensor:
    """The sum in memory of its own, with the strides of its base."""
    # `empty_like` keeps strides, but for those of 0
    return torch.empty_like(base).copy_(total)


def _plain(group: _Group) -> list[tuple[Any, str]]:
    """(owner, attribute) of the base tensor in each holder whose sum is written as it is."""
    return [_stored(module, name) for (module, name, _), values in group if not values]


def _total(group: _Group, rounding: Optional[Rounding]) -> Optional[Tensor]:
    """What is to be copied into a base; nothing where the sum goes back another way."""
    plain = _plain(group)
    return _sum(getattr(*plain[0]), group[0][0][2], rounding) if plain else None


def _erase(module: nn.Module, name: str, ours: list[AttachedUpdate]) -> None:
    for tensor, held in updates_of(module):
        if tensor == name:
            replace(module, name, held, [p for p in held if not _among(p, ours)])


def _identity(module: nn.Module, name: str, ours: list[AttachedUpdate]) -> tuple[int, ...]:
    owner, attribute = _stored(module, name)
    return (id(getattr(owner, attribute)), *map(id, ours))


def _stored(module: nn.Module, name: str) -> tuple[Any, str]:
    """The owner and the attribute of the tensor behind ``module.name``."""
    if stored(module, name) is not None:
        return module, name
    plist = parametrized(module)[name]
    return plist, "original" if plist.is_tensor else "original0"


def _sum(
    base: Tensor, updates: list[AttachedUpdate], rounding: Optional[Rounding] = None
) -> Tensor:
    """A new tensor that is the sum of a base and those of its updates that act once it is copied
    into that base."""
    # one that is off is erased with the others, and adds nothing
    acting = [update for update in updates if update.acts]
    if is_sharded(base):
        wide = base.to(torch.promote_types(base.dtype, torch.float32))
        # each process forms its own part of the sum, whose blocks the others could not follow
        if all(update.lies_along() for update in acting):
            return applied(acting, wide).to(base.dtype)
        whole = folded(gathered(wide), [answer(update, "gathered_term") for update in acting])
        return distributed(whole.to(base.dtype), base)
    terms = [answer(update, "term") for update in acting]
    total = summed(base, terms) if rounding is None else None
    if total is not None:
        return total
    return Fold(base.shape, base.dtype, terms, base.device, rounding).to_copy(base)


def _check_held(model: nn.Module, jobs: list[_Job], counted: bool, most_of_all: float) -> None:
    """Refuse a sum that the base's type does not hold, or unless it is `counted` does not keep.

    Args:
        most_of_all: what no number of the updates is above.
    """
    every: list[Tensor] = [getattr(*_stored(module, name)) for module, name, _ in jobs]
    for (module, name, _), base in zip(jobs, every):
        # a merge into 8 bits is meant where its loss is counted, or rounding is at random
        if is_storage(base.dtype) and not counted:
            raise AdapterError(
                f"{_full(model, module, name)} is stored in {base.dtype}, which would round the "
                "update away. Nothing was merged; cast the model first (model.to(torch.bfloat16)), "
                "or round at random (seed=0), or count what is lost (report=True)."
            )
    # all at once: a device would be waited for as often as there are layers
    of_half = largest(base for base in every if base.dtype == torch.float16 and not base.is_meta)
    held = math.inf if of_half is None else of_half
    # most are cleared by numbers that are known already, without a term
    jobs = [j for j, base in zip(jobs, every) if _may_overflow(j, base, most_of_all, held)]
    bases: list[Tensor] = [getattr(*_stored(module, name)) for module, name, _ in jobs]
    terms = [[answer(update, "term") for update in ours if update.acts] for _, _, ours in jobs]
    # bounds of sharded tensors would be each process's own
    unknown = [is_sharded(base) or base.is_meta for base in bases]
    added = waited_for([0.0 if skip else bound_of(of) for skip, of in zip(unknown, terms)])
    for (module, name, ours), base, of, bound in zip(jobs, bases, terms, added):
        if not is_sharded(base):
            over = overflows(base, of, bound)
        else:
            narrow = base.dtype == torch.float16
            # all processes must come to one decision, or some would merge
            over = narrow and not bool(gathered(torch.isfinite(_sum(base, ours))).all())
        if over:
            raise AdapterError(
                f"{_full(model, module, name)}: the sum is beyond "
                f"{torch.finfo(base.dtype).max:g}, the most that {base.dtype} holds. Nothing was "
                "merged; make the model wider (model.bfloat16() or model.float()) or the adapter "
                "weaker (set_adapters) first."
            )


def _may_overflow(job: _Job, base: Tensor, largest: float, held: float) -> bool:
    """Whether a sum may be too large by what its updates tell of themselves, without a term; `held`
    is the largest number of the weights in float16."""
    added = sum(most(update, largest) for update in job[-1] if update.acts)
    return not math.isfinite(added) or near_overflow(base.dtype, added, held)


def _full(model: nn.Module, module: nn.Module, name: str) -> str:
    """The name of a tensor in messages; looked for then, as it takes going through the model."""
    path = next(path for path, one in model.named_modules() if one is module)
    return f"{path}.{name}" if path else name


def _inverted(module: nn.Module, name: str, ours: list[AttachedUpdate]) -> _Values:
    """(stored tensor, new value) where another parametrization acts before an update.

    Empty where the updates come first: they then add to the stored tensor itself.
    """
    if name in module._parameters:  # a plain parameter: its updates are branches
        return []
    plist: Any = parametrized(module)[name]
    others = [i for i, p in enumerate(plist) if not isinstance(p, AttachedUpdate)]
    first = [i for i, p in enumerate(plist) if _among(p, ours)]
    soft = [p for p in ours if p.beside]
    if not others or (not soft and first[-1] < others[0]):
        return []
    names = ["original"] if plist.is_tensor else [f"original{i}" for i in range(plist.ntensors)]
    stored = [getattr(plist, n) for n in names]
    wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in stored]
    # a copy in eval mode: spectral norm steps its power iteration whenever it is read
    rules = [copy.deepcopy(plist[i]).eval() for i in others]
    # the same rules in float32 to compute with; the model's own type to compare with
    wide_rules = [copy.deepcopy(rule).to(wide[0].dtype) for rule in rules]
    chain = [
        wide_rules[others.index(i)] if i in others else p
        for i, p in enumerate(plist)
        if i in others or _among(p, ours)
    ]
    aim = _through(chain, wide)
    if soft:
        aim = folded(aim, [answer(update, "term") for update in soft])
    exact = _back(module, name, wide_rules, aim)
    new = [value.to(t.dtype) for value, t in zip(exact, stored)]
    # in float32 nearly exactly, and in the stored type to a few last places
    held = _through(wide_rules, exact), _through(rules, new)
    if not (_equals(held[0], aim, 64) and _equals(held[1], aim.to(held[1].dtype), 4)):
        raise AdapterError(_cannot_hold(module, name, rules))
    return list(zip(stored, new))


def _equals(value: Tensor, aim: Tensor, units: int) -> bool:
    """Whether a value is the one that was wanted, but for some units in the last place of each
    element: a small update of a large weight would hide behind any absolute tolerance."""
    eps = torch.finfo(aim.dtype).eps
    near = units * eps * aim.abs() + torch.finfo(aim.dtype).tiny
    return bool(((value - aim).abs() <= near).all())


def _through(chain: list[Any], stored: list[Tensor]) -> Tensor:
    value: Tensor = chain[0](*stored)
    for rule in chain[1:]:
        value = rule(value)
    return value


def _back(module: nn.Module, name: str, rules: list[Any], aim: Tensor) -> list[Tensor]:
    value: Any = aim
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
    return (
        f"{_full(model, module, name)} is quantised and cannot hold the sum. Nothing was merged; "
        "merge(model, dequantize=True) makes it dense, or keep the adapter attached."
    )


def _check_finite(acting: list[tuple[str, AttachedUpdate]]) -> float:
    """What no number of the updates is above; refuses one that is not finite, or not there yet."""
    for _, update in acting:
        update.check_started()
    # one number for all of it: a model has thousands of tensors, and a device is waited for once
    found = largest(t for _, update in acting for t in update.every_tensor() if not t.is_meta)
    if found is not None:
        return found
    named = [
        (update.adapter, f"{path}.{name}", tensor)
        for path, update in acting
        for name, tensor in update.state_dict().items()
        if not tensor.is_meta
    ]
    adapter, place = next(at for *at, tensor in named if not torch.isfinite(tensor).all())
    raise AdapterError(
        f'adapter "{adapter}", {place}: not finite. Nothing was merged; '
        "detach the adapter or load a sound one."
    )
