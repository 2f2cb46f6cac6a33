"""The update of a weight out of those of other weights that hold its rows.

``W + s·B·A`` of a weight whose rows are those of several is the same sum for each: its rows of
``B``, and the whole of ``A``. What lies in one weight and comes from several updates has their
ranks one beside the other, each ``B`` with zeros in the others' rows. Every kind of update says so
of its own tensors (`AttachedUpdate.of_rows`); what adds and cannot is had as a low-rank update
or, where that is no smaller, as the change itself.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Optional, Union

import torch
from torch import Tensor

from paramlora.errors import FileError, counted, listed
from paramlora.formats.factors import held, with_scale_in, with_scale_in_B
from paramlora.formats.parts import Part, Rows
from paramlora.update.attached import AttachedUpdate, kind_adds, says
from paramlora.update.geometry import Layout
from paramlora.update.kinds import KINDS
from paramlora.update.sum import folded
from paramlora.update.value import KindUpdate, Update

_MOST = 1 << 30  # elements of one factor
_Any = Union[Update, KindUpdate]
_Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Source:
    """An update of a file, and what its rows are.

    Args:
        path: as the file has it.
        value: of a matrix, or of a stack of them.
        rows: what the outputs of each matrix are.
    """

    path: str
    value: _Any
    rows: Rows

    @property
    def kind(self) -> type[AttachedUpdate]:
        """The class of its kind; a branch counts as the low-rank update that it equals."""
        return KINDS["lora" if isinstance(self.value, Update) else self.value.method]

    def outputs(self) -> int:
        """How many rows a matrix has."""
        return self.kind.outputs_of(self.matrix(0))

    def shape(self, matrix: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the file's own weight, by that of one of the model's matrices."""
        lead = (len(self.rows),) if self.value.layout == "stack" else ()
        return (*lead, self.outputs(), *matrix[1:])

    def matrix(self, number: int) -> dict[str, Tensor]:
        """The tensors of one matrix."""
        own = self.value.tensors()
        stack = self.value.layout == "stack"
        return {n: t[number] for n, t in own.items()} if stack else own


def check_blocks(source: Source, where: str) -> None:
    """Refuse a stack of another number of matrices, and what is no matrix or stack at all.

    Raises:
        FileError: as said.
    """
    value, count = source.value, len(source.rows)
    tensors = list(value.tensors().values())
    stack = value.layout == "stack"
    same = isinstance(value, Update) and value.up_kernel != 1
    sound = all(one.dim() == 3 if stack else one.dim() > 1 for one in tensors)
    counts = {one.shape[0] for one in tensors} if stack and sound else {1}
    if counts != {count} or value.layout == "transposed" or same or not sound:
        have = listed(map(str, sorted(counts)))
        raise FileError(
            f"{where}: {have} matrices ({value.layout}) instead of {count} whose rows are those "
            "of other weights. Was it made for another model?"
        )
    if not source.outputs():
        raise _whole_alone(source, where)


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
    rows: Rows,
    matrix: tuple[int, ...],
    sources: Sequence[Source],
    size: Mapping[str, int],
    where: str,
) -> _Any:
    """The update of a weight that holds `rows`, out of all those that have some of them.

    Args:
        rows: what the weight's rows are.
        matrix: the shape of one of its matrices, ``[out, in, *kernel]``.
        sources: the updates.
        size: of the parts, from `sizes`.
        where: the file and the weight, for messages.

    Returns:
        A matrix's update; a stack's where `rows` has more than one block.

    Raises:
        FileError: the rows do not fit, or no update does what these do.
    """
    for source in sources:
        _check_inputs(source, matrix, f"{where}, {source.path}")
    held_here = {part.name for block in rows for part in block}
    told = [part.name for s in sources for block in s.rows for part in block]
    told = [name for name in told if name in held_here]
    # what a kind has in other rows than its own is no sum where two are of the same
    if len({source.kind for source in sources}) == 1 and len(set(told)) == len(told):
        _check_all_told(sources, sorted(held_here.difference(told)), where)
        found = _of_one_kind(rows, matrix, sources, size, where)
        if found is not None:
            return found
    for source in sources:
        if not kind_adds(source.kind):
            raise _whole_alone(source, f"{where}, {source.path}")
    values = alike([source.value for source in sources], [s.shape(matrix) for s in sources])
    sources = [replace(source, value=value) for source, value in zip(sources, values)]
    found = _of_one_kind(rows, matrix, sources, size, where)
    assert found is not None  # a low-rank update, or a difference, can be of any rows
    return found


def _check_all_told(sources: Sequence[Source], lost: Sequence[str], where: str) -> None:
    """Refuse rows of which nothing is told beside those of a kind that does not add."""
    alone = next((source for source in sources if not kind_adds(source.kind)), None)
    if lost and alone is not None:
        raise FileError(
            f"{where}, {alone.path}: an update of kind {alone.value.method} is of all rows of a "
            f"weight, and of {listed(lost, 4)}, which the model holds in the same one, the file "
            "tells nothing. Give a model of the file's own names."
        )


def alike(values: Sequence[_Any], shapes: Sequence[tuple[int, ...]]) -> Sequence[_Any]:
    """Updates that add, as low-rank ones, or all as differences where one is no lower a rank.

    Args:
        values: each of a weight of the shape at its place in `shapes`.
    """
    low = [_low_rank(value, shape) for value, shape in zip(values, shapes)]
    if all(isinstance(value, Update) for value in low):
        return low
    return differences_of(values, shapes)


def differences_of(values: Sequence[_Any], shapes: Sequence[tuple[int, ...]]) -> list[KindUpdate]:
    """Updates that add, as what they add to weights of those shapes."""
    return [_difference(value, shape) for value, shape in zip(values, shapes)]


