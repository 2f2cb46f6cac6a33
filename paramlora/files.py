"""Tensors on disk: read as they are asked for, written whole or not at all."""

import os
import tempfile
from pathlib import Path
from typing import Optional, Union

from paramlora.errors import FileError

PathLike = Union[str, "os.PathLike[str]"]


def write_whole(path: Path, content: bytes) -> None:
    """Put `content` at `path`: a crash leaves the older file or the new one.

    Raises:
        FileError: the place cannot be written.
    """
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
