"""One update of one tensor: what it is, its arithmetic, its value; no model is known here.

A file with a class that is registered (see `kinds`) is a kind of update: no other names it.
"""

from importlib import import_module
from pkgutil import iter_modules

for _file in iter_modules(__path__):  # so that a new kind's file is all that makes it known
    import_module(f"{__name__}.{_file.name}")
