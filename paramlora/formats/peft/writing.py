"""PEFT's tensors, written."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, Optional

from einops import rearrange
from torch import Tensor

from paramlora.errors import FileError, listed, with_article
from paramlora.formats.base import Base
from paramlora.formats.content import Content
from paramlora.formats.factors import (
    apart_from,
    check_told,
    grouped,
    kernels,
    with_low_ranks,
)
from paramlora.formats.peft.configuration import INNER, PREFIX, config_of
from paramlora.formats.peft.experts import parts_beside_experts
from paramlora.formats.peft.products import products
from paramlora.formats.peft.tokens import numbers_of, tokens_alone, without_rows
from paramlora.formats.peft.whole import saved_whole
from paramlora.formats.scale import alpha_of, scales_metadata
from paramlora.update.value import Adapter, KindUpdate, Update

MAGNITUDE = "lora_magnitude_vector"


def write(
    adapter: Adapter,
    base: Optional[Base] = None,
    prefix: str = PREFIX,
    magnitude: str = MAGNITUDE,
) -> Content:
    """An adapter as PEFT's file and configuration.

    Args:
        adapter: fitted to its model where kinds of layers matter (see `fit`).
        base: needed where several parameters of one module are adapted.
        prefix: in front of every key.
        magnitude: the end of the key of a DoRA's magnitude.

    Raises:
        FileError: a layer that PEFT cannot adapt, named with the reason.
    """
    adapter, tokens = without_rows(adapter)
    if not (adapter.updates or adapter.others):
        _check_beside(adapter.whole, "a folder of trained tokens alone")
        return tokens_alone(tokens, prefix)
    rest, found = apart_from(adapter, "loha", "lokr")
    if found:
        return _products(rest, found, tokens, base, prefix)
    check_all_rescaled(adapter, "PEFT")
    adapter, magnitudes = with_low_ranks(adapter)
    state, config, scales = _low_ranks(adapter, magnitudes, base, magnitude)
    wrapped = _wrapped(adapter, base)

    def stem(path: str) -> str:
        # of an adapted layer peft saves the bias from inside of its wrapper
        known = path in adapter.updates
        own = _stem(path, wrapped, adapter, base)
        return f"{own}{INNER}" if known else own

    whole, told = saved_whole(adapter, base, stem)
    state, config = {**state, **whole}, {**config, **told}
    state |= {
        # in peft's wrapper of the embedding; a folder of tokens alone has no .token_adapter
        f"{path}.token_adapter.trainable_tokens_delta": value.held["lora_rows"]
        for path, value in tokens.items()
    }
    if tokens:
        config["trainable_token_indices"] = {p: numbers_of(value) for p, value in tokens.items()}
    stored = {f"{prefix}{key}": tensor.contiguous() for key, tensor in state.items()}
    return Content(stored, {"format": "pt", **scales_metadata(scales)}, config)


def _products(
    rest: Adapter,
    found: Mapping[str, KindUpdate],
    tokens: Mapping[str, KindUpdate],
    base: Optional[Base],
    prefix: str,
) -> Content:
    """A folder of LoHa or LoKr, beside which PEFT has whole modules and nothing else."""
    kinds = sorted({value.method for value in found.values()})
    _check_beside({**rest.updates, **rest.others, **tokens}, f"a folder of {kinds[0]}")
    if len(kinds) > 1:
        raise FileError(
            f"{listed(sorted(found))}: loha and lokr, and PEFT has one kind in each. Save two "
            "adapters."
        )
    state, config = products(found)
    whole, told = saved_whole(replace(rest, others=found), base, lambda path: path)
    _check_beside([path for path in rest.whole if "bias" in told], f"a folder of {kinds[0]}")
    state = {**state, **whole}
    stored = {f"{prefix}{key}": tensor.contiguous() for key, tensor in state.items()}
    return Content(stored, {"format": "pt"}, {**config, **told})


def _check_beside(paths: Collection[str], what: str) -> None:
    """Refuse what PEFT has no place for in a folder."""
    if paths:
        raise FileError(
            f"{listed(sorted(paths))}: beside {what}, which PEFT does not hold. Save two adapters, "
            "or keep the native format."
        )


def _low_ranks(
    adapter: Adapter, magnitudes: Mapping[str, Tensor], base: Optional[Base], ending: str
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, tuple[float, int]]]:
    """The tensors of all low-rank updates, the configuration, and the scales."""
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    scales: dict[str, tuple[float, int]] = {}
    modules: set[str] = set()
    wrapped = _wrapped(adapter, base)
    for path, update in adapter.updates.items():
        check_writable(path, update)
        stem = _stem(path, wrapped, adapter, base)
        if path in magnitudes:
            _check_rescaled(path, update, path in wrapped, adapter, base)
            own = magnitude_of(path, update, magnitudes[path], "PEFT")
            state[f"{stem}.{ending}"] = own
        for key, tensor, r, module in _tensors(path, stem, update, adapter, base):
            # peft looks a wrapped parameter's rank and alpha up by the parameter's own name
            named = wrapped.get(path, module)
            state[key] = tensor
            ranks[named], alphas[named] = r, alpha_of(update.scale, r)
            scales[path] = update.scale, r
            # parameters are named in target_parameters, layers in target_modules
            if path not in wrapped:
                modules.add(module)
    config = config_of(ranks, alphas, modules, sorted(set(wrapped.values())))
    config["fan_in_fan_out"] = _fan_in_fan_out(adapter)
    config["use_dora"] = bool(magnitudes)
    return state, config, scales


def check_all_rescaled(adapter: Adapter, tool: str) -> None:
    """Refuse DoRA beside plain updates, between which one switch of a tool's file decides."""
    if adapter.updates and adapter.others:
        raise FileError(
            f'{next(iter(adapter.others))} is of the kind "dora", {next(iter(adapter.updates))} is '
            f"not: {tool} has one switch for both. Save two adapters."
        )


