"""An adapter as a server's loader takes it, and what of it no such loader takes.

Read from the loaders' sources by commit: vLLM's vllm/lora/lora_model.py at 0306474e,
model_manager.py at 01533aa8, peft_helper.py at 02143692 and config/lora.py at 01230b40; SGLang's
python/sglang/srt/lora/lora_config.py at 0ceb81fe and mem_pool.py at 00639c4d. Both read one ``r``
and one ``lora_alpha`` for all layers, without patterns; SGLang also wants every factor to be of
that rank. Experts are PEFT's: ``experts.base_layer`` is ``gate_up_proj``, ``experts`` is
``down_proj``, of shapes ``[E·r, in]`` and ``[out, r·E]``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn

from paramlora import formats
from paramlora.errors import AdapterError, listed
from paramlora.files.adapters import read_adapter
from paramlora.files.atomic import PathLike
from paramlora.formats import Options, base_of
from paramlora.formats.factors import folded
from paramlora.model.targets import adaptable
from paramlora.model.values import adapter_of
from paramlora.update.contexts import own_context
from paramlora.update.value import Adapter, Update

SERVERS = {"vllm": "vLLM", "sglang": "SGLang"}
MOST_RANK = 512  # the largest max_lora_rank of vLLM's configuration
_HEADS = ("lm_head", "score", "classifier", "embed_out")
_EXPERTS = ("gate_up_proj", "down_proj")


class Served(NamedTuple):
    """What a server is handed in place of a folder.

    Args:
        tensors: by the names of ``adapter_model.safetensors``.
        config: ``adapter_config.json``.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]


@own_context()
def tensors_for(
    model: nn.Module,
    server: str,
    adapter: str = "default",
    dtype: Optional[torch.dtype] = None,
) -> Served:
    """An attached adapter as ``"vllm"``, ``"sglang"`` or ``"peft"`` load it; no file is written.

    For the servers all layers have one rank, filled up with zeros, and one alpha: other scales
    are multiplied into ``lora_B``. Called before training, it tells what could not be served.

    Args:
        model: with the adapter attached.
        server: whose loader takes it.
        adapter: its name.
        dtype: of the tensors; for the servers, which cast to it anyway, by default the type of the
            adapted weights where that has 16 bits.

    Raises:
        AdapterError: no such adapter or server, or a part that the server does not load.
        FileError: what PEFT's form does not hold.

    Example:
        >>> import paramlora
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))
        >>> model = paramlora.attach(model, {"0": {"r": 2}, "1": {"r": 1, "scale": 3}})
        >>> tensors, config = tensors_for(model, "vllm")
        >>> config["r"], config["lora_alpha"], config["target_modules"]
        (2, 2, ['0', '1'])
        >>> [tuple(tensor.shape) for key, tensor in sorted(tensors.items()) if "lora_A" in key]
        [(2, 4), (2, 3)]
    """
    if server != "peft":
        _check_server(server)
    base, found = base_of(model), adapter_of(model, adapter)
    if server != "peft":
        lost = unserved(found, server)
        if lost:
            raise AdapterError(f'adapter "{adapter}" for {SERVERS[server]}: {" ".join(lost)}')
        found, dtype = _of_one_rank(found), dtype or _narrow(model, found)
    content = formats.write(found, "peft", base)
    tensors = {key: _own(tensor, dtype) for key, tensor in content.state.items()}
    return Served(tensors, dict(content.config))


@own_context()
def unserved_in(path: PathLike, server: str) -> list[str]:
    """What of an adapter's file a server does not load, a sentence for each kind of part.

    Raises:
        AdapterError: no such server.
        FileError: it cannot be read.
    """
    _check_server(server)
    return unserved(read_adapter(path, options=Options(strict=False)), server)


def unserved(adapter: Adapter, server: str) -> list[str]:
    """The same of an adapter as a value."""
    return [text for text in _lost(adapter, SERVERS[server]) if text]


def _lost(adapter: Adapter, name: str) -> Iterator[str]:
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
        yield f"{listed(odd)}: neither a linear layer, an embedding nor experts. Leave it out."
    alone = [path for path in updates if _twin(path, updates) is not None]
    if alone:
        yield (
            f"{listed(alone)}: of experts {name} loads gate_up_proj and down_proj together. Adapt "
            "both."
        )
    most = max((update.r for update in updates.values()), default=0)
    if most > MOST_RANK:
        yield f"rank {most} is above the {MOST_RANK} that {name} can be started with. Train less."


def _is_served(path: str, update: Update) -> bool:
    if update.layout == "stack":
        return path.rpartition(".")[2] in _EXPERTS
    flat = update.shape is None or len(update.shape) == 2
    return update.kind in (None, "linear", "embedding") and flat and update.up_kernel == 1


def _twin(path: str, updates: Mapping[str, Update]) -> Optional[str]:
    """The parameter of the same experts that is missing."""
    owner, _, name = path.rpartition(".")
    if updates[path].layout != "stack" or name not in _EXPERTS:
        return None
    twin = f"{owner}.{_EXPERTS[name == _EXPERTS[0]]}"
    return None if twin in updates else twin


def _of_one_rank(adapter: Adapter) -> Adapter:
    """All updates of the largest rank; and of one scale, if need be by their factors."""
    r = max(update.r for update in adapter.updates.values())
    same = len({update.scale for update in adapter.updates.values()}) == 1
    made = {
        path: _filled(update if same else folded(update), r)
        for path, update in adapter.updates.items()
    }
    return replace(adapter, updates=made)


def _filled(update: Update, r: int) -> Update:
    more, a, b = r - update.r, update.lora_A, update.lora_B
    zeros_a = a.new_zeros(*a.shape[:-2], more, a.shape[-1])
    zeros_b = b.new_zeros(*b.shape[:-1], more)
    return replace(
        update, lora_A=torch.cat([a, zeros_a], dim=-2), lora_B=torch.cat([b, zeros_b], dim=-1)
    )


def _narrow(model: nn.Module, adapter: Adapter) -> Optional[torch.dtype]:
    """The type of the adapted weights where all have one of 16 bits."""
    types = {target.dtype for target in adaptable(model) if target.path in adapter.updates}
    return types.pop() if types in ({torch.bfloat16}, {torch.float16}) else None


def _own(tensor: Tensor, dtype: Optional[torch.dtype]) -> Tensor:
    return tensor.detach().to(dtype or tensor.dtype, copy=True).contiguous()


def _check_server(server: str) -> None:
    if server not in SERVERS:
        raise AdapterError(f'no server "{server}" is known. Known: {", ".join(SERVERS)}, peft.')
