"""Attaching, detaching and switching adapters: the one place that registers and freezes."""

import gc
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace as dataclass_replace
from numbers import Real
from typing import Any, Optional

import torch
from torch import Tensor, nn

from paramlora.config import ConfigLike, LoRAConfig, as_config
from paramlora.errors import AdapterError, TargetError, warn
from paramlora.model.branch import add_branch, remove_branches
from paramlora.model.classes import Model
from paramlora.model.experts import drops_in_experts
from paramlora.model.forwards import below, honours_dropout, own_class
from paramlora.model.input_grads import (
    checkpoints_reentrantly,
    disable_input_grads,
    enable_input_grads,
)
from paramlora.model.layer_class import Gone, Updates, parametrized, refresh, shared
from paramlora.model.methods import add_methods, remove_methods
from paramlora.model.placement import shard_like
from paramlora.model.quantised import dense
from paramlora.model.statistics import forget, keepers, put_back, remember, warn_moving
from paramlora.model.targets import (
    Target,
    adaptable,
    check_model,
    chosen_targets,
    shown,
    stem,
    unwrapped,
)
from paramlora.model.ties import holders, overlapping
from paramlora.model.undo import surely_left, to_the_end, unchanged_on_error, undisturbed
from paramlora.update.attached import AttachedUpdate, Gains, Site, Switch, check_computed
from paramlora.update.casts import is_storage
from paramlora.update.compat import is_wrapper
from paramlora.update.contexts import own_context
from paramlora.update.geometry import PLAIN
from paramlora.update.kinds import FOREIGN, kind_of
from paramlora.update.lowrank import value_of
from paramlora.update.names import BRANCHES
from paramlora.update.sharded import (
    check_not_flat,
    check_order,
    gathered,
    is_sharded,
    reshard,
)
from paramlora.update.walk import paths_of

Fresh = list[tuple[nn.Module, Target, AttachedUpdate]]
# a gain is a tensor in float32: a larger strength would be infinite there
_MOST = torch.finfo(torch.float32).max
_LOCK = threading.RLock()


def attach(
    model: Model,
    config: ConfigLike,
    adapter: str = "default",
    strict: bool = False,
    max_rank: Optional[int] = None,
) -> Model:
    """Adapt `model` in place and return it; all or nothing.

    The configuration is ``{name: entry, ...}``. A name is a path, matched by whole dotted
    components from the right (``"to_q"``, ``"attn1.to_q"``, ``"attn.in_proj_weight"``), with ``*``
    for any one component; ``"re:..."``, a regular expression of whole paths; ``"type:Linear"``, a
    class; ``"attention"`` or ``"all-linear"``. Beside the entries, ``"exclude": [names]`` leaves
    tensors out of all of them, and ``"trainable_model": 1`` lets the backbone train. An entry (see
    `Entry` and docs/configuration.md) holds:

    - ``r``: the rank, required but for ``whole`` and ``rows``;
    - ``scale`` (1), the factor of the update, or ``alpha``: ``scale = alpha / r``, and with
      ``rslora`` ``alpha / sqrt(r)``; ``trainable_scale`` trains it too;
    - ``hard`` (1): parametrize the weight, or 0: add a parallel branch, for convolutions with
      ``up_kernel`` 1 or ``"same"``;
    - ``dropout`` (0) on the branch's input; ``init``, how the factors start; ``adapter_dtype``;
    - ``kind`` (``"lora"``, ``"dora"``, ``"loha"``, ``"lokr"``) with the keys of that kind;
    - ``whole``: train what is named itself, instead; ``rows``: some rows of it.

    Args:
        model: any module; layers keep their places, names and ``isinstance``.
        config: a `LoRAConfig`, a dict, or a path to JSON.
        adapter: the name of this set of updates.
        strict: an entry that matches nothing is an error instead of a warning.
        max_rank: fill up the factors with zeros to this rank, or to the most that a layer holds, so
            that ``load_adapter(model, path, into=adapter)`` has room for larger ones.

    Raises:
        ConfigError: the configuration is wrong.
        TargetError: the configuration does not fit the model.
        AdapterError: `adapter` is attached already.

    Example:
        >>> model = attach(nn.Sequential(nn.Linear(4, 3)), {"0": {"r": 2}})
        >>> assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (4 + 3)
    """
    parsed = as_config(config)
    check_model(model)
    check_order(model)
    inside = unwrapped(model)
    chosen = chosen_targets(inside, parsed, strict)
    _warn_frozen(inside, parsed)
    check_room(chosen, max_rank)
    attach_targets(
        inside,
        chosen,
        adapter,
        parsed.trainable_model,
        lambda fresh: make_room(fresh, max_rank),
    )
    return model


