"""The weights of a base model, by name and shape, and an adapter made to fit them."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Optional, TypeVar, Union, get_args

import torch
from torch import Tensor, nn

from paramlora.errors import FileError, closest, listed
from paramlora.formats.content import Options, report
from paramlora.formats.factors import held, with_scale_in_B
from paramlora.formats.names.levels import belongs
from paramlora.formats.originals import original_names
from paramlora.formats.parts import STACKS
from paramlora.formats.pieces import Source, alike, check_blocks, gathered, sizes
from paramlora.formats.places import Found, Places
from paramlora.model.targets import Target, adaptable, base_tensor, unwrapped, vectors
from paramlora.update.attached import kind_adds
from paramlora.update.geometry import Layout, matrix_shape
from paramlora.update.kinds import KINDS
from paramlora.update.value import Adapter, Holder, KindUpdate, Update, Value, apart_by_kind

_Value = TypeVar("_Value")
# in front of a file's names: diffusers' parts of a pipeline, ComfyUI's denoiser, peft's wrapper
COMPONENTS = (
    "unet transformer transformer_2 prior decoder text_encoder text_encoder_2 text_encoder_3 "
    "text_encoders diffusion_model model.diffusion_model base_model.model base_model"
).split()


@dataclass(frozen=True)
class Slot:
    """One weight that can be adapted.

    Args:
        shape: the weight's own.
        layout: None where only a checkpoint is known.
        kind, groups: as in `Update`.
        classes: the names of the classes from the model down to the layer.
        input_first: whether a stack of matrices is ``[E, in, out]``, as its owner's
            ``is_transposed`` says (transformers' expert layers).
        tied: the other paths of the same tensor.
        values: gives the weight itself, where a model is known.
    """

    shape: tuple[int, ...]
    layout: Optional[Layout] = None
    kind: Optional[str] = None
    groups: Optional[int] = None
    classes: tuple[str, ...] = ()
    input_first: bool = False
    tied: tuple[str, ...] = field(default=(), compare=False)
    values: Optional[Callable[[], Tensor]] = field(default=None, compare=False)


Base = Mapping[str, Slot]


class Known(dict[str, Slot]):
    """A `Base`, and beside it what has one dimension, such as biases and norms' weights, by path.

    Those have no low-rank update, and can be changed whole.
    """

    vectors: Mapping[str, Slot]

    def __init__(self, matrices: Base, vectors: Mapping[str, Slot]) -> None:
        super().__init__(matrices)
        self.vectors = vectors


def vectors_of(base: Optional[Base]) -> Mapping[str, Slot]:
    """What is known beside the matrices; nothing of a mapping that does not tell."""
    return base.vectors if isinstance(base, Known) else {}


_Any = Union[Update, KindUpdate]


def base_of(model: nn.Module) -> Base:
    """What can be adapted in `model`, in its order, by the paths of adapter files.

    Example:
        >>> base_of(nn.Sequential(nn.Embedding(5, 2)))["0"].shape
        (5, 2)
    """
    # files have no names of wrappers, such as torch.compile's _orig_mod
    inside = unwrapped(model)
    beside = {one.path: Slot(one.shape, "matrix", one.kind) for one in vectors(inside)}
    found = {target.path: _slot(inside, target) for target in adaptable(inside)}
    for path, others in _ties(inside, found).items():
        found[path] = replace(found[path], tied=others)
    return Known(found, beside)


def _ties(model: nn.Module, known: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The other paths of each weight that several layers hold."""
    there, holders = set(known), dict[int, list[str]]()
    # otherwise torch names a tied tensor once, and the other layers would seem to have none
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path = name.removesuffix(".weight")
        if path in there:
            holders.setdefault(id(parameter), []).append(path)
    several = (paths for paths in holders.values() if len(paths) > 1)
    return {p: tuple(o for o in paths if o != p) for paths in several for p in paths}


def base_of_shapes(shapes: Mapping[str, "tuple[int, ...] | torch.Size"]) -> Base:
    """A model's names and shapes out of a checkpoint's keys, where layers' kinds are unknown."""
    slots = {key.removesuffix(".weight"): Slot(tuple(shape)) for key, shape in shapes.items()}
    matrices = {path: slot for path, slot in slots.items() if len(slot.shape) >= 2}
    layouts = _layouts(matrices)
    matrices = {p: replace(slot, layout=layouts.get(p)) for p, slot in matrices.items()}
    return Known(matrices, {path: slot for path, slot in slots.items() if len(slot.shape) == 1})


def _layouts(matrices: Base) -> dict[str, Layout]:
    """How weights of GPT-2's names are stored: as transformers' Conv1Ds, or as Linear layers in
    models that took the names over. Those that have more outputs than inputs tell of the square
    ones."""
    named = {p: s for p, s in matrices.items() if is_named_conv1d(p) and len(s.shape) == 2}
    told: dict[str, set[Layout]] = {}
    for path, slot in named.items():
        wider = path.rpartition(".")[2] in ("c_attn", "c_fc") and slot.shape[0] != slot.shape[1]
        if wider:
            stored: Layout = "transposed" if slot.shape[0] < slot.shape[1] else "matrix"
            told.setdefault(_stack_of(path), set()).add(stored)
    sure = {stack: next(iter(one)) for stack, one in told.items() if len(one) == 1}
    return {path: sure[_stack_of(path)] for path in named if _stack_of(path) in sure}


def is_named_conv1d(path: str) -> bool:
    """Whether a layer has the name of one of GPT-2's, which are transformers' Conv1Ds there."""
    return path.rpartition(".")[2] in ("c_attn", "c_fc", "c_proj", "q_attn")


def _stack_of(path: str) -> str:
    """What stands before the number of a block."""
    return re.split(r"\.\d+\.", path)[0]


def fit(adapter: Adapter, base: Base, options: Options, source: str) -> Adapter:
    """`adapter` under the names of `base`, with its shapes; one that does not fit is an error.

    A file's name is found by what `base` has, in any tool's spelling (see `Places`); an update of
    several weights in one is divided, and those of one weight's parts are joined, exactly. Where a
    file has both the fused weight and its parts, their updates add up, as the patches of one weight
    do in ComfyUI (comfy/lora.py at 17358c8f, ``calculate_weight``).

    Raises:
        FileError: an update without a weight, two for one weight, or another shape.
    """
    chosen: dict[str, _Any] = {**adapter.updates, **adapter.others}
    if options.component is not None:
        chosen = component_of(adapter, options.component, source)
    # a file may change biases and norms too, which have no low-rank update
    base = Known({**base, **vectors_of(base)}, {})
    places = places_of(base)
    # all places first, so that one error names all updates of nothing
    there = {path: _place(path, places, f"{source}: {path}") for path in chosen}
    check_known((path for path in chosen if there[path] is None), base, options, source)
    found = {path: one for path, one in there.items() if one is not None}
    _check_once(found, source)
    _check_sides({path: (chosen[path], one) for path, one in found.items()}, base, source)
    updates: dict[str, Value] = {}
    made: dict[tuple[int, Slot], Value] = {}  # tied tensors keep sharing one update
    holders = Counter(map(id, chosen.values()))
    for path, one in found.items():
        if one.weight is not None:
            slot = _told(base[one.weight], adapter.holders.get(path))
            # a difference moves the tensor itself: whichever layer holds it, it is the same one
            moves = KINDS[chosen[path].method].tied
            tied = holders[id(chosen[path])] > 1
            value = _turned(chosen[path], f"{source}: {path}") if one.turned else chosen[path]
            fresh = _fitted(one.weight, value, slot, source, tied)
            # layers share one value again where its file's was one and their kinds agree
            key = (id(chosen[path]), Slot(slot.shape) if moves else slot)
            updates[one.weight] = made.setdefault(key, fresh)
    parts = {path: one for path, one in found.items() if one.weight is None}
    for path, rows in _gathered(chosen, parts, base, source).items():
        own = updates.get(path)
        updates[path] = rows if own is None else _added(path, own, rows, base[path], source)
    told = apart_by_kind(updates)
    # a checkpoint does not tell which of its layers hold one tensor in the model
    alone = {**adapter.apart, **_apart(updates, base)}
    return replace(adapter, updates=told["updates"], others=told["others"], apart=alone)


def _apart(updates: Mapping[str, Value], base: Base) -> dict[str, tuple[str, ...]]:
    """By path of an update, the layers that hold its tensor without it."""
    found = {
        path: tuple(other for other in base[path].tied if other not in updates)
        for path, value in updates.items()
        if not KINDS[value.method].tied
    }
    return {path: others for path, others in found.items() if others}


def places_of(base: Base) -> Places:
    """The names by which a file can mean what is in `base`."""
    return Places({path: slot.shape for path, slot in base.items()})


def _place(path: str, places: Places, where: str) -> Optional[Found]:
    """Where a file's path lies; of a bias, beside the weight that its layer's name means."""
    found = places.find(path, where)
    layer, dot, name = path.rpartition(".")
    if found is not None or name != "bias" or not dot:
        return found
    beside = places.find(layer, where)
    if beside is None or beside.weight is None or f"{beside.weight}.bias" not in places.shapes:
        return None
    return Found(f"{beside.weight}.bias")


def original_of(base: Base) -> Base:
    """A base's weights under their original names, fused as there: for `fit`, and so for writing.

    ComfyUI's and kohya's files of a transformer have these names, where diffusers' model has its
    own. Weights of one name alone keep it, and so do all of a model that has the original names.

    Example:
        >>> base = {f"blocks.0.attn1.to_{n}": Slot((4, 6)) for n in "qkv"}
        >>> list(original_of(base))
        ['blocks.0.self_attn.q', 'blocks.0.self_attn.k', 'blocks.0.self_attn.v']
    """
    found = {}
    names = original_names(places_of(base))
    beside = dict(vectors_of(base))
    for name, there in names.items():
        own = [base[path] for path in there.paths]
        rows = sum(slot.shape[0] for slot in own)
        found[name] = replace(own[0], shape=(rows, *own[0].shape[1:]))
        # a bias follows its weight; where rows of several are joined no single bias does
        if there.weight is not None and f"{there.weight}.bias" in beside:
            beside[f"{name}.bias"] = beside.pop(f"{there.weight}.bias")
    renamed = {path for there in names.values() for path in there.paths}
    kept = {path: slot for path, slot in base.items() if path not in renamed}
    return Known(kept | found, beside)


def stacks_of(base: Base) -> Base:
    """The stacks of matrices that a file can mean by what `base` has one by one: experts.

    In the order of the tables, which is that of the modules: PEFT's files follow it.
    """
    found = {}
    for name, there in places_of(base).others.items():
        if len(there.rows) > 1:
            # of the first expert: all are of one shape
            own = [base[there.held[part.name][0]].shape for part in there.rows[0]]
            rows = sum(shape[0] for shape in own)
            found[name] = Slot((len(there.rows), rows, *own[0][1:]), "stack", "parameter")
    return {
        name: found[name]
        for name in sorted(found, key=lambda n: STACKS.index(n.rpartition(".")[2]))
    }


def _check_once(found: Mapping[str, Found], source: str) -> None:
    """Refuse two updates of the same weight of a file; of one fused and one of its parts each has
    its own name there, and both are meant."""
    taken: set[tuple[str, frozenset[str]]] = set()
    for path, there in found.items():
        for weight in there.paths:
            own = {name for name, (at, _) in there.held.items() if at == weight}
            meant = (weight, frozenset(() if there.weight is not None else there.held or own))
            if meant in taken:
                raise FileError(
                    f"{source}: {path} is a second update of {weight}. Choose one part of the file "
                    "with component=... (--component), such as text_encoder_2."
                )
            taken.add(meant)


def _check_sides(found: Mapping[str, tuple[_Any, Found]], base: Base, source: str) -> None:
    """Refuse square weights of a checkpoint where the file tells another's shape the other way
    round: it may be as wrong of these, and no shape would show it.

    peft's ``fan_in_fan_out`` is that of the last layer that it has adapted, whatever the others
    are: GPT-2's head is a Linear, and what stands before it are Conv1Ds.
    """
    square: list[str] = []
    turned: list[str] = []
    untold: list[str] = []
    for path, (value, there) in found.items():
        slot = base[there.weight] if there.weight is not None else None
        if slot is None or slot.layout is not None or value.kind not in (None, "linear"):
            continue
        told = value.shape
        if are_sides_untold(value) and len(set(slot.shape)) == 1:
            untold.append(path)
        elif told is not None and len(told) == 2 and not there.turned:
            if told[0] == told[1]:
                square.append(path)
            elif told[::-1] == slot.shape:
                turned.append(path)
    if untold:
        raise sides_untold(untold, source)
    if square and turned:
        raise FileError(
            f"{source}: {listed(square, 4)}: a checkpoint does not tell which side of a square "
            f"weight is the input, and the file tells it wrongly of {turned[0]}. Give the model "
            "(--model)."
        )


def are_sides_untold(value: Value) -> bool:
    """Whether an update is of a Linear or a Conv1D, and its file does not tell of which."""
    return getattr(value, "kind", None) == "linear" and value.shape is None


def sides_untold(paths: Iterable[str], source: str) -> FileError:
    """What is wrong with updates of which nothing tells how their weight is stored."""
    return FileError(
        f"{source}: {listed(paths, 4)}: its file is of Linear layers beside transformers' Conv1Ds, "
        "and does not tell which of the two these are. Give the model (--model)."
    )


def _added(path: str, one: Value, second: _Any, slot: Slot, source: str) -> _Any:
    """Two updates of one weight as one: their ranks side by side, or both as a change of it."""
    both = [value for value in (one, second) if isinstance(value, (Update, KindUpdate))]
    sums = [kind_adds(KINDS[v.method]) and getattr(v, "up_kernel", 1) == 1 for v in both]
    if len(both) < 2 or not all(sums):
        raise FileError(
            f"{source}: {path} has an update of its own that does not add, and another with "
            "other weights. Choose one of them with component=... (--component), or leave one out."
        )
    first, other = alike(both, [slot.shape] * 2)
    if not (isinstance(first, Update) and isinstance(other, Update)):
        own, added = (value.tensors()["lora_diff"] for value in (first, other))
        total = held(own.double() + added.double(), torch.promote_types(own.dtype, added.dtype))
        return KindUpdate("difference", {"lora_diff": total}, layout=first.layout)
    if first.scale != second.scale:
        # one update has one scale, so two that differ go into the factors
        first, other = with_scale_in_B(first), with_scale_in_B(other)
    a = torch.cat([first.lora_A, other.lora_A], dim=-2)
    return replace(first, lora_A=a, lora_B=torch.cat([first.lora_B, other.lora_B], dim=-1))


def _gathered(
    chosen: Mapping[str, _Any], parts: Mapping[str, Found], base: Base, source: str
) -> dict[str, _Any]:
    """The updates of weights whose rows the file has elsewhere."""
    sources = {path: Source(path, chosen[path], there.rows) for path, there in parts.items()}
    for path, one in sources.items():
        check_blocks(one, f"{source}: {path}")
    inside = {path: rows for there in parts.values() for path, rows in there.held.values()}
    matrices = {path: _matrix(base[path], len(rows)) for path, rows in inside.items()}
    of: dict[str, list[Source]] = {}
    for path, there in parts.items():
        for weight in there.paths:
            of.setdefault(weight, []).append(sources[path])
    # what the model's and the file's weights have in all tells how many rows each part has
    totals = [(matrices[path][0], block) for path, rows in inside.items() for block in rows]
    totals += [(one.outputs(), block) for one in sources.values() for block in one.rows]
    size = sizes(totals)
    updates: dict[str, _Any] = {}
    for weight, those in of.items():
        update = gathered(inside[weight], matrices[weight], those, size, f"{source}: {weight}")
        # single experts are [out, in]: where the stack is [in, out] the sides change places
        if update.layout == "stack" and base[weight].input_first:
            update = _turned(update, f"{source}: {weight}")
        updates[weight] = _fitted(weight, update, base[weight], source, False)
    return updates


def _matrix(slot: Slot, blocks: int) -> tuple[int, ...]:
    """The shape of one of a weight's matrices, ``[out, in, *kernel]``."""
    layout = slot.layout or ("stack" if blocks > 1 else "matrix")
    if layout == "matrix":
        return slot.shape
    _, out, fan_in = matrix_shape(slot.shape, layout)
    return (fan_in, out) if slot.input_first else (out, fan_in)


def apart(adapter: Adapter, base: Optional[Base]) -> Adapter:
    """`adapter` with an update of its own for each layer that holds a tied tensor, as `fit` gives.

    Raises:
        FileError: nothing tells what kind of layers hold an embedding's tensor.
    """
    if any(adapter.updates[path].kind == "embedding" for path in _untold(adapter, base)):
        check_holders(adapter, base)
    if base is not None:
        return fit(adapter, base, Options(), "adapter")
    fresh = {}
    for path, holder in adapter.holders.items():
        update = adapter.updates.get(path)
        if update is not None and update.shape is not None:
            slot = _told(Slot(update.shape), holder)
            fresh[path] = _fitted_factors(path, update, slot, "adapter", True)
    return replace(adapter, updates={**adapter.updates, **fresh})


def check_holders(adapter: Adapter, base: Optional[Base]) -> None:
    """Refuse tied tensors of whose layers nothing tells the kind, as files of 0.1.0 do not.

    Raises:
        FileError: names them.
    """
    untold = _untold(adapter, base)
    if untold:
        raise FileError(
            f"{', '.join(untold)}: one tied tensor, and the adapter does not tell what kind of "
            "layer each is. Give the model (--model)."
        )


def _untold(adapter: Adapter, base: Optional[Base]) -> list[str]:
    count = Counter(map(id, adapter.updates.values()))
    tied = [path for path, update in adapter.updates.items() if count[id(update)] > 1]
    kinds = {path for path, slot in (base or {}).items() if slot.kind is not None}
    return [p for p in tied if p not in adapter.holders and place(p, base or {}) not in kinds]


def _told(slot: Slot, holder: Optional[Holder]) -> Slot:
    """A slot with what the adapter tells of the layer, where the base does not."""
    if slot.kind is not None or holder is None:
        return slot
    return replace(slot, kind=holder.kind, layout=holder.layout, groups=holder.groups)


def check_known(lost: Iterable[str], base: Base, options: Options, source: str) -> None:
    """Report the updates that found no weight in the model."""
    paths = sorted(lost)
    near = closest(paths[0], base) if paths else []
    hint = f' Closest to "{paths[0]}": "{near[0]}".' if near else ""
    report(
        source,
        "updates of what the model does not have",
        paths,
        options.strict,
        f"Is it for another model, or for several, of which component=... (--component) "
        f"chooses one?{hint}",
    )


def place(path: str, base: Base) -> Optional[str]:
    """The weight that a file's path means."""
    for component in ("", *COMPONENTS):
        rest = path.removeprefix(f"{component}.") if component else path
        if component and rest == path:
            continue
        # transformers 5 has left out this level of CLIP's text model
        for name in (rest, rest.removeprefix("text_model.")):
            if name in base:
                return name
    return None


def part_of(
    adapter: Adapter, component: str, source: str, within_pipeline: bool = False
) -> Adapter:
    """One part of a pipeline, under the names that its own model has, or the pipeline.

    Raises:
        FileError: there is none of it.
    """
    found = apart_by_kind(component_of(adapter, component, source))

    def inside(values: Mapping[str, _Value]) -> dict[str, _Value]:
        start = "" if within_pipeline else f"{component}."
        own = {path: value for path, value in values.items() if belongs(path, component)}
        return {path.removeprefix(start): value for path, value in own.items()}

    return replace(
        adapter,
        updates=inside(found["updates"]),
        others=inside(found["others"]),
        whole=inside(adapter.whole),
        base=inside(adapter.base),
        holders=inside(adapter.holders),
        apart=inside(adapter.apart),
    )


def component_of(adapter: Adapter, component: str, source: str) -> dict[str, _Any]:
    """The updates of one part of a pipeline.

    Raises:
        FileError: there is none of it.
    """
    every: dict[str, _Any] = {**adapter.updates, **adapter.others}
    found = {path: update for path, update in every.items() if belongs(path, component)}
    if not found:
        parts = dict.fromkeys(path.split(".")[0] for path in every)
        raise FileError(
            f"{source}: it has no part {component}. Its names begin with {listed(parts, 4)}; give "
            "one of those as component (--component), or leave it out."
        )
    return found


def _fitted(path: str, update: _Any, slot: Slot, source: str, tied: bool) -> _Any:
    if isinstance(update, Update):
        return _fitted_factors(path, update, slot, source, tied)
    layouts = [slot.layout] if slot.layout else [update.layout, *get_args(Layout)]
    # of a tied tensor another holder's layout says nothing of how the tensor is stored
    laid = ((update if tied else update.relaid(layout), layout) for layout in layouts)
    fits = (found for one, layout in laid if (found := one.fitted(slot.shape, [layout])))
    fitted = next(fits, None)
    if fitted is None and tied:
        raise FileError(
            f"{source}: {path}: one of several layers that hold a tensor, whose "
            f'"{update.method}" is by the sides of another one, and this format has one of each '
            "layer. Keep the native format."
        )
    if fitted is None:
        sizes = ", ".join(f"{name} {list(t.shape)}" for name, t in update.held.items())
        raise FileError(
            f"{source}: {path}: an update of {sizes} does not fit the weight of "
            f"{list(slot.shape)}. Was it made for another model?"
        )
    kind, groups = slot.kind or update.kind, slot.groups or update.groups
    return replace(fitted, kind=kind, groups=groups)


def _fitted_factors(path: str, update: Update, slot: Slot, source: str, tied: bool) -> Update:
    layout = slot.layout or _guessed(update, slot.shape)
    # an embedding and a head share [V, d]: the output of the one is the input of the other
    if tied and layout is not None and {layout, update.layout} == {"matrix", "transposed"}:
        update = _swapped(update)
    a, b = tuple(update.lora_A.shape), tuple(update.lora_B.shape)
    if layout is None or (a, b) != _factors(update, slot.shape, layout):
        raise FileError(
            f"{source}: {path}: an update of {list(a)} and {list(b)} (lora_A, lora_B) does not fit "
            f"the weight of {list(slot.shape)}. Was it made for another model?"
        )
    kind, groups = slot.kind or update.kind, slot.groups or update.groups
    return replace(update, shape=slot.shape, layout=layout, kind=kind, groups=groups)


def _swapped(update: Update) -> Update:
    """An update whose input is the output of this one."""
    return replace(update, lora_A=update.lora_B.mT, lora_B=update.lora_A.mT)


def _turned(update: _Any, where: str) -> _Any:
    """The same change of the transpose of its weight, or of each matrix of its stack.

    Raises:
        FileError: of a kind that has no such.
    """
    if isinstance(update, Update):
        return _swapped(update)
    if update.method == "difference":
        return replace(update, held={"lora_diff": update.held["lora_diff"].mT})
    raise FileError(
        f"{where}: its weight is the transpose of the model's, and an update of kind "
        f"{update.method} is of one of the two alone. Give a model of the file's own names."
    )


def _guessed(update: Update, shape: tuple[int, ...]) -> Optional[Layout]:
    """The layout of a checkpoint's weight: the file's own where it fits, else any that does."""
    have = (tuple(update.lora_A.shape), tuple(update.lora_B.shape))
    # False sorts first, so the file's own layout does
    order = sorted(get_args(Layout), key=lambda layout: layout != update.layout)
    return next((layout for layout in order if have == _factors(update, shape, layout)), None)


def _factors(
    update: Update, shape: tuple[int, ...], layout: Layout
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes that lora_A and lora_B have on a weight of `shape`."""
    if len(shape) < 2:
        return (), ()
    stack, out, fan_in = matrix_shape(shape, layout)
    lead = (stack,) if layout == "stack" else ()
    kernel = shape[2:] if update.up_kernel == "same" else ()
    size = torch.Size(kernel).numel() if layout == "transposed" else 1
    return (*lead, update.r * size, fan_in), (*lead, out // size, update.r, *kernel)


def _slot(model: nn.Module, target: Target) -> Slot:
    owner = model.get_submodule(target.module)
    return Slot(
        target.shape,
        target.layout,
        target.kind,
        target.groups,
        tuple(_classes(model, target.module)),
        bool(getattr(owner, "is_transposed", False)) and target.layout == "stack",
        values=lambda: base_tensor(owner, target.tensor),
    )


def _classes(model: nn.Module, path: str) -> Iterator[str]:
    yield type(model).__name__
    for part in path.split(".") if path else []:
        model = model.get_submodule(part)
        yield type(model).__name__
