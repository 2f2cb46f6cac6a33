"""Few rows, each with an update of its own, on CUDA, in the kernels; imported only there."""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from paramlora.cuda.decoding import kernels
from paramlora.cuda.device import Card, card
from paramlora.cuda.launch import Launch, on_its_device, outside_of_pools, planned
from paramlora.cuda.operands import power

_Maybe = Optional[Tensor]
HIGHEST = 64  # rank
_WAVES = 2  # programs that read a tile of the weight, for each processor
_OF_A, _OF_B = 8192, 16384  # numbers of either that a program holds
_TYPE, _SHAPE = attrgetter("dtype"), attrgetter("shape")
_PLANS: dict[Any, Any] = {}
_TABLES: dict[Any, Any] = {}
_NONE = (None, None)  # of tensors of no table
_CAPTURED: dict[int, Tensor] = {}  # read by CUDA graphs, which do not keep them alive


class Part(NamedTuple):
    """An update: A ``[r, in]``, B ``[out, r]``, its scale and its strength, a number each."""

    a: Tensor
    b: Tensor
    scale: Tensor
    gain: Tensor


class Table(NamedTuple):
    """Updates by their addresses on the device, and one of them, for the types of its tensors.

    Args:
        at: ``[4, updates]``, the addresses of the A's, the B's, the scales and the strengths.
        like: the first of them.
        ranks: of each.
        rank: of all of them, or 0.
        most: the largest.
        places: the addresses of `at`, and of A, the scale and the strength of `like`.
        kind: all that a launch depends on but these.
    """

    at: Tensor
    like: Part
    ranks: tuple[int, ...]
    rank: int
    most: int
    places: tuple[int, int, int, int]
    kind: tuple[Any, ...]


def table_of(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: Sequence[Tensor],
    gain: Sequence[Tensor],
    weight: Tensor,
) -> Optional[Table]:
    """The updates of a weight, of each A ``[r, in]``, B ``[out, r]``, a scale and a strength; or
    None where the kernels do not serve them.

    A table is made once for tensors of such addresses and shapes, as a copy to the device waits for
    it; none can be made while a CUDA graph is captured.
    """
    tensors = (*a, *b, *scale, *gain)
    # by functions of C alone: in Python's a model's layers would take longer than their products
    key = tuple(map(Tensor.data_ptr, tensors))
    about = [weight.get_device(), weight.shape, *map(_TYPE, tensors), *map(_SHAPE, tensors)]
    about += map(Tensor.is_contiguous, tensors)
    told, known = _TABLES.get(key, _NONE)
    captured = torch.cuda.is_current_stream_capturing()
    if told != about:
        if captured or not _fit(list(map(Part, a, b, scale, gain)), weight):
            return None
        if len(_TABLES) >= 1024:  # of factors that are long gone
            _TABLES.clear()
        known = _known(key, a, Part(a[0], b[0], scale[0], gain[0]), weight.device)
        _TABLES[key] = about, known
    at, rest = known
    if captured:
        _CAPTURED[at.data_ptr()] = at
    return Table(at, Part(a[0], b[0], scale[0], gain[0]), *rest)


def _known(key: tuple[int, ...], a: Sequence[Tensor], like: Part, device: torch.device) -> Any:
    """What stays the same of a table whose tensors have such addresses."""
    count, ranks = len(a), tuple(map(len, a))
    addresses = [list(key[i : i + count]) for i in range(0, len(key), count)]
    at = outside_of_pools(lambda: torch.tensor(addresses, dtype=torch.int64, device=device))
    most = max(ranks)
    rank = most if most == min(ranks) else 0
    places = (at.data_ptr(), key[0], key[2 * count], key[3 * count])
    kind = (ranks, *(t.dtype for t in like), *(place & 15 for place in places))
    return at, (ranks, rank, most, places, kind)


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
        and not (part.a.data_ptr() | part.b.data_ptr()) & 15  # which the kernels assume of all
        for part in parts
    )


