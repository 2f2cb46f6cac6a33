"""The table of choices: how the grid of a product is divided into tiles."""

import math
from typing import NamedTuple, Optional

from paramlora.cuda.device import Card
from paramlora.cuda.launch import Layout, along
from paramlora.cuda.launches import WIDEST, Launches

LONG = 16384  # rows of which a block of the thin product takes 128


class Tiling(NamedTuple):
    """A tile of ``[BM, BN]`` in steps of `BK`, `GROUP` rows of tiles that share columns in L2,
    Triton's stages and warps, and whether the tensor memory engine loads it."""

    BM: int
    BN: int
    BK: int
    GROUP: int
    stages: int
    warps: int
    tma: bool


def tiling(
    M: int, N: int, K: int, processors: int, aligned: bool, local: bool, alone: bool
) -> Tiling:
    """The table of choices, measured on an H200, of 132 multiprocessors, by Triton 3.6.

    `processors`: of the device. `aligned`: it has the engine, and its rules on addresses and
    strides are met.
    `local`: the thin product is computed in the same grid. That spares launches, and `project`
    beside it is a little faster, so it is chosen where the host takes longer than the device:
    small products, but not in a CUDA graph. Of small products describing blocks to the engine also
    costs more than it saves. `alone`: no gradients of factors are computed in the same grid.
    """
    if not aligned or (local and M * N * K < 2**32):
        if M <= 512:
            return Tiling(64, 64, 64, 8, 4, 4, False)
        wide = N <= 512 and K <= 512 or not aligned
        return Tiling(128, 128, 64, 8, 3, 8, False) if wide else Tiling(64, 128, 64, 8, 3, 4, False)
    if M <= 512:
        return Tiling(64, 64, 128, 8, 3 if K <= 2048 else 4, 4, True)
    # two thirds of the device at least, as on the 132 processors of what was measured
    if min(N, K) >= 2048 and -(-M // 128) * -(-N // 256) >= 90 * processors // 132 and not local:
        return Tiling(128, 256, 64, 16, 3, 8, True)
    if alone and not local and N <= 640 and K < 2048:
        return Tiling(128, 64, 64, 8, 3, 4, True)
    if K >= 2048 and -(-M // 128) * -(-N // 128) < processors:
        return Tiling(64, 128, 64, 8, 4, 4, True)
    return Tiling(128, 128, 64, 16 if M >= 8192 else 8, 3, 4, True)


NONE = Tiling(64, 64, 64, 8, 3, 8, False)  # of a backward without the input's gradient


def projection(M: int, R: int, hopper: bool, drop: bool = False) -> tuple[int, int, int, int]:
    """Rows, depth, stages and warps of a block of the thin product in a grid of its own. A mask is
    drawn ahead of each step's product, so that it takes more blocks to fill that time."""
    if R > WIDEST:
        return (64, 128, 3, 4) if R == 128 else (64, 64, 4, 8)
    deep = 256 if R <= 32 else 128  # fits the shared memory of every device
    # from 64 rows on warp groups multiply a masked block, and Triton 3.6 then gives other numbers
    # each time, some not finite
    if drop and M >= LONG:
        return (32, 128, 4, 4)
    if drop and M > 512:
        tall = M > 4096
        return (32 if tall else 16, deep, 4 if hopper or not (tall and R == 32) else 3, 4)
    return (16, deep, 4, 4) if M <= 512 else (64, 64, 4, 4) if M < LONG else (128, 64, 4, 4)


def gradients(tiling: Tiling, R: int, masks: int = 0) -> tuple[int, int, int]:
    """Depth of a block of the factors' gradients beside such tiles, and the grid's stages and
    warps. A masked block goes through shared memory, of which only devices whose tiles the engine
    loads have enough for the deepest; one of several masks is kept in registers beside what each
    lets through."""
    if R > 128:
        return 32, tiling.stages, 8
    if masks > 1:
        return 32, tiling.stages, tiling.warps
    deep = R <= 16 and tiling.stages <= 3 and (tiling.tma or not masks)
    return 128 if deep else 64, tiling.stages, tiling.warps


class Rows(NamedTuple):
    """Where the rows of a matrix lie: row m is ``m // period`` batches and ``m % period`` rows from
    its start; distances are in elements."""

    M: int
    period: int
    batch: int
    row: int
    column: int

    @property
    def flat(self) -> bool:
        """Whether one distance leads from every row to the next, and rows are contiguous."""
        # the column too: of an image of batch 1 the period is all of M, but its columns lie apart
        return self.period == self.M and self.column == 1

    def places(self, period: int) -> tuple[int, int, int]:
        """Distances of a batch of `period` rows, a row and a column."""
        return (period * self.row if self.flat else self.batch), self.row, self.column


def rows_of(shape: tuple[int, ...], stride: tuple[int, ...], image: bool) -> Optional[Rows]:
    """The rows ``[..., K]`` of a tensor, or None where only a copy has them.

    `image`: of ``[batch, P, K]``, whose columns may lie apart where its rows do not.
    """
    M, K = math.prod(shape[:-1]), shape[-1]
    if stride[-1] != 1 and K > 1:  # the stride of a single column may be any
        if image and stride[1] == 1:
            return Rows(M, shape[1], *stride)
        return None
    lead = [(size, step) for size, step in zip(shape[:-1], stride[:-1]) if size != 1]
    if not lead:
        return Rows(M, M, K, K, 1)
    row = lead[-1][1]
    # rows that overlap, such as those of an expanded tensor, which the engine cannot read
    if row < K:
        return None
    # each dimension begins where the next inner one ends: one distance leads through all of them
    if all(outer[1] == inner[0] * inner[1] for outer, inner in zip(lead, lead[1:])):
        return Rows(M, M, M * row, row, 1)
    # a batch and its rows, as `Rows` can say; three distances it cannot
    if len(lead) == 2 and lead[0][1] >= 0:
        return Rows(M, lead[1][0], lead[0][1], row, 1)
    return None


class Tiles:
    """How a product ``left[M, K] @ w[K, N]`` is divided, of which `how` says what shares its grid.

    Its `early` says that it may start before the `project` ends that must be launched right ahead
    of it.
    `misaligned`: the address of left or w is not a multiple of 16. `alone`: as of `tiling`.
    """

    def __init__(
        self,
        left: Rows,
        out: Rows,
        period: int,
        w: tuple[int, ...],
        sizes: tuple[int, int, int],
        R: int,
        card: Card,
        misaligned: bool,
        how: Launches,
        alone: bool,
        wanted: bool = True,
    ) -> None:
        (M, N, K), (w_k, w_n) = sizes, w
        step = w_n if w_k == 1 else w_k
        # the engine's strides are multiples of 16 bytes, 8 elements, and never 0 (expanded)
        strides = (K | N | left.row | out.row | step) & 7 or not step
        hopper, local = card.hopper, how is Launches.TOGETHER
        aligned = hopper and left.flat and out.flat and not misaligned and not strides
        self.early = hopper and how is Launches.APART
        self.tiling = tiling(M, N, K, card.processors, aligned, local, alone) if wanted else NONE
        BM, BN, BK, GROUP, _, _, tma = self.tiling
        # `local` is one more column of tiles, that of the thin product
        self.grid = -(-M // BM) * (-(-N // BN) + local) if wanted else 0
        self.sizes = {"M": M, "N": N, "K": K, "P": period}
        self.strides = left.places(period), w, out.places(period)
        rows_out = w_k == 1  # w is stored as [N, K]
        self.constants = {
            "TMA": tma,
            "ROWS_OUT": rows_out,
            "EVEN_P": is_even(period, M),
            "EVEN_K": K % BK == 0,
            "R": R,
            "BLOCK_M": BM,
            "BLOCK_N": BN,
            "BLOCK_K": BK,
            "GROUP_M": GROUP,
        }
        self.layouts: tuple[Layout, ...] = ()
        if tma:
            of_w = ([N, K], [w_n, 1], [BN, BK]) if rows_out else ([K, N], [w_k, 1], [BK, BN])
            # stored in halves, see `kernels._halves`
            of_out = ([M, N], [out.row, 1], [BM, BN // 2])
            self.layouts = (([M, K], [left.row, 1], [BM, BK]), of_w, of_out)

    def numbers(self, left: str, out: str) -> dict[str, int]:
        """The sizes and strides, by the names of a kernel that calls both matrices so."""
        of_left, of_w, of_out = self.strides
        return dict(
            **self.sizes,
            **along(f"stride_{left}", "bmk", of_left),
            **along("stride_w", "kn", of_w),
            **along(f"stride_{out}", "bmn", of_out),
        )


def groups_of(units: int, blocks: int, programs: int) -> tuple[int, int]:
    """Into how many groups the rows of a sum are divided, and how many units of them each has: so
    that there are programs for the device, but no more than one for four units.

    Args:
        units: of rows, that a program takes at a time.
        blocks: programs for each group.
        programs: that the device should have.
    """
    groups = max(1, min(-(-units // 4), -(-programs // blocks)))
    each = -(-units // groups)
    # rounding up may have left the last groups no rows, of which the kernels assume some
    return -(-units // each), each


def is_even(period: int, M: int) -> bool:
    """Whether no block of rows, of 128 or a divisor, reaches over the end of a batch."""
    return period == M or period % 128 == 0
