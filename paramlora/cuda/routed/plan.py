"""The products of rows that take different updates on CUDA, in the kernels; imported only there."""

from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from paramlora.cuda.decoding.plan import Table
from paramlora.cuda.device import Card, card
from paramlora.cuda.experts.plan import added, parts_of
from paramlora.cuda.launch import Launch, on_its_device, planned
from paramlora.cuda.linear.tiles import tiling
from paramlora.cuda.operands import DEEP, power
from paramlora.cuda.routed import kernels

_Maybe = Optional[Tensor]
_PLANS: dict[Any, Any] = {}
_TOGETHER = 32  # ranks, whosever they are, that one step of a product adds
_SUMS = (64, 4, 8)  # rows of a step of the gradients, stages, warps


class Sorted(NamedTuple):
    """Which update each row takes, as whole numbers of 32 bits on the device.

    Args:
        taken: ``[N]``, the update of each row, one beyond them for none.
        order: ``[N]``, the rows sorted by their update.
        ends: ``[updates]``, where each one's positions end among the sorted ones.
        spans: ``[2, N]``, where the ranks of each row's update start and end among those of all.
        starts: ``[updates + 1]``, where each one's ranks start.
        owner: ``[ranks]``, whose each of these is.
        held: ``[updates]``, the rank of each, which is filled up to that many.
        most: the largest of these.
        positions: of each row.
    """

    taken: Tensor
    order: Tensor
    ends: Tensor
    spans: Tensor
    starts: Tensor
    owner: Tensor
    held: Tensor
    most: int
    positions: int


