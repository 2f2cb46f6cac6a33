"""Several adapters in one batch: each row takes its own."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from paramlora.errors import AdapterError, counted
from paramlora.model.attach import (
    check_adapters,
    one_by_one,
    put,
    updates_of,
)
from paramlora.model.experts import takes_rows
from paramlora.model.forwards import below, is_known, reaches_known
from paramlora.model.layer_class import holds_updates, parametrized
from paramlora.model.split import Split, splits, takes_positions
from paramlora.model.targets import stem, unwrapped
from paramlora.model.undo import surely_left
from paramlora.update.attached import AttachedUpdate, Routes, Switch
from paramlora.update.choice import Choice, Flattened
from paramlora.update.names import BRANCHES
from paramlora.update.walk import paths_of

Names = Sequence[Optional[str]]
_Inner = nn.modules.linear.NonDynamicallyQuantizableLinear  # read by the attention around it
_Undo = Callable[[], None]
_Held = tuple[str, nn.Module, str, Any]  # a layer's path, itself, a tensor's name and its updates


@contextmanager
def route(
    model: nn.Module,
    adapters: Union[Names, Tensor],
    names: Optional[Names] = None,
    dim: int = 0,
    cu_seqlens: Optional[Union[Tensor, Sequence[int]]] = None,
) -> Iterator[nn.Module]:
    """Inside the block each row of the batch takes its own adapter, in one pass of the base.

    A row's result and gradients are those of the row by itself with its adapter alone, as strong as
    `set_adapters` left it; no gradient of one adapter comes from another's rows. Where only a
    layer's weight is known (attention, recurrent layers, tensors trained whole) that layer is
    called once for each adapter; under reentrant or any other checkpointing of such a layer the
    backward belongs inside of the block too. Positions that a block flattens, ``x.view(-1, side)``,
    are known as the batch's by their memory (see `paramlora.update.choice.Flattened`).

    Args:
        model: with adapters attached.
        adapters: the name of each row's adapter, None for the base; or ``[N]`` integers, a tensor
            or a list, indices into `names`, where a negative one is the base. Those on a device are
            not checked.
        names: what the integers mean.
        dim: where the rows lie in the input of a layer that does not tell, such as 1 where the
            first dimension is time. Convolutions, attention and recurrent layers tell.
        cu_seqlens: of packed sequences, ``[N + 1]``: row `i` is the positions from
            ``cu_seqlens[i]`` up to ``cu_seqlens[i + 1]`` of the dimension `dim`.

    Raises:
        AdapterError: an adapter that is not attached or is switched off, or a layer that cannot
            tell the rows apart; and in the block, an input of another number of rows.

    Example:
        >>> import paramlora
        >>> model = paramlora.attach(nn.Linear(4, 3), {"weight": {"r": 2}}, "style")
        >>> _ = model.parametrizations.weight[0].lora_B.data.normal_()
        >>> x = torch.ones(2, 4)
        >>> with route(model, ["style", None]):
        ...     y = model(x)
        >>> with paramlora.disable_adapters(model):
        ...     assert torch.equal(y[1], model(x)[1]) and not torch.equal(y[0], y[1])
    """
    modules = paths_of(unwrapped(model))  # gone through once: they are thousands
    held = [(path, m, *of) for m, path in modules.items() if m._modules for of in updates_of(m)]
    there: dict[str, bool] = {}  # each adapter, and whether one of its updates acts
    for *_, some in held:
        for update in some:
            if isinstance(update, AttachedUpdate):
                # by its strength: a block of `disable_adapters` may be left inside of this one
                acts = update.switch.strength != 0
                there[update.adapter] = there.get(update.adapter, False) or acts
    # everything is looked at before the first layer changes
    index = _index(model, there, adapters, names)
    if cu_seqlens is not None:
        index = _of_positions(index, cu_seqlens)
    if not isinstance(dim, int) or dim < 0:
        raise AdapterError(f"dim must be a whole number of at least 0, got {dim!r}.")
    attentions = [one for one in modules if isinstance(one, nn.MultiheadAttention)]
    rows, split = _checked(held, attentions, list(there), index, dim, cu_seqlens is not None)

    def enter(undo: list[_Undo]) -> None:
        _enter(modules, rows, undo)
        # only where a layer is called once for each adapter: the groups wait for a device
        groups = _groups(list(there), index) if split else {}
        # a forward of the instance's own: the class serves other layers too
        for layer, update, own in split:
            _replace(layer, "forward", Split(layer, dim, groups, update, own), undo)

    with surely_left(enter, _leave):
        yield model


def _index(
    model: nn.Module,
    there: dict[str, bool],
    adapters: Union[Names, Tensor],
    names: Optional[Names],
) -> Tensor:
    """``[N]``: for each row an index into `there`, or one beyond it for the base."""
    if isinstance(adapters, (list, tuple)) and {*map(type, adapters)} == {int}:
        adapters = torch.tensor(adapters)
    if isinstance(adapters, Tensor):
        return _of_tensor(model, there, adapters, names)
    if isinstance(adapters, str) or not isinstance(adapters, Sequence):
        raise AdapterError(
            "expected the adapter of each row, such as "
            f"[{', '.join(map(repr, [*there][:1]))}, None], "
            f"got {adapters!r}."
        )
    if names is not None:
        raise AdapterError(
            f"names tell what integers mean, and the rows have names already: "
            f"{repr(list(adapters))[:50]}. Leave names out."
        )
    _check_on(model, there, adapters)
    number = {name: at for at, name in enumerate(there)}
    index = [number[n] if n is not None else len(there) for n in adapters]
    return torch.tensor(index, dtype=torch.long)


def _of_tensor(
    model: nn.Module, there: dict[str, bool], index: Tensor, names: Optional[Names]
) -> Tensor:
    if names is None or isinstance(names, str):
        raise AdapterError(
            f"indices need the list of adapters that they mean, got {names!r}. Give names."
        )
    if index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool:
        raise AdapterError(
            "expected the adapters of rows as integers of one dimension, got shape "
            f"{list(index.shape)} of {index.dtype}."
        )
    _check_on(model, there, names)
    if index.is_cpu and len(index) and int(index.max()) >= len(names):
        most, there_are = int(index.max()), counted(len(names), "adapter")
        raise AdapterError(f"index {most} is beyond the {there_are} named. Name more.")
    # what is not named, a negative index among them, is the base
    out = torch.full_like(index, len(there), dtype=torch.long)
    for at, name in enumerate(names):
        if name is not None:
            # filled name by name: `names` may have an adapter twice
            out = out.masked_fill(index == at, list(there).index(name))
    return out


def _check_on(model: nn.Module, there: dict[str, bool], names: Names) -> None:
    for name in dict.fromkeys(name for name in names if name is not None):
        if name not in there:
            check_adapters(model, [name])
        if not there[name]:
            raise AdapterError(
                f'adapter "{name}" is switched off, so its rows would be the base\'s. Give None '
                "for them, or switch it on with set_adapters first."
            )


def _of_positions(index: Tensor, cu_seqlens: Union[Tensor, Sequence[int]]) -> Tensor:
    """The index of each position of packed sequences, from that of each sequence."""
    try:
        # on the index's device, so that positions are repeated where they lie
        bounds = torch.as_tensor(cu_seqlens, device=index.device)
    except (TypeError, ValueError, RuntimeError):
        raise _wrong_bounds(index, cu_seqlens) from None
    if bounds.shape != (len(index) + 1,) or bounds.is_floating_point():
        raise _wrong_bounds(index, cu_seqlens)
    lengths = bounds.long().diff()
    if int(bounds[0]) or bool((lengths < 0).any()):
        raise _wrong_bounds(index, cu_seqlens)
    return index.repeat_interleave(lengths)


def _wrong_bounds(index: Tensor, got: Any) -> AdapterError:
    shown = got.tolist() if isinstance(got, Tensor) else got
    return AdapterError(
        f"cu_seqlens of {counted(len(index), 'sequence')} must be {len(index) + 1} whole numbers "
        f"that start at 0 and do not fall, got {repr(shown)[:100]}."
    )


def _checked(
    held: list[_Held],
    attentions: list[nn.MultiheadAttention],
    there: list[str],
    index: Tensor,
    dim: int,
    packed: bool,
) -> tuple[list[tuple[AttachedUpdate, Choice]], list[tuple[nn.Module, AttachedUpdate, Choice]]]:
    """Each update with the rows of its tensor, and the layers to be called once for each adapter,
    with one of their updates and its rows.

    Raises:
        AdapterError: one that allows neither.
    """
    # one `Choice` for all tensors with the same adapters: there are hundreds of tensors
    made: dict[tuple[Any, ...], Choice] = {}
    rows: dict[int, tuple[AttachedUpdate, Choice]] = {}
    split: dict[int, tuple[nn.Module, AttachedUpdate, Choice]] = {}
    flattened = Flattened({id(module): path.rpartition(".")[0] for path, module, *_ in held})
    # attention reads the weights of `out_proj`: it is the layer to be called for each adapter
    inside = {id(attention.out_proj): attention for attention in attentions}
    for path, module, name, some in held:
        ours = [one for one in some if isinstance(one, AttachedUpdate)]
        if not ours:
            continue
        # rows lie in the attention's input; the inner layer is called by nobody
        layer = inside.get(id(module), module)
        own = _rows(made, there, index, dim, packed, flattened, ours)
        if _must_split(module, layer, stem(path, name), name, packed):
            split[id(layer)] = layer, ours[0], own
        # one update of tied tensors has one switch, and so one choice
        for update in ours:
            if rows.setdefault(id(update), (update, own))[1] is not own:
                raise AdapterError(_tied(stem(path, name)))
    return list(rows.values()), list(split.values())


def _rows(
    made: dict[tuple[Any, ...], Choice],
    there: list[str],
    index: Tensor,
    dim: int,
    packed: bool,
    flattened: Flattened,
    ours: list[AttachedUpdate],
) -> Choice:
    """The rows of one tensor, made once for all that have the same adapters."""
    # where the factors lie: a device map spreads a model over several
    names, device = tuple([one.adapter for one in ours]), next(ours[0].every_tensor(), index).device
    ranks = tuple([one.rank_of_sum() for one in ours])
    key = (names, ranks, device)
    if key not in made:
        own = torch.full_like(index, len(names))
        # the index counts the model's adapters, a tensor's choice its own
        for at, name in enumerate(names):
            own = own.masked_fill(index == there.index(name), at)
        made[key] = Choice(names, ranks, own.to(device), dim, packed, flattened)
    return made[key]


def _must_split(module: nn.Module, layer: nn.Module, path: str, name: str, packed: bool) -> bool:
    """Whether a layer is to be called once for each adapter, not once for all.

    Raises:
        AdapterError: its forward allows neither.
    """
    base = below(type(layer)) if parametrized(layer) else type(layer)
    lists = parametrized(module)
    # experts tell which token each row is of, so one call serves all
    if takes_rows(base, name) and name in lists and all(map(is_known, lists[name])):
        return False
    # a branch is added by a hook, which has the layer's own input
    soft = BRANCHES in module._modules and name not in lists
    if packed and not takes_positions(base):
        raise AdapterError(
            f"{path or name}: {base.__name__} sees more than one position of a sequence at a time, "
            "so packed sequences cannot take different adapters there. Give each its own row "
            "(without cu_seqlens), or detach the adapters from that layer."
        )
    # of an attention's inner layer the attention is what is called
    if soft or (layer is module and _is_grouped(module, base)):
        return False
    if splits(layer, base):
        return True
    raise AdapterError(
        f"{path or name}: of {base.__name__} only the tensor is known, and not where the rows of "
        "its batch lie, so they cannot take different adapters. Call the model once for each "
        "adapter (set_adapters), or detach the adapters from that layer."
    )


def _is_grouped(module: Any, base: type) -> bool:
    """Whether one forward serves all rows: see `forwards`."""
    lists = parametrized(module)
    plain = set(lists) == {"weight"} and all(map(is_known, lists["weight"]))
    odd = isinstance(module, nn.Embedding) and (
        module.max_norm is not None or module.scale_grad_by_freq or module.sparse
    )
    return plain and not odd and reaches_known(base) and not issubclass(base, _Inner)


def _tied(path: str) -> str:
    return (
        f"{path}: it shares its update with a tensor that has other adapters, so rows cannot take "
        "different ones there. Name every holder of a tied tensor in one entry (re:...)."
    )


def _groups(there: list[str], index: Tensor) -> dict[Optional[str], Tensor]:
    """By adapter the rows that take it, where somebody does."""
    index = index.cpu()
    order = {name: (index == at).nonzero()[:, 0] for at, name in enumerate([*there, None])}
    # of an empty batch one call with no rows, which gives the shapes
    return {name: rows for name, rows in order.items() if len(rows)} or {None: index}


def _enter(
    modules: Iterable[nn.Module], rows: list[tuple[AttachedUpdate, Choice]], undo: list[_Undo]
) -> None:
    # by its own object: blocks are left in any order, and each takes its own rows out
    block = object()
    undo.append(lambda: _put(rows, lambda open_, _: tuple(o for o in open_ if o[0] is not block)))
    _put(rows, lambda open_, own: (*open_, (block, own)))
    for layer in modules:
        # torch's fused evaluation reads the layers' weights, where a hook keeps it from that
        if isinstance(layer, nn.TransformerEncoderLayer) and holds_updates(layer):
            hook = partial(_nothing)  # one of its own, by which it is found
            undo.append(partial(_unhook, layer, hook))  # first: what stops the next line needs it
            layer.register_forward_pre_hook(hook)
        # and packs rows of several lengths before the first layer, which it asks for its weights
        if isinstance(layer, nn.TransformerEncoder) and holds_updates(layer):
            if _PACKS in vars(layer):
                _replace(layer, _PACKS, _Unpacked(vars(layer)[_PACKS]), undo)


_PACKS = "use_nested_tensor"  # by which torch's encoder tells whether it may


class _Unpacked:
    """What an encoder reads, inside of a block, to learn that it must pack no rows.

    Attributes:
        before: what it took the place of.
        left: whether its block is.
    """

    def __init__(self, before: Any) -> None:
        self.before, self.left = before, False

    def __bool__(self) -> bool:
        return False

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """What a copied encoder gets: the value from before, as no block is open of it."""
        return deepcopy(self.before, memo)


def _nothing(*_: Any) -> None:
    """Nothing: that there is a hook is all that is wanted."""


def _unhook(layer: nn.Module, hook: Callable[..., Any]) -> None:
    hooks = layer._forward_pre_hooks
    for key in [key for key, other in hooks.items() if other is hook]:
        del hooks[key]


def _put(
    rows: Sequence[tuple[AttachedUpdate, Choice]],
    change: Callable[[Routes, Choice], Routes],
) -> None:
    """Change the blocks that are open, whichever others have been opened or left meanwhile. Updates
    whose switches said the same get one, so that a model has some of them and not thousands."""
    with one_by_one():
        now = [(update, update.switch, own) for update, own in rows]
        made: dict[Any, Switch] = {}  # by the switch itself, and by what it says
        new: list[tuple[AttachedUpdate, Switch]] = []
        for update, switch, own in now:
            key = id(switch), id(own)
            found = made.get(key)
            if found is None:
                gain, routes = id(switch.gain), switch.routes
                told = switch.strength, gain, switch.muted, switch.past, routes, own
                found = made.get(told) or switch.routed(change(routes, own))
                made[key] = made[told] = found
            new.append((update, found))
        put(new)


def _replace(
    layer: nn.Module, name: str, value: Union[Split, _Unpacked], undo: list[_Undo]
) -> None:
    """Give one layer another attribute of its own, such as its forward, until it is left."""
    own = vars(layer)
    undo.append(partial(_restore, own, name, value))  # first: what stops the next line needs it
    own[name] = value


def _restore(own: dict[str, Any], name: str, value: Any) -> None:
    """Put back what was there before a value, of the blocks that are not left yet."""
    value.left = True
    if own.get(name) is not value:
        return
    # blocks that are left and still below another one are passed over
    while value is not None and getattr(value, "left", False):
        value = value.before
    if value is None:
        del own[name]
    else:
        own[name] = value


def _leave(undo: list[_Undo]) -> None:
    while undo:
        # taken off behind its end: a stop in it has it done again
        undo[-1]()
        undo.pop()
