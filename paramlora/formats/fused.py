"""Several projections in one weight, each with factors of its own: loralib's MergedLinear.

Read from microsoft/LoRA loralib/layers.py (``MergedLinear``) and litgpt/lora.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from paramlora.errors import FileError
from paramlora.update.value import Update


def fused_linear(
    a: Tensor, b: Tensor, scale: float, rows: Sequence[int], on: Sequence[bool], where: str
) -> Update:
    """One update of the whole weight: part ``i`` of its rows gets ``B_i · A_i``.

    Args:
        a: ``[trained parts · r, in]``, the parts' first factors one below the other.
        b: ``[rows of the trained parts, r]``.
        scale: the factor itself.
        rows: of every part.
        on: which parts were trained; the rows of the others stay as they are.
        where: the file and layer, for messages.

    Raises:
        FileError: the factors do not fit these parts.

    Example:
        >>> update = fused_linear(torch.eye(2), torch.ones(4, 1), 1.0, [2, 2], [True, True], "")
        >>> assert update.delta().tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
    """
    r = b.shape[1]
    trained = [size for size, here in zip(rows, on) if here]
    if a.shape[0] != r * len(trained) or b.shape[0] != sum(trained) or len(rows) != len(on):
        raise FileError(
            f"{where}: factors of {list(a.shape)} and {list(b.shape)} do not fit parts of "
            f"{list(rows)} rows of which {list(on)} were trained. Was it made for another model?"
        )
    placed = b.new_zeros(sum(rows), a.shape[0])
    # column: of A's ranks; start: of all rows; taken: of the rows that B has
    column, start, taken = 0, 0, 0
    for size, here in zip(rows, on):
        if here:
            placed[start : start + size, column : column + r] = b[taken : taken + size]
            column, taken = column + r, taken + size
        start += size
    return Update(a, placed, scale, (sum(rows), a.shape[1]), kind="linear")


def parted(update: Update, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The reverse of `fused_linear` with all parts trained.

    Where lora_B is no row of blocks, each part gets all of lora_A: the same sum.
    """
    r, extra = divmod(update.r, len(rows))
    starts = [sum(rows[:i]) for i in range(len(rows))]
    blocks = [update.lora_B[start : start + size] for start, size in zip(starts, rows)]
    if not extra and r:
        own = [block[:, i * r : (i + 1) * r] for i, block in enumerate(blocks)]
        if sum(int(o.count_nonzero()) for o in own) == int(update.lora_B.count_nonzero()):
            return update.lora_A, torch.cat(own)
    return torch.cat([update.lora_A] * len(rows)), update.lora_B
