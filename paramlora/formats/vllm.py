"""vLLM's adapters: PEFT's folder, of one rank and one alpha for all layers, and what it refuses.

Read from the loader's sources by commit: vllm/lora/lora_model.py at 0306474e, model_manager.py at
01533aa8, peft_helper.py at 02143692, utils.py at 001e63a8 and config/lora.py at 01230b40. It reads
one ``r`` and one ``lora_alpha``, without patterns. A layer is looked for by the last part of its
name, among linear layers, embeddings and experts. Experts as one stack are PEFT's:
``experts.base_layer`` is ``gate_up_proj``, ``experts`` is ``down_proj``, of shapes ``[E·r, in]``
and ``[out, r·E]``; for a model whose checkpoint has them one by one, each is a linear layer
(``experts.0.gate_proj``).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Optional

import torch

from paramlora.errors import FileError, listed
from paramlora.formats import peft
from paramlora.formats.base import Base
from paramlora.formats.content import Content
from paramlora.formats.factors import with_scale_in_B
from paramlora.formats.format import Format
from paramlora.formats.loaders import of_peft
from paramlora.update.value import Adapter, Update

MOST_RANK = 512  # the largest max_lora_rank of vLLM's configuration
_HEADS = ("lm_head", "score", "classifier", "embed_out")
_EXPERTS = ("gate_up_proj", "down_proj")


def write(adapter: Adapter, base: Optional[Base] = None, **_: Any) -> Content:
    """An adapter as the folder that vLLM's ``--lora-modules`` takes.

    All layers get the largest rank, filled up with zeros, and one alpha: where scales differ they
    are multiplied into ``lora_B``.

    Args:
        adapter: fitted to its model where kinds of layers matter.
        base: as for PEFT's; a checkpoint of single experts tells their names one by one.

    Raises:
        FileError: a part that vLLM does not load, named.
    """
    return of_one_rank(adapter, base, unserved(adapter, "vLLM"))


def of_one_rank(adapter: Adapter, base: Optional[Base], lost: Iterable[str]) -> Content:
    """PEFT's form of one rank and one alpha.

    Raises:
        FileError: something is lost.
    """
    told = " ".join(lost)
    if told:
        raise FileError(told)
    return peft.write(_of_one_rank(adapter), base)


def unserved(adapter: Adapter, name: str) -> Iterator[str]:
    """What of an adapter vLLM does not load, a sentence for each kind of part."""
    yield from unloaded(adapter, name)
    most = max((update.r for update in adapter.updates.values()), default=0)
    if most > MOST_RANK:
        yield f"rank {most} is above the {MOST_RANK} that {name} can be started with. Train less."


def unloaded(adapter: Adapter, name: str) -> Iterator[str]:
    """What of an adapter a server of this name loads at no rank, likewise."""
    updates = adapter.updates
    if adapter.whole:
        yield (
            f"{listed(sorted(adapter.whole))}: trained whole, which {name} does not load "
            "(modules_to_save, bias). Merge the adapter into the base, or train low ranks there."
        )
    if adapter.others:
        kinds = listed(sorted({value.method for value in adapter.others.values()}))
        yield (
            f"{listed(sorted(adapter.others))}: of kind {kinds}, and {name} loads low ranks alone. "
            "Merge the adapter into the base instead."
        )
    heads = [path for path in updates if path.rpartition(".")[2] in _HEADS]
    if heads:
        yield (
            f"{listed(heads)}: a head, which {name} adapts only in models that say so. Leave it "
            "out, or merge."
        )
    odd = [path for path, update in updates.items() if not _is_served(path, update)]
    if odd:
        yield (
            f"{listed(odd)}: neither a linear layer, an embedding nor experts, all that {name} "
            "adapts. Leave it out, or merge."
        )
    alone = [path for path in updates if _twin(path, updates) is not None]
    if alone:
        yield (
            f"{listed(alone)}: of experts {name} loads gate_up_proj and down_proj together. Adapt "
            "both."
        )


def _is_served(path: str, update: Update) -> bool:
    if update.layout == "stack":
        return path.rpartition(".")[2] in _EXPERTS
    # a shape that is not known is taken for a matrix: most are
    flat = update.shape is None or len(update.shape) == 2
    return update.kind in (None, "linear", "embedding") and flat and update.up_kernel == 1


def _twin(path: str, updates: Mapping[str, Update]) -> Optional[str]:
    """The parameter of the same experts that is missing."""
    owner, _, name = path.rpartition(".")
    if updates[path].layout != "stack" or name not in _EXPERTS:
        return None
    # True is 1: the other one of the two
    twin = f"{owner}.{_EXPERTS[name == _EXPERTS[0]]}"
    return None if twin in updates else twin


def _of_one_rank(adapter: Adapter) -> Adapter:
    """All updates of the largest rank; and of one scale, if need be by their factors."""
    # zeros more of rank change no sum, and vLLM reads one r for all layers
    r = max(update.r for update in adapter.updates.values())
    same = len({update.scale for update in adapter.updates.values()}) == 1
    made = {
        path: _filled(update if same else with_scale_in_B(update), r)
        for path, update in adapter.updates.items()
    }
    return replace(adapter, updates=made)


def _filled(update: Update, r: int) -> Update:
    """An update with ranks of zeros beside its own, up to `r`."""
    more, a, b = r - update.r, update.lora_A, update.lora_B
    zeros_a = a.new_zeros(*a.shape[:-2], more, a.shape[-1])
    zeros_b = b.new_zeros(*b.shape[:-1], more)
    return replace(
        update, lora_A=torch.cat([a, zeros_a], dim=-2), lora_B=torch.cat([b, zeros_b], dim=-1)
    )


FORMAT = Format(
    "vllm",
    marks=(),
    like="peft",
    read=peft.read,
    write=write,
    passed_over=of_peft,
    weights=("adapter_model.safetensors",),
    config="adapter_config.json",
    servers={"vllm": "vLLM"},
    unserved=unserved,
)
