"""The native adapter file: one safetensors file that describes itself."""

from pathlib import Path

from torch import nn

from paramlora.errors import FileError
from paramlora.files.atomic import PathLike, new_file
from paramlora.files.safetensors import spec_of, write_safetensors
from paramlora.formats.native import described
from paramlora.model.statistics import warn_moved
from paramlora.model.values import adapter_of, adapter_state_dict
from paramlora.update.contexts import own_context
from paramlora.update.memory import pieces_of
from paramlora.update.sharded import is_sharded, wait, writes
from paramlora.update.value import Adapter


@own_context()
def save_adapter(model: nn.Module, path: PathLike, adapter: str = "default") -> None:
    """Write one adapter and its configuration; an older file at `path` survives a failure.

    The file holds the tensors of `adapter_state_dict` and describes itself in its metadata
    (see `write_native`): `load_adapter` needs nothing else. Where the adapter is sharded over
    processes all of them call this; the first one writes.

    Raises:
        AdapterError: `adapter` is not attached.
        FileError: the file cannot be written, its name ends in something other than
            ``.safetensors``, or `load_adapter` would refuse it: numbers that are not finite.
    """
    warn_moved(model)
    live = adapter_state_dict(model, adapter)
    for key, one in live.items():
        if one.is_meta:
            raise FileError(
                f"{path}: {key} lies on the meta device, without values. Load the model first. "
                "Nothing was written."
            )
    together = any(map(is_sharded, live.values()))
    # in every process: gathering what is sharded waits for all of them
    value = adapter_of(model, adapter)
    if not together or writes():
        write_native(value, path)
    if together:
        wait()


@own_context()
def write_native(adapter: Adapter, path: PathLike) -> None:
    """Write an adapter as the native file, whole or not at all.

    Keys are ``<path>.lora_A``, ``.lora_B``, ``.lora_scale``, or ``.lora_whole``. The metadata
    keeps `adapter`'s own and adds ``paramlora``, JSON of ``format``, ``adapter`` (its name),
    ``config`` (an entry for each path), ``shapes`` (``{path: {"shape": [...], "layout": "..."}}``,
    of the weights, with ``kind`` and ``groups``), ``base`` (``{path: digits}``, see
    `paramlora.model.digest`), ``ties`` (``{path: first path}`` where tied tensors share one
    update), ``holders`` (``{path: {"kind", "layout", "groups"}}`` of the layers of those that are
    tied, where known) and ``apart`` (``{path: [paths]}`` of layers that hold the tensor of an
    update and do not get it, where there are any).

    Raises:
        FileError: the file cannot be written, or `read_adapter` would refuse it.
    """
    _check_name(path)
    state, metadata = described(adapter, Path(path))
    specs = {key: spec_of(value) for key, value in state.items()}
    with new_file(path) as file:
        write_safetensors(file, specs, metadata, lambda key: pieces_of(state[key]))


def _check_name(path: PathLike) -> None:
    if Path(path).suffix in (".pt", ".pth", ".ckpt", ".bin"):
        raise FileError(
            f"{path}: it would be a safetensors file under a name of torch.save's. Give a name "
            "that ends in .safetensors."
        )
