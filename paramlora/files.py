"""Adapters on disk: one safetensors file that describes itself, written whole or not at all."""

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional, Union

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from paramlora.attach import attach, detach, updates
from paramlora.config import FROM_WEIGHT, LoRAConfig, TargetConfig
from paramlora.errors import ConfigError, FileError
from paramlora.sharded import gathered, is_sharded, wait, writes
from paramlora.state import adapter_state_dict, load_adapter_state_dict

PathLike = Union[str, "os.PathLike[str]"]
FORMAT = 1


def save_adapter(model: nn.Module, path: PathLike, adapter: str = "default") -> None:
    """Write one adapter and its configuration; an older file at `path` survives a failure.

    The file holds the tensors of `adapter_state_dict` and, in its metadata under ``paramlora``,
    ``{"format": 1, "config": {...}, "adapter": "..."}``: `load_adapter` needs nothing else. Where
    the adapter is sharded over processes all of them call this; the first one writes.

    Raises:
        AdapterError: `adapter` is not attached.
        FileError: the file cannot be written.
    """
    live = adapter_state_dict(model, adapter)
    state = {k: gathered(v).contiguous() for k, v in live.items()}
    config = LoRAConfig(tuple(_entries(model, adapter)))
    about = {"format": FORMAT, "config": config.to_dict(), "adapter": adapter}
    together = any(is_sharded(v) for v in live.values())
    if not together or writes():
        _write(Path(path), save(state, {"paramlora": json.dumps(about)}))
    if together:
        wait()


def load_adapter(model: nn.Module, path: PathLike, adapter: Optional[str] = None) -> nn.Module:
    """Attach the adapter in a file written by `save_adapter`; all or nothing.

    Args:
        model: the model that it was trained for, or one with the same targets.
        path: the file.
        adapter: a name of your own instead of the file's.

    Raises:
        FileError: the file is missing, truncated, of another tool, or does not fit the model.
        TargetError: the file's configuration does not fit the model.
        AdapterError: an adapter of that name is attached already.
    """
    about, state = _read(Path(path))
    name = str(about["adapter"]) if adapter is None else adapter
    config = LoRAConfig.from_dict(about["config"], source=Path(path).name)
    before = [(p, p.requires_grad) for p in model.parameters()]
    attach(model, config, name, strict=True)
    try:
        load_adapter_state_dict(model, state, name)
    except BaseException:
        detach(model, name)
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
        raise
    return model


def _entries(model: nn.Module, adapter: str) -> list[TargetConfig]:
    found = [update.entry for _, _, update in updates(model) if update.adapter == adapter]
    return [_plain(entry) for entry in dict.fromkeys(found) if entry is not None]


def _plain(entry: TargetConfig) -> TargetConfig:
    """The entry of what is saved, which starts from its own values."""
    r = 2 * entry.r if entry.init in FROM_WEIGHT else entry.r
    return replace(entry, r=r, init="default")


def _write(path: Path, content: bytes) -> None:
    temporary: Optional[str] = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror}.") from error
    finally:
        if temporary is not None:
            os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}
    except OSError as error:
        reason = error.strerror or "no such file"
        raise FileError(f"{path}: cannot be read: {reason}.") from error
    except SafetensorError as error:
        raise FileError(
            f"{path}: not a whole safetensors file ({error}). Copy or save it again."
        ) from error
    return _about(path, metadata), state


def _about(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if "paramlora" not in metadata:
        raise FileError(
            f'{path}: no "paramlora" in its metadata, so another tool wrote it. Attach a '
            "configuration and use load_adapter_state_dict with renamed keys."
        )
    try:
        about: dict[str, Any] = json.loads(metadata["paramlora"])
        version, _, _ = about["format"], about["adapter"], about["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(f'{path}: its "paramlora" metadata is damaged: {error}.') from error
    if version != FORMAT:
        raise FileError(f"{path}: format {version!r}; this paramlora reads {FORMAT}. Upgrade it.")
    try:
        LoRAConfig.from_dict(about["config"], source=path.name)
    except ConfigError as error:
        raise FileError(f"{path}: its configuration is damaged: {error}") from error
    return about
