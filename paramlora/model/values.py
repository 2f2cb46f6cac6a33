"""The live model to and from an adapter's tensors, named by module path."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Optional

import torch
from torch import Tensor, nn

from paramlora.config import TargetConfig
from paramlora.errors import AdapterError, FileError, counted, listed, warn
from paramlora.model.attach import (
    Fresh,
    adapted_modules,
    attach_targets,
    base_of,
    check_adapters,
    check_room,
    make_room,
    placed,
    updates,
    updates_of,
)
from paramlora.model.classes import Model
from paramlora.model.digest import digests, others
from paramlora.model.layer_class import parametrized
from paramlora.model.targets import (
    Target,
    adaptable,
    base_tensor,
    check_model,
    stem,
    targets_at,
    unwrapped,
)
from paramlora.model.undo import to_the_end
from paramlora.update.attached import AttachedUpdate, answer
from paramlora.update.contexts import own_context
from paramlora.update.memory import all_finite, moved
from paramlora.update.sharded import check_not_flat, check_order, reshard, take_all
from paramlora.update.value import Adapter, Holder, Value, apart_by_kind


def adapter_state_dict(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """``{"<module path>.lora_A": ...}``: the adapter's own tensors, detached, not copied.

    A tensor other than ``weight`` has its name in the path, such as ``lstm.weight_ih_l0.lora_A``.
    One that is trained whole is ``lora_whole``. After ``"init": "pissa"`` or ``"olora"`` the
    factors are new tensors, of twice the rank: a plain adapter for the unchanged base.

    Raises:
        AdapterError: `adapter` is not attached, FSDP1 holds it in flat parts, or a tensor that
            starts as the base's came from the meta device and has no values yet.
    """
    stems = _stems(model, adapter)
    for update in stems.values():
        update.check_started()
    return {key: tensor.detach() for key, tensor in _live(stems).items()}


@own_context()
def load_adapter_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], adapter: str = "default"
) -> nn.Module:
    """Copy `state` into an attached adapter; everything is checked before the first copy.

    Raises:
        AdapterError: `adapter` is not attached, or FSDP1 holds it in flat parts.
        FileError: missing or unexpected keys, another shape, or no finite real numbers.
    """
    _load(model, _stems(model, adapter), state, adapter)
    return model


def _load(
    model: nn.Module, stems: Mapping[str, AttachedUpdate], state: Mapping[str, Tensor], adapter: str
) -> None:
    live = _live(stems)
    # names and shapes before numbers: these may be on a device, or large
    _check(model, stems, state, adapter)
    # all that can fail or wait, before anything changes; and a device looks at numbers faster
    ready = _finite(live, _beside(live, state))
    # once for each update: `plain` may compute factors anew
    own = {path: answer(update, "plain") for path, update in stems.items()}
    held = {
        path: {name: ready[_key(path, name)] for name in tensors} for path, tensors in own.items()
    }
    to_the_end(lambda: _take(stems, held))


def _check(
    model: nn.Module, stems: Mapping[str, AttachedUpdate], state: Mapping[str, Tensor], adapter: str
) -> None:
    """Refuse values by their names, shapes and types; they are not looked at."""
    live, own = _live(stems), {path: answer(update, "plain") for path, update in stems.items()}
    missing = sorted(live.keys() - state.keys())
    unexpected = sorted(state.keys() - live.keys())
    if missing or unexpected:
        raise FileError(
            f'adapter "{adapter}" does not fit {type(model).__name__}: '
            f"missing: {', '.join(missing) or 'none'}; "
            f"unexpected: {', '.join(unexpected) or 'none'}. Attach its own configuration."
        )
    for path, tensors in own.items():
        for name, tensor in tensors.items():
            _check_fits(_key(path, name), state[_key(path, name)], name, tensor, stems[path])
            _check_its_own(_key(path, name), name, stems[path])
            _check_is_there(_key(path, name), tensor)


def _check_is_there(key: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise FileError(
            f"{key} lies on the meta device, where values are lost. Load the model first."
        )


def _beside(live: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values from the host's memory on the devices of the tensors that take them."""
    ready, keys = dict(state), dict[torch.device, list[str]]()
    for key, value in state.items():
        device = live[key].device
        # plain tensors alone: a subclass knows by itself how it moves
        if value.is_cpu and type(value) is Tensor and not live[key].is_cpu:
            keys.setdefault(device, []).append(key)
    for device, some in keys.items():
        ready.update(zip(some, moved([state[key] for key in some], device)))
    return ready


