"""Files: checkpoints and adapters, read and written within bounds; conversions, streamed.

- `merge`, `embed`, `extract`: between checkpoints and adapters.
- `read_adapter`, `write_adapter`, `convert`: an adapter's file of any tool, as a value and back.
- `combine`, `resize`, `difference`: arithmetic (see docs/arithmetic.md).
- `inspect`: what is in a file. `base_of`, `base_of_file`: the names and shapes of a model, out of
  itself or of its checkpoint, for files whose names only it tells. `Options`: what some formats do
  not tell.
"""

from paramlora.files.adapters import base_of_file, convert, format_of, read_adapter, write_adapter
from paramlora.files.arithmetic import combine, difference, resize
from paramlora.files.convert import Report, embed, extract, merge
from paramlora.files.inspect import Inspection, inspect
from paramlora.formats import Base, Options, base_of

__all__ = [
    "Base",
    "Inspection",
    "Options",
    "Report",
    "base_of",
    "base_of_file",
    "combine",
    "convert",
    "difference",
    "embed",
    "extract",
    "format_of",
    "inspect",
    "merge",
    "read_adapter",
    "resize",
    "write_adapter",
]
