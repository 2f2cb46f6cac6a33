"""In how many launches the kernels compute a linear layer, each way: arithmetic alone, so that it
is tested without a device."""

import math
from enum import Enum
from typing import Optional

WIDEST = 64  # rank whose thin products the kernels compute on every device, and in a CUDA graph


class Launches(Enum):
    """How a product and its thin product share launches."""

    TOGETHER = "one grid, whose programs wait for each other"
    APART = "the factors cast; the thin product; then the rest"
    CUBLAS = "as apart, but the thin products by cuBLAS"


def launches(
    sizes: tuple[int, int, int],
    R: int,
    captured: bool,
    hopper: bool,
    wanted: Optional[tuple[bool, bool]] = None,
    masks: int = 0,
) -> Launches:
    """How a forward, or the backward of which some gradients are wanted, is launched.

    Args:
        sizes: rows, columns and what is summed of the large product.
        R: padded rank.
        captured: into a CUDA graph, whose replays would all find the same number in the signals,
            and where launches cost no Python.
        hopper: see `device.Card.hopper`.
        wanted: of a backward, the gradients of the input and of the factors.
        masks: by how many the update drops inputs, of which cuBLAS knows nothing.
    """
    if not masks and not _is_ours(sizes, R, captured, hopper):
        return Launches.CUBLAS
    both = masks < 2 and (wanted is None or all(wanted))
    if both and _is_together(sizes, R, captured, hopper, masks > 0):
        return Launches.TOGETHER
    return Launches.APART


def _is_ours(sizes: tuple[int, int, int], R: int, captured: bool, hopper: bool) -> bool:
    """Whether the kernels compute the thin products, else cuBLAS.

    Above `WIDEST` cuBLAS takes the device a little less time, but the host twice as long as all
    else in a step, so it is left to a CUDA graph, to the largest products, and to devices without
    the shared memory for such blocks.
    """
    if R <= WIDEST:
        return True
    return hopper and not captured and (R <= 128 or (R <= 256 and math.prod(sizes) <= 2**35))


def _is_together(
    sizes: tuple[int, int, int], R: int, captured: bool, hopper: bool, drop: bool
) -> bool:
    """Whether the thin product is computed in the same grid, see `tiles.tiling`.

    That spares the host two launches forward and one backward, and costs the device a wait, which
    at 2**35 is the longer: 145 microseconds on an H200 for 117 apart, and 207 for 130 where the
    grid waits for a mask.
    """
    if captured or R > (128 if hopper else WIDEST):
        return False
    return math.prod(sizes) < (2**32 if R > WIDEST else 2**33 if drop else 2**35)