def check_room(chosen: list[Target], max_rank: Optional[int]) -> None:
    """Refuse a largest rank that is none, or less than a layer's."""
    if max_rank is None:
        return
    if isinstance(max_rank, bool) or not isinstance(max_rank, int):
        raise AdapterError(f"max_rank must be a whole number, got {max_rank!r}.")
    for target in chosen:
        if target.entry.r > max_rank:
            raise AdapterError(
                f"{target.path or 'weight'}: r = {target.entry.r} is above max_rank = {max_rank}. "
                "Give the largest rank that will ever be loaded."
            )


def make_room(fresh: Fresh, max_rank: Optional[int]) -> None:
    """Fill up new factors with zeros to a rank, or to the most that their layer holds."""
    for _, target, update in fresh:
        if max_rank is not None:
            update.make_room(max_rank, target.shape, target.layout)


@own_context()
def attach_targets(
    model: nn.Module,
    chosen: list[Target],
    adapter: str,
    trainable_model: bool = False,
    fill: "Callable[[Fresh], None]" = lambda fresh: None,
) -> None:
    """Adapt the chosen tensors in place; all or nothing.

    Args:
        model: unwrapped, and checked by `check_model` and `check_order`.
        chosen: of that model.
        adapter: the name of this set of updates.
        trainable_model: leave the backbone as it is, instead of freezing it.
        fill: gives the new updates their values, before the model is touched.

    Raises:
        AdapterError: `adapter` is attached already, or another one has a tensor to itself.
    """
    # asked before the first change: with adapters there, the model's record exists already
    there = adapter_names(model)
    _check_name(adapter, there)
    # `route` holds a choice for each update, made when its block was entered
    if any(update.switch.rows is not None for _, _, update in updates(model)):
        raise AdapterError(
            f'adapter "{adapter}" cannot be attached inside of paramlora.route, whose rows do not '
            "know it. Leave the block first."
        )
    modules = dict(model.named_modules())
    # before the checks below, which the other holders must pass too
    chosen = _with_tied(model, chosen, modules)
    owners = [modules[target.module] for target in chosen]
    for module, target in zip(owners, chosen):
        _check_alone(module, target)
        _check_dropout(module, target)
        _check_at_home(module, target)
    # all that can fail for want of memory happens before the model is touched
    with uncollected():
        # `fill` loads a file's values: a wrong file leaves no trace
        fresh = _fresh(model, chosen, owners, adapter)
        fill(fresh)
    # asked before anything is registered: a checkpointed model is told by its own attributes
    carries = checkpoints_reentrantly(model)
    # with an adapter there, what the model was is on record since its first one
    kept = [] if there else keepers(model)
    # lists too: an undo restores named modules alone
    touched = [model, *kept, *(one for owner in owners for one in with_lists(owner))]
    if carries:
        # `enable_input_grads` hooks and marks modules anywhere in the model
        touched += model.modules()
    with uncollected(), unchanged_on_error(touched, model.parameters()):
        if not there:
            remember(model, kept, froze=not trainable_model)
        _put_in_place(fresh, bool(there))
        # after the updates: only models that hold some get these methods
        add_methods(model)
        if carries:
            enable_input_grads(model)
    warn_moving(model)


