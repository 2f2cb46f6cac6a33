"""Which rows of a batch take which update of a tensor."""

import threading
from typing import Optional

import torch
from torch import Tensor

from paramlora.errors import AdapterError

UNSPLIT = ""  # no adapter has such a name
_FEW, _MANY = 16, 64  # rows of one adapter that are multiplied at once, where each row is short


class _Only(threading.local):  # no context variable, which torch.compile does not read
    """The adapter of the rows that a layer is called with alone, None where those are the base's;
    of each thread."""

    adapter: Optional[str] = UNSPLIT


ONLY = _Only()


class Rows:
    """The rows of a batch by the adapters of one tensor; made anew for each batch.

    Args:
        names: the adapters with an update of that tensor, in their order there.
        index: ``[N]``, which of them each row takes; ``len(names)`` is none, the base.
        dim: where the rows lie in an input that does not tell.

    Attributes:
        places: ``[N]``, where each row lies once all are in blocks of rows of one adapter, or None
            where there are too few for that.
        owners: ``[blocks]``, which adapter each block belongs to.
        block: how many rows a block has.
    """

    # not a tuple, nor frozen: torch.compile would guard all of it, where it reads some attributes
    __slots__ = ("names", "index", "dim", "places", "owners", "block")

    def __init__(self, names: tuple[str, ...], index: Tensor, dim: int) -> None:
        self.names, self.index, self.dim = names, index, dim
        self.places: Optional[Tensor] = None
        self.owners: Optional[Tensor] = None
        count, adapters = len(index), len(names) + 1
        self.block = _MANY if count > 2 * _MANY * adapters else _FEW
        blocks = count // self.block + adapters  # however the rows are spread
        # of a rank of 16 or so; else each row having its own copy of its factors is less to move
        if 16 * count > (16 + self.block) * blocks:
            self.places, self.owners = _blocks(index, adapters, blocks, self.block)


def _blocks(index: Tensor, count: int, blocks: int, block: int) -> tuple[Tensor, Tensor]:
    """`Rows.places` and `Rows.owners`, with nothing that waits for a device."""
    order = torch.argsort(index, stable=True)
    ordered = index[order]
    sizes = index.new_zeros(count).scatter_add(0, index, torch.ones_like(index))
    needed = (sizes + block - 1) // block
    ends = needed.cumsum(0)
    start = (ends - needed) * block  # [count], of each adapter's first block
    within = torch.arange(len(index), device=index.device) - (sizes.cumsum(0) - sizes)[ordered]
    places = torch.empty_like(index).scatter_(0, order, start[ordered] + within)
    every = torch.arange(blocks, device=index.device)
    return places, torch.bucketize(every, ends, right=True).clamp_(max=count - 1)


def wrong_rows(kind: type, x: Tensor, dim: int, count: int) -> AdapterError:
    """That an input of a layer has not the rows that `route` was given."""
    plain = kind.__bases__[0] if kind.__name__.startswith("Parametrized") else kind
    return AdapterError(
        f"{plain.__name__} was given an input of shape {list(x.shape)}, whose dimension {dim} is "
        f"not the {count} rows of paramlora.route. Give route the rows of this batch, or their dim."
    )
