"""PEFT's tensors, written."""

from collections.abc import Iterator
from typing import Optional

from einops import rearrange
from torch import Tensor

from paramlora.errors import FileError
from paramlora.formats.base import Base
from paramlora.formats.content import (
    Content,
)
from paramlora.formats.factors import (
    check_told,
    grouped,
    kernels,
    with_low_ranks,
)
from paramlora.formats.peft.configuration import INNER, PREFIX, config_of
from paramlora.formats.peft.experts import EXPERTS, PARTS
from paramlora.formats.peft.tokens import numbers_of, tokens_alone, without_rows
from paramlora.formats.scale import alpha_of, scales_metadata
from paramlora.update.value import Adapter, Update


def write(adapter: Adapter, base: Optional[Base] = None, prefix: str = PREFIX) -> Content:
    """An adapter as PEFT's file and configuration.

    Args:
        adapter: fitted to its model where kinds of layers matter (see `fit`).
        base: needed where several parameters of one module are adapted.
        prefix: in front of every key.

    Raises:
        FileError: a layer that PEFT cannot adapt, named with the reason.
    """
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    scales: dict[str, tuple[float, int]] = {}
    modules: set[str] = set()
    parameters: list[str] = []
    adapter, tokens = without_rows(adapter)
    if not (adapter.updates or adapter.others):
        return tokens_alone(tokens, prefix)
    check_all_rescaled(adapter, "PEFT")
    adapter, magnitudes = with_low_ranks(adapter)
    for path, update in adapter.updates.items():
        check_writable(path, update)
        if path in magnitudes:
            _check_rescaled(path, update, adapter, base)
            own = magnitude_of(path, update, magnitudes[path], "PEFT")
            state[f"{prefix}{path}.lora_magnitude_vector"] = own
        for key, tensor, r, module in _tensors(path, update, adapter, base):
            state[f"{prefix}{key}"] = tensor.contiguous()
            ranks[module], alphas[module] = r, alpha_of(update.scale, r)
            scales[path] = update.scale, r
            if update.kind in ("parameter", "weight") and not _attention(path, adapter, base):
                parameters.append(module)
            else:
                modules.add(module)
    _check_attention(adapter, base)
    if any(EXPERTS.fullmatch(path) for path in (*adapter.updates, *(base or ()))):
        modules, ranks, alphas = _apart(modules, parameters, ranks, alphas)
    config = config_of(ranks, alphas, modules, sorted(set(parameters)))
    config["fan_in_fan_out"] = _fan_in_fan_out(adapter)
    config["use_dora"] = bool(magnitudes)
    for path, value in tokens.items():
        state[f"{prefix}{path}.token_adapter.trainable_tokens_delta"] = value.held["lora_rows"]
    if tokens:
        config["trainable_token_indices"] = {p: numbers_of(value) for p, value in tokens.items()}
    return Content(state, {"format": "pt", **scales_metadata(scales)}, config)


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
    flat = magnitude.reshape(-1).contiguous()
    dims = 0 if update.kind != "convolution" else len(update.shape or ())
    return flat.reshape(1, -1, *[1] * (dims - 2)) if dims else flat


def _check_rescaled(path: str, update: Update, adapter: Adapter, base: Optional[Base]) -> None:
    """Refuse DoRA where peft has none."""
    if update.kind in ("parameter", "weight") or _attention(path, adapter, base):
        what = "attention" if _attention(path, adapter, base) else f"a {update.kind}"
        raise FileError(f'{path}: "dora" of {what}, which PEFT does not have.')


def _apart(
    modules: set[str], parameters: list[str], ranks: dict[str, int], alphas: dict[str, float]
) -> tuple[set[str], dict[str, int], dict[str, float]]:
    """Layers under the names of experts' parts as parameters, which peft leaves as they are.

    Fused experts and their shared or dense neighbours are in one model: peft 0.21 rewrites every
    module of these names into the fused parameters, and drops the updates of all others.
    """
    moved = {path for path in modules if path.rpartition(".")[2] in PARTS}
    parameters.extend(f"{path}.weight" for path in moved)
    names = {path: f"{path}.weight" if path in moved else path for path in ranks}
    return (
        modules - moved,
        {names[path]: r for path, r in ranks.items()},
        {names[path]: alpha for path, alpha in alphas.items()},
    )