def _put_in_place(fresh: Fresh, later: bool) -> None:
    """Register new updates, or hang them beside their layers; `later`: behind other adapters."""
    for module, target, update in fresh:
        # a module is made in training mode; `eval()` on the model has passed this one by
        if not module.training:
            update.eval()
        # a checkpoint that computes an earlier forward again must compute it without this update
        if later:
            update.keep(switch=update.switch.born())
        if update.beside:
            add_branch(module, update)
        else:
            _register(module, target.tensor, update)


@own_context()
def detach(model: Model, adapters: "str | list[str] | None" = None) -> Model:
    """Take updates off without merging; the base comes back bit for bit.

    With the last adapter everything that `attach` changed is as it was: what it froze trains again,
    and running statistics that moved have the values that they had. All or nothing.

    Args:
        model: with adapters attached, or none: then nothing happens.
        adapters: a name or several; all when None.

    Raises:
        AdapterError: an adapter that is not attached, or a model under FSDP1.

    Example:
        >>> layer = nn.Linear(4, 3)
        >>> before = layer.weight
        >>> assert detach(attach(layer, {"weight": {"r": 2}})).weight is before
    """
    chosen = check_adapters(model, adapters)
    if not chosen:
        return model
    check_not_flat(model, "detach")
    # `fully_shard` leaves gathered tensors in place after a call; its own are to be given back
    reshard(model)
    with unchanged_on_error(model.modules(), model.parameters()):
        for module in list(model.modules()):
            for name, plist in updates_of(module):
                kept = [
                    p for p in plist if not (isinstance(p, AttachedUpdate) and p.adapter in chosen)
                ]
                replace(module, name, plist, kept)
        # what the base was comes back with its last adapter, not before
        if not adapter_names(model):
            put_back(model)
        tidy(model)
    return model


def tidy(model: nn.Module) -> None:
    """After the last adapter nothing of ours stays on the model."""
    if not adapter_names(model):
        disable_input_grads(model)
        remove_methods(model)
        forget(model)


@own_context()
def set_adapters(model: nn.Module, strengths: Mapping[str, float]) -> None:
    """Which adapters act, and how strongly; those not named are switched off.

    Raises:
        AdapterError: a name that is not attached, or a strength that is no finite number.

    Example:
        >>> model = attach(nn.Linear(4, 3), {"weight": {"r": 1}}, adapter="style")
        >>> set_adapters(model, {"style": 0.7})
        >>> assert model.parametrizations.weight[0].strength == 0.7
    """
    if not isinstance(strengths, Mapping):
        raise AdapterError(f'expected strengths such as {{"style": 0.7}}, got {strengths!r}.')
    check_adapters(model, list(strengths))
    # all numbers are looked at before the first one counts
    checked = {name: _strength(name, value) for name, value in strengths.items()}
    # each switch is made from the one that is there: another thread must not change it in between
    with one_by_one():
        gains, found = Gains(), [update for _, _, update in updates(model)]
        put(
            [
                (u, u.switch.changed(checked.get(u.adapter, 0.0), u.switch.muted, gains))
                for u in found
            ]
        )


@contextmanager
def one_by_one() -> Iterator[None]:
    """Threads that switch do so one after the other: each reads what the others left."""
    with (
        undisturbed(),  # no signal leaves the lock held, and no handler waits for it
        # the lock is Python's: a signal between acquiring and noting it would hold it for ever
        surely_left(
            lambda kept: kept.append(_LOCK.acquire()),  # kept is not empty once it is held
            lambda kept: _LOCK.release() if kept and kept.pop() else None,
        ),
    ):
        yield


def put(switches: list[tuple[AttachedUpdate, Switch]]) -> None:
    """Put switches in their places; what stops this half-way does not leave half of them."""

    def each() -> None:
        for update, switch in switches:
            # a whole switch at a time, so that a reader in another thread sees the old or the new
            # one
            update.__dict__["switch"] = switch  # `keep` without its call: they are thousands

    to_the_end(each)


def _strength(name: str, value: Any) -> float:
    # bool is refused as in the configuration: on and off are what a mapping without a name says
    number = isinstance(value, Real) and not isinstance(value, bool)
    # written so that NaN, of which every comparison is false, is refused
    if not number or not abs(value) <= _MOST:  # nor what is no number
        raise AdapterError(
            f'adapter "{name}": its strength must be a finite number of at most {_MOST:.3g}, '
            f"got {value!r}."
        )
    return float(value)


