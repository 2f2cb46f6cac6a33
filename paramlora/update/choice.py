"""Which rows of a batch take which update of a tensor."""

import threading
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from paramlora.errors import AdapterError, counted
from paramlora.update.compat import current_backward

# not None, which stands for the base's rows
UNSPLIT = ""  # no adapter has such a name
_RANKS = 16  # that are multiplied at once
_FEW, _MANY = 16, 64  # rows of one adapter that are multiplied at once, where each row is short


class _Only(threading.local):  # no context variable, which torch.compile does not read
    """The adapter of the rows that a layer is called with alone, None where those are the base's;
    of each thread."""

    adapter: Optional[str] = UNSPLIT


ONLY = _Only()


def padded(rank: int) -> int:
    """The rank as which an update is multiplied: 16 or the next power of two, zeros behind its own.

    So no sum of an update's is ordered by another's rank, and each is, bit for bit, the same
    whichever adapters are beside it.
    """
    # a rank of 0 is an update that adds no product, and takes no ranks
    return max(_RANKS, 1 << (rank - 1).bit_length()) if rank else 0


def steps(ranks: int) -> list[slice]:
    """The ranks that are multiplied at once: the first 16, those up to 32, up to 64, and so on."""
    # a rank of 64 has the steps 16, 16 and 32: the first ones are those of a smaller rank
    bounds = [0, _RANKS]
    while bounds[-1] < ranks:
        bounds.append(2 * bounds[-1])
    return list(map(slice, bounds, bounds[1:]))


class Flattened:
    """Whether positions ``[rows · some, ..., side]`` are a batch's, one row's after another's.

    A tensor tells it that is a view of one with the rows in front, as ``x.view(-1, side)`` is, or
    the windows of images; and beside a layer that was given such a one, in the same module,
    another that is given as many positions, as inside of an MLP. A choice among positions, such as
    a router's, tells neither.

    Args:
        parents: by the number (`id`) of a layer the path of the module that holds it.
    """

    __slots__ = ("parents", "seen")

    def __init__(self, parents: dict[int, str]) -> None:
        self.parents = parents
        # by module, and by thread, how many positions it was given: each calls with its own batch
        self.seen: dict[str, dict[int, int]] = {}

    def holds(self, layer: object, x: Tensor, count: int) -> bool:
        """Whether a layer's input is such a batch of so many rows."""
        parent = self.parents.get(id(layer))
        if x.dim() < 2 or parent is None or not count or len(x) % count:
            return False
        # `_base` is what a view was made of
        base, positions = x._base, x.shape[:-1].numel()
        seen = self.seen.setdefault(parent, {})
        if base is not None and base.shape[:1] == (count,) and _same_memory(x, base):
            seen[threading.get_ident()] = positions
            return True
        # no view of the batch: as many positions as one beside it was given
        if seen.get(threading.get_ident()) == positions:
            return True
        # a backward has threads of its own, and its forward was any
        return current_backward() != -1 and positions in seen.values()


