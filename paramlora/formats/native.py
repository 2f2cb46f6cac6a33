"""The native format as a value; what its files hold is told by `paramlora.native`."""

from typing import Any, Optional

from paramlora.adapter import Adapter
from paramlora.formats.base import Base
from paramlora.formats.content import DEFAULTS, Content, Options
from paramlora.formats.format import Format, Mark
from paramlora.native import NATIVE, checked_entries, described, native_of


def read(content: Content, base: Optional[Base] = None, options: Options = DEFAULTS) -> Adapter:
    """The adapter in a native file, which needs neither a model nor options.

    Raises:
        FileError: its tensors or its metadata are damaged.
    """
    return native_of(content.path or content.source, content.metadata, content.state)


def write(adapter: Adapter, base: Optional[Base] = None, **_: Any) -> Content:
    """An adapter with all that it has, and its metadata.

    Raises:
        FileError: `read` would refuse it.
    """
    return Content(*described(adapter, "adapter"))


def _check(content: Content) -> None:
    checked_entries(content.path or content.source, content.metadata, content.state)


FORMAT = Format(
    NATIVE,
    marks=(Mark(0, lambda content: "paramlora" in content.metadata),),
    read=read,
    write=write,
    weights=("adapter.safetensors",),
    weights_rank=50,
    complete=True,
    check=_check,
)