@contextmanager
def disable_adapters(model: Model) -> Iterator[Model]:
    """Inside the block the model is the base, exactly.

    Blocks nest and may overlap: the adapters act again when the last one is left, with the
    strengths that `set_adapters` gave them last. They belong to the model: another thread that
    calls it meanwhile also sees the base. A layer that keeps statistics of what it sees, such as
    BatchNorm in training, counts a batch inside the block like any other.

    Example:
        >>> model = attach(nn.Linear(4, 3), {"weight": {"r": 2}})
        >>> with disable_adapters(model):
        ...     assert model.weight is model.parametrizations.weight.original
    """
    # found once: adapters attached inside of the block are not muted by it
    found = [update for _, _, update in updates(model)]

    def enter(kept: list[object]) -> None:
        # an object of the block's own, so that blocks nest and are left in any order
        kept.append(object())  # first: what stops the next line finds it
        _mute(found, lambda muted: muted | {*kept})

    def leave(kept: list[object]) -> None:
        if kept:
            # `leave` may be called again: `muted` without it is the same
            to_the_end(lambda: _mute(found, lambda muted: muted - {*kept}))
            kept.clear()

    with surely_left(enter, leave):
        yield model


@own_context()
def _mute(
    found: list[AttachedUpdate], to: Callable[[frozenset[object]], frozenset[object]]
) -> None:
    """Change the blocks in which updates do not act."""
    with one_by_one():
        # under the lock, or another block's token could be lost
        gains, now = Gains(), [(update, update.switch) for update in found]
        put([(u, own.changed(own.strength, to(own.muted), gains)) for u, own in now])


def rounding(model: Model, how: str) -> Model:
    """How the layers of 16 bits round from now on; returns the same model.

    Args:
        model: with adapters attached; those attached later round once.
        how: ``"once"``, as after attaching: the base's product and the update are added before
            their only rounding, which keeps small updates. ``"as served"``: the base's product is
            rounded to its type, and then the rounded update is added, as servers do that load an
            adapter beside a base (vLLM's lora_expand, SGLang's sgemm_lora_b), for training what
            will be served. Linear layers, convolutions and stacks of experts do; layers of which
            only a weight is known, embeddings and other kinds of update stay as they are.

    Raises:
        AdapterError: no adapter is attached, or another word.

    Example:
        >>> model = attach(nn.Linear(4, 3).bfloat16(), {"weight": {"r": 2}})
        >>> assert rounding(model, "as served") is model
    """
    words = ("once", "as served")
    if how not in words:
        raise AdapterError(f"rounding is {' or '.join(map(repr, words))}, got {how!r}. Give one.")
    found = [update for _, _, update in updates(model)]
    if not found:
        raise AdapterError("no adapter is attached, so there is nothing to round. Attach one.")

    def each() -> None:
        for update in found:
            update.keep(rounds_twice=how == "as served")

    to_the_end(each)
    return model


def adapter_names(model: nn.Module) -> list[str]:
    """The attached adapters, in the order of the model's modules."""
    return list(dict.fromkeys(update.adapter for _, _, update in updates(model)))


def updates(model: nn.Module) -> Iterator[tuple[str, nn.Module, AttachedUpdate]]:
    """(path of the tensor in files, owner, update) of every update, each once."""
    seen: set[int] = set()
    for path, module, update in placed(model):
        if id(update) not in seen:
            seen.add(id(update))
            yield path, module, update


