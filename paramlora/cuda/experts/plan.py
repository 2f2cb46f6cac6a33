"""The grouped products of experts on CUDA, in the kernels; imported only there."""

from typing import Any, Optional

import torch
from torch import Tensor

from paramlora.cuda.device import Card, card
from paramlora.cuda.experts import kernels
from paramlora.cuda.launch import Launch, along, on_its_device, planned
from paramlora.cuda.linear.tiles import Tiling
from paramlora.cuda.operands import DEEP, Drop, power

_Maybe = Optional[Tensor]
_PLANS: dict[Any, Any] = {}


def tiling(rows: int, N: int, hopper: bool, drop: bool) -> Tiling:
    """How a product is divided: a first guess by the linear layers' table, not measured yet.

    Args:
        rows: about how many each expert has.
        N: columns.
        hopper: whether the tensor memory engine may load the operands.
        drop: whether a mask takes registers beside the accumulator.
    """
    if rows <= 64:
        return Tiling(64, 128, 64, 8, 4 if hopper else 3, 4, hopper)
    if not hopper:
        return Tiling(128, 128, 64, 8, 3, 8, False)
    if N >= 1024 and not drop:
        return Tiling(128, 256, 64, 8, 3, 8, True)
    return Tiling(128, 128, 64, 8, 3, 8 if drop else 4, True)


@on_its_device
def thin(x: Tensor, f: Tensor, ends: Tensor, width: int, drop: Optional[Drop]) -> Tensor:
    """``(mask ∘ x_e) f_eᵀ``, in x's type; rows of no expert are not written.

    Args:
        x: ``[M, K]``, contiguous rows.
        f: ``[experts, r, K]``, any strides, of x's type.
        ends: ``[experts]``, of 32 bits, where each expert's rows end.
        width: numbers in a row of the result, zeros from the rank on.
        drop: the mask of x, if any.
    """
    p, (seed, least) = x.new_empty(len(x), width), _drawn_from(drop, ends)
    tensors = (x, f, p, ends, seed)

    def made(_: Any) -> Launch:
        (M, K), (experts, r, _) = x.shape, f.shape
        BR = power(max(r, width, 16))
        BM, BK = 64, 128 if BR <= 32 else 64
        return Launch(
            kernels.project,
            x.get_device(),
            M // BM + experts,  # the last block of each may be a part of one
            numbers=dict(
                M=M,
                K=K,
                experts=experts,
                stride_xm=x.stride(0),
                **along("stride_f", "erk", f.stride()),
                r=r,
                R=width,
                threshold=least,
            ),
            constants=dict(
                DROP=drop is not None,
                EVEN_K=K % BK == 0,
                E=power(experts + 1),
                BLOCK_R=BR,
                BLOCK_M=BM,
                BLOCK_K=BK,
            ),
            stages=3,
            warps=4,
        )

    launch, addresses = planned(_PLANS, tensors, ("thin", drop is None, least), made)
    launch(tensors, addresses)
    return p


def _drawn_from(drop: Optional[Drop], ends: Tensor) -> tuple[Tensor, int]:
    """A mask's seed and threshold; without one any pointer, which the kernels do not read."""
    return (ends, 0) if drop is None else (drop.seed, drop.thresholds[0])


@on_its_device
def product(
    x: Tensor,
    w: Tensor,
    ends: Tensor,
    p: Tensor,
    q: Tensor,
    drop: Optional[Drop] = None,
    bias: _Maybe = None,
) -> Tensor:
    """``x_e w_e + mask ∘ (p_e q_e) + bias_e``, rounded once; zeros in rows of no expert.

    Args:
        x: ``[M, K]``, contiguous rows.
        w: ``[experts, K, N]``, any strides; or fewer, each for as many groups one after the other.
        ends: as of `thin`.
        p: ``[M, width]``, contiguous.
        q: ``[experts, r, N]``, any strides.
        drop: the mask of the low-rank product, if any.
        bias: ``[experts, N]``, contiguous rows.
    """
    y, (seed, least) = x.new_empty(len(x), w.shape[2]), _drawn_from(drop, ends)
    tensors = (x, w, p, q, y, ends, seed, w if bias is None else bias)

    def made(addresses: tuple[int, ...]) -> Launch:
        even = not any(address & 15 for address in addresses[:2])
        return _product(x, w, p, q, len(ends), drop, bias, even)

    rest = ("product", bias is None, drop is None, least)
    launch, addresses = planned(_PLANS, tensors, rest, made)
    launch(tensors, addresses)
    return y


