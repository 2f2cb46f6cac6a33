"""The update of a weight out of those of other weights that hold its rows.

``W + s·B·A`` of a weight whose rows are those of several is the same sum for each: its rows of
``B``, and the whole of ``A``. What lies in one weight and comes from several updates has their
ranks one beside the other, each ``B`` with zeros in the others' rows.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Optional

import torch
from torch import Tensor

from paramlora.errors import FileError, counted
from paramlora.formats.factors import with_scale_in_B
from paramlora.formats.parts import Part, Rows
from paramlora.update.value import Update

_MOST = 1 << 30  # elements of one factor


@dataclass(frozen=True)
class Source:
    """An update of a file, and what its rows are.

    Args:
        path: as the file has it.
        update: ``lora_B`` is ``[out, r]``, or ``[count, out, r]`` of a stack.
        rows: what the rows of ``lora_B`` are.
    """

    path: str
    update: Update
    rows: Rows


def check_blocks(source: Source, where: str) -> None:
    """Refuse a stack of another number of matrices, and what is no matrix or stack at all.

    Raises:
        FileError: as said.
    """
    update, count = source.update, len(source.rows)
    stack = update.layout == "stack"
    have = update.lora_B.shape[0] if stack and update.lora_B.dim() == 3 else 1
    if have != count or update.layout == "transposed" or update.up_kernel != 1:
        raise FileError(
            f"{where}: {have} matrices ({update.layout}) instead of {count} whose rows are those "
            "of other weights. Was it made for another model?"
        )


def sizes(known: Iterable[tuple[int, Sequence[Part]]]) -> dict[str, int]:
    """How many rows each kind of part has, as far as the totals tell.

    Args:
        known: of every weight, all its rows and the parts that they are.

    Example:
        >>> q, k, mlp = Part("q", "q"), Part("k", "q"), Part("mlp", "mlp")
        >>> sizes([(10, [q, k, mlp]), (3, [k])])
        {'q': 3, 'mlp': 4}
    """
    found: dict[str, int] = {}
    # by substitution: a weight all but one kind of whose parts is known tells that kind's size
    open_ = [(total, [part.size for part in parts]) for total, parts in known]
    while True:
        later = []
        for total, kinds in open_:
            left = total - sum(found.get(kind, 0) for kind in kinds)
            unknown = [kind for kind in kinds if kind not in found]
            if len(set(unknown)) == 1:
                found[unknown[0]] = max(left, 0) // len(unknown)
            elif unknown:
                later.append((total, kinds))
        if len(later) == len(open_) or not later:
            return found
        open_ = later


def gathered(
    rows: Rows, out: int, sources: Sequence[Source], size: Mapping[str, int], where: str
) -> Update:
    """The update of a weight that holds `rows`, out of all those that have some of them.

    Args:
        rows: what the weight's rows are.
        out: how many rows one of its matrices has.
        sources: the updates.
        size: of the parts, from `sizes`.
        where: the file and the weight, for messages.

    Returns:
        A matrix's update; a stack's where `rows` has more than one block.

    Raises:
        FileError: the rows do not fit.
    """
    # an update has one scale: where sources differ theirs go into lora_B first
    if len({source.update.scale for source in sources}) > 1:
        sources = [replace(source, update=with_scale_in_B(source.update)) for source in sources]
    scale = sources[0].update.scale
    matrices = _by_part(sources)
    made = [_block(block, out, matrices, size, where) for block in rows]
    if len(made) == 1:
        a, b = made[0] or _nothing(made, out)
        return Update(a, b, scale, layout="matrix")
    rank = max(one[0].shape[0] for one in made if one is not None)
    wide = max(out, sources[0].update.lora_A.shape[-1])
    _check_size(len(made) * wide, rank, where)
    # a stack has one rank: matrices of a lower one, or of no update, get zeros
    each = [_padded(one or _nothing(made, out), rank) for one in made]
    a, b = torch.stack([a for a, _ in each]), torch.stack([b for _, b in each])
    return Update(a, b, scale, layout="stack")


def _check_size(rows: int, rank: int, where: str) -> None:
    """Refuse a rank that takes a file a few bytes, and beside all of a weight's rows the memory."""
    if rows * rank > _MOST:
        told = f"rank {rank:,} for {counted(rows, 'row')}"
        raise FileError(f"{where}: {told} is more than any model has. Save it again.")