def _low_rank(value: _Any, shape: tuple[int, ...]) -> _Any:
    if isinstance(value, Update):
        return value
    kind = KINDS[value.method]
    factors = kind.factors_of(value.held) if says(kind, "factors_of") else None
    if factors is None or sum(f.numel() for f in factors) >= math.prod(shape):
        return value
    own = next(iter(value.held.values())).dtype
    a, b = (held(factor.double(), own) for factor in factors)
    both = torch.promote_types(a.dtype, b.dtype)
    return Update(a.to(both), b.to(both), value.scale, layout=value.layout)


def _difference(value: _Any, shape: tuple[int, ...]) -> KindUpdate:
    """The change itself, formed in double precision."""
    if not isinstance(value, Update) and value.method == "difference":
        return value
    own = next(iter(value.tensors().values()))
    base = torch.zeros(shape, dtype=torch.float64, device=own.device)
    change = folded(base, [value.term(1.0, torch.float64, own.device)])
    return KindUpdate("difference", {"lora_diff": held(change, own.dtype)}, layout=value.layout)


def _of_one_kind(
    rows: Rows,
    matrix: tuple[int, ...],
    sources: Sequence[Source],
    size: Mapping[str, int],
    where: str,
) -> Optional[_Any]:
    """The update out of those of one kind; None where no update of that kind does what they do."""
    kind = sources[0].kind
    # an update has one scale: where sources differ theirs go into a factor first
    if len({source.value.scale for source in sources}) > 1:
        sources = [replace(source, value=_with_scale_in(source.value)) for source in sources]
    matrices = _by_part(sources)
    found = [_block(block, matrix, matrices, size, where) for block in rows]
    joined = [None if one is None else _joined(kind, one) for one in found]
    made = [one for one in joined if one is not None]
    if len(made) < len(rows):
        return None
    if len(made) == 1:
        return _like(sources[0].value, made[0], "matrix")
    rank = max(kind.rank_of(one) for one in made if one)
    _check_size(len(made) * max(matrix[0], math.prod(matrix[1:])), rank, where)
    names = next(one for one in made if one)
    stacked = {name: _stacked([one.get(name) for one in made]) for name in names}
    # not every kind can be of a stack
    if not kind.fits(stacked, (len(made), *matrix), "stack"):
        return None
    return _like(sources[0].value, stacked, "stack")


def _joined(kind: type[AttachedUpdate], several: Sequence[_Tensors]) -> Optional[_Tensors]:
    """The tensors of one matrix; none where no update has rows of it."""
    return kind.beside_each_other(several) if several else {}


def _like(first: _Any, tensors: _Tensors, layout: Layout) -> _Any:
    """An update as the first of its sources, of other tensors and of a layer of no known kind."""
    if isinstance(first, Update):
        a, b = (tensors[name] for name in ("lora_A", "lora_B"))
        return replace(first, lora_A=a, lora_B=b, shape=None, layout=layout, hard=True, kind=None)
    options = KINDS[first.method].options_of(tensors)
    return replace(first, held=tensors, shape=None, layout=layout, options=options, kind=None)


def _with_scale_in(value: _Any) -> _Any:
    if isinstance(value, Update):
        return with_scale_in_B(value)
    # of each kind that has a scale the first tensor is a factor of what that scales
    return with_scale_in(value, min(value.held))


def _whole_alone(source: Source, where: str) -> FileError:
    return FileError(
        f"{where}: its rows are in other weights of the model, and an update of kind "
        f"{source.value.method} as this one is of its whole weight alone. Give a model of the "
        "file's own names."
    )


def _check_inputs(source: Source, matrix: tuple[int, ...], where: str) -> None:
    own = source.matrix(0)
    if not source.kind.fits(own, (source.outputs(), *matrix[1:]), "matrix"):
        sizes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in own.items())
        raise FileError(
            f"{where}: an update of {sizes} does not fit the weight's inputs, "
            f"{list(matrix[1:])}. Was it made for another model?"
        )


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
    matrix: tuple[int, ...],
    matrices: Mapping[str, list[_Matrix]],
    size: Mapping[str, int],
    where: str,
) -> Optional[list[_Tensors]]:
    """The tensors of one matrix, of each update that has rows of it; None where a kind cannot."""
    there, out = starts(block, size), matrix[0]
    # each source once, though it may have several of the parts here
    those = {(id(s), n): (s, n) for name in there for s, n in matrices.get(name, ())}
    found = []
    for source, number in those.values():
        own, here = source.matrix(number), starts(source.rows[number], size)
        _check(source.outputs(), here, out, there, f"{where}, {source.path}")
        _check_size(out, source.kind.rank_of(own), where)
        shared = [(here[name], there[name]) for name in here if name in there]
        told = says(source.kind, "of_rows")
        moved = source.kind.of_rows(own, shared, out) if told else None
        if moved is None:
            return None
        found.append(moved)
    return found


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
    for name in here.keys() & there.keys():
        own, model = (parts[name].stop - parts[name].start for parts in (here, there))
        if own != model:
            raise FileError(
                f"{where}: {counted(own, 'row')} of {name}, of which the model has {model}. Was it "
                "made for another model?"
            )


def _stacked(tensors: Sequence[Optional[Tensor]]) -> Tensor:
    """Tensors of several ranks as one, those of a lower one, or of no update, with zeros."""
    there = [tensor for tensor in tensors if tensor is not None]
    sides = [max(sizes) for sizes in zip(*(tensor.shape for tensor in there))]
    out = there[0].new_zeros(len(tensors), *sides)
    for row, tensor in zip(out, tensors):
        if tensor is not None:
            row[tuple(slice(n) for n in tensor.shape)] = tensor
    return out
