"""Few rows, each with an update of its own, on CUDA, in the kernels; imported only there."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from paramlora.cuda.decoding import kernels
from paramlora.cuda.device import Card, card
from paramlora.cuda.launch import Launch, on_its_device, outside_of_pools, planned
from paramlora.cuda.operands import power

_Maybe = Optional[Tensor]
HIGHEST = 64  # rank
_TILES = (64, 128, 2, 3, 4)  # columns, depth, programs for each processor, stages, warps
_HELD, _COLUMNS = 16384, 16384  # numbers of an A and of a B that a program holds
_PLANS: dict[Any, Any] = {}
_TABLES: dict[Any, Tensor] = {}
_CAPTURED: dict[Any, Tensor] = {}  # read by CUDA graphs, which do not keep them alive


class Part(NamedTuple):
    """An update: A ``[r, in]``, B ``[out, r]``, its scale and its strength, a number each."""

    a: Tensor
    b: Tensor
    scale: Tensor
    gain: Tensor


class Table(NamedTuple):
    """Updates by their addresses on the device, and one tensor of each kind, for its type."""

    at: Tensor
    like: Part
    rank: int  # of all of them, or 0
    most: int


def table_of(parts: Sequence[Part], weight: Tensor) -> Optional[Table]:
    """The updates of a weight, or None where the kernels do not serve them.

    A table is made once for tensors of such addresses and shapes, as a copy to the device waits for
    it; none can be made while a CUDA graph is captured.
    """
    told = tuple((t.data_ptr(), t.dtype, t.shape) for part in parts for t in part)
    ranks = {part.a.shape[0] for part in parts}
    rank, most = (ranks.pop() if len(ranks) == 1 else 0), max(len(part.a) for part in parts)
    key = (weight.get_device(), weight.shape, told)
    found = _TABLES.get(key)
    captured = torch.cuda.is_current_stream_capturing()
    if found is None:
        if captured or not _fit(parts, weight):
            return None
        if len(_TABLES) >= 1024:
            _TABLES.clear()
        addresses = [[getattr(part, name).data_ptr() for part in parts] for name in Part._fields]
        found = _TABLES[key] = outside_of_pools(lambda: _placed(addresses, weight.device))
    if captured:
        _CAPTURED[key] = found
    return Table(found, parts[0], rank, most)


def _placed(addresses: list[list[int]], device: torch.device) -> Tensor:
    return torch.tensor(addresses, dtype=torch.int64, device=device)


def _fit(parts: Sequence[Part], weight: Tensor) -> bool:
    """Whether all are what the kernels take them for, of one type and on the weight's device."""
    (out, fan_in), device = weight.shape, weight.get_device()
    types = tuple(t.dtype for t in parts[0])
    return types[0] == types[1] and all(
        part.a.shape[1] == fan_in
        and part.b.shape == (out, len(part.a))
        and 0 < len(part.a) <= HIGHEST
        and part.scale.numel() == part.gain.numel() == 1
        and tuple(t.dtype for t in part) == types
        and all(t.is_contiguous() and t.get_device() == device for t in part)
        and not (part.a.data_ptr() | part.b.data_ptr()) & 15
        for part in parts
    )


@on_its_device
def product(
    x: Tensor,
    weight: Tensor,
    bias: _Maybe,
    taken: Tensor,
    starts: Tensor,
    table: Table,
    positions: int,
) -> Tensor:
    """``x (W + s_i B_i A_i)ᵀ + bias`` of each row, rounded once.

    Args:
        x: ``[M, in]``, contiguous rows, few enough for one tile.
        weight: ``[out, in]``, contiguous rows.
        bias: ``[out]``, contiguous.
        taken, starts: as of `paramlora.cuda.routed.plan.Sorted`.
        table: the updates.
        positions: rows of each that was asked for.
    """
    tensors = (x, weight, taken, starts, table.at, *table.like, weight if bias is None else bias)
    rest = (bias is not None, table.rank, table.most, positions)

    def made(_: Any) -> Any:
        return _launches(x, weight, bias is not None, table, positions, card(x.get_device()))

    (launches, (size, parts)), addresses = planned(_PLANS, tensors, rest, made)
    (px, pw, pt, ps, pa, pf, _, pscale, pgain, pbias) = addresses
    scratch, y = x.new_empty(size, dtype=torch.float32), x.new_empty(len(x), len(weight))
    pp = scratch.data_ptr()
    pu, (a, _, scale, gain) = pp + 4 * parts, table.like
    shared, places = (taken, starts, table.at, a), (pt, ps, pa, pf)
    launches[0]((x, scratch, *shared), (px, pu, *places))
    launches[1]((x, weight, scratch), (px, pw, pp))
    launches[2](
        (scratch, scratch, y, tensors[-1], *shared, scale, gain),
        (pp, pu, y.data_ptr(), pbias, *places, pscale, pgain),
    )
    return y


def _launches(
    x: Tensor, weight: Tensor, bias: bool, table: Table, positions: int, of: Card
) -> tuple[tuple[Launch, Launch, Launch], tuple[int, int]]:
    """The launches; how many numbers the first two leave for the third, and how many of them are of
    the wide product, a multiple of four."""
    (M, K), N, updates, device = x.shape, len(weight), table.at.shape[1], x.get_device()
    RB, BM, early = power(max(table.most, 16)), max(16, power(M)), of.hopper
    deep = max(16, _HELD // RB)
    thin = max(1, min(4, -(-K // deep)))
    BN, BK, waves, stages, warps = _TILES
    BK = BK if BM <= 64 else 64  # fits the shared memory of every device
    tiles = -(-N // BN)
    splits = max(1, min(8, waves * of.processors // tiles, -(-K // BK)))
    each = -(-K // (splits * BK)) * BK
    splits = -(-K // each)
    columns = max(16, _COLUMNS // RB)
    own = ((thin, early, table.rank, RB, deep), (splits, K % each == 0, early, BM, BN, BK))
    numbers = (
        (M, K, updates, positions, x.stride(0)),
        (M, N, K, x.stride(0), weight.stride(0), each),
        (M, N, updates, positions),
    )
    last = (bias, thin, splits, early, table.rank, RB, columns)
    grids = (M * thin, tiles * splits, M * -(-N // columns))
    made = (
        Launch(kernels.thin, device, grids[0], numbers[0], own[0], 1, 4),
        Launch(kernels.wide, device, grids[1], numbers[1], own[1], stages, warps, early),
        Launch(kernels.finish, device, grids[2], numbers[2], last, 1, 4, early),
    )
    parts = splits * M * N
    parts += -parts % 4
    return made, (parts + thin * M * RB, parts)