def _take(stems: Mapping[str, AttachedUpdate], held: Mapping[str, dict[str, Tensor]]) -> None:
    """Copy all values, which does the same when it is done again."""
    take_all(pair for path, update in stems.items() for pair in update.taking(held[path]))


def _check_fits(key: str, value: Tensor, name: str, tensor: Tensor, update: AttachedUpdate) -> None:
    _check_values(key, value, tensor.dtype)
    if not update.takes(name, tensor, tuple(value.shape)):
        raise FileError(
            f"{key}: shape {list(value.shape)} does not fit {list(tensor.shape)}. "
            "Was it made for another model or rank?"
        )


def _check_its_own(key: str, name: str, update: AttachedUpdate) -> None:
    """Refuse to copy into a tensor that is computed at each read: nothing would keep the values."""
    if name in parametrized(update):
        raise AdapterError(
            f"{key} is computed by a parametrization of its own, which values cannot be copied "
            "into. Take it off (torch.nn.utils.parametrize.remove_parametrizations), load, and "
            "register it again."
        )


def _check_values(key: str, value: object, dtype: torch.dtype) -> None:
    if not isinstance(value, Tensor):
        raise FileError(f"{key}: a {type(value).__name__}, where a tensor belongs. Save it again.")
    if not value.is_floating_point() and value.dtype != dtype:
        raise FileError(f"{key}: of type {value.dtype}, where real numbers belong. Save it again.")


