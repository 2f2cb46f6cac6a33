"""An adapter as a server's loader takes it, and what of it no such loader takes.

What the loaders take, and where that was read, stands in the formats (`Format.servers`).
"""

from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn

from paramlora import formats
from paramlora.errors import AdapterError
from paramlora.files.adapters import read_adapter
from paramlora.files.atomic import PathLike
from paramlora.formats import FORMATS, Format, Options, base_of
from paramlora.model.targets import adaptable
from paramlora.model.values import adapter_of
from paramlora.update.contexts import own_context
from paramlora.update.value import Adapter


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
    form, found = _form_for(server, _takers()), adapter_of(model, adapter)
    if form.unserved is not None:
        name = form.servers[server]
        lost = list(form.unserved(found, name))
        if lost:
            raise AdapterError(f'adapter "{adapter}" for {name}: {" ".join(lost)}')
        dtype = dtype or _narrow(model, found)
    # what a file would hold, so that both loads give the same
    content = formats.write(found, form.name, base_of(model))
    tensors = {key: _own(tensor, dtype) for key, tensor in content.state.items()}
    return Served(tensors, dict(content.config))


@own_context()
def unserved_in(path: PathLike, server: str) -> list[str]:
    """What of an adapter's file a server does not load, a sentence for each kind of part.

    Raises:
        AdapterError: no such server.
        FileError: it cannot be read.
    """
    form = _form_for(server, _servers())
    assert form.unserved is not None
    adapter = read_adapter(path, options=Options(strict=False))
    return list(form.unserved(adapter, form.servers[server]))


def servers() -> dict[str, str]:
    """What messages call the servers, by the names that `unserved_in` knows."""
    return {server: form.servers[server] for server, form in _servers().items()}


def _takers() -> dict[str, Format]:
    """The format that each program takes from memory, by the program's name."""
    return {server: form for form in FORMATS.values() for server in form.servers}


def _servers() -> dict[str, Format]:
    """The format of each program that loads less than the format holds, by the program's name."""
    return {server: form for server, form in _takers().items() if form.unserved is not None}


def _narrow(model: nn.Module, adapter: Adapter) -> Optional[torch.dtype]:
    """The type of the adapted weights where all have one of 16 bits."""
    types = {target.dtype for target in adaptable(model) if target.path in adapter.updates}
    return types.pop() if types in ({torch.bfloat16}, {torch.float16}) else None


def _own(tensor: Tensor, dtype: Optional[torch.dtype]) -> Tensor:
    # a copy: the server keeps it, and training goes on with the other
    return tensor.detach().to(dtype or tensor.dtype, copy=True).contiguous()


def _form_for(server: str, known: dict[str, Format]) -> Format:
    if server not in known:
        raise AdapterError(f'no server "{server}" is known. Known: {", ".join(sorted(known))}.')
    return known[server]
