"""PEFT's updates of parameters that are no layer's weight: stacks of experts, mostly."""

import re
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Optional

from einops import rearrange
from torch import Tensor

from paramlora.errors import FileError, listed
from paramlora.formats.base import COMPONENTS, Base
from paramlora.formats.content import (
    number,
)
from paramlora.formats.factors import (
    pair,
)
from paramlora.formats.peft.configuration import INNER, by_pattern, ends_in, tails
from paramlora.update.value import Update

# the layers of an expert before transformers 5, which peft 0.21 takes for parts of fused parameters
# wherever they stand; what tells that a model has such experts; single experts, which peft fuses
_PARTS = ("gate_proj", "up_proj", "down_proj", "gate", "w1", "w2", "w3")
_EXPERTS = re.compile(
    r".*\b(?:experts\.(?:gate_up_proj|down_proj|[0-9]+\..+)|shared_(?:experts?|mlp)(?:\..+)?"
    r"|mlps\.[0-9]+\..+)"
)
_SINGLE = re.compile(r".*\bexperts\.[0-9]+\..+")
_BLOCK = re.compile(r"(?P<block>.*?\.[0-9]+)\..+")
_FEW = 4  # blocks, of which all can be those before the first with experts


@dataclass(frozen=True)
class Pair:
    """The two tensors of one layer, under the path that the file gives it."""

    a: Tensor
    b: Tensor
    embedding: bool = False


def is_attention(path: str, found: Mapping[str, Pair]) -> bool:
    return f"{path}{INNER}.out_proj" in found or path.endswith(f"{INNER}.out_proj")


def owner_of(path: str) -> str:
    """The module inside PEFT's wrappers of its parameters."""
    end = len(path)
    while path.endswith(INNER, 0, end):
        end -= len(INNER)
    return path[:end]


@dataclass(frozen=True)
class Experts:
    """The parameters that ``target_parameters`` names, by their owner, and the ranks of each."""

    parameters: Mapping[str, list[str]]
    ranks: Mapping[str, Any]


def experts_of(
    found: Mapping[str, Pair], config: Mapping[str, Any], base: Optional[Base], source: str
) -> Experts:
    asked = [name for name in config.get("target_parameters") or [] if isinstance(name, str)]
    plain = (p for p, q in found.items() if not (q.embedding or is_attention(p, found)))
    owners = list(dict.fromkeys(map(owner_of, plain)))
    if not asked:
        return Experts({}, {})
    if base is None:
        parameters = _named_parameters(owners, asked, source)
    else:
        parameters = _held_parameters(owners, asked, base)
    told = {name: parameter_path(at, name) for at, own in parameters.items() for name in own}
    chosen = by_pattern(config, "rank_pattern", told.values(), source)
    ranks = {name: chosen.get(path, config.get("r")) for name, path in told.items()}
    return Experts(parameters, ranks)


def _named_parameters(owners: list[str], asked: list[str], source: str) -> dict[str, list[str]]:
    by_module: dict[str, list[str]] = {}
    for name in asked:
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    out = {}
    for owner in owners:
        named = [name for tail in tails(owner) for name in by_module.get(tail, [])]
        if len(named) > 1:
            raise FileError(
                f"{source}: {owner}: several parameters of one module; give the model, which "
                "knows their order (load_adapter, or convert --model)."
            )
        inner = [name.rpartition(".")[2] for name in named]
        out[owner] = [owner if name == "weight" else f"{owner}.{name}" for name in inner]
    return out


def _held_parameters(owners: list[str], asked: list[str], base: Base) -> dict[str, list[str]]:
    """The parameters of each, innermost wrapper first: PEFT wraps them in the order in which the
    module holds them, which only a model tells."""
    held: dict[str, list[str]] = {}
    for key in base:
        held.setdefault(key.rpartition(".")[0], []).append(key)
    # sorted for `_begins`, which is asked for every owner and component
    known, names, out = sorted(base), set(asked), {}
    for owner in owners:
        there = _place_of_owner(owner, known)
        # a layer's weight is the first thing that it holds, before other parameters
        own = [there] if there in base and ends_in(f"{owner}.weight", names) else []
        out[owner] = own + [key for key in held.get(there, []) if ends_in(key, names)]
    return out