def placed(model: nn.Module) -> Iterator[tuple[str, nn.Module, AttachedUpdate]]:
    """The `updates`, of which one that tied tensors share comes once for each holder."""
    for path, module in adapted_modules(model):
        for name, plist in updates_of(module):
            for update in plist:
                if isinstance(update, AttachedUpdate):
                    yield stem(path, name), module, update


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of those that hold parametrizations or branches."""
    for module, path in paths_of(unwrapped(model)).items():
        # not by `getattr`, which a wrapper answers for the layer inside of it
        if "parametrizations" in module._modules or BRANCHES in module._modules:
            yield path, module


def updates_of(module: nn.Module) -> list[tuple[str, Any]]:
    """(tensor name, torch's list of parametrizations or our list of soft branches)."""
    # a layer has soft branches under its weight's name, beside lists for any tensor
    soft = [("weight", module._modules[BRANCHES])] if BRANCHES in module._modules else []
    held = [*parametrized(module).items()]
    if len(held) > 1:
        # as the layer has them, whichever adapter came first: optimizers go by the order
        order = {name: at for at, name in enumerate((*_before(module)[0], *_before(module)[1]))}
        held.sort(key=lambda one: order.get(one[0], len(order)))
    return [*held, *soft]


def check_adapters(model: nn.Module, adapters: "str | list[str] | None") -> list[str]:
    """The named adapters (all when None), or an AdapterError that lists what is there."""
    there = adapter_names(model)
    # a single name is an iterable of characters too
    names = there if adapters is None else [adapters] if isinstance(adapters, str) else adapters
    if not isinstance(names, (list, tuple, set, frozenset)):
        raise AdapterError(f"expected the names of adapters, got {names!r}.")
    for name in names:
        if name not in there:
            raise AdapterError(
                f'no adapter "{name}" is attached. Attached: {", ".join(there) or "none"}.'
            )
    return list(names)


def _check_name(adapter: Any, there: list[str]) -> None:
    if not isinstance(adapter, str) or not adapter:
        raise AdapterError(f"an adapter's name must be a non-empty string, got {adapter!r}.")
    if adapter in there:
        raise AdapterError(f'adapter "{adapter}" is attached already. Detach it, or rename this.')


def _warn_frozen(model: nn.Module, config: LoRAConfig) -> None:
    if not config.trainable_model:
        return
    # an update's own parameters do not count: the backbone's are asked for
    ours = {id(p) for _, _, update in updates(model) for p in update.parameters()}
    if not any(p.requires_grad for p in model.parameters() if id(p) not in ours):
        warn(
            f'{config.source}: "trainable_model" is set, but no parameter of the model requires '
            "a gradient, so only updates will train. Call model.requires_grad_(True) first."
        )


@torch.inference_mode(False)  # under which nothing made here could ever be trained
def _fresh(model: nn.Module, chosen: list[Target], owners: list[nn.Module], adapter: str) -> Fresh:
    """The new updates; one for all holders of a tied tensor that one entry adapts everywhere."""
    claims: dict[int, list[tuple[nn.Module, Target]]] = {}
    # tied tensors are one object: all who hold it are adapted as one, or warned of
    for module, target in zip(owners, chosen):
        claims.setdefault(id(base_of(module, target.tensor)), []).append((module, target))
    count, gains = holders(model), Gains()
    _warn_overlapping(model, claims)
    out = []
    for key, group in claims.items():
        entries = {target.entry for _, target in group}
        every = len(group) == count[key] and len(entries) == 1
        if count[key] > 1 and not every:
            _warn_tied(model, key, [target for _, target in group])
        first = _new(*group[0], adapter, gains)
        for module, target in group:
            # a soft branch belongs to its layer's output, so holders share only a parametrization
            same = target is group[0][1] or (every and target.entry.hard)
            out.append((module, target, first if same else _new(module, target, adapter, gains)))
    return out


def _with_tied(
    model: nn.Module, chosen: list[Target], modules: Mapping[str, nn.Module]
) -> list[Target]:
    """The chosen targets, and the other layers that hold a chosen tensor whose kind moves all of
    them."""
    heads = {
        # such as `rows`, whose trained tokens are the embedding's and the head's
        id(base_of(modules[target.module], target.tensor)): target.entry
        for target in chosen
        if kind_of(target.entry).tied
    }
    if not heads:
        return chosen
    taken = {(target.module, target.tensor) for target in chosen}
    others = [
        dataclass_replace(one, entry=heads[key])
        for one in adaptable(model)
        if (key := id(base_of(modules[one.module], one.tensor))) in heads
        and (one.module, one.tensor) not in taken
    ]
    return [*chosen, *others]


def _new(module: nn.Module, target: Target, adapter: str, gains: Gains) -> AttachedUpdate:
    entry, base = target.entry, base_of(module, target.tensor)
    # 4-bit weights are packed in another shape than the one that they stand for
    weight = base if tuple(base.shape) == target.shape else _like(base, target)

    def shown_now() -> Tensor:
        return _value(module, target)

    def dense_now() -> Tensor:
        return gathered(dense(module, shown_now()))

    def read_now() -> Tensor:
        return gathered(dense(module, _read(module, target.tensor)))

    site = Site(module, target.path, weight, target.layout, shown_now, dense_now, read_now)
    update = kind_of(entry).attached_to(site, entry, adapter, gains)
    update.check_told()  # before it trains: what no file holds would be lost after that
    # ours are tested, and a dense weight for each would take as long as all the rest
    if type(update) in FOREIGN and type(base) in PLAIN and not base.is_meta:
        check_computed(update, base, target.path)
    if is_sharded(base) and not update.made_sharded:
        # before a cast: `shard_like` replaces the tensors
        shard_like(update, base, target.path or "weight")
    if entry.adapter_dtype is not None:
        update.cast(getattr(torch, entry.adapter_dtype))
    update.keep(entry=entry, stored=is_storage(base.dtype), dropout=entry.dropout)
    # an embedding that renormalises the rows that it looks up, in the weight that it is given
    if getattr(module, "max_norm", None) is not None:
        update.keep(written_by_reader=True)
    return update


def _like(base: Tensor, target: Target) -> Tensor:
    """A tensor of the target's shape for an update to be made by; its base is stored in another."""
    # packed weights are of bytes; factors want the width that they stand for
    dtype = base.dtype if base.is_floating_point() else torch.bfloat16
    memory = torch.empty(target.shape, dtype=dtype, device=base.device)
    return nn.Parameter(memory, False) if isinstance(base, nn.Parameter) else memory


def _value(module: nn.Module, target: Target) -> Tensor:
    """What the tensor shows before this update."""
    known = stored(module, target.tensor)
    # of a list of parametrizations: `shown` copies what reading would step, as spectral norm does
    return shown(module, target.tensor).detach() if known is None else known


@torch.no_grad()
def _read(module: nn.Module, name: str) -> Tensor:
    """What the tensor shows, earlier updates of it included."""
    known = stored(module, name)
    if known is not None:
        return known.detach()
    plist = parametrized(module)[name]
    ours = all(isinstance(one, AttachedUpdate) for one in plist)
    # of our updates alone the sum is read; foreign rules are not run on the model itself
    return value_of(plist) if ours else shown(module, name)


def _check_alone(module: nn.Module, target: Target) -> None:
    there = [p for name, held in updates_of(module) if name == target.tensor for p in held]
    kind = kind_of(target.entry)
    ours = [update for update in there if isinstance(update, AttachedUpdate)]
    rules = [type(rule).__name__.lstrip("_") for rule in there if rule not in ours]
    reason = (
        "a tensor trained whole has no update beside it but those of other adapters that train it "
        "whole"
    )
    if kind.alone and all(type(update) is kind for update in ours):
        # adapters that train it whole are summed, see `Whole.together`
        if not rules:
            return
        # torch's own list calls one after the other, so the last would stand alone
        reason = f"under {rules[0]} one adapter alone trains a tensor whole"
    for update in ours:
        if update.alone or kind.alone:
            raise AdapterError(
                f'"{target.entry.name}" matches {target.path or "weight"}, which adapter '
                f'"{update.adapter}" adapts already: {reason}. Detach or merge that adapter first, '
                "or leave the tensor out."
            )


def _check_dropout(module: nn.Module, target: Target) -> None:
    if target.entry.hard and not target.entry.dropout:
        return
    # masks on several processes would have to agree on what they drop
    if is_sharded(base_of(module, target.tensor)):
        raise TargetError(
            f'"{target.entry.name}": {target.path or "weight"} lies on several processes, where '
            'only "hard": 1 without "dropout" acts. Change the entry, or attach before sharding.'
        )
    if not target.entry.hard:
        return
    held = parametrized(module)[target.tensor] if target.tensor in parametrized(module) else []
    # over a foreign rule the layer's forward is not ours, and only its weight is read
    ours = all(isinstance(p, AttachedUpdate) for p in held)
    base = own_class(module)
    known = target.tensor == "weight" and honours_dropout(base)
    stack = base_of(module, target.tensor).dim() == 3
    if not ours or not (known or stack and drops_in_experts(base, target.tensor)):
        raise TargetError(
            f'"{target.entry.name}": "dropout" cannot act at {target.path or "weight"} of '
            f"{base.__name__}: only its weight is known here, and a weight has no input to drop. "
            "Remove it there."
        )


def _check_at_home(module: nn.Module, target: Target) -> None:
    # accelerate's hook on the module itself; a sequence of hooks may hold it deeper
    hook = vars(module).get("_hf_hook")
    if any(getattr(one, "offload", False) for one in (hook, *getattr(hook, "hooks", ()))):
        raise TargetError(
            f'"{target.entry.name}" matches {target.path or "weight"}, which accelerate keeps '
            "elsewhere and brings in for each call, where no update would find it. Give that layer "
            "a device in the device map, or leave it out."
        )


def stored(module: nn.Module, name: str) -> "Tensor | None":
    """A layer's own parameter or buffer of a name; None where it is parametrized."""
    return module._parameters.get(name, module._buffers.get(name))


def base_of(module: nn.Module, name: str) -> Tensor:
    """The first stored tensor behind ``module.name``: the parameter, or torch's original of it."""
    held = stored(module, name)
    if held is not None:
        return held
    plist = parametrized(module)[name]
    # weight norm and others keep several originals; the first stands for them all
    return plist.original if plist.is_tensor else plist.original0  # type: ignore[no-any-return]


def _warn_overlapping(
    model: nn.Module, claims: Mapping[int, list[tuple[nn.Module, Target]]]
) -> None:
    # by memory, not by object: tied parameters are one object and are no overlap
    found = overlapping(model)
    for key, ((_, target), *_) in claims.items():
        if key in found:
            warn(
                f"{target.path or 'weight'}: it shares its memory with {', '.join(found[key])}, as "
                "another tensor. Merging will give it memory of its own; hold one Parameter in "
                "both places to keep them tied."
            )


def _warn_tied(model: nn.Module, key: int, group: list[Target]) -> None:
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if id(p) == key]
    adapted = ", ".join(target.path or "weight" for target in group)
    warn(
        f"{adapted}: one tensor is held as {', '.join(names)}, and one update does not serve "
        "all of them. Merging will untie the adapted one; name every holder in one entry "
        "(re:...) to keep them tied."
    )


