"""One update of one tensor: what it is, its arithmetic, its value; no model is known here.

A file with a class that is registered (see `kinds`) is a kind of update: no other names it.
"""

from paramlora.update import difference, dora, loha, lokr, lowrank, rows, whole

__all__ = ["difference", "dora", "loha", "lokr", "lowrank", "rows", "whole"]