def check_writable(path: str, update: Update) -> None:
    """Refuse what is no update of a layer that PEFT knows."""
    check_told(path, update, "PEFT")
    known = (None, "linear", "convolution", "embedding", "parameter", "weight")
    if update.kind not in known:
        raise FileError(f"{path}: a {update.kind}, which PEFT cannot adapt.")


def _tensors(
    path: str, update: Update, adapter: Adapter, base: Optional[Base]
) -> Iterator[tuple[str, Tensor, int, str]]:
    """(key, tensor, rank there, module or parameter) of one update."""
    owner = path.rpartition(".")[0]
    if update.kind == "embedding":
        yield f"{path}.lora_embedding_A", update.lora_A, update.r, path
        yield f"{path}.lora_embedding_B", update.lora_B, update.r, path
        return
    stem, module, r = path, path, update.r
    a, b = kernels(update) if update.layout != "stack" else _stacked(path, update, base)
    if update.groups > 1:
        a, b = grouped(update)
        r = a.shape[0]
    if _attention(path, adapter, base):
        inside = path.endswith(".out_proj")
        stem, module = f"{owner}{INNER}.out_proj" if inside else owner, owner
        yield from _idle_half(owner, update, adapter, inside)
    elif update.kind in ("parameter", "weight"):
        stem = _wrapped(path, update, adapter, base)
        module = f"{path}.weight" if update.kind == "weight" else path
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
    return rearrange(a, "e r i -> (e r) i"), rearrange(b, "e o r -> o (r e)")


def _attention(path: str, adapter: Adapter, base: Optional[Base]) -> bool:
    """Whether a weight is one of the two that PEFT adapts together in MultiheadAttention."""
    owner, _, name = path.rpartition(".")
    if name == "in_proj_weight":
        return True
    sibling = f"{owner}.in_proj_weight"
    apart = base is not None and f"{owner}.q_proj_weight" in base
    if name == "out_proj" and apart:
        raise FileError(f"{path}: PEFT adapts attention only where q, k and v have one width.")
    return name == "out_proj" and (sibling in adapter.updates or sibling in (base or ()))


def _idle_half(
    owner: str, update: Update, adapter: Adapter, inside: bool
) -> Iterator[tuple[str, Tensor, int, str]]:
    """Zeros for the weight of attention that has no update, since PEFT always adapts both."""
    other = f"{owner}.in_proj_weight" if inside else f"{owner}.out_proj"
    if other in adapter.updates:
        return
    stem, width = (owner, 3) if inside else (f"{owner}{INNER}.out_proj", 1)
    size = update.lora_B.shape[0] // (1 if inside else 3)
    yield f"{stem}.lora_A.weight", update.lora_A.new_zeros(update.r, size), update.r, owner
    yield f"{stem}.lora_B.weight", update.lora_B.new_zeros(width * size, update.r), update.r, owner


def _check_attention(adapter: Adapter, base: Optional[Base]) -> None:
    for path, update in adapter.updates.items():
        owner, _, name = path.rpartition(".")
        twin = adapter.updates.get(f"{owner}.out_proj") if name == "in_proj_weight" else None
        if twin is not None and (twin.r, twin.scale) != (update.r, update.scale):
            raise FileError(
                f"{path} has r = {update.r} and scale {update.scale:g}, {owner}.out_proj {twin.r} "
                f"and {twin.scale:g}: PEFT holds one of each for both."
            )


def _wrapped(path: str, update: Update, adapter: Adapter, base: Optional[Base]) -> str:
    """The module of a parameter, with a wrapper for each parameter that PEFT wraps after it."""
    owner = path if update.kind == "weight" else path.rpartition(".")[0]
    if not owner:
        raise FileError(f"{path}: a parameter of the model itself, which PEFT cannot adapt.")
    siblings = [
        p
        for p, u in adapter.updates.items()
        if u.kind in ("parameter", "weight")
        and (p if u.kind == "weight" else p.rpartition(".")[0]) == owner
    ]
    if len(siblings) > 1 and base is None:
        raise FileError(
            f"{owner}: several parameters of one module ({', '.join(siblings)}). Give "
            "the model, which knows their order."
        )
    order = [p for p in (base or siblings) if p in siblings]
    return owner + INNER * (len(order) - 1 - order.index(path))


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