def _finite(live: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values in the types that take them, in which all must be finite."""
    # in the type that takes it: what is finite in float32 may not be in float16
    cast = {key: state[key].detach().to(tensor.dtype) for key, tensor in live.items()}
    real = {key: value for key, value in cast.items() if not value.is_meta}
    if all_finite(real.values()):
        return cast
    key = next(key for key, value in real.items() if not torch.isfinite(value).all())
    raise FileError(
        f"{key}: not finite in {live[key].dtype}. Nothing was loaded; give a sound one."
    )


@own_context()
def adapter_of(model: nn.Module, adapter: str = "default") -> Adapter:
    """An attached adapter as a value: its tensors detached, and shared where they are plain.

    Where it is sharded over processes all of them call this, and each gets the whole.
    Tied tensors that share one update hold the same `Update` under each of their paths.

    Raises:
        AdapterError: `adapter` is not attached, or FSDP1 holds it in flat parts.
    """
    held = {path: update for path, _, update in placed(model) if update.adapter == adapter}
    if not held:
        check_adapters(model, adapter)
    _settle(model)
    # the model tells kind and groups of a layer, which an update does not know
    there = {target.path: target for target in adaptable(model)}
    first: dict[int, str] = {}
    made: dict[str, Value] = {}
    for path, update in held.items():
        head = first.setdefault(id(update), path)
        made[path] = _value(update, there.get(path)) if head == path else made[head]
    told, tied = _digests(model, adapter), _holders(held, there)
    return Adapter(
        name=adapter,
        base=told,
        holders=tied,
        apart=_apart(model, held, there.values()),
        **apart_by_kind(made),
    )


@own_context()
def attach_adapter(
    model: Model,
    adapter: Adapter,
    name: Optional[str] = None,
    max_rank: Optional[int] = None,
) -> Model:
    """Attach an adapter at its own paths and load its values; all or nothing.

    Args:
        model: a model that has every path of `adapter`.
        adapter: its tensors are copied into new parameters.
        name: a name of your own instead of the adapter's.
        max_rank: see `attach`.

    Raises:
        TargetError: a path that the model lacks, or a rank or kind that does not fit there.
        FileError: a tensor of another shape.
        AdapterError: an adapter of that name is attached already.
    """
    name = adapter.name if name is None else name
    check_model(model)
    check_order(model)
    inside = unwrapped(model)
    found = adapter.values()
    chosen = [_typed(t, found[t.path]) for t in targets_at(inside, _entries(found))]
    values = _values(_laid_out(found, chosen))
    check_room(chosen, max_rank)

    def fill(fresh: Fresh) -> None:
        stems: dict[str, AttachedUpdate] = {}
        seen: set[int] = set()
        for _, target, update in fresh:  # of tied tensors only the first one's
            # one update of tied tensors is filled once; its value stands under the first path
            if id(update) not in seen:
                stems[target.path] = update
                seen.add(id(update))
        _load(model, stems, {key: values[key] for key in _live(stems)}, name)
        # after the values, which have their own rank
        make_room(fresh, max_rank)

    attach_targets(inside, chosen, name, fill=fill)
    # behind the attaching: digests are of the base, which nothing above changed
    if adapter.base:
        warn_other(others(adapter.base, _digests(model, name)), len(adapter.base))
    return model


def check_fits(model: nn.Module, adapter: Adapter) -> None:
    """Refuse an adapter whose paths or ranks `attach_adapter` would, or for a model without values;
    its own are not looked at.

    Raises:
        TargetError, FileError: as there.
    """
    inner = unwrapped(model)
    for target in targets_at(inner, _entries(adapter.values())):
        module = inner.get_submodule(target.module)
        _check_is_there(target.path, base_tensor(module, target.tensor))


@own_context()
def swap_adapter(model: Model, adapter: Adapter, into: str) -> Model:
    """Copy an adapter's values into an attached one of the same layers, in place; all or nothing.

    Nothing is attached, so nothing compiles again and optimizers keep their parameters. A smaller
    rank is filled up with zeros.

    Raises:
        AdapterError: `into` is not attached, or FSDP1 holds it in flat parts.
        FileError: other layers, a larger rank, another shape, or no finite real numbers.
    """
    stems, state = _swapped(model, adapter, into)
    _load(model, stems, state, into)
    _warn_if_other(model, adapter, into)
    return model


def check_swap(model: nn.Module, adapter: Adapter, into: str) -> None:
    """Refuse an adapter by its names, shapes and types as `swap_adapter` would.

    Raises:
        AdapterError, FileError: as there.
    """
    _check(model, *_swapped(model, adapter, into), into)


def _swapped(
    model: nn.Module, adapter: Adapter, into: str
) -> tuple[dict[str, AttachedUpdate], dict[str, Tensor]]:
    """The updates that an adapter's values go to, and those values with zeros for lacking ranks."""
    held = {path: update for path, _, update in placed(model) if update.adapter == into}
    if not held:
        check_adapters(model, into)
    _settle(model)
    found = adapter.values()
    given = set(found)
    # reversed, so that the first path of a shared update is the one that stays
    first = {id(update): path for path, update in reversed(held.items())}
    stems = {path: update for path, update in held.items() if first[id(update)] == path}
    # other holders of a tied tensor may be in the file, and need not be
    missing, unexpected = sorted(stems.keys() - given), sorted(given - held.keys())
    if missing or unexpected:
        raise FileError(
            f'"{adapter.name}" has other layers than the attached "{into}": '
            f"missing: {listed(missing) or 'none'}; unexpected: {listed(unexpected) or 'none'}. "
            "Load it under a name of its own, without into."
        )
    # a file may have a tied tensor's factors by the other layer's sides
    values = _values({p: found[p].turned(getattr(u, "layout", "matrix")) for p, u in stems.items()})
    state = {
        _key(path, name): _filled(_key(path, name), name, values, update, tensor.shape)
        for path, update in stems.items()
        for name, tensor in answer(update, "plain").items()
    }
    _check_taken(sorted(values.keys() - state.keys()))
    return stems, state


def _check_taken(left: list[str]) -> None:
    """Refuse what a file has of an update and the attached one, of another kind, has not."""
    if left:
        raise FileError(
            f"{left[0]}: in the file, and the attached update of that tensor is of another kind. "
            "Load it under a name of its own."
        )


_ASKED = 8  # tensors whose base a swap compares: all would take longer than the swap itself


def _warn_if_other(model: nn.Module, adapter: Adapter, into: str) -> None:
    """Warn where some of the tensors tell that the adapter was trained on another base."""
    paths = sorted(adapter.base)
    some = {path: adapter.base[path] for path in paths[:: max(1, len(paths) // _ASKED)]}
    if some:
        warn_other(others(some, _digests(model, into, some)), len(some))


def _filled(
    key: str,
    name: str,
    values: Mapping[str, Tensor],
    update: AttachedUpdate,
    shape: torch.Size,
) -> Tensor:
    """A value of a file in the shape that an update has, with ranks of zeros where it has less."""
    if key not in values:
        raise FileError(
            f"{key}: not in the file, whose update of that tensor is of another kind. Load it "
            "under a name of its own."
        )
    value = values[key]
    dim = update.rank_dim(name)
    if dim is None or value.shape == shape or value.dim() != len(shape):
        return value
    if value.shape[dim] > shape[dim]:
        raise FileError(
            f'{key}: of rank {value.shape[dim]}, and the attached "{update.adapter}" has room for '
            f"{shape[dim]}. Attach it with max_rank={value.shape[dim]} or more."
        )
    size = list(value.shape)
    size[dim] = shape[dim] - size[dim]
    return torch.cat([value, value.new_zeros(size)], dim)


def _holders(held: Mapping[str, AttachedUpdate], there: Mapping[str, Target]) -> dict[str, Holder]:
    """The layers of tied tensors, which share the first one's update and not its kind."""
    count = Counter(map(id, held.values()))
    tied = (there[path] for path in held if count[id(held[path])] > 1 and path in there)
    return {one.path: Holder(one.kind, one.layout, one.groups) for one in tied}


def _apart(
    model: nn.Module, held: Collection[str], there: Iterable[Target]
) -> dict[str, tuple[str, ...]]:
    """By path of an update, the layers that hold its tensor without it."""
    tied: dict[int, list[str]] = {}
    inside = unwrapped(model)  # whose names the targets have
    for target in there:
        base = base_of(inside.get_submodule(target.module), target.tensor)
        tied.setdefault(id(base), []).append(target.path)
    found = {
        path: tuple(other for other in paths if other not in held)
        for paths in tied.values()
        for path in paths
        if path in held
    }
    return {path: others for path, others in found.items() if others}


def _digests(
    model: nn.Module, adapter: str, only: Optional[Mapping[str, str]] = None
) -> dict[str, str]:
    """By path, what tells each tensor that an adapter updates, as the base stores it."""
    bases = {}
    for path, module in adapted_modules(model):
        for name, held in updates_of(module):
            if only is not None and stem(path, name) not in only:
                continue
            if any(isinstance(one, AttachedUpdate) and one.adapter == adapter for one in held):
                bases[stem(path, name)] = base_of(module, name)
    return {path: told for path, told in digests(bases).items() if told is not None}


def warn_other(paths: list[str], count: int) -> None:
    """Tell of tensors that are not those that an adapter was trained on."""
    if paths:
        warn(
            f"{len(paths)} of {counted(count, 'tensor')}, such as {paths[0] or 'weight'}, hold "
            "other values than those that the adapter was trained on. Is this its base, and is the "
            "adapter not merged into it already?"
        )


def _value(update: AttachedUpdate, target: Optional[Target]) -> Value:
    layer = (None, None, 1) if target is None else (target.shape, target.kind, target.groups)
    update.check_started()
    return answer(update, "value", *layer)  # type: ignore[no-any-return]


def _entries(found: Mapping[str, Value]) -> dict[str, TargetConfig]:
    """A configuration's entry for each path; paths that share one value share one entry."""
    first: dict[int, str] = {}
    # `attach_targets` gives tensors of one entry one update
    return {path: one.entry(first.setdefault(id(one), path)) for path, one in found.items()}


def _typed(target: Target, value: Value) -> Target:
    """The target with an entry that also asks for the type that its value is of."""
    entry = value.typed(target.entry, target.dtype)
    return target if entry is target.entry else replace(target, entry=entry)


def _laid_out(found: Mapping[str, Value], chosen: Iterable[Target]) -> dict[str, Value]:
    """The values by path, with factors on the sides where each layer of `chosen` has them."""
    out = dict(found)
    for target in chosen:
        value, shape = out.get(target.path), tuple(target.shape)
        if value is not None:
            same = value.shape == shape
            out[target.path] = (
                value.turned(target.layout) if same else value.placed(shape, target.layout)
            )
    return out


def _values(found: Mapping[str, Value]) -> dict[str, Tensor]:
    return {
        _key(path, name): tensor
        for path, value in found.items()
        for name, tensor in value.parts().items()
    }


def _stems(model: nn.Module, adapter: str) -> dict[str, AttachedUpdate]:
    found = {path: update for path, _, update in updates(model) if update.adapter == adapter}
    if not found:
        check_adapters(model, adapter)
    _settle(model)
    return found


def _settle(model: nn.Module) -> None:
    """Have an adapter's own tensors in their places, and nothing that torch takes away again."""
    # inside of `summon_full_params` all of them are there
    check_not_flat(model, "reading or replacing an adapter's values", gathers=True)
    reshard(model)


def _live(stems: Mapping[str, AttachedUpdate]) -> dict[str, Tensor]:
    return {
        _key(stem, name): tensor
        for stem, update in stems.items()
        for name, tensor in answer(update, "plain").items()
    }


def _key(stem: str, name: str) -> str:
    return f"{stem}.{name}" if stem else name