def _same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether both are all of one memory in its own order."""
    # contiguous, as large and at the same address: one order of the numbers
    dense = one.is_contiguous() and other.is_contiguous() and one.numel() == other.numel()
    return dense and one.data_ptr() == other.data_ptr()


class Sorted(NamedTuple):
    """Which update each row takes, as whole numbers of 32 bits on the device, for kernels.

    Args:
        taken: ``[N]``, the update of each row, one beyond them for none.
        order: ``[N]``, the rows sorted by their update.
        ends: ``[updates]``, where each one's positions end among the sorted ones.
        spans: ``[2, N]``, where the ranks of each row's update start and end among those of all.
        starts: ``[updates + 1]``, where each one's ranks start.
        owner: ``[ranks]``, whose each of these is.
        held: ``[updates]``, the rank of each, which is filled up to that many.
        positions: of each row.
        each: the ranks that the updates are filled up to.
        ranks: all of these.
        most: the largest of these.
        places: the addresses of the tensors.
    """

    taken: Tensor
    order: Tensor
    ends: Tensor
    spans: Tensor
    starts: Tensor
    owner: Tensor
    held: Tensor
    positions: int
    each: tuple[int, ...]
    ranks: int
    most: int
    places: tuple[int, ...]


class Choice:
    """The rows of a batch by the adapters of one tensor; made anew for each batch.

    How rows are multiplied depends on how many there are, and on nothing that is of one adapter.

    Args:
        names: the adapters with an update of that tensor, in their order there.
        ranks: of each.
        index: ``[N]``, which of them each row takes; ``len(names)`` is none, the base.
        dim: where the rows lie in an input that does not tell.
        packed: each is a position of a packed sequence.
        flattened: tells of an input without rows whether it is the batch's positions.

    Attributes:
        ranks: of each, `padded`.
        picks: where the ranks of each row's update lie among those of all updates one after the
            other, and ``sum(ranks)``, a rank of zeros, beyond them: ``[N, r]`` of each of `steps`.
        owner: ``[sum(ranks) + 1]``, whose each of these ranks is.
        places: ``[N]``, where each row lies once all are in blocks of rows of one adapter, or None
            where there are too few for that.
        block_picks: as `picks` of each block.
        block: how many rows a block has.
        starts: ``[updates + 1]``, where each one's ranks start, as whole numbers of 32 bits.
        held: ``[updates]``, the rank of each, not `padded`, likewise.
        taken: the index, as such numbers.
        spans: ``[2, N]``, where the ranks of each row's update start and where they end, likewise.
    """

    # not a tuple, nor frozen: torch.compile would guard all of it, where it reads some attributes
    __slots__ = (
        "names", "ranks", "index", "dim", "packed", "flattened", "picks", "owner",
        "places", "block_picks", "block", "starts", "held", "taken", "spans", "_sorted",
        "_given", "_there",
    )  # fmt: skip

    def __init__(
        self,
        names: tuple[str, ...],
        ranks: tuple[int, ...],
        index: Tensor,
        dim: int,
        packed: bool = False,
        flattened: Optional[Flattened] = None,
    ) -> None:
        self.names, self.index, self.dim, self.packed = names, index, dim, packed
        self.flattened, self.ranks, self._given = flattened, tuple(map(padded, ranks)), ranks
        self._there: Optional[dict[torch.device, Choice]] = None
        self.places: Optional[Tensor] = None
        self.block_picks: tuple[Tensor, ...] = ()
        table, self.owner, self.starts, self.held = _ranks(ranks, self.ranks, index)
        # by the positions of a row: a layer is called with the same number again and again
        self._sorted: dict[int, Sorted] = {}
        self.taken = index.int()
        # the last of `starts` is the end of all, where the base's rank of zeros is
        self.spans = torch.stack([self.starts, torch.cat([self.starts[1:], self.starts[-1:]])])
        self.spans = self.spans[:, index]
        self.picks = _steps(table[index])
        count, adapters = len(index), len(names) + 1
        self.block = _MANY if count > _MANY * _FEW else _FEW
        # else each row having its own copy of its factors is less to move
        if count > 4 * _FEW:
            blocks = min(count, count // self.block + adapters)  # however the rows are spread
            self.places, owners = _blocks(index, adapters, blocks, self.block)
            self.block_picks = _steps(table[owners])

    def on(self, device: torch.device) -> "Choice":
        """The choice on a device, where a model is moved: one for all updates that ask, and the
        first one again where it comes back, of which the meta device would have lost the values."""
        if device == self.index.device:
            return self
        # made late: it holds itself
        there = {self.index.device: self} if self._there is None else self._there
        self._there = there
        if device not in there:
            rest = self.dim, self.packed, self.flattened
            there[device] = Choice(self.names, self._given, self.index.to(device), *rest)
            there[device]._there = there
        return there[device]

    def sorted_by(self, positions: int) -> Sorted:
        """The rows by their updates, of so many positions each; found once."""
        found = self._sorted.get(positions)
        if found is None:
            found = self._sort(positions)
            # what a CUDA graph computes has its values, and its memory, in that graph alone
            if not (self.index.is_cuda and torch.cuda.is_current_stream_capturing()):
                self._sorted[positions] = found
        return found

    def _sort(self, positions: int) -> Sorted:
        # stable: rows of one adapter stay in order, and so do their sums
        ordered, order = torch.sort(self.index, stable=True)
        every = torch.arange(len(self.names), device=order.device)
        # in positions, of which each row has as many
        ends = torch.searchsorted(ordered, every, right=True) * positions
        tensors = (
            *(self.taken, order.int(), ends.int(), self.spans),
            *(self.starts, self.owner, self.held),
        )
        places, each = tuple(t.data_ptr() for t in tensors), self.ranks
        return Sorted(*tensors, positions, each, sum(each), max(each), places)


def _steps(picks: Tensor) -> tuple[Tensor, ...]:
    """Picks ``[N, ranks]``, cut into one tensor for each of the `steps` of the ranks."""
    return tuple(picks[:, some].contiguous() for some in steps(picks.shape[1]))


def _ranks(
    held: tuple[int, ...], ranks: tuple[int, ...], index: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tables of a `Choice`, on the index's device: the picks of each adapter and of the base,
    not yet cut into `steps`, and its `owner`, `starts` and `held`."""
    every = sum(ranks)
    # filled with the rank of zeros, which rows of a smaller rank and the base pick
    table = index.new_full((len(ranks) + 1, max(ranks, default=0)), every)
    owner, start = index.new_full((every + 1,), len(ranks)), 0
    starts = index.new_zeros(len(ranks) + 1, dtype=torch.int32)
    own = index.new_zeros(len(ranks), dtype=torch.int32)
    for at, r in enumerate(ranks):  # in slices, which copy nothing from the host
        # `arange` and slices are made on the device: a list would be copied to it, and waited for
        table[at, :r] = torch.arange(start, start + r, device=index.device)
        owner[start : start + r] = at
        start += r
        starts[at + 1], own[at] = start, held[at]
    return table, owner, starts, own