_paused: dict[int, list[bool]] = {}  # by block, in any thread: was the collector on before it?


def _pause(kept: list[Any]) -> None:
    """Stop the collector; what it was is told by the first of the blocks that are open at once."""
    # a block that is entered while the collector is off by another of ours must remember "on"
    block = [gc.isenabled() or any(on for (on,) in list(_paused.values()))]
    kept.append(block)
    _paused[id(block)] = block
    gc.disable()


def _resume(kept: list[Any]) -> None:
    """The last block to be left switches the collector on, where the first one found it on.

    Without a lock: each line is one step to other threads, and a block that is left hands on to
    those that are still open that it was on.
    """
    for block in kept:
        _paused.pop(id(block), None)
        if block[0]:
            for other in list(_paused.values()):
                other[0] = True
            if not _paused:
                gc.enable()
    kept.clear()


def uncollected() -> AbstractContextManager[None]:
    """Without looking for garbage: a thousand updates are tens of thousands of containers, which
    all stay, and for which the collector would go through everything that lives."""
    return surely_left(_pause, _resume)


def with_lists(module: nn.Module) -> list[nn.Module]:
    """A layer, and the lists inside of it that hold its updates."""
    branches, lists = module._modules.get(BRANCHES), parametrized(module)
    there = [] if branches is None else [branches]
    return [module, *there, *([lists, *lists._modules.values()] if lists else [])]