_Matrix = tuple[Source, int]  # of a stack, which one


def _by_part(sources: Sequence[Source]) -> dict[str, list[_Matrix]]:
    """The matrices that have rows of a part."""
    found: dict[str, list[_Matrix]] = {}
    for source in sources:
        for number, block in enumerate(source.rows):
            for part in block:
                found.setdefault(part.name, []).append((source, number))
    return found


def _block(
    block: Sequence[Part],
    out: int,
    matrices: Mapping[str, list[_Matrix]],
    size: Mapping[str, int],
    where: str,
) -> Optional[tuple[Tensor, Tensor]]:
    """The factors of one matrix; None where no update has rows of it."""
    there = starts(block, size)
    # each source once, though it may have several of the parts here
    those = {(id(s), n): (s, n) for name in there for s, n in matrices.get(name, ())}
    factors = []
    for source, number in those.values():
        a, b = _matrix(source.update, number)
        here = starts(source.rows[number], size)
        _check(b.shape[0], here, out, there, f"{where}, {source.path}")
        _check_size(out, b.shape[1], where)
        shared = [(here[name], there[name]) for name in here if name in there]
        factors.append(_moved(a, b, shared, out))
    if not factors:
        return None
    # ranks side by side: the sum of all, each in its own rows
    return torch.cat([a for a, _ in factors]), torch.cat([b for _, b in factors], 1)


def starts(block: Sequence[Part], size: Mapping[str, int]) -> dict[str, slice]:
    """The rows of each part."""
    found, at = {}, 0
    for part in block:
        found[part.name] = slice(at, at := at + size.get(part.size, 0))
    return found


def _check(
    have: int, here: Mapping[str, slice], out: int, there: Mapping[str, slice], where: str
) -> None:
    for rows, parts in ((have, here), (out, there)):
        counts = [part.stop - part.start for part in parts.values()]
        if sum(counts) != rows or 0 in counts:
            raise FileError(
                f"{where}: {counted(rows, 'row')}, which are not those of {', '.join(parts)} "
                f"({', '.join(map(str, counts))}). Was it made for another model?"
            )


def _matrix(update: Update, number: int) -> tuple[Tensor, Tensor]:
    if update.layout == "stack":
        return update.lora_A[number], update.lora_B[number]
    return update.lora_A, update.lora_B


def _moved(
    a: Tensor, b: Tensor, rows: Sequence[tuple[slice, slice]], out: int
) -> tuple[Tensor, Tensor]:
    """The factors of those rows in a weight of `out`, without ranks that do nothing there.

    A file of one fused weight often holds its parts apart, as blocks of zeros in ``lora_B``.
    """
    placed = b.new_zeros(out, b.shape[1])
    for here, there in rows:
        placed[there] = b[here]
    used = placed.count_nonzero(0) > 0
    # not used.any(): an update of zeros keeps its rank, for there is none of rank 0
    if used.all() or not used.any():
        return a, placed
    return a[used], placed[:, used]


def _nothing(made: "Sequence[Optional[tuple[Tensor, Tensor]]]", out: int) -> tuple[Tensor, Tensor]:
    a = next(one[0] for one in made if one is not None)
    return a.new_zeros(1, a.shape[1]), a.new_zeros(out, 1)


def _padded(factors: tuple[Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    a, b = factors
    more = rank - a.shape[0]
    return torch.cat([a, a.new_zeros(more, a.shape[1])]), torch.cat(
        [b, b.new_zeros(b.shape[0], more)], 1
    )
