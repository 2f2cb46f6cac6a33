"""kohya's sd-scripts and LyCORIS: one file, module paths with ``_`` for ``.``.

Read from sd-scripts networks/lora.py, networks/merge_lora.py and LyCORIS modules/locon.py,
loha.py, lokr.py.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Optional

import torch
from einops import EinopsError, einsum
from torch import Tensor

from paramlora.config import TargetConfig
from paramlora.errors import FileError, with_article
from paramlora.formats.base import Base, places_of, vectors_of
from paramlora.formats.content import (
    DEFAULTS,
    Content,
    Options,
    check_factors,
    check_first,
    number,
    parsed,
    report_unused,
)
from paramlora.formats.factors import (
    MOST_DENSE,
    apart_from,
    check_size,
    check_told,
    difference_of,
    from_dense,
    held,
    kernels,
    pair,
    product_of,
    rescaled,
    wide,
    with_low_ranks,
    with_scale_in,
    with_scale_in_B,
)
from paramlora.formats.format import Format, Mark, Prefix, any_key
from paramlora.formats.loaders import of_kohya
from paramlora.formats.names.levels import MANGLED, belongs, in_checkpoint
from paramlora.formats.pieces import alike, differences_of
from paramlora.formats.pipeline import part_told
from paramlora.formats.places import Places
from paramlora.formats.scale import alpha_of, headed, recorded, scale_of, scales_metadata
from paramlora.update.lokr import Lokr, factors, split
from paramlora.update.value import Adapter, KindUpdate, Update, Value, apart_by_kind

_LEAF = re.compile(
    r"(?P<name>.+?)\.(?:lora_(?P<role>down|up|mid|A|B)(?:(?:\.[^.]+)?\.weight)?|"
    r"(?P<leaf>alpha|hada_\w+|lokr_\w+|dora_scale|diff(?:_b)?|[wb]_norm))",
    re.DOTALL,
)
# of tools that write PEFT's factors under kohya's names of layers
_ROLES = {"A": "down", "B": "up"}
_LORA = {"lora_down.weight", "lora_up.weight"}
_BIAS = ("diff_b", "b_norm")
_HADA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}


def read(content: Content, base: Optional[Base] = None, options: Options = DEFAULTS) -> Adapter:
    """The adapter in a kohya or LyCORIS file: LoRA, LoCon, LoHa, LoKr and full differences.

    LoHa, LoKr and ``diff`` are dense: they are kept whole, or at the rank in `options`. So are the
    changes of biases and norms (``diff_b``; ``w_norm`` and ``b_norm``), which have no rank.

    Args:
        content: what the file holds.
        base: the names that the mangled ones stand for; without it they stay as they are.
        options: see `Options`; ``split`` divides alpha by the rank of one part.

    Raises:
        FileError: a form of LyCORIS that is not read, or two weights of one mangled name.
    """
    modules, unused = _modules(content)
    report_unused(content, unused, options.strict)
    exact = recorded(content)
    told = _headed(content, modules, options)
    places = None if base is None else places_of(base)
    updates: dict[str, Value] = {}
    for name, parts in modules.items():
        where = f"{content.source}: {name}"
        if options.component is None or belongs(name, options.component):
            most = _most(name, parts, places, where)
            own = {leaf: tensor for leaf, tensor in parts.items() if leaf not in _BIAS}
            # a layer of which only the bias changed may have an alpha all the same: of nothing
            if own.keys() - {"alpha"} or own.keys() == parts.keys():
                how = replace(options, alpha=told.get(name, options.alpha))
                updates[name] = _update(own, exact.get(name), how, most, where)
            for leaf in _BIAS:
                if leaf in parts:
                    updates[f"{name}.bias"] = difference_of(parts[leaf], f"{where}.{leaf}")
    return Adapter(**apart_by_kind(updates))


def _headed(
    content: Content, modules: Mapping[str, Mapping[str, Tensor]], options: Options
) -> dict[str, float]:
    """The alphas of layers in a file that tells them in its header alone; sd-scripts has another
    for convolutions of a kernel (networks/lora.py's ``conv_alpha``)."""
    scaled = [name for name, parts in modules.items() if _has_factors(parts)]
    found = headed(content, scaled, belongs, options.alpha)
    if not found or "ss_network_args" not in content.metadata:
        return found
    told = parsed(content.metadata["ss_network_args"], content.source).get("conv_alpha")
    if told is None:
        return found
    alpha = number(told, f"{content.source}: conv_alpha")
    # sd-scripts gives 1x1 convolutions the alpha of Linear
    wide = (name for name in found if _has_kernel(modules[name]))
    return {**found, **dict.fromkeys(wide, alpha)}


def _has_kernel(parts: Mapping[str, Tensor]) -> bool:
    return any(math.prod(tensor.shape[2:]) > 1 for tensor in parts.values())


def _has_factors(parts: Mapping[str, Tensor]) -> bool:
    return any(leaf.startswith(("lora_", "hada_", "lokr_")) for leaf in parts)


def _most(name: str, parts: Mapping[str, Tensor], places: Optional[Places], where: str) -> int:
    """The elements that a dense difference may have: those of the weights that the name means."""
    # of plain LoRA nothing dense is ever formed
    if places is None or _LORA <= set(parts):
        return MOST_DENSE
    found = places.find(name, where)
    return MOST_DENSE if found is None else sum(math.prod(places.shapes[p]) for p in found.paths)


def _modules(content: Content) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    modules: dict[str, dict[str, Tensor]] = {}
    unused = []
    for key, tensor in content.state.items():
        match = _LEAF.fullmatch(key)
        if match is None:
            unused.append(key)
        else:
            role = _ROLES.get(match["role"], match["role"])
            # one name for each tensor, whichever way the file spells it
            leaf = match["leaf"] or f"lora_{role}.weight"
            parts = modules.setdefault(match["name"], {})
            check_first(leaf in parts, key, content.source)
            parts[leaf] = tensor
    return modules, unused


def _update(
    parts: Mapping[str, Tensor], exact: Any, options: Options, most: int, where: str
) -> Value:
    # the low-rank update first: a magnitude is checked against the shape that it tells
    if "dora_scale" in parts:
        rest = {leaf: tensor for leaf, tensor in parts.items() if leaf != "dora_scale"}
        inner = _update(rest, exact, options, most, where) if _LORA <= set(rest) else None
        if not isinstance(inner, Update):
            raise FileError(
                f"{where}: dora_scale of another form than LoRA, which is not read. Merge it with "
                "the tool that trained it."
            )
        return rescaled(inner, parts["dora_scale"], where)
    leaves = set(parts) - {"alpha"}
    alpha = number(parts["alpha"], f"{where}.alpha") if "alpha" in parts else options.alpha
    if _LORA <= leaves <= {*_LORA, "lora_mid.weight"}:
        update = _lora(parts, where)
        # sd-scripts joins the parts of a q/k/v in one tensor, and divides alpha by the rank of one
        r = update.r if options.split == 1 else _part(update, options.split, where)
        return replace(update, scale=_scale(alpha, r, exact, where))
    if leaves >= _HADA or any(leaf.startswith("lokr_w1") for leaf in leaves):
        delta, r = _product(parts, most, where, form=options.rank is not None)
        if options.rank is None:
            scale = _scale(alpha, r, exact, where) if r else 1.0
            # kept as factors: LoHa and LoKr are kinds of update of their own
            held = {leaf: tensor for leaf, tensor in parts.items() if leaf != "alpha"}
            return product_of(held, scale, where, tuple(delta.shape))
    elif leaves == {"diff"} or leaves == {"w_norm"}:
        # no rank and no alpha: it is added as it is
        (delta,), r = (parts[leaf] for leaf in leaves), 0
        if options.rank is None or delta.dim() < 2:
            return difference_of(delta, where)
    else:
        raise FileError(
            f"{where}: {', '.join(sorted(parts))}: no form that can be read. Save it "
            "again, with all parts."
        )
    scale = _scale(alpha, r, exact, where) if r else 1.0
    return from_dense(delta.contiguous(), options.rank, scale)


def _lora(parts: Mapping[str, Tensor], where: str) -> Update:
    down, up = parts["lora_down.weight"], parts["lora_up.weight"]
    if "lora_mid.weight" not in parts:
        return pair(down, up, 1.0, where)
    # Tucker: dW = sum over m, n of mid[m,n] · up[:,m] · down[n,:]; the middle joins the first
    mid = parts["lora_mid.weight"]
    check_factors(where, down, up, mid)
    if mid.shape[:2] != (up.shape[1], down.shape[0]):
        raise FileError(
            f"{where}: lora_mid of {list(mid.shape)} does not fit its factors. Save it again."
        )
    check_size((*mid.shape[:1], *down.shape[1:], *mid.shape[2:]), where)
    down = einsum(wide(mid), wide(down.flatten(1)), "m n ..., n i -> m i ...")
    return pair(down, wide(up), 1.0, where)


def _part(update: Update, split: int, where: str) -> int:
    """The rank of one of the parts that training kept apart."""
    if update.r % split:
        raise FileError(
            f"{where}: rank {update.r} is not {split} equal parts (split={split}). Give the "
            "number of parts that it was trained with."
        )
    return update.r // split


def _scale(alpha: Optional[float], r: int, exact: Any, where: str) -> float:
    return 1.0 if alpha is None else scale_of(alpha, r, exact, where)


def _product(parts: Mapping[str, Tensor], most: int, where: str, form: bool) -> tuple[Tensor, int]:
    """The dense difference of LoHa or LoKr, and its rank, once its size is known to be sane;
    without numbers where it is not to be formed."""
    shapes = ", ".join(f"{leaf} {list(t.shape)}" for leaf, t in parts.items() if leaf != "alpha")
    check_factors(where, *(tensor for leaf, tensor in parts.items() if leaf != "alpha"))
    made = loha if "hada_w1_a" in parts else lokr
    try:
        # on the meta device first: factors of a few bytes can claim any product
        found = made({leaf: torch.empty_like(t, device="meta") for leaf, t in parts.items()})
        check_size(found[0].shape, where, most)
        return made({leaf: wide(t) for leaf, t in parts.items()}) if form else found
    except (RuntimeError, KeyError, EinopsError) as error:
        raise FileError(
            f"{where}: its parts do not fit each other: {shapes}. Save it again."
        ) from error


def loha(parts: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """(difference, rank) of LoHa: ``(w1a·w1b) ∘ (w2a·w2b)``, FedPara (arXiv:2108.06098) 2.2."""
    names = [("hada_w1_a", "hada_w1_b", "hada_t1"), ("hada_w2_a", "hada_w2_b", "hada_t2")]
    sides = []
    for a, b, t in names:
        wa, wb = parts[a], parts[b]
        if t in parts:  # Tucker: w_a is [r, out], w_b [r, in], t [r, r, *kernel]
            sides.append(einsum(parts[t], wb, wa, "i j ..., j r, i p -> p r ..."))
        else:
            sides.append(wa @ wb)
    return sides[0] * sides[1], parts["hada_w1_b"].shape[0]


def lokr(parts: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """(difference, rank) of LoKr: ``w1 ⊗ w2``; rank 0 where both are whole, and alpha unused."""
    rank = 0
    if "lokr_w1" in parts:
        w1 = parts["lokr_w1"]
    else:
        w1, rank = parts["lokr_w1_a"] @ parts["lokr_w1_b"], parts["lokr_w1_b"].shape[0]
    if "lokr_w2" in parts:
        w2 = parts["lokr_w2"]
    elif "lokr_t2" in parts:
        w2 = einsum(
            parts["lokr_t2"],
            parts["lokr_w2_b"],
            parts["lokr_w2_a"],
            "i j ..., j r, i p -> p r ...",
        )
        rank = parts["lokr_w2_b"].shape[0]
    else:
        w2, rank = parts["lokr_w2_a"] @ parts["lokr_w2_b"], parts["lokr_w2_b"].shape[0]
    # torch.kron of a matrix and a kernel pads the fewer dimensions in front, LyCORIS's behind
    w1 = w1.reshape(*w1.shape, *[1] * (w2.dim() - w1.dim()))
    return torch.kron(w1.contiguous(), w2.contiguous()), rank


def write(adapter: Adapter, base: Optional[Base] = None, prefix: Optional[str] = None) -> Content:
    """An adapter as kohya's LoRA; ``alpha`` is ``scale · r``.

    Args:
        adapter: fitted to its model where kinds of layers matter.
        base: tells which part of a pipeline the model is, where its names do not.
        prefix: of every key, ``lora_unet`` without; a component's name in front of a path
            (``text_encoder.``) gives its own instead.

    Raises:
        FileError: a layer that is no Linear or Conv2d, or two of one mangled name; a text encoder
            without a prefix, which depends on the pipeline; a prefix that no tool reads.
    """
    prefix = _prefix_of(adapter, base) if prefix is None else prefix
    if not any(prefix == level or prefix.startswith(f"{level}_") for level in MANGLED):
        raise FileError(
            f'"{prefix}" begins no key that a tool reads, so nothing of the file would load. '
            f"Prefixes: {', '.join(MANGLED)}."
        )
    # in this order: what is left after the other two must be DoRA's
    adapter, differences = apart_from(adapter, "difference")
    adapter, products = without_products(adapter, "kohya's")
    made = apart_by_kind({path: _rebuilt(value) for path, value in products.items()})
    others, products = apart_from(Adapter({}, others=made["others"]), "loha", "lokr")
    adapter = replace(adapter, updates={**adapter.updates, **made["updates"]})
    differences |= others.others
    adapter, magnitudes = with_low_ranks(adapter)
    adapter, products = _without_zeros(adapter, products)
    # of all kinds together: two layers of one mangled name are a clash whatever trains them
    names = _names((*adapter.updates, *products, *differences), prefix)
    scaled: dict[str, Value] = {**adapter.updates, **products}
    scales = {names[path]: (value.listed()[1], value.listed()[0]) for path, value in scaled.items()}
    state: dict[str, Tensor] = {}
    for path, update in adapter.updates.items():
        state |= _low_rank(path, update, names[path], magnitudes.get(path))
    for path, value in products.items():
        like = next(iter(value.held.values()))
        state |= {f"{names[path]}.{leaf}": tensor for leaf, tensor in value.held.items()}
        alpha = alpha_of(value.scale, value.r)
        state[f"{names[path]}.alpha"] = alpha_tensor(alpha, like.dtype)
    for path, value in differences.items():
        state[_key_of(path, differences, base, names)] = value.held["lora_diff"]
    ranks = {r for _, r in scales.values()}
    plain = not (magnitudes or products or differences)
    about = {
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": "Dynamic",
        **scales_metadata(scales),
    }
    return Content({key: tensor.contiguous() for key, tensor in state.items()}, about)


def _without_zeros(
    adapter: Adapter, products: Mapping[str, KindUpdate]
) -> tuple[Adapter, dict[str, KindUpdate]]:
    """An adapter with a scale of zero in a factor: an alpha of zero is none to sd-scripts and
    LyCORIS, which take the rank instead (networks/lora.py, modules/locon.py), so a scale of 1."""
    updates = {p: u if u.scale else with_scale_in_B(u) for p, u in adapter.updates.items()}
    # the first tensor is a factor of the product, in either kind
    found = {p: v if v.scale else with_scale_in(v, min(v.held)) for p, v in products.items()}
    return replace(adapter, updates=updates), found


def _names(paths: Collection[str], prefix: str) -> dict[str, str]:
    """The key's name of the layer of each path; a bias has its layer's.

    Raises:
        FileError: two layers of one name.
    """
    two = any(_component(path)[0] == "text_encoder_2" for path in paths)
    names: dict[str, str] = {}
    layers: dict[str, str] = {}
    for path in paths:
        layer = path.removesuffix(".bias")
        # a.b and a_b are both a_b in this format
        names[path] = name_of(layer, prefix, two)
        if layers.setdefault(names[path], layer) != layer:
            raise _taken(path, names[path])
    return names


def _low_rank(
    path: str, update: Update, name: str, magnitude: Optional[Tensor]
) -> dict[str, Tensor]:
    """The tensors of a low-rank update, and of a DoRA."""
    _check(path, update, magnitude is not None)
    down, up = kernels(update)
    alpha = alpha_tensor(alpha_of(update.scale, update.r), down.dtype)
    state = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
    return state if magnitude is None else {**state, f"{name}.dora_scale": magnitude}


def _key_of(
    path: str,
    differences: Mapping[str, KindUpdate],
    base: Optional[Base],
    names: Mapping[str, str],
) -> str:
    """The key of a difference: of norms, whose weights are vectors, LyCORIS has its own.

    Raises:
        FileError: of a tensor that is no weight and no bias.
    """
    layer = path.removesuffix(".bias")
    weight = differences.get(layer)
    norm = weight is not None and weight.held["lora_diff"].dim() == 1
    norm = norm or layer in vectors_of(base)
    if differences[path].kind == "parameter" and path == layer:
        raise FileError(
            f"{path}: a parameter that is no weight and no bias, which kohya's format cannot name. "
            "Keep the native format."
        )
    leaf = {True: ("w_norm", "b_norm"), False: ("diff", "diff_b")}[norm][path != layer]
    return f"{names[path]}.{leaf}"


def without_products(adapter: Adapter, tool: str) -> tuple[Adapter, dict[str, KindUpdate]]:
    """An adapter without its LoHa and LoKr updates, and those as LyCORIS reads them.

    Raises:
        FileError: one of a layer that LyCORIS does not know.
    """
    rest, products = apart_from(adapter, "loha", "lokr")
    for path, value in products.items():
        known = value.layout == "matrix" and value.kind in (None, "linear", "convolution")
        if not path or not known:
            raise FileError(
                f"{path or '(model)'}: {value.method} of "
                f"{with_article(value.kind or value.layout)}; {tool} format holds Linear "
                "and convolutions inside of a model only. Keep the native format."
            )
        if {"lokr_w1", "lokr_w2"} <= value.held.keys():  # for which LyCORIS reads no scale
            products[path] = with_scale_in(value, "lokr_w1")
    return rest, products


def _rebuilt(value: KindUpdate) -> Value:
    """A LoKr in tensors that LyCORIS's own loader makes room for: ``w_2`` whole if need be, and
    where that is of no use either the same change as a low-rank update or a difference."""
    if value.method != "lokr" or _makes_room(value):
        return value
    first, second = factors({name: one.double() for name, one in value.held.items()})
    shape = value.shape or (len(first) * len(second), first.shape[1] * second.shape[1])
    kernel = shape[2:]
    # a product of two matrices has the kernel's numbers behind the inputs'
    if second.dim() == 2 and kernel and second.shape[1] * first.shape[1] == math.prod(shape[1:]):
        second = second.reshape(len(second), -1, *kernel)
    dtype = next(iter(value.held.values())).dtype
    both = {"lokr_w1": held(first * value.scale, dtype), "lokr_w2": held(second, dtype)}
    wider = torch.promote_types(*(one.dtype for one in both.values()))
    whole = replace(value, held={name: one.to(wider) for name, one in both.items()}, scale=1.0)
    if _makes_room(whole):
        return whole
    # sd-scripts has low-rank layers for Linear and Conv2d
    found = (alike if len(shape) in (2, 4) else differences_of)([value], [shape])[0]
    return replace(found, shape=shape, kind=value.kind, groups=value.groups)


def _makes_room(value: KindUpdate) -> bool:
    """Whether the sizes that LyCORIS's loader derives are those of the tensors (modules/lokr.py,
    ``make_module_from_state_dict``): it has the sizes of ``w_1`` and ``w_2`` by one factor."""
    own = value.held
    first, second = (_sides(own, n) for n in (1, 2))
    # of Tucker's form, and of a kernel, it takes the ranks and the flattened inputs for sides
    thin = next((own[n] for n in ("lokr_w1_a", "lokr_w2_a") if n in own), None)
    out, fan_in = (a * b for a, b in zip(first, second))
    factor = -1
    if first != (split(out, -1)[0], split(fan_in, -1)[0]):
        sides = [max(first), max(second)]
        good = (
            one
            for one in sides
            if not out % one
            and not fan_in % one
            and one in (first[0], second[0])
            and one in (first[1], second[1])
        )
        factor = next(good, min(sides))
    options = {
        "factor": factor,
        "full_matrix": thin is None,
        "decompose_both": "lokr_w1" not in own and "lokr_w2" not in own,
        "tucker": "lokr_t2" in own,
    }
    entry = TargetConfig("", 1 if thin is None else thin.shape[1], options=tuple(options.items()))
    shape = value.shape or (out, fan_in)
    made = Lokr.sizes(entry, shape, "matrix")
    return made == {name: tuple(tensor.shape) for name, tensor in own.items()}


def _sides(own: Mapping[str, Tensor], number: int) -> tuple[int, int]:
    """The first sizes of one side, of which LyCORIS reads those of its first and last factor."""
    whole = own.get(f"lokr_w{number}")
    if whole is not None:
        return whole.shape[0], whole.shape[1]
    return own[f"lokr_w{number}_a"].shape[0], own[f"lokr_w{number}_b"].shape[1]


def _taken(path: str, name: str) -> FileError:
    return FileError(
        f"{path}: a second layer of the name {name}, which kohya's format cannot tell apart. Keep "
        "the native format."
    )


def _prefix_of(adapter: Adapter, base: Optional[Base]) -> str:
    if part_told(adapter.values(), base) == "text_encoder":
        raise FileError(
            "a text encoder, whose keys depend on the pipeline: give a prefix (--prefix): lora_te "
            "for Stable Diffusion 1 and 2, lora_te1 and lora_te2 for SDXL, with _text_model behind "
            "where the model has no such level."
        )
    return "lora_unet"


def name_of(path: str, prefix: str, two_text_encoders: bool = False) -> str:
    """The key's name of a path: ``text_encoder.a.b`` is ``lora_te_a_b``."""
    component, rest = _component(path)
    # sd-scripts: lora_te where there is one text encoder, lora_te1 and lora_te2 for SDXL's
    te = {"text_encoder": "lora_te1" if two_text_encoders else "lora_te"}
    te |= {"text_encoder_2": "lora_te2", "text_encoder_3": "lora_te3", "unet": "lora_unet"}
    if component in te:
        # transformers 5 has left out a level of CLIP's text model, which all readers know
        clip = component.startswith("text") and rest.startswith("encoder.layers.")
        return f"{te[component]}_{'text_model_' if clip else ''}{rest.replace('.', '_')}"
    if any(
        path.startswith(f"{level}_") for level in MANGLED
    ):  # out of a file of the same kind, read without a model
        return path
    return f"{prefix}_{path.replace('.', '_')}"


def _component(path: str) -> tuple[str, str]:
    component, rest = in_checkpoint(path)
    if component:
        return component, rest
    component, _, rest = path.partition(".")
    return component, rest


def alpha_tensor(alpha: float, dtype: torch.dtype) -> Tensor:
    """An alpha in the type of the factors where that holds it exactly, else in the smallest."""
    # readers divide it by the rank: rounded, the scale would be another
    for kind in (dtype, torch.float32):
        value = torch.tensor(alpha, dtype=kind)
        if value.item() == alpha:
            return value
    return torch.tensor(alpha, dtype=torch.float64)


def _check(path: str, update: Update, rescaled: bool) -> None:
    """Refuse what neither sd-scripts, nor of DoRA LyCORIS, has a layer for."""
    check_told(path, update, "kohya's format")
    assert update.shape is not None
    dims, known = ((2, 3, 4, 5), "convolutions") if rescaled else ((2, 4), "Conv2d")
    # sd-scripts' lora.py has layers for Linear and Conv2d; LyCORIS for all three convolutions too
    flat = update.layout == "matrix" and len(update.shape) in dims
    if not flat or update.kind not in (None, "linear", "convolution"):
        kind = update.kind or update.layout
        raise FileError(
            f"{path}: {with_article(kind)} of shape {list(update.shape)}; kohya's format holds "
            f"Linear and {known} only. Keep the native format."
        )


FORMAT = Format(
    "kohya",
    marks=(
        Mark(50, any_key(rf"(?:{'|'.join(MANGLED)})_[^.]+\..+")),
        Mark(51, any_key(r".+\.(?:lora_(?:down|mid)\.weight|hada_w1_a|lokr_w1(?:_a)?|dora_scale)")),
        Mark(82, any_key(r".+\.(?:diff(?:_b)?|[wb]_norm)")),
    ),
    read=read,
    write=write,
    passed_over=of_kohya,
    kinds=("lora", "soft", "dora", "loha", "lokr", "difference"),
    names_layers=False,
    prefix=Prefix("prefix", "kohya's keys (lora_unet)"),
)