def _register(module: nn.Module, name: str, update: AttachedUpdate) -> None:
    """What torch's `register_parametrization` does, with one class for many layers."""
    before = _before(module)
    # torch's own names and classes, so that its functions work on what is registered here
    lists: Any = module._modules.setdefault("parametrizations", nn.ModuleDict())
    base: Any = below(type(module)) if lists else type(module)
    if name in lists:
        lists[name].append(update)
        # as every list of ours: of others torch's `right_inverse` compares dtypes and shapes
        lists[name].unsafe = True
    else:
        held = module._parameters if name in module._parameters else module._buffers
        weight: Any = held.pop(name)
        # torch would swap a sharded or quantised tensor with itself, which it refuses to do
        odd = is_wrapper(weight)
        stands_in = (
            nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device="meta"), False)
            if odd
            else weight  # torch's list adopts it as its `original`
        )
        lists[name] = Updates([update], stands_in, unsafe=True)
        # in the place of the stand-in, past torch's registration
        if odd:
            lists[name]._parameters["original"] = weight
    # in each list of ours, so that any of them tells it
    vars(lists[name])[_BEFORE] = before
    # after the list is there: the class's property reads it
    module.__class__ = shared(base, frozenset(lists))


_BEFORE = "before_paramlora"
_Before = tuple[tuple[str, ...], tuple[str, ...], type]


