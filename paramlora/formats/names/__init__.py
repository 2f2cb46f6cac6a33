"""What tools call the weights of each architecture: one file of data for each.

A file of this folder with a `Table` called ``TABLE`` is known: no other names it.
"""

from importlib import import_module
from pkgutil import iter_modules

from paramlora.formats.names.table import Name, Row, Table, Template

__all__ = ["TABLES", "Name", "Row", "Table", "Template"]

TABLES: dict[str, Table] = {
    file.name: table
    for file in iter_modules(__path__)
    if (table := getattr(import_module(f"{__name__}.{file.name}"), "TABLE", None)) is not None
}