def _blocks(index: Tensor, count: int, blocks: int, block: int) -> tuple[Tensor, Tensor]:
    """Where each row lies once rows are in blocks (`Choice.places`), and which adapter's each block
    is; with nothing that waits for a device."""
    order = torch.argsort(index, stable=True)
    ordered = index[order]
    sizes = index.new_zeros(count).scatter_add(0, index, torch.ones_like(index))
    needed = (sizes + block - 1) // block
    ends = needed.cumsum(0)
    start = (ends - needed) * block  # [count], of each adapter's first block
    # which of its adapter's rows each one is
    within = torch.arange(len(index), device=index.device) - (sizes.cumsum(0) - sizes)[ordered]
    places = torch.empty_like(index).scatter_(0, order, start[ordered] + within)
    every = torch.arange(blocks, device=index.device)
    # blocks behind the last are of nobody, and hold zeros
    return places, torch.bucketize(every, ends, right=True).clamp_(max=count - 1)


def wrong_rows(kind: type, x: Tensor, dim: int, count: int, packed: bool = False) -> AdapterError:
    """The error of an input that has not the rows that `route` was given."""
    # by the name of the user's class
    plain = kind.__bases__[0] if kind.__name__.startswith("Parametrized") else kind
    rows = counted(count, "position" if packed else "row")
    return AdapterError(
        f"{plain.__name__} was given an input of shape {list(x.shape)}, whose dimension {dim} is "
        f"not the {rows} of paramlora.route. Give route the rows of this batch, or their dim. "
        "Where a layer is given no rows, such as a table of positions, detach the adapters from "
        "it, or call the model once for each (set_adapters)."
    )