def _product(
    x: Tensor,
    w: Tensor,
    p: Tensor,
    q: Tensor,
    experts: int,
    drop: Optional[Drop],
    bias: _Maybe,
    even: bool,
) -> Launch:
    """The launch of `product`; `even`: the addresses of x and w are multiples of 16."""
    (M, K), (matrices, _, N), x_row, (w_e, w_k, w_n) = x.shape, w.shape, x.stride(0), w.stride()
    rows_out, r, device = w_k == 1, q.shape[1], x.get_device()
    step = w_n if rows_out else w_k
    # one descriptor holds all matrices, one below the other, so they must lie without gaps
    dense = matrices == 1 or w_e == step * (N if rows_out else K)
    dense = dense and 1 in (w_k, w_n)
    # the engine's strides are multiples of 16 bytes; and where a block of K reached into the next
    # matrix, x has zeros there, but zero times NaN is NaN
    aligned = even and dense and not (x_row | step) & 7 and (rows_out or K % 64 == 0)
    tiles = tiling(M // experts, N, card(device).hopper and aligned, drop is not None)
    BM, BN, BK, GROUP, stages, warps, tma = tiles
    of_w = ([matrices * K, N], [step, 1], [BK, BN])
    if rows_out:
        of_w = ([matrices * N, K], [step, 1], [BN, BK])
    layouts = (([M, K], [x_row, 1], [BM, BK]), of_w) if tma else ()
    return Launch(
        kernels.product,
        device,
        # the last block of each expert, and of the rows of none, may be a part of one
        (M // BM + experts + 1) * -(-N // BN),
        numbers=dict(
            M=M,
            N=N,
            K=K,
            experts=experts,
            groups_per_matrix=experts // matrices,
            stride_xm=x_row,
            **along("stride_w", "ekn", w.stride()),
            **along("stride_q", "ern", q.stride()),
            stride_be=0 if bias is None else bias.stride(0),
            r=r,
            R=p.shape[1],
            threshold=_drawn_from(drop, p)[1],
        ),
        constants=dict(
            BIAS=bias is not None,
            DROP=drop is not None,
            TMA=tma,
            ROWS_OUT=rows_out,
            EVEN_K=K % BK == 0,
            E=power(experts + 1),
            BLOCK_R=power(max(r, 16)),
            BLOCK_M=BM,
            BLOCK_N=BN,
            BLOCK_K=BK,
            GROUP_M=GROUP,
        ),
        stages=stages,
        warps=warps,
        layouts=layouts,
    )


@on_its_device
def sums(
    x: Tensor,
    v: _Maybe,
    dy: Tensor,
    u: _Maybe,
    ends: Tensor,
    r: int,
    drop: Optional[Drop],
    wanted: tuple[bool, bool],
) -> tuple[_Maybe, _Maybe]:
    """``v_eᵀ (mask ∘ x_e)`` and ``dy_eᵀ u_e`` where they are wanted, in float32.

    Args:
        x: ``[M, in]``; dy: ``[M, out]``; contiguous rows.
        v, u: ``[M, width]``, contiguous; what is not wanted needs none.
        ends: as of `thin`.
        r: the rank.
        drop: the mask of x, if any.
        wanted: of ``[experts, r, in]``, and of ``[experts, out, r]``.
    """
    (M, fan_in), out, experts = x.shape, dy.shape[1], len(ends)
    inner, outer = (-(-n // DEEP) * want for n, want in zip((fan_in, out), wanted))
    parts = parts_of(M, experts, inner + outer, card(x.get_device()))
    of_a = x.new_empty(parts * wanted[0], experts, r, fan_in, dtype=torch.float32)
    of_b = x.new_empty(parts * wanted[1], experts, out, r, dtype=torch.float32)
    seed, least = _drawn_from(drop, ends)
    thins: Any = (v if wanted[0] else u, u if wanted[1] else v)  # one stands in for the other
    written = (of_a if wanted[0] else of_b, of_b if wanted[1] else of_a)
    tensors = (x, thins[0], dy, thins[1], *written, ends, seed)

    def made(_: Any) -> Launch:
        return Launch(
            kernels.gradients,
            x.get_device(),
            (inner + outer) * experts * parts,
            numbers=dict(
                M=M,
                fan_in=fan_in,
                out=out,
                experts=experts,
                r=r,
                R=thins[0].shape[1],
                stride_xm=x.stride(0),
                stride_dym=dy.stride(0),
                inner=inner,
                parts=parts,
                threshold=least,
            ),
            constants=dict(
                DROP=drop is not None,
                E=power(experts + 1),
                BLOCK_R=power(max(r, 16)),
                BLOCK_D=DEEP,
                BLOCK_M=64,
            ),
            stages=3,
            warps=8,
        )

    launch, addresses = planned(_PLANS, tensors, ("sums", wanted, drop is None, least), made)
    launch(tensors, addresses)
    da, db = (added(t) if want else None for t, want in zip((of_a, of_b), wanted))
    return da, db


def added(parts: Tensor) -> Tensor:
    """``[parts, ...]`` added in order; of a single one no copy."""
    return parts[0] if len(parts) == 1 else parts.sum(0)


def parts_of(M: int, experts: int, blocks: int, of: Card) -> int:
    """Into how many parts the rows of each expert, or of each update that rows choose, go, so that
    all processors have some: of M rows, and of `blocks` in the grid."""
    # a part of fewer rows is not worth that its sum is written and read again
    most = max(1, M // (experts * 512))
    return min(most, max(1, 4 * of.processors // (experts * blocks)))