def magnitude_of(path: str, update: Update, magnitude: Tensor, tool: str) -> Tensor:
    """A magnitude as peft has it: ``[out]``, of a convolution ``[1, out, 1, ...]``.

    Raises:
        FileError: its norm is over the outputs, which peft does not know.
    """
    outer = 1 if update.layout == "transposed" else 0
    if magnitude.shape[outer] != magnitude.numel():
        raise FileError(
            f"{path}: its magnitude is of the norm over outputs, {list(magnitude.shape)}, and "
            f"{tool} takes that over inputs. Keep the native format, or kohya's."
        )
    # LyCORIS keeps the weight's dimensions, peft a vector, but of convolutions [1, out, 1, ...]
    flat = magnitude.reshape(-1).contiguous()
    dims = 0 if update.kind != "convolution" else len(update.shape or ())
    return flat.reshape(1, -1, *[1] * (dims - 2)) if dims else flat


def _check_rescaled(
    path: str, update: Update, wrapped: bool, adapter: Adapter, base: Optional[Base]
) -> None:
    """Refuse DoRA where peft has none."""
    if wrapped or update.kind in ("parameter", "weight") or _attention(path, adapter, base):
        what = f"a {update.kind}" if update.kind in ("parameter", "weight") else "a parameter"
        what = "attention" if _attention(path, adapter, base) else what
        raise FileError(
            f'{path}: "dora" of {what}, which PEFT does not have. Keep the native format.'
        )


def _wrapped(adapter: Adapter, base: Optional[Base]) -> dict[str, str]:
    """What peft adapts as a parameter, by path: the parameter's own name, for ``weight`` too.

    Layers under the names of experts' parts are among them where there may be experts: peft 0.21
    rewrites every module of these names into the parameters of fused experts
    (utils/transformers_weight_conversion.py), and drops the updates of all others.
    """
    found = {
        path: f"{path}.weight" if update.kind == "weight" else path
        for path, update in adapter.updates.items()
        if update.kind in ("parameter", "weight") and not _attention(path, adapter, base)
    }
    moved = parts_beside_experts(adapter.updates, base)
    return found | {path: f"{path}.weight" for path in moved if path not in found}


def check_writable(path: str, update: Update) -> None:
    """Refuse what is no update of a layer that PEFT knows."""
    check_told(path, update, "PEFT")
    known = (None, "linear", "convolution", "embedding", "parameter", "weight")
    if update.kind not in known:
        raise FileError(
            f"{path}: {with_article(update.kind)}, which PEFT cannot adapt. Keep the native format."
        )


def _tensors(
    path: str, stem: str, update: Update, adapter: Adapter, base: Optional[Base]
) -> Iterator[tuple[str, Tensor, int, str]]:
    """(key, tensor, rank there, module) of one update."""
    if update.kind == "embedding":
        # an nn.Parameter in peft, not a layer: without .weight
        yield f"{stem}.lora_embedding_A", update.lora_A, update.r, path
        yield f"{stem}.lora_embedding_B", update.lora_B, update.r, path
        return
    module, r = path, update.r
    a, b = kernels(update) if update.layout != "stack" else _stacked(path, update, base)
    # peft's first convolution has no groups: it gets the ranks of all, with zeros between them
    if update.groups > 1:
        a, b = grouped(update)
        r = a.shape[0]
    if _attention(path, adapter, base):
        module = path.rpartition(".")[0]
        yield from _idle_half(stem, module, update)
    yield f"{stem}.lora_A.weight", a, r, module
    yield f"{stem}.lora_B.weight", b, r, module


