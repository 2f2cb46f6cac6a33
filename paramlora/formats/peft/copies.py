"""The embeddings that PEFT saves beside an adapter: the base's own, perhaps with more rows."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Optional

import torch
from torch import Tensor

from paramlora.errors import FileError
from paramlora.formats.base import Base, Slot, places_of
from paramlora.formats.factors import held
from paramlora.formats.peft.configuration import INNER, stem
from paramlora.update.value import Adapter

# as transformers' models call them
_EMBEDDINGS = ("embed_tokens", "lm_head", "word_embeddings", "wte", "embed_in", "embed_out")


def copies_in(rest: Iterable[str], adapted: Iterable[str]) -> dict[str, str]:
    """``{key: path}`` of the weights that ``save_embedding_layers`` saved
    (utils/save_and_load.py), adapted ones under their wrapper's name."""
    known, found = set(adapted), {}
    for key in sorted(rest):
        module, _, name = stem(key).rpartition(".")
        path = module.removesuffix(INNER)
        plain = path == module and path.rpartition(".")[2] in _EMBEDDINGS
        if name == "weight" and (path in known if path != module else plain):
            found[key] = path
    return found


def with_copies(
    adapter: Adapter, copies: Mapping[str, Tensor], base: Optional[Base], source: str
) -> Adapter:
    """An adapter that has the saved weights, and not the model's, under its updates.

    A copy of what the model has says nothing. Of another, or where the model's is not known, the
    sum is a tensor trained whole, and so is the copy for each layer that is tied to it.

    Raises:
        FileError: DoRA on a weight of other values, which is no sum.
    """
    places = None if base is None else places_of(base)
    updates, whole = dict(adapter.updates), dict(adapter.whole)
    for path, saved in copies.items():
        there = None if places is None else places.find(path, f"{source}: {path}")
        name = path if there is None or there.weight is None else there.weight
        slot = (base or {}).get(name)
        # peft saves all embeddings where one is a target, whether they changed or not
        if slot is not None and _is_same(slot, saved):
            continue
        if path in adapter.others and (slot is None or slot.values is None):
            raise FileError(
                f"{source}: {path}: DoRA beside a saved embedding, and without the model nothing "
                "tells whether it is the model's own. Give the model (--model)."
            )
        if path in adapter.others:
            raise FileError(
                f"{source}: {path}: DoRA beside a saved embedding of other values than the "
                "model's. Merge it with peft (merge_and_unload)."
            )
        for own in (path, *(() if slot is None else slot.tied)):
            update, at = updates.pop(own, None), name if own == path else own
            if update is not None and update.shape != tuple(saved.shape):
                raise FileError(
                    f"{source}: {own}: a saved embedding of {list(saved.shape)} beside an update "
                    f"of {list(update.shape or ())}. Save it again."
                )
            if at not in whole:  # of two that are tied both are saved
                whole[at] = saved if update is None else _sum(saved, update.delta())
    return replace(adapter, updates=updates, whole=whole)


def _is_same(slot: Slot, saved: Tensor) -> bool:
    own = None if slot.values is None else slot.values()
    if own is None or own.shape != saved.shape or own.is_meta:
        return False
    return bool(torch.equal(own.detach().to("cpu", saved.dtype), saved))


def _sum(saved: Tensor, delta: Tensor) -> Tensor:
    return held(saved.double() + delta.double(), saved.dtype)