def _before(module: nn.Module) -> _Before:
    """What a layer was before our first update: the order of its parameters and of its buffers,
    which a state dict shows, and its class, torch's own where somebody had parametrized it
    already."""
    # any of our lists knows it; the layer's own order has changed since
    for plist in parametrized(module).values():
        if _BEFORE in vars(plist):
            return vars(plist)[_BEFORE]  # type: ignore[no-any-return]
    return tuple(module._parameters), tuple(module._buffers), type(module)


def replace(module: nn.Module, name: str, plist: Any, kept: list[nn.Module]) -> None:
    """Keep only `kept` of the updates in one list; the base tensor is untouched."""
    if len(kept) == len(plist):
        return
    if plist is module._modules.get(BRANCHES):
        _keep(plist, kept)
        if not kept:
            remove_branches(module)
        return
    before = _before(module)
    if kept:
        _keep(plist, kept)
        # foreign rules are left: the list is torch's again
        if not any(isinstance(one, AttachedUpdate) for one in kept):
            del vars(plist)[_BEFORE]
    else:
        _take_off(module, name, plist, before)
    module.__class__ = _class_of_the_rest(module, before[-1])


def _take_off(module: nn.Module, name: str, plist: Any, before: _Before) -> None:
    """Give a layer back the tensor behind a list that is empty now."""
    held = "_parameters" if "original" in plist._parameters else "_buffers"
    own = getattr(module, held)
    own[name] = getattr(plist, held).pop("original")
    # what still holds the list, as `fully_shard` does, is led to the layer
    vars(plist)["now"] = module, name
    plist.__class__ = Gone
    # taken out and put in again, a tensor comes last: all of them in turn restore the order
    for key in before[0] if held == "_parameters" else before[1]:
        if key in own:
            own[key] = own.pop(key)
    del module._modules["parametrizations"]._modules[name]  # type: ignore[union-attr]
    if not parametrized(module):
        del module._modules["parametrizations"]
    refresh(module)


def _keep(held: Any, kept: list[nn.Module]) -> None:
    for index in reversed(range(len(held))):
        if not any(held[index] is one for one in kept):
            del held[index]


def _class_of_the_rest(module: nn.Module, former: type) -> type:
    """The class for the parametrizations that are left: the former one where none is ours."""
    lists = parametrized(module)
    ours = any(_BEFORE in vars(plist) for plist in lists.values())
    # properties of the former class show each tensor that is still parametrized
    if not ours and all(isinstance(getattr(former, key, None), property) for key in lists):
        return former
    return shared(below(type(module)), frozenset(lists))
