"""The products of rows that take different updates on CUDA, in the kernels; imported only there.

`forward` and `backward` are those of a layer whose factors lie apart, each planned once for each
kind of operands, as Python takes longer than the device; `thin`, `product` and `sums` are their
parts, of factors that lie together.
"""

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from paramlora.cuda.decoding.plan import Table
from paramlora.cuda.device import Card, card
from paramlora.cuda.experts.plan import added, parts_of
from paramlora.cuda.launch import Launch, along, on_its_device, planned
from paramlora.cuda.linear.tiles import tiling
from paramlora.cuda.operands import DEEP, power
from paramlora.cuda.routed import kernels
from paramlora.update.choice import Sorted

_Maybe = Optional[Tensor]
_Gradients = Optional[Sequence[Tensor]]
_PLANS: dict[Any, Any] = {}
_FORWARDS: dict[Any, Any] = {}
_BACKWARDS: dict[Any, Any] = {}
_TOGETHER = 32  # ranks, whosever they are, that one step of a product adds
_SUMS = (64, 4, 8)  # rows of a step of the gradients, stages, warps


class Forward:
    """The plan of a forward: the factors cast, the thin product, and the rest."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: bool, table: Table, by: Sorted, even: bool
    ) -> None:
        (N, K), device, size = weight.shape, x.get_device(), x.element_size()
        M, of = x.numel() // K, card(device)
        self.shape, self.size = (*x.shape[:-1], N), by.ranks * (K + N) + M * by.most
        # where the second factors and the thin product lie behind the first factors
        self.up, self.thin = size * by.ranks * K, size * by.ranks * (K + N)
        self.pack = _pack((N, K), device, table, by, of)
        self.project = _project((M, K), device, (K, 1), by, of)
        sizes, w = (M, N, K), weight.stride()[::-1]
        self.product = _product(sizes, device, w, (N, 1), by, bias, even, of)

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: _Maybe,
        table: Table,
        by: Sorted,
        addresses: tuple[int, ...],
    ) -> tuple[Tensor, Tensor]:
        y, kept, (a, _, scale, gain) = x.new_empty(self.shape), x.new_empty(self.size), table.like
        (px, pw, pbias), (at, pa, pscale, pgain), pk = addresses, table.places, kept.data_ptr()
        ptaken, porder, pends, pspans, pstarts, powner, pheld = by.places
        up, thin = pk + self.up, pk + self.thin
        self.pack(
            (table.at, by.starts, by.held, kept, kept, a, scale, gain),
            (at, pstarts, pheld, pk, up, pa, pscale, pgain),
        )
        self.project(
            (x, kept, kept, by.order, by.ends, by.starts), (px, pk, thin, porder, pends, pstarts)
        )
        rest = (by.taken, by.spans, by.starts, by.owner, weight if bias is None else bias)
        self.product(
            (x, weight, y, kept, kept, *rest),
            (px, pw, y.data_ptr(), thin, up, ptaken, pspans, pstarts, powner, pbias),
        )
        return y, kept


@on_its_device
def forward(
    x: Tensor, weight: Tensor, bias: _Maybe, table: Table, by: Sorted
) -> tuple[Tensor, Tensor]:
    """``x (W + s_i B_i A_i)ᵀ + bias`` of each row, rounded once, and what `backward` takes: the
    factors ``A_i`` and ``s_i B_iᵀ`` of all updates in x's type, and ``x A_iᵀ``.

    Args:
        x: ``[N, ..., in]``, contiguous.
        weight: ``[out, in]``, one side contiguous.
        bias: ``[out]``, contiguous.
        table: the updates.
        by: which of them each row takes.
    """

    def made(addresses: tuple[int, ...]) -> Forward:
        even = not (addresses[0] | addresses[1]) & 15
        return Forward(x, weight, bias is not None, table, by, even)

    # how many rows and positions there are x's shape tells, and the ranks the table's kind
    tensors = (x, weight, weight if bias is None else bias)
    plan, addresses = planned(_FORWARDS, tensors, (bias is None, table.kind), made)
    return plan(x, weight, bias, table, by, addresses)  # type: ignore[no-any-return]


class Backward:
    """The plan of a backward: the thin product of the output's gradient, the input's gradient, and
    those of the factors, of which some are wanted."""

    def __init__(
        self,
        dy: Tensor,
        weight: Tensor,
        table: Table,
        by: Sorted,
        wanted: tuple[bool, bool, bool],
        even: bool,
    ) -> None:
        (K, N), device, size = weight.shape, dy.get_device(), dy.element_size()
        M, of = dy.numel() // K, card(device)
        self.wanted, self.shape, self.thin_shape = wanted, (*dy.shape[:-1], N), (M, by.most)
        self.up, self.thin = size * by.ranks * N, size * by.ranks * (K + N)
        self.project = _project((M, K), device, (K, 1), by, of)
        sizes, w = (M, N, K), weight.stride()
        self.product = _product(sizes, device, w, (N, 1), by, False, even, of)
        sizes, of_factors = (M, N, K), wanted[1:]
        self.sums, parts = _sums(sizes, device, by.ranks, by, of_factors, True, wanted[0], of)
        count = len(table.ranks)
        # all gradients as one tensor, which one call takes apart, where nothing lies between them
        self.alike = table.rank == by.most
        self.of_a = (parts, count, by.most, N) if self.alike else (parts, by.ranks * N)
        self.of_b = (parts, count, K, by.most) if self.alike else (parts, by.ranks * K)
        self.dtype = table.like.a.dtype

    def __call__(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        kept: Tensor,
        table: Table,
        by: Sorted,
        addresses: tuple[int, ...],
    ) -> tuple[_Maybe, _Gradients, _Gradients]:
        (py, px, pw, pk), (input_too, a_too, b_too) = addresses, self.wanted
        ptaken, porder, pends, pspans, pstarts, powner, pheld = by.places
        dx, v, pv = None, kept, pk
        if input_too or a_too:
            v = dy.new_empty(self.thin_shape)
            pv = v.data_ptr()
            self.project(
                (dy, kept, v, by.order, by.ends, by.starts),
                (py, pk + self.up, pv, porder, pends, pstarts),
            )
        if input_too:
            dx = dy.new_empty(self.shape)
            rest = (by.taken, by.spans, by.starts, by.owner, weight)
            self.product(
                (dy, weight, dx, v, kept, *rest),
                (py, pw, dx.data_ptr(), pv, pk, ptaken, pspans, pstarts, powner, pw),
            )
        if not (a_too or b_too):
            return dx, None, None
        da = dy.new_empty(self.of_a, dtype=torch.float32) if a_too else None
        db = dy.new_empty(self.of_b, dtype=torch.float32) if b_too else None
        written: Any = (db if da is None else da, da if db is None else db)  # one stands in
        (at, _, pscale, pgain), (_, _, scale, gain) = table.places, table.like
        self.sums(
            (
                x,
                v,
                dy,
                kept,
                *written,
                by.order,
                by.ends,
                by.starts,
                by.held,
                table.at,
                scale,
                gain,
            ),
            (
                *(px, pv, py, pk + self.thin, written[0].data_ptr(), written[1].data_ptr()),
                *(porder, pends, pstarts, pheld, at, pscale, pgain),
            ),
        )
        return dx, self._each(da, table, by, 0), self._each(db, table, by, 1)

    def _each(self, found: _Maybe, table: Table, by: Sorted, side: int) -> _Gradients:
        """The gradients of all A's or B's as those of each, from where its ranks start on."""
        if found is None:
            return None
        total = added(found)
        total = total if self.dtype == torch.float32 else total.to(self.dtype)
        if self.alike:
            return total.unbind(0)
        width = len(total) // by.ranks
        parts = torch.split(total, [rank * width for rank in by.each])
        shapes = [(width, rank) if side else (rank, width) for rank in table.ranks]
        return [part[: a * b].view(a, b) for part, (a, b) in zip(parts, shapes)]


@on_its_device
def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    kept: Tensor,
    table: Table,
    by: Sorted,
    wanted: tuple[bool, bool, bool],
) -> tuple[_Maybe, _Gradients, _Gradients]:
    """The gradients of `forward` that are wanted: of x, and of each update's factors
    ``[r_i, in]`` and ``[out, r_i]``, of their type.

    Args:
        dy: ``[N, ..., out]``, contiguous.
        x, weight, table, by: of the forward.
        kept: of the forward.
        wanted: of x, of the A's, of the B's; one at least.
    """

    def made(addresses: tuple[int, ...]) -> Backward:
        even = not (addresses[0] | addresses[2]) & 15
        return Backward(dy, weight, table, by, wanted, even)

    rest = (wanted, table.kind)
    plan, addresses = planned(_BACKWARDS, (dy, x, weight, kept), rest, made)
    return plan(dy, x, weight, kept, table, by, addresses)  # type: ignore[no-any-return]


def _pack(sizes: tuple[int, int], device: int, table: Table, by: Sorted, of: Card) -> Launch:
    """The launch that casts the factors of updates of a weight of such sizes."""
    (out, fan_in), RB, updates = sizes, by.most, len(table.ranks)
    deep = 4096 // RB
    inner, outer = -(-fan_in // deep), -(-out // deep)
    return Launch(
        kernels.pack,
        device,
        (inner + outer) * updates,
        numbers=dict(updates=updates, fan_in=fan_in, out=out, inner=inner),
        constants=dict(EARLY=of.hopper, RANK=table.rank, BLOCK_R=RB, BLOCK_D=deep),
        stages=1,
        warps=4,
    )


@on_its_device
def thin(x: Tensor, f: Tensor, by: Sorted) -> Tensor:
    """``x f_iᵀ`` ``[M, width]``, in x's type; rows of no update are not written.

    Args:
        x: ``[M, K]``, contiguous.
        f: ``[ranks, K]``, any strides, of x's type.
        by: which update each row takes.
    """
    p = x.new_empty(len(x), by.most)
    tensors = (x, f, p, by.order, by.ends, by.starts)

    def made(_: Any) -> Launch:
        device = x.get_device()
        return _project((x.shape[0], x.shape[1]), device, f.stride(), by, card(device))

    launch, addresses = planned(_PLANS, tensors, ("thin", by.most, by.positions), made)
    launch(tensors, addresses)
    return p


def _project(
    sizes: tuple[int, int], device: int, factor: tuple[int, ...], by: Sorted, of: Card
) -> Launch:
    """The launch of `thin`, of such rows and columns, and a factor of such strides."""
    (M, K), updates = sizes, len(by.each)
    BM, BK = 64, 64  # leaves shared memory for the product, which starts before it ends
    return Launch(
        kernels.project,
        device,
        M // BM + updates,
        numbers=dict(
            M=M,
            K=K,
            updates=updates,
            P=by.positions,
            stride_xm=K,
            **along("stride_f", "rk", factor),
            R=by.most,
        ),
        constants=dict(
            EARLY=of.hopper,
            EVEN_K=K % BK == 0,
            E=power(updates + 1),
            BLOCK_R=by.most,
            BLOCK_M=BM,
            BLOCK_K=BK,
        ),
        stages=4,
        warps=4,
        early=of.hopper,
    )


@on_its_device
def product(x: Tensor, w: Tensor, p: Tensor, q: Tensor, by: Sorted, bias: _Maybe = None) -> Tensor:
    """``x w + p_i q_i + bias``, rounded once.

    Args:
        x: ``[M, K]``, contiguous.
        w: ``[K, N]``, one side contiguous.
        p: ``[M, width]``, as of `thin`.
        q: ``[ranks, N]``, any strides, of x's type.
        by: which update each row takes.
        bias: ``[N]``, contiguous.
    """
    y, last = x.new_empty(len(x), w.shape[1]), w if bias is None else bias
    tensors = (x, w, y, p, q, by.taken, by.spans, by.starts, by.owner, last)
    rest = (by.most, by.positions, bias is not None)

    def made(addresses: tuple[int, ...]) -> Launch:
        even = not any(address & 15 for address in addresses[:2])
        sizes, device = (x.shape[0], w.shape[1], x.shape[1]), x.get_device()
        strides = w.stride(), q.stride()
        return _product(sizes, device, *strides, by, bias is not None, even, card(device))

    launch, addresses = planned(_PLANS, tensors, ("product", *rest), made)
    launch(tensors, addresses)
    return y


def _product(
    sizes: tuple[int, int, int],
    device: int,
    w: tuple[int, ...],
    q: tuple[int, ...],
    by: Sorted,
    bias: bool,
    even: bool,
    of: Card,
) -> Launch:
    """The launch of `product`, of such rows, columns and depth, and such strides of w and q.
    `even`: the addresses of x and w are multiples of 16."""
    (M, N, K), (w_k, w_n) = sizes, w
    rows_out = w_k == 1
    step = w_n if rows_out else w_k
    aligned = even and not (K | step | N) & 7 and (rows_out or K % 64 == 0)
    aligned = of.hopper and aligned and step > 0
    BM, BN, BK, GROUP, stages, warps, tma = tiling(M, N, K, of.processors, aligned, False, True)
    of_w = ([N, K], [step, 1], [BN, BK]) if rows_out else ([K, N], [step, 1], [BK, BN])
    of_y = ([M, N], [N, 1], [BM, BN // 2])
    layouts = (([M, K], [K, 1], [BM, BK]), of_w, of_y) if tma else ()
    return Launch(
        kernels.product,
        device,
        -(-M // BM) * -(-N // BN),
        numbers=dict(
            M=M,
            N=N,
            K=K,
            updates=len(by.each),
            rows=len(by.taken),
            P=by.positions,
            stride_xm=K,
            **along("stride_w", "kn", w),
            **along("stride_q", "rn", q),
            R=by.most,
        ),
        constants=dict(
            EARLY=of.hopper,
            ALONE=by.positions % BM == 0,
            BIAS=bias,
            TMA=tma,
            ROWS_OUT=rows_out,
            EVEN_K=K % BK == 0,
            BLOCK_R=by.most,
            STEP_R=_TOGETHER,
            BLOCK_M=BM,
            BLOCK_N=BN,
            BLOCK_K=BK,
            GROUP_M=GROUP,
        ),
        stages=stages,
        warps=warps,
        early=of.hopper,
        layouts=layouts,
    )


@on_its_device
def sums(
    x: Tensor, v: _Maybe, dy: Tensor, u: _Maybe, by: Sorted, ranks: int, wanted: tuple[bool, bool]
) -> tuple[_Maybe, _Maybe]:
    """``v_iᵀ x_i`` and ``u_iᵀ dy_i`` where they are wanted, in float32; zeros of no update.

    Args:
        x: ``[M, in]``; dy: ``[M, out]``; contiguous.
        v, u: ``[M, width]``, as of `thin`; what is not wanted needs none.
        by: which update each row takes.
        ranks: of all updates, and of none.
        wanted: of ``[ranks, in]``, and of ``[ranks, out]``.
    """
    (M, fan_in), out, device = x.shape, dy.shape[1], x.get_device()
    thins: Any = (v if wanted[0] else u, u if wanted[1] else v)  # one stands in for the other
    shared = (x, thins[0], dy, thins[1], by.order, by.ends, by.starts, by.held)
    rest = ("sums", by.most, by.positions, ranks, wanted)

    def made(_: Any) -> tuple[Launch, int]:
        return _sums((M, fan_in, out), device, ranks, by, wanted, False, False, card(device))

    (launch, parts), (*first, order, ends, starts, held) = planned(_PLANS, shared, rest, made)
    of_a = x.new_zeros(parts * wanted[0], ranks, fan_in, dtype=torch.float32)
    of_b = x.new_zeros(parts * wanted[1], ranks, out, dtype=torch.float32)
    written = (of_a if wanted[0] else of_b, of_b if wanted[1] else of_a)
    launch(
        (*shared[:4], *written, *shared[4:], *[by.starts] * 3),
        (*first, *[t.data_ptr() for t in written], order, ends, starts, held, *[starts] * 3),
    )
    da, db = (added(t) if want else None for t, want in zip((of_a, of_b), wanted))
    return da, db


def _sums(
    sizes: tuple[int, int, int],
    device: int,
    ranks: int,
    by: Sorted,
    wanted: tuple[bool, bool],
    apart: bool,
    beside: bool,
    of: Card,
) -> tuple[Launch, int]:
    """The launch of the factors' gradients, and into how many parts rows go.

    Args:
        sizes: rows, in, out.
        device: its index.
        ranks: in one part.
        by: which update each row takes.
        wanted: of the A's, of the B's.
        apart: the latter are ``s_i dy_iᵀ u_i [out, r_i]``, each from where its ranks start, and no
            number beyond an update's own ranks is written.
        beside: the launch right ahead is a `product` of v, which it may run beside.
        of: the device.
    """
    (M, fan_in, out), updates = sizes, len(by.each)
    inner, outer = (-(-n // DEEP) * want for n, want in zip((fan_in, out), wanted))
    parts = parts_of(M, updates, inner + outer, of)
    BM, stages, warps = _SUMS
    early = beside and of.hopper
    launch = Launch(
        kernels.gradients,
        device,
        (inner + outer) * updates * parts,
        numbers=dict(
            M=M,
            fan_in=fan_in,
            out=out,
            updates=updates,
            ranks=ranks,
            P=by.positions,
            R=by.most,
            stride_xm=fan_in,
            stride_dym=out,
            inner=inner,
            parts=parts,
        ),
        constants=dict(
            EARLY=early,
            APART=apart,
            E=power(updates + 1),
            BLOCK_R=by.most,
            BLOCK_D=DEEP,
            BLOCK_M=BM,
        ),
        stages=stages,
        warps=warps,
        early=early,
    )
    return launch, parts
