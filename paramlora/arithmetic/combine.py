"""The weighted sum of adapters, as an adapter."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal, Optional, Union, get_args

import torch
from torch import Tensor

from paramlora.arithmetic.products import (
    Approximation,
    check_all_add,
    check_choice,
    decomposed,
    distance,
    is_difference,
    is_share,
    nearest,
    with_factors,
)
from paramlora.errors import AdapterError, counted, listed, spelled, warn
from paramlora.formats.factors import held, within
from paramlora.update.contexts import own_context
from paramlora.update.memory import installed
from paramlora.update.rounding import check_seed
from paramlora.update.value import Adapter, Holder, KindUpdate, Update
from paramlora.update.weighted import pairs_of

How = Literal["exact", "svd", "ties", "dare", "linear"]
HOWS: tuple[How, ...] = get_args(How)
_RANKED, _DENSE = ("svd", "ties", "dare"), ("ties", "dare")
Weighted = Union[Adapter, tuple[Adapter, float]]


@dataclass(frozen=True)
class _Term:
    """``scale · B·A``, in float64."""

    scale: float
    a: Tensor
    b: Tensor

    def turned(self) -> "_Term":
        return _Term(self.scale, self.b.mT, self.a.mT)


@dataclass(frozen=True)
class _Way:
    """How `combine` is asked to add.

    Args:
        how, rank, density, seed: as in `combine`.
    """

    how: How
    rank: Optional[int]
    density: float
    seed: int


@own_context()
def combine(
    adapters: Sequence[Weighted],
    how: How = "exact",
    rank: Optional[int] = None,
    *,
    density: Optional[float] = None,
    seed: int = 0,
    strict: bool = False,
) -> Approximation:
    r"""The adapter whose updates are the weighted sums of others', ``Σ wᵢ·sᵢ·Bᵢ·Aᵢ``.

    - ``"exact"`` joins the ranks: ``A`` is all rows of all ``Aᵢ``, ``B`` all columns of all
      ``wᵢ·sᵢ·Bᵢ``. Where some ``A`` or ``B`` are equal those share their rows. Factors are
      kept as they are where the scales agree, else rounded once to float32.
    - ``"svd"`` is the nearest of `rank` (Eckart and Young 1936), by QR of the factors.
    - ``"ties"`` (Yadav et al. 2023, arXiv:2306.01708, section 3): of each update the `density` of
      largest entries, of these the sign with the larger sum, and the mean of what has it; the
      weights come first, and a layer is a vector of its own. The nearest of `rank` of that.
    - ``"dare"`` (Yu et al. 2024, arXiv:2311.03099, equations 3 to 5): each entry is kept with
      probability `density` and divided by it, by random numbers of `seed`, then summed. The
      nearest of `rank` of that.
    - ``"linear"`` is what peft means by it: ``Σ√(wᵢsᵢ)·Bᵢ · Σ√(wᵢsᵢ)·Aᵢ``. It has the cross terms
      ``Bᵢ·Aⱼ``, so it is not the sum; it is here for comparison.

    Whole differences (LyCORIS's full, changes of biases and norms) add by ``"exact"`` and
    ``"svd"``, and stay whole; so does what an adapter adds as a product where another has one.

    Args:
        adapters: each with its weight; 1 without one. Any number may be negative.
        how: the way.
        rank: of the result, where the way has one; layers that hold less have less.
        density: a share of the entries, above 0 and up to 1.
        seed: of ``"dare"``.
        strict: a layer that only some of the adapters update is an error, not a warning.

    Returns:
        The adapter, and how near each layer is to the sum that the way means.

    Raises:
        AdapterError: other shapes, kinds that do not add, numbers that are not finite, ranks above
            what there is, or options that say nothing to this way.

    Example:
        >>> one = Adapter({"q": Update(torch.randn(1, 5), torch.randn(4, 1), 0.5, (4, 5))})
        >>> two = Adapter({"q": Update(torch.randn(2, 5), torch.randn(4, 2), 0.5, (4, 5))})
        >>> both = combine([one, (two, 2.0)]).adapter.updates["q"]
        >>> expected = one.updates["q"].delta() + 2 * two.updates["q"].delta()
        >>> assert both.r == 3 and torch.allclose(both.delta(), expected, atol=1e-6)
    """
    pairs = _weighted(adapters)
    _check_options(how, rank, density)
    check_seed(seed)
    way = _Way(how, rank, 1.0 if density is None else density, seed)
    every = _by_path(pairs)
    dense = {path: strong for path, strong in every.items() if any(_dense_ones(strong))}
    if dense and how not in ("exact", "svd"):
        raise AdapterError(
            f'{listed(dense)}: whole differences, which "{how}" does not add. Use "exact" (--how).'
        )
    terms: dict[str, list[_Strong]] = {p: s for p, s in every.items() if p not in dense}
    _report_missing(pairs, every, strict)
    whole = _whole(pairs, every)
    if rank is not None:
        _check_rank(rank, terms)
    updates, errors = _summed(terms, way)
    others, exact = _added(dense)
    return Approximation(
        _around([one for one, _ in pairs], updates, others, whole), {**errors, **exact}
    )


_Strong = tuple[int, Any, float]  # the adapter's number, its update, the weight


def _dense_ones(strong: list[_Strong]) -> Iterator[bool]:
    return (is_difference(value) for _, value, _ in strong)


def _added(
    dense: Mapping[str, list[_Strong]],
) -> tuple[dict[str, KindUpdate], dict[str, float]]:
    """The sum of whole differences at each path; tied tensors keep sharing one."""
    # by the values that add and their weights: tied layers have the same ones
    made: dict[tuple[tuple[int, float], ...], KindUpdate] = {}
    found = {}
    for path, strong in dense.items():
        same = tuple((id(value), weight) for _, value, weight in strong)
        if same not in made:
            made[same] = _difference(strong)
        found[path] = made[same]
    return found, dict.fromkeys(found, 0.0)


def _difference(strong: list[_Strong]) -> KindUpdate:
    """The sum in float64, rounded once to float32 or what is wider."""
    # one dense term makes the sum dense: the others' products are added to it
    first: KindUpdate = next(value for _, value, _ in strong if is_difference(value))
    shape = first.held["lora_diff"].shape
    total = torch.zeros(shape, dtype=torch.float64)
    dtypes = [torch.float32]
    for _, value, weight in strong:
        own = next(iter(value.tensors().values()))
        dtypes.append(own.dtype)
        if not is_difference(value):
            wide = replace(value, lora_A=value.lora_A.double(), lora_B=value.lora_B.double())
            total += weight * wide.delta().reshape(shape)
        else:
            total += weight * own.double()
    return replace(first, held={"lora_diff": held(total, reduce(torch.promote_types, dtypes))})


def _summed(
    terms: Mapping[str, list[_Strong]], way: _Way
) -> tuple[dict[str, Update], dict[str, float]]:
    """The sum at each path; tensors that are tied in each adapter keep sharing one."""
    updates, errors = {}, {}
    made: dict[tuple[tuple[int, float], ...], tuple[Update, float]] = {}
    for path, strong in terms.items():
        same = tuple((id(update), weight) for _, update, weight in strong)
        if same not in made:
            made[same] = _sum(path, strong, way)
        updates[path], errors[path] = made[same]
    return updates, errors


def _sum(path: str, strong: list[_Strong], way: _Way) -> tuple[Update, float]:
    first = strong[0][1]
    dtype = reduce(torch.promote_types, (u.lora_A.dtype for _, u, _ in strong))
    terms = [_Term(u.scale * w, u.lora_A.double(), u.lora_B.double()) for _, u, w in strong]
    if way.how in _DENSE:
        a, b, scale, error = _thinned(path, terms, [number for number, _, _ in strong], way, dtype)
    elif way.how == "linear":
        a, b, scale, error = (*_linear(path, terms), 1.0, 0.0)
    else:
        a, b, scale, error = _joined(terms, way.rank)
    # joined ranks may pass what the matrix holds, which a live update refuses
    joined = within(replace(first, lora_A=a, lora_B=b))
    return with_factors(joined, joined.lora_A, joined.lora_B, scale, dtype), error


def _joined(terms: list[_Term], rank: Optional[int]) -> tuple[Tensor, Tensor, float, float]:
    """A, B, the scale before them and the error of a cut."""
    # first of one A, then, turned, of one B: B1 A + B2 A = (B1 + B2) A
    fewer = _without_repeats(terms)
    fewer = [term.turned() for term in _without_repeats([term.turned() for term in fewer])]
    # one scale stays outside of the factors, so that equal ones leave those as they were
    scale = max((term.scale for term in fewer), key=abs)
    a = torch.cat([term.a for term in fewer], -2)
    # by a ratio: the same scales, and powers of two apart, lose no bit
    b = torch.cat([term.b * (term.scale / scale if scale else 1.0) for term in fewer], -1)
    if rank is None or rank >= a.shape[-2]:
        return a, b, scale, 0.0
    found = decomposed(a, b)
    error = found.error(rank) if scale else 0.0  # nothing of nothing is lost
    return *found.factors(rank), scale, error


def _without_repeats(terms: list[_Term]) -> list[_Term]:
    """The terms, those with the same A as one, which has no higher rank."""
    groups: list[list[_Term]] = []
    for term in terms:
        same = (g for g in groups if torch.equal(g[0].a, term.a))
        group = next(same, None)
        if group is None:
            groups.append([term])
        else:
            group.append(term)
    return [_one(group) for group in groups]


def _one(group: list[_Term]) -> _Term:
    scale = max((term.scale for term in group), key=abs)
    if len(group) == 1 or not scale:
        return group[0]
    parts = (term.b * (term.scale / scale) for term in group)
    return _Term(scale, group[0].a, reduce(Tensor.add, parts))


def _linear(path: str, terms: list[_Term]) -> tuple[Tensor, Tensor]:
    """The sum of the factors themselves, as peft's ``add_weighted_adapter`` forms it."""
    ranks = sorted({term.a.shape[-2] for term in terms})
    if len(ranks) > 1:
        raise AdapterError(
            f'{path}: "linear" adds factors of one rank, and these have {listed(map(str, ranks))}. '
            'Use "exact" or "svd" (--how).'
        )
    roots = [math.sqrt(abs(term.scale)) for term in terms]
    # a negative weight goes into A alone: in both factors it would cancel
    a = reduce(Tensor.add, (math.copysign(w, t.scale) * t.a for w, t in zip(roots, terms)))
    return a, reduce(Tensor.add, (w * t.b for w, t in zip(roots, terms)))


def _thinned(
    path: str, terms: list[_Term], numbers: list[int], way: _Way, dtype: torch.dtype
) -> tuple[Tensor, Tensor, float, float]:
    """The sum by a way that chooses entries: dense, one layer of it, and its nearest of a rank."""
    # these two need the dense products, which `exact` and `svd` never form
    _check_size(path, terms, way.how)
    wide = _wide_enough(terms, torch.promote_types(dtype, torch.float32), way.density)
    # a generator: dare adds one product at a time; ties needs all of them at once
    dense = (((term.b * term.scale) @ term.a).to(wide) for term in terms)
    if way.how == "ties":
        total = _ties([_trimmed(one, way.density) for one in dense])
    else:
        thin = (_dropped(one, way, path, number) for one, number in zip(dense, numbers))
        total = reduce(Tensor.add_, thin)
    assert way.rank is not None
    rank = min(way.rank, *total.shape[-2:])
    a, b = nearest(total, rank).factors(rank)
    return a, b, 1.0, distance(total, a, b)


def _wide_enough(terms: list[_Term], wide: torch.dtype, density: float) -> torch.dtype:
    """A type, or float64 where the norm of the sum may be beyond it, or its entries below."""
    limits, count = torch.finfo(wide), terms[0].b.shape[-2] * terms[0].a[..., 0, :].numel()
    # no entry of a product is above this; and all of a sum together, divided by what is kept
    most = [abs(t.scale) * float(t.b.norm()) * float(t.a.norm()) for t in terms]
    over = sum(most) * math.sqrt(count) / density > limits.max
    under = max(most) < limits.tiny / limits.eps
    return torch.float64 if over or under else wide


def _check_size(path: str, terms: list[_Term], how: str) -> None:
    """Refuse factors of a few bytes whose products would fill the memory."""
    # in bytes of float64: each term's product, and two more while they are summed
    size = 8 * terms[0].b.shape[-2] * terms[0].a[..., 0, :].numel() * (len(terms) + 2)
    if size > (memory := installed()):
        raise AdapterError(
            f'{path}: "{how}" forms the products, which take {size:,} bytes, and this machine has '
            f'{memory:,} of memory. Use "exact" or "svd" (--how), or a machine with more.'
        )


def _trimmed(delta: Tensor, density: float) -> Tensor:
    """The largest entries, the others zero."""
    flat = delta.reshape(-1)
    count = max(1, int(density * flat.numel()))
    kept = flat.abs().topk(count, sorted=False).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view_as(delta)


def _ties(deltas: list[Tensor]) -> Tensor:
    """The mean, at each entry, of what has the sign of the sum."""
    elected = torch.stack([delta.sign() for delta in deltas])
    # the sign with the larger sum of sizes is the sign of the sum
    sign = reduce(Tensor.add, deltas).sign()
    agree = (elected == sign) & (sign != 0)
    return (torch.stack(deltas) * agree).sum(0) / agree.sum(0).clamp(min=1)


def _dropped(delta: Tensor, way: _Way, path: str, number: int) -> Tensor:
    """Some entries, each divided by the share that is kept; by numbers of its own for each layer
    and adapter, so that no other layer's presence changes them."""
    digits = hashlib.sha256(f"{way.seed}\0{number}\0{path}".encode()).digest()
    # 56 bits: a seed of torch is an int64
    random = torch.Generator().manual_seed(int.from_bytes(digits[:7], "little"))
    kept = torch.rand(delta.shape, generator=random, dtype=torch.float64) < way.density
    return delta * kept / way.density


def _weighted(adapters: Sequence[Weighted]) -> list[tuple[Adapter, float]]:
    # one of weight 0 says nothing, not even which layers there are
    acting = [(adapter, weight) for adapter, weight in pairs_of(adapters) if weight]
    if not acting:
        raise AdapterError("nothing to add. Give an adapter whose weight is not 0.")
    return acting


def _check_options(how: str, rank: Optional[int], density: Optional[float]) -> None:
    if how not in HOWS:
        raise AdapterError(f'how (--how) "{how}" is not known. Known: {", ".join(HOWS)}.')
    if rank is None and how in _RANKED:
        raise AdapterError(
            f'"{how}" gives a sum of a lower rank: give a rank (--rank), such as 16.'
        )
    if rank is not None and how not in _RANKED:
        raise AdapterError(
            f'"{how}" has the rank that it has. Leave out the rank (--rank), or use "svd" (--how).'
        )
    if rank is not None:
        check_choice(rank, None)
    if density is None and how in _DENSE:
        raise AdapterError(f'"{how}" keeps a share of the entries: give a density (--density).')
    if density is not None and how not in _DENSE:
        raise AdapterError(f'"{how}" keeps all entries. Leave out the density (--density).')
    if density is not None and not is_share(density):
        raise AdapterError(
            "density (--density) is a share, above 0 and up to 1, such as 0.5; got "
            f"{spelled(density)}."
        )


def _by_path(pairs: list[tuple[Adapter, float]]) -> dict[str, list[_Strong]]:
    found: dict[str, list[_Strong]] = {}
    for number, (adapter, weight) in enumerate(pairs):
        check_all_add(adapter, adapter.name)
        values: dict[str, Any] = {**adapter.updates, **adapter.others}
        for path, update in values.items():
            if not math.isfinite(update.scale * weight):
                raise AdapterError(
                    f'{path}: its scale {update.scale:g} in "{adapter.name}" times the weight '
                    f"{weight:g} is beyond any number. Give a smaller weight."
                )
            there = found.setdefault(path, [])
            if there:
                names = pairs[there[0][0]][0].name, adapter.name
                _check_same(path, names, there[0][1], update)
            there.append((number, update, weight))
    return found


def _check_same(path: str, names: tuple[str, str], first: Any, other: Any) -> None:
    """Refuse updates of two weights; what a file does not tell of is taken to agree."""
    if is_difference(first) or is_difference(other):
        _check_dense(path, names, first, other)
        return
    shapes = [
        (tuple(u.lora_A.shape[:-2]), u.lora_B.shape[-2], u.lora_A.shape[-1]) for u in (first, other)
    ]
    told = None in (first.shape, other.shape) or first.shape == other.shape
    if shapes[0] == shapes[1] and told and first.layout == other.layout:
        return
    sizes = [list(u.shape or (u.lora_B.shape[-2], u.lora_A.shape[-1])) for u in (first, other)]
    raise AdapterError(
        f'{path}: "{names[0]}" updates a weight of {sizes[0]} ({first.layout}) and "{names[1]}" '
        f"one of {sizes[1]} ({other.layout}). Only adapters of one model add. Leave one out."
    )


def _check_dense(path: str, names: tuple[str, str], first: Any, other: Any) -> None:
    """Refuse two values of one path, of which one is a dense difference, of other shapes."""
    shapes = []
    for one in (first, other):
        own = one.held["lora_diff"].shape if is_difference(one) else one.shape
        shapes.append(list(own or (one.lora_B.shape[-2], one.lora_A.shape[-1])))
    if shapes[0] != shapes[1]:
        raise AdapterError(
            f'{path}: "{names[0]}" updates a weight of {shapes[0]} and "{names[1]}" one of '
            f"{shapes[1]}. Only adapters of one model add. Leave one out."
        )


def _report_missing(
    pairs: list[tuple[Adapter, float]], terms: Mapping[str, list[_Strong]], strict: bool
) -> None:
    some = [path for path, strong in terms.items() if len(strong) < len(pairs)]
    if not some:
        return
    text = f"only some of the adapters update {counted(len(some), 'layer')}: {listed(some)}."
    if strict:
        raise AdapterError(f"{text} Leave out strict (--strict) to have what there is.")
    warn(f"{text} There the sum has what there is.")


def _check_rank(rank: int, terms: Mapping[str, list[_Strong]]) -> None:
    most = {
        path: min(strong[0][1].lora_B.shape[-2], strong[0][1].lora_A.shape[-1])
        for path, strong in terms.items()
    }
    if most and rank > max(most.values()):
        path = max(most, key=lambda path: most[path])
        raise AdapterError(
            f"rank (--rank) {rank} is more than any layer holds; the most is {most[path]}, of "
            f'"{path or "weight"}". Give at most that.'
        )


def _whole(
    pairs: list[tuple[Adapter, float]], terms: Mapping[str, list[_Strong]]
) -> dict[str, Tensor]:
    """Tensors to have instead of the base's, which add only where one adapter alone has its own."""
    found: dict[str, Tensor] = {}
    for adapter, weight in pairs:
        for path, tensor in adapter.whole.items():
            if weight != 1 or path in found or path in terms:
                raise AdapterError(
                    f'{path}: trained whole by "{adapter.name}", and a weighted sum of that needs '
                    "the base. Give that adapter the weight 1 and no other one there, or merge "
                    "them into a checkpoint."
                )
            found[path] = tensor
    return found


def _around(
    adapters: list[Adapter],
    updates: dict[str, Update],
    others: dict[str, KindUpdate],
    whole: dict[str, Tensor],
) -> Adapter:
    """An adapter of the values, with the metadata that all adapters have alike, and with what any
    of them tells of a layer: the weight that it was trained on, and its kind where it is tied."""
    # a trigger word of one of several would be wrong of the sum
    told = [one.metadata.items() for one in adapters]
    metadata = dict(pair for pair in told[0] if all(pair in other for other in told))
    base: dict[str, str] = {}
    holders: dict[str, Holder] = {}
    apart: dict[str, tuple[str, ...]] = {}
    # what the first one says wins
    for one in reversed(adapters):
        base |= one.base
        holders |= one.holders
        apart |= one.apart
    _warn_bases(adapters)
    names = {one.name for one in adapters}
    name = names.pop() if len(names) == 1 else "combined"
    return Adapter(updates, name, metadata, whole, base, holders, others, apart)


def _warn_bases(adapters: Iterable[Adapter]) -> None:
    told: dict[str, str] = {}
    for one in adapters:
        other = [
            path for path, digits in one.base.items() if told.setdefault(path, digits) != digits
        ]
        if other:
            warn(
                f'"{one.name}" was trained on another base than the first: {listed(other, 3)} '
                "differ. Their sum belongs to neither."
            )