def _place_of_owner(owner: str, known: list[str]) -> str:
    """`owner` without a component's name in front, where the base has none."""
    if _begins(owner, known) or _begins(f"{owner}.", known):
        return owner
    for component in COMPONENTS:
        rest = owner.removeprefix(f"{component}.")
        if rest != owner and _begins(f"{rest}.", known):
            return rest
    return owner


def _begins(start: str, known: list[str]) -> bool:
    """Whether one of the sorted names is `start`, or begins so where that ends in a dot."""
    at = bisect_left(known, start)
    if at == len(known):
        return False
    return known[at].startswith(start) if start.endswith(".") else known[at] == start


def expert_of(
    path: str,
    owner: str,
    experts: Experts,
    pair_: Pair,
    base: Optional[Base],
    where: str,
) -> tuple[str, Update]:
    parameters = experts.parameters[owner]
    # ParamWrapper lies in ParamWrapper: the innermost is behind the most base_layer
    depth = path.count(INNER, len(owner))
    if depth >= len(parameters):
        raise FileError(
            f"{where}: more wrapped parameters than the model has: {listed(parameters)}. Was it "
            "made for another model?"
        )
    name = parameters[len(parameters) - 1 - depth]
    r = int(number(experts.ranks[name], f"{where}, r"))
    count, extra = divmod(pair_.a.shape[0], max(r, 1))
    if extra or pair_.a.dim() != 2 or pair_.b.dim() != 2 or pair_.b.shape[1] != r * count:
        raise FileError(
            f"{where}: factors of {list(pair_.a.shape)} and {list(pair_.b.shape)} for "
            f"experts of rank {r}. Save it again."
        )
    # as many rows as one rank has: a plain matrix, no stack
    if count == 1 and (base is None or len(base[name].shape) == 2):
        return name, replace(pair(pair_.a, pair_.b, 1.0, where), kind="parameter")
    if base is None:
        raise FileError(
            f"{where}: {count} experts, stored as [out, in] or [in, out]; give the "
            "model (--model), which knows."
        )
    a = rearrange(pair_.a, "(e r) i -> e r i", e=count)
    b = rearrange(pair_.b, "o (r e) -> e o r", e=count)
    shape = base[name].shape
    # of square matrices both fit; then the owner's is_transposed tells
    plain, swapped = (b.shape[1], a.shape[2]) == shape[-2:], (a.shape[2], b.shape[1]) == shape[-2:]
    if swapped and (base[name].input_first or not plain):
        a, b = b.mT.contiguous(), a.mT.contiguous()
    return name, Update(a, b, 1.0, shape, "stack", kind="parameter")


def parameter_path(owner: str, name: str) -> str:
    """The path of a parameter as PEFT spells it: here a layer's own weight has the layer's."""
    return f"{name}.weight" if ends_in(owner, {name}) else name


def parts_beside_experts(updates: Mapping[str, Update], base: Optional[Base]) -> Iterator[str]:
    """The layers with names of experts' parts that are none, in a model that may have experts."""
    named = [
        path
        for path, update in updates.items()
        if path.rpartition(".")[2] in _PARTS
        and update.kind in (None, "linear")
        and not _SINGLE.fullmatch(path)
    ]
    told = any(_EXPERTS.fullmatch(path) for path in (*updates, *(base or ())))
    if told or (base is None and not _in_every_block(named, updates)):
        yield from named


def _in_every_block(named: Collection[str], updates: Collection[str]) -> bool:
    """Whether all numbered blocks have such layers, and others too: as of a model without experts.

    Experts come after a few blocks without them, so of few blocks nothing is told.
    """
    blocks, rest = (
        {match["block"] for path in paths if (match := _BLOCK.fullmatch(path)) is not None}
        for paths in (named, set(updates) - set(named))
    )
    return len(blocks) >= _FEW and blocks == rest