@on_its_device
def product(
    x: Tensor,
    weight: Tensor,
    bias: _Maybe,
    taken: Tensor,
    held: Tensor,
    table: Table,
    positions: int,
) -> Tensor:
    """``x (W + s_i B_i A_i)ᵀ + bias`` of each row, rounded once.

    Args:
        x: ``[M, in]``, contiguous rows, few enough for one tile.
        weight: ``[out, in]``, contiguous rows.
        bias: ``[out]``, contiguous.
        taken, held: as of `paramlora.cuda.routed.plan.Sorted`.
        table: the updates.
        positions: rows of each that was asked for.
    """
    tensors = (x, weight, taken, held, table.at, *table.like, weight if bias is None else bias)
    rest = (bias is not None, table.rank, table.most, positions)

    def made(_: Any) -> Any:
        return _launches(x, weight, bias is not None, table, positions, card(x.get_device()))

    (first, second, size, parts), addresses = planned(_PLANS, tensors, rest, made)
    (px, pw, pt, ph, pa, pf, _, pscale, pgain, pbias) = addresses
    # one allocation for both, as each takes the host a good part of a launch
    scratch, y = x.new_empty(size, dtype=torch.float32), x.new_empty(len(x), len(weight))
    pp = scratch.data_ptr()
    thin = pp + 4 * parts  # bytes of float32
    a, scale, gain = table.like.a, table.like.scale, table.like.gain
    shared, places = (taken, held, table.at, a), (pt, ph, pa, pf)
    first((x, weight, scratch, scratch, *shared), (px, pw, pp, thin, *places))
    second(
        (scratch, scratch, y, tensors[-1], *shared, scale, gain),
        (pp, thin, y.data_ptr(), pbias, *places, pscale, pgain),
    )
    return y


def _launches(
    x: Tensor, weight: Tensor, bias: bool, table: Table, positions: int, of: Card
) -> tuple[Launch, Launch, int, int]:
    """Both launches; how many numbers the first leaves for the second, and how many of them are of
    the wide product, a multiple of four."""
    (M, K), N, updates, device = x.shape, len(weight), table.at.shape[1], x.get_device()
    RB, BM = power(max(table.most, 16)), max(16, power(M))
    BN, BK = 32, 128 if BM <= 64 else 64  # fits the shared memory of every device
    tiles = -(-N // BN)
    # a weight of few columns is divided along K too, so that all processors read some of it
    splits = max(1, min(8, _WAVES * of.processors // tiles, -(-K // BK)))
    each = -(-K // (splits * BK)) * BK
    splits = -(-K // each)
    first = Launch(
        kernels.partial,
        device,
        (tiles + M) * splits,
        numbers=dict(
            M=M,
            N=N,
            K=K,
            updates=updates,
            P=positions,
            stride_xm=x.stride(0),
            stride_wn=weight.stride(0),
            k_per_split=each,
        ),
        constants=dict(
            SPLIT_K=splits,
            EVEN_K=K % each == 0,
            EARLY=of.hopper,
            RANK=table.rank,
            BLOCK_R=RB,
            BLOCK_D=max(16, _OF_A // RB),
            BLOCK_M=BM,
            BLOCK_N=BN,
            BLOCK_K=BK,
        ),
        stages=3,
        warps=4,
    )
    columns = max(16, _OF_B // RB)
    second = Launch(
        kernels.finish,
        device,
        M * -(-N // columns),
        numbers=dict(M=M, N=N, updates=updates, P=positions),
        constants=dict(
            BIAS=bias,
            SPLIT_K=splits,
            EARLY=of.hopper,
            RANK=table.rank,
            BLOCK_R=RB,
            BLOCK_N=columns,
        ),
        stages=1,
        warps=4,
        early=of.hopper,
    )
    parts = splits * M * N
    parts += -parts % 4  # the thin sums behind start at a multiple of 16 bytes
    return first, second, parts + splits * M * RB, parts