@on_its_device
def packed(table: Table, by: Sorted, ranks: int, like: Tensor, sizes: tuple[int, int]) -> Tensor:
    """All updates' factors in the type of `like`, ``[ranks, in]`` and behind them ``s_i B_iᵀ``,
    ``[ranks, out]``.

    Args:
        table: the updates.
        by: which update each row takes.
        ranks: of all of them.
        like: a tensor of the type, on the device.
        sizes: in, out.
    """
    (fan_in, out), kept = sizes, like.new_empty(ranks * sum(sizes))
    place, (a, _, scale, gain) = kept.data_ptr(), table.like
    tensors = (table.at, by.starts, by.held, kept, a, scale, gain)

    def made(_: Any) -> Launch:
        RB, updates = power(max(by.most, 16)), table.at.shape[1]
        deep = 4096 // RB
        inner, outer = -(-fan_in // deep), -(-out // deep)
        early = card(kept.get_device()).hopper
        numbers, constants = (updates, fan_in, out, inner), (early, table.rank, RB, deep)
        grid = (inner + outer) * updates
        return Launch(kernels.pack, like.get_device(), grid, numbers, constants, 1, 4)

    rest = ("pack", by.most, table.rank, ranks, sizes)
    launch, (at, starts, held, _, first, *numbers) = planned(_PLANS, tensors, rest, made)
    behind = place + ranks * fan_in * kept.element_size()
    launch(
        (table.at, by.starts, by.held, kept, kept[ranks * fan_in :], a, scale, gain),
        (at, starts, held, place, behind, first, *numbers),
    )
    return kept


@on_its_device
def thin(x: Tensor, f: Tensor, by: Sorted) -> Tensor:
    """``x f_iᵀ`` ``[M, width]``, in x's type; rows of no update are not written.

    Args:
        x: ``[M, K]``, contiguous rows.
        f: ``[ranks, K]``, any strides, of x's type.
        by: which update each row takes.
    """
    p = x.new_empty(len(x), by.most + -by.most % 8)
    tensors = (x, f, p, by.order, by.ends, by.starts)
    rest = (by.most, by.positions)

    def made(_: Any) -> Launch:
        (M, K), updates, RB = x.shape, len(by.ends), power(max(p.shape[1], 16))
        BM, BK = 64, 64  # leaves shared memory for the product, which starts before it ends
        numbers = (M, K, updates, by.positions, x.stride(0), *f.stride(), p.shape[1])
        early = card(x.get_device()).hopper
        constants = (early, K % BK == 0, power(updates + 1), RB, BM, BK)
        grid = M // BM + updates
        return Launch(kernels.project, x.get_device(), grid, numbers, constants, 4, 4, early)

    launch, addresses = planned(_PLANS, tensors, ("thin", *rest), made)
    launch(tensors, addresses)
    return p


@on_its_device
def product(x: Tensor, w: Tensor, p: Tensor, q: Tensor, by: Sorted, bias: _Maybe = None) -> Tensor:
    """``x w + p_i q_i + bias``, rounded once.

    Args:
        x: ``[M, K]``, contiguous rows.
        w: ``[K, N]``, one side contiguous.
        p: ``[M, width]``, as of `thin`.
        q: ``[ranks, N]``, any strides, of x's type.
        by: which update each row takes.
        bias: ``[N]``, contiguous.
    """
    y, last = x.new_empty(len(x), w.shape[1]), w if bias is None else bias
    tensors = (x, w, y, p, q, by.taken, by.spans, by.starts, by.owner, last)
    rest = (by.most, by.positions, bias is not None)

    def made(addresses: tuple[int, ...]) -> Any:
        even = not any(address & 15 for address in addresses[:2])
        return _product(x, w, p, q, by, bias is not None, even, card(x.get_device()))

    launch, addresses = planned(_PLANS, tensors, ("product", *rest), made)
    loaded = len(launch.layouts)
    launch(tensors[loaded:], addresses[loaded:], (), tensors[:loaded])
    return y


def _product(
    x: Tensor, w: Tensor, p: Tensor, q: Tensor, by: Sorted, bias: bool, even: bool, of: Card
) -> Launch:
    (M, K), N, (w_k, w_n), x_row = x.shape, w.shape[1], w.stride(), x.stride(0)
    rows_out = w_k == 1
    step = w_n if rows_out else w_k
    aligned = even and not (x_row | step | N) & 7 and (rows_out or K % 64 == 0)
    aligned = of.hopper and aligned and step > 0
    BM, BN, BK, GROUP, stages, warps, tma = tiling(M, N, K, of.processors, aligned, False, True)
    updates, rows = len(by.ends), len(by.taken)
    numbers = (M, N, K, updates, rows, by.positions, x_row, w_k, w_n, *q.stride(), p.shape[1])
    RB = power(max(by.most, 16))
    alone = by.positions % BM == 0
    constants = (
        of.hopper, alone, bias, tma, rows_out, K % BK == 0, RB, _TOGETHER, BM, BN, BK, GROUP,
    )  # fmt: skip
    grid = -(-M // BM) * -(-N // BN)
    of_w = ([N, K], [step, 1], [BN, BK]) if rows_out else ([K, N], [step, 1], [BK, BN])
    of_y = ([M, N], [N, 1], [BM, BN // 2])
    layouts = (([M, K], [x_row, 1], [BM, BK]), of_w, of_y) if tma else ()
    more = stages, warps, of.hopper, layouts
    return Launch(kernels.product, x.get_device(), grid, numbers, constants, *more)


@on_its_device
def sums(
    x: Tensor,
    v: _Maybe,
    dy: Tensor,
    u: _Maybe,
    by: Sorted,
    ranks: int,
    wanted: tuple[bool, bool],
    table: Optional[Table] = None,
    beside: bool = False,
) -> tuple[_Maybe, _Maybe]:
    """``v_iᵀ x_i`` and ``u_iᵀ dy_i`` where they are wanted, in float32; zeros of no update.

    Of a `table` the second are ``s_i dy_iᵀ u_i [out, r_i]``, each from where its ranks start, and
    no number beyond an update's own ranks is written; `ranks` are then those of the updates alone.

    Args:
        x: ``[M, in]``; dy: ``[M, out]``; contiguous rows.
        v, u: ``[M, width]``, as of `thin`; what is not wanted needs none.
        by: which update each row takes.
        ranks: of all updates, and of none.
        wanted: of ``[ranks, in]``, and of ``[ranks, out]``.
        beside: the launch right ahead is a `product` of v, which it may run beside.
    """
    (M, fan_in), out, updates = x.shape, dy.shape[1], len(by.ends)
    inner, outer = (-(-n // DEEP) * want for n, want in zip((fan_in, out), wanted))
    parts = parts_of(M, updates, inner + outer, card(x.get_device()))
    new: Any = x.new_zeros if table is None else x.new_empty  # then all of it is written
    of_a = new(parts * wanted[0], ranks, fan_in, dtype=torch.float32)
    of_b = new(parts * wanted[1], ranks, out, dtype=torch.float32)
    thins: Any = (v if wanted[0] else u, u if wanted[1] else v)  # one stands in for the other
    written = (of_a if wanted[0] else of_b, of_b if wanted[1] else of_a)
    more = (by.starts,) * 3 if table is None else (table.at, table.like.scale, table.like.gain)
    tensors = (x, thins[0], dy, thins[1], *written, by.order, by.ends, by.starts, by.held, *more)

    def made(_: Any) -> Launch:
        numbers = (
            M, fan_in, out, updates, ranks, by.positions, thins[0].shape[1],
            x.stride(0), dy.stride(0), inner, parts,
        )  # fmt: skip
        apart = table is not None
        RB = power(max(by.most, 16))
        BM, stages, warps = _SUMS
        early = beside and card(x.get_device()).hopper
        constants = (early, apart, power(updates + 1), RB, DEEP, BM)
        grid = (inner + outer) * updates * parts
        device = x.get_device()
        return Launch(kernels.gradients, device, grid, numbers, constants, stages, warps, early)

    rest = ("sums", by.most, by.positions, wanted, table is None, beside)
    launch, addresses = planned(_PLANS, tensors, rest, made)
    launch(tensors, addresses)
    da, db = (added(t) if want else None for t, want in zip((of_a, of_b), wanted))
    return da, db