def _stacked(path: str, update: Update, base: Optional[Base]) -> tuple[Tensor, Tensor]:
    if update.shape is None or len(update.shape) != 3:
        raise FileError(
            f"{path}: a parameter of shape {list(update.shape or ())}; PEFT adapts parameters of "
            "two or three dimensions. Leave it out, or keep the native format."
        )
    a, b = update.lora_A, update.lora_B
    if base is not None and path in base and base[path].input_first:
        a, b = b.mT, a.mT
    # as peft's ParamWrapper takes them apart: the experts are outermost in A, and innermost in B
    return rearrange(a, "e r i -> (e r) i"), rearrange(b, "e o r -> o (r e)")


def _attention(path: str, adapter: Adapter, base: Optional[Base]) -> bool:
    """Whether a weight is of a MultiheadAttention that PEFT adapts: its ``in_proj_weight``.

    Raises:
        FileError: it is the other one, of which no file gives peft the update once.
    """
    owner, _, name = path.rpartition(".")
    if name == "in_proj_weight":
        return True
    names = ("in_proj_weight", "q_proj_weight")
    siblings = [f"{owner}.{one}" for one in names]
    if name == "out_proj" and any(
        one in adapter.updates or one in (base or ()) for one in siblings
    ):
        raise FileError(
            f"{path}: the output projection of a MultiheadAttention, whose update peft (0.21 and "
            "before) adds twice, and where q, k and v have several widths not at all. Keep the "
            "native format, merge it (paramlora merge), or leave it out."
        )
    return False


def _idle_half(stem: str, module: str, update: Update) -> Iterator[tuple[str, Tensor, int, str]]:
    """Zeros for the output projection of attention, since PEFT always adapts both weights."""
    # in_proj_weight is q, k and v one below the other
    size = update.lora_B.shape[0] // 3
    inside = f"{stem}{INNER}.out_proj"
    yield f"{inside}.lora_A.weight", update.lora_A.new_zeros(update.r, size), update.r, module
    yield f"{inside}.lora_B.weight", update.lora_B.new_zeros(size, update.r), update.r, module


def _stem(path: str, wrapped: Mapping[str, str], adapter: Adapter, base: Optional[Base]) -> str:
    """Where peft looks for the tensors of an update: behind the wrappers of its parameters."""
    name = wrapped.get(path, path)
    layer = name.rpartition(".")[0] if path in wrapped or _attention(path, adapter, base) else name
    if not layer:
        raise FileError(
            f"{path}: a parameter of the model itself, which PEFT cannot adapt. Keep the native "
            "format."
        )
    # as many wrappers as parameters of a module are adapted, one inside of the other
    owners = Counter(one.rpartition(".")[0] for one in wrapped.values())
    found = layer
    # every module on the way whose parameters peft wraps has that many levels of base_layer
    for at in (at for at, letter in reversed(list(enumerate(layer))) if letter == "."):
        outer = layer[:at]
        if outer in owners and path in wrapped:
            raise FileError(
                f"{path}: inside of {outer}, of which a parameter is adapted too: peft finds only "
                "one of them. Save two adapters."
            )
        found = found[:at] + INNER * owners[outer] + found[at:]
    return found + INNER * _after(path, layer, wrapped, base) if path in wrapped else found


def _after(path: str, owner: str, wrapped: Mapping[str, str], base: Optional[Base]) -> int:
    """How many parameters of one module PEFT wraps after this one."""
    siblings = [p for p, name in wrapped.items() if name.rpartition(".")[0] == owner]
    if len(siblings) > 1 and base is None:
        raise FileError(
            f"{owner}: several parameters of one module ({', '.join(siblings)}). Give "
            "the model, which knows their order."
        )
    # peft wraps in the order of the module, so the last one is outermost
    order = [p for p in (base or siblings) if p in siblings]
    return len(order) - 1 - order.index(path)


def _fan_in_fan_out(adapter: Adapter) -> bool:
    turned = [p for p, u in adapter.updates.items() if _is_conv1d(u)]
    experts = [p for p, u in adapter.updates.items() if u.kind in ("parameter", "weight")]
    experts = [p for p in experts if not p.endswith(".in_proj_weight")]
    if turned and experts:
        raise FileError(
            f"{turned[0]} is a transformers Conv1D and {experts[0]} a parameter: PEFT "
            "refuses both in one adapter. Save two adapters."
        )
    return bool(turned)


def _is_conv1d(update: Update) -> bool:
    return update.kind == "linear" and update.layout == "transposed"
