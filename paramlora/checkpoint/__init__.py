"""The three conversions on state dicts: `embed`, `extract`, `merge`. Pure: no model, no file."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from paramlora.checkpoint.keys import Key, without_updates
from paramlora.checkpoint.recipes import (
    Contents,
    Recipe,
    Recipes,
    Weighted,
    embed_recipes,
    merge_recipes,
)
from paramlora.errors import AdapterError
from paramlora.update.contexts import own_context
from paramlora.update.value import Adapter, Value, apart_by_kind

State = Mapping[str, Any]


@own_context()
def embed(base: State, adapter: Adapter) -> dict[str, Any]:
    """The state dict of a model with `adapter` attached: it loads there with ``strict=True``.

    Args:
        base: the model's own state dict, or one with another adapter inside. Not changed; the
            result shares its tensors.
        adapter: what to put in.

    Raises:
        FileError: a path that `base` lacks, or factors of a shape that does not fit.

    Example:
        >>> import paramlora, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> base = dict(model.state_dict())
        >>> model = paramlora.attach(model, {"0": {"r": 2}})
        >>> embedded = paramlora.checkpoint.embed(base, paramlora.adapter_of(model))
        >>> assert embedded.keys() == model.state_dict().keys()
    """
    return apply(embed_recipes(Contents(base), adapter), base)


@own_context()
def extract(state: State) -> Adapter:
    """The adapter inside an attached model's state dict; its tensors are shared, not copied.

    A state dict does not tell the adapter's name nor whether a scale was trained.

    Raises:
        AdapterError: nothing is inside, or more than one update on one tensor.

    Example:
        >>> import paramlora, torch
        >>> model = paramlora.attach(torch.nn.Linear(4, 3), {"weight": {"r": 2, "scale": 0.5}})
        >>> update = paramlora.checkpoint.extract(model.state_dict()).updates[""]
        >>> assert (update.r, update.scale, update.shape) == (2, 0.5, (3, 4))
    """
    return extracted(Contents(state), state.__getitem__)


@own_context()
def merge(base: State, *adapters: Weighted) -> dict[str, Any]:
    """The state dict with updates folded in; to the last bit what `paramlora.merge` gives.

    Args:
        base: a model's own state dict and `adapters` for it; or an attached model's, without
            `adapters`: what is inside is folded. Not changed; untouched tensors are shared.
        adapters: each an `Adapter`, or a pair of one and its strength (see `set_adapters`).

    Raises:
        FileError: a path that `base` lacks, or factors of a shape that does not fit.
        AdapterError: not finite, a soft update with ``"up_kernel": "same"``, a tensor under another
            parametrization, or nothing to merge.

    Example:
        >>> import torch
        >>> from paramlora import Adapter, Update
        >>> base = {"proj.weight": torch.zeros(2, 3)}
        >>> style = Adapter({"proj": Update(torch.ones(1, 3), torch.ones(2, 1), scale=0.5)})
        >>> assert torch.equal(merge(base, (style, 3))["proj.weight"], torch.full((2, 3), 1.5))
    """
    return apply(merge_recipes(Contents(base), adapters, base.__getitem__), base)


def extracted(contents: Contents, read: Callable[[str], Any]) -> Adapter:
    """`extract`, from keys with shapes and a function that reads a tensor."""
    inside = contents.inside(read)
    if not inside:
        raise AdapterError(
            "nothing to extract: no update of an attached adapter is inside. Give the checkpoint "
            "of a model with one attached."
        )
    changes = {}
    for weight, held in inside.items():
        if len(held) > 1:
            raise AdapterError(
                f"{weight} holds {len(held)} updates, and a state dict does not tell which "
                "belong together. Attach them to the model and save each with save_adapter."
            )
        changes[Key(weight).path] = held[0]
    return Adapter(**apart_by_kind(changes))


def apply(recipes: Recipes, state: State) -> dict[str, Any]:
    """Carry recipes out on a state dict; tensors that were one stay one."""
    out: Any = OrderedDict()
    made: dict[object, Any] = {}
    for key, recipe in recipes.items():
        same = _identity(recipe, state)
        if same not in made:
            made[same] = recipe.make(state.__getitem__)
        out[key] = made[same]
    versions = getattr(state, "_metadata", None)  # of the modules, as torch keeps them
    if not isinstance(versions, Mapping):
        return dict(out)
    # _metadata has a version of each module; merging erases the modules of parametrizations
    attached = any(Key.parse(key).part for key in out)
    out._metadata = OrderedDict(versions) if attached else without_updates(versions)
    return out  # type: ignore[no-any-return]


def _identity(recipe: Recipe, state: State) -> object:
    """Equal for recipes that give one tensor under several keys."""
    # what is not merged is the input's own tensor, shared as it was: an object equals no other
    if not recipe.changes:
        return object()
    base = state[recipe.source]
    # tied tensors are one memory under two keys, and must be one after merging
    what = (base.data_ptr(), tuple(base.shape), base.stride(), base.dtype)
    return (*what, *(_same(*strong) for strong in recipe.changes))


def _same(change: Value, strength: float) -> tuple[object, ...]:
    # a change that was fitted is another value with the same tensors
    return (*map(id, change.tensors().values()), *change.listed(), strength)
