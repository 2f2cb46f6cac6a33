"""The grouped products of experts on CUDA, in the kernels; imported only there."""

from typing import Any, Optional

import torch
from torch import Tensor

from paramlora.cuda.device import Card, card
from paramlora.cuda.experts import kernels
from paramlora.cuda.launch import Block, Launch, planned
from paramlora.cuda.linear.tiles import Tiling
from paramlora.cuda.operands import DEEP, Drop, power
from paramlora.update.compat import cuda_device

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


def thin(x: Tensor, f: Tensor, ends: Tensor, width: int, drop: Optional[Drop]) -> Tensor:
    """``(mask ∘ x_e) f_eᵀ``, in x's type; rows of no expert are not written.

    Args:
        x: ``[M, K]``, contiguous rows.
        f: ``[experts, r, K]``, any strides, of x's type.
        ends: ``[experts]``, of 32 bits, where each expert's rows end.
        width: numbers in a row of the result, zeros from the rank on.
        drop: the mask of x, if any.
    """
    p = x.new_empty(len(x), width)
    seed, least = (ends, 0) if drop is None else (drop.seed, drop.threshold)
    numbers = (*x.shape, len(f), x.stride(0), *f.stride(), f.shape[1], width, least)
    _launched(_project, numbers, (x, f, p, ends, seed), (drop is not None,))
    return p


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
    y = x.new_empty(len(x), w.shape[2])
    seed, least = (ends, 0) if drop is None else (drop.seed, drop.threshold)
    (M, K), N, experts, b = x.shape, w.shape[2], len(ends), w if bias is None else bias
    numbers = (
        M, N, K, experts, experts // len(w), x.stride(0), *w.stride(), *q.stride(),
        0 if bias is None else bias.stride(0), q.shape[1], p.shape[1], least,
    )  # fmt: skip
    tensors = (x, w, p, q, y, ends, seed, b)
    _launched(_product, numbers, tensors, (bias is not None, drop is not None))
    return y


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
    seed, least = (ends, 0) if drop is None else (drop.seed, drop.threshold)
    thins: Any = (v if wanted[0] else u, u if wanted[1] else v)  # one stands in for the other
    numbers = (
        M, fan_in, out, experts, r, thins[0].shape[1], x.stride(0), dy.stride(0), inner, parts,
        least,
    )  # fmt: skip
    written = (of_a if wanted[0] else of_b, of_b if wanted[1] else of_a)
    tensors = (x, thins[0], dy, thins[1], *written, ends, seed)
    _launched(_gradients, numbers, tensors, (drop is not None, inner + outer))
    da, db = (added(t) if want else None for t, want in zip((of_a, of_b), wanted))
    return da, db


def added(parts: Tensor) -> Tensor:
    """``[parts, ...]`` added in order; of a single one no copy."""
    return parts[0] if len(parts) == 1 else parts.sum(0)


def parts_of(M: int, experts: int, blocks: int, of: Card) -> int:
    """Into how many parts the rows of each expert, or of each update that rows choose, go, so that
    all processors have some: of M rows, and of `blocks` in the grid."""
    most = max(1, M // (experts * 512))
    return min(most, max(1, 4 * of.processors // (experts * blocks)))


def _launched(
    plan: Any, numbers: tuple[int, ...], tensors: tuple[Tensor, ...], how: tuple[int, ...]
) -> None:
    """Launch the plan of such operands, made once, on their device."""
    device = tensors[0].get_device()
    if device != cuda_device():
        with torch.cuda.device(device):
            return _launched(plan, numbers, tensors, how)

    def made(addresses: tuple[int, ...]) -> tuple[Launch, tuple[Any, ...]]:
        even = not any(address & 15 for address in addresses[:2])
        found: tuple[Launch, tuple[Any, ...]] = plan(numbers, even, card(device), device, how)
        return found

    (launch, layouts), addresses = planned(_PLANS, tensors, (plan, numbers, how), made)
    blocks = tuple(map(Block, tensors, layouts))
    launch(tensors[len(blocks) :], addresses[len(blocks) :], (), blocks)


def _project(
    numbers: tuple[int, ...], _: bool, of: Card, device: int, how: tuple[int, ...]
) -> tuple[Launch, tuple[Any, ...]]:
    M, K, experts, *_strides, r, R, _least = numbers
    BLOCK_R = power(max(r, R, 16))
    BLOCK_M, BLOCK_K = 64, 128 if BLOCK_R <= 32 else 64
    constants = (bool(how[0]), K % BLOCK_K == 0, power(experts + 1), BLOCK_R, BLOCK_M, BLOCK_K)
    grid = M // BLOCK_M + experts
    return Launch(kernels.project, device, grid, numbers, constants, 3, 4), ()


def _product(
    numbers: tuple[int, ...], even: bool, of: Card, device: int, how: tuple[int, ...]
) -> tuple[Launch, tuple[Any, ...]]:
    M, N, K, experts, per, stride_xm, stride_we, stride_wk, stride_wn, *_, r, _R, _least = numbers
    matrices = experts // per
    rows_out, (bias, drop) = stride_wk == 1, map(bool, how)
    step = stride_wn if rows_out else stride_wk
    dense = matrices == 1 or stride_we == step * (N if rows_out else K)
    dense = dense and 1 in (stride_wk, stride_wn)
    aligned = even and dense and not (stride_xm | step) & 7 and (rows_out or K % 64 == 0)
    tiles = tiling(M // experts, N, of.hopper and aligned, drop)
    BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, stages, warps, tma = tiles
    E, BLOCK_R = power(experts + 1), power(max(r, 16))
    constants = (bias, drop, tma, rows_out, K % BLOCK_K == 0, E, BLOCK_R, *tiles[:4])
    grid = (M // BLOCK_M + experts + 1) * -(-N // BLOCK_N)
    launch = Launch(kernels.product, device, grid, numbers, constants, stages, warps)
    of_w = ([matrices * N, K], [step, 1], [BLOCK_N, BLOCK_K]) if rows_out else (
        [matrices * K, N], [step, 1], [BLOCK_K, BLOCK_N]
    )  # fmt: skip
    return launch, (([M, K], [stride_xm, 1], [BLOCK_M, BLOCK_K]), of_w) if tma else ()


def _gradients(
    numbers: tuple[int, ...], _: bool, of: Card, device: int, how: tuple[int, ...]
) -> tuple[Launch, tuple[Any, ...]]:
    experts, r, parts, (drop, blocks) = numbers[3], numbers[4], numbers[9], how
    BLOCK_R = power(max(r, 16))
    constants = (bool(drop), power(experts + 1), BLOCK_R, DEEP, 64)
    grid = blocks * experts * parts
    return Launch(kernels.gradients, device, grid, numbers, constants, 3, 8), ()
