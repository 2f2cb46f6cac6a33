"""PEFT's LoHa and LoKr folders, written: LyCORIS's tensors in the sizes that peft makes."""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from einops import einsum
from torch import Tensor

from paramlora.errors import FileError, with_article
from paramlora.formats.factors import held, wide
from paramlora.formats.peft.configuration import config_of
from paramlora.formats.scale import alpha_of
from paramlora.update import lokr
from paramlora.update.value import KindUpdate

_Pair = tuple[int, int]


def products(values: Mapping[str, KindUpdate]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the configuration of updates of one of the two kinds.

    Read from peft 0.21's tuners/loha/layer.py and tuners/lokr/layer.py (``update_layer``): the
    configuration alone tells the sizes of all tensors.

    Raises:
        FileError: a layer that peft has no such update of, or sizes that no configuration gives.
    """
    method = next(iter(values.values())).method
    for path, value in values.items():
        _check(path, value)
    make, more = (_loha(values), {}) if method == "loha" else _lokr(values)
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, r, tensors in make:
        state |= {f"{path}.{name}": tensor for name, tensor in tensors.items()}
        ranks[path], alphas[path] = r, alpha_of(values[path].scale, r)
    told = config_of(ranks, alphas, set(values), [])
    kept = ("target_modules", "rank_pattern", "alpha_pattern", "r", "modules_to_save")
    beside = ("base_model_name_or_path", "task_type", "inference_mode")
    config = {
        "peft_type": method.upper(),
        # LoHa's and LoKr's name for it
        "alpha": told["lora_alpha"],
        "use_effective_conv2d": _tucker(values),
        **{key: told[key] for key in (*kept, *beside)},
    }
    return state, {**config, **more}


def _check(path: str, value: KindUpdate) -> None:
    shape = value.shape or ()
    known = value.layout == "matrix" and value.kind in (None, "linear", "convolution")
    if not path or not known or len(shape) not in (2, 3, 4):
        kind = value.kind or value.layout
        raise FileError(
            f"{path or '(model)'}: {value.method} of {with_article(kind)} of shape "
            f"{list(shape)}, which PEFT has of Linear, Conv1d and Conv2d only. If its shape is "
            "unknown, give the model (--model)."
        )


def _tucker(values: Mapping[str, KindUpdate]) -> bool:
    """Whether kernels are apart, which one switch says of all convolutions.

    Raises:
        FileError: of some they are.
    """
    told = {
        path: "hada_t1" in value.held
        for path, value in values.items()
        if value.method == "loha" and set((value.shape or ())[2:]) - {1}
    }
    if len(set(told.values())) > 1:
        first, other = (next(p for p, tucker in told.items() if tucker is is_) for is_ in (1, 0))
        raise FileError(
            f'{first} is of Tucker\'s form ("tucker"), {other} is not: PEFT has one switch for '
            "both. Save two adapters."
        )
    return any(told.values())


def _loha(values: Mapping[str, KindUpdate]) -> Iterator[tuple[str, int, dict[str, Tensor]]]:
    for path, value in values.items():
        tensors = dict(value.held)
        for name in ("hada_t1", "hada_t2"):
            if name in tensors and tensors[name].dim() == 3:  # of a Conv1d
                tensors[name] = tensors[name][..., None]
        yield path, value.r, tensors


def _lokr(
    values: Mapping[str, KindUpdate],
) -> tuple[Iterator[tuple[str, int, dict[str, Tensor]]], dict[str, Any]]:
    """The first factor whole, the second of its own rank where peft keeps one so."""
    sizes = {path: _sizes(value) for path, value in values.items()}
    factor = _factor(sizes)
    # our first factor is always written whole, so no layer needs it decomposed
    more = {"decompose_both": False, "decompose_factor": factor}
    return (_factors(path, value, sizes[path]) for path, value in values.items()), more


def _factors(
    path: str, value: KindUpdate, sizes: tuple[_Pair, _Pair]
) -> tuple[str, int, dict[str, Tensor]]:
    """(path, rank, tensors): peft's second factor is whole where its rank is at least half of its
    larger side, and two factors below that."""
    # use_w2 = r >= max(...) / 2 in peft's tuners/lokr/layer.py, update_layer
    most = -(-max(sizes[0][1], sizes[1][1]) // 2)
    # the factors may have to be multiplied out: in double, so that `held` rounds once
    exact = {name: wide(tensor).double() for name, tensor in value.held.items()}
    first, second = lokr.factors(exact)
    kernel = (value.shape or ())[2:]
    full = "lokr_w2" in exact and len(kernel) != 1
    a, b = _second(exact, second.reshape(sizes[0][1], -1))
    if not full and a.shape[1] < most:
        r, made = a.shape[1], {"lokr_w2_a": a, "lokr_w2_b": b}
    elif len(kernel) == 1 and sizes[0][0] * sizes[1][0] > 1:
        raise FileError(
            f"{path}: lokr of a Conv1d whose second factor, {list(second.shape)}, PEFT 0.21 would "
            "keep whole, and then multiplies in another order. Keep the native format, or kohya's."
        )
    else:
        r, made = most, {"lokr_w2": second.reshape(sizes[0][1], sizes[1][1], *kernel)}
    like = next(iter(value.held.values()))
    own = {name: held(one, like.dtype) for name, one in {"lokr_w1": first, **made}.items()}
    # an update has one type, and `held` may have widened some of its tensors
    widest = functools.reduce(torch.promote_types, (one.dtype for one in own.values()))
    return path, r, {name: tensor.to(widest) for name, tensor in own.items()}


def _second(exact: Mapping[str, Tensor], full: Tensor) -> tuple[Tensor, Tensor]:
    """Two factors of the second one ``[c, d·kernel]``: its own, or where it is full an identity on
    the smaller side; of Tucker's form (``t ×₁ a ×₂ b``) the first is ``aᵀ``."""
    if "lokr_w2" in exact:
        c, d = full.shape
        eye = torch.eye(min(c, d), dtype=full.dtype)
        return (eye, full) if c <= d else (full, eye)
    a, b = exact["lokr_w2_a"], exact["lokr_w2_b"]
    if "lokr_t2" not in exact:
        return a, b
    return a.t(), einsum(exact["lokr_t2"], b, "i j ..., j d -> i d ...").flatten(1)


def _sizes(value: KindUpdate) -> tuple[_Pair, _Pair]:
    """(outputs of both factors, inputs of both)."""
    first, second = lokr.factors({name: one.to("meta") for name, one in value.held.items()})
    kernel = math.prod((value.shape or ())[2:])
    inner = second.shape[1] if second.dim() > 2 else second.shape[1] // kernel
    return (first.shape[0], second.shape[0]), (first.shape[1], inner)


def _factor(sizes: Mapping[str, tuple[_Pair, _Pair]]) -> int:
    """The ``decompose_factor`` that divides all layers as they are divided.

    Raises:
        FileError: none does.
    """
    first, own = next(iter(sizes.items()))
    wrong = first
    # -1, as near to a square as can be, is the default of peft and LyCORIS
    for factor in (-1, *dict.fromkeys(size for pair in own for size in pair)):
        left = [path for path, pairs in sizes.items() if not _divides(factor, pairs)]
        if not left:
            return factor
        wrong = wrong if first in left else left[0]
    also = "" if wrong == first else f" together with {first}'s"
    raise FileError(
        f"{wrong}: its factors are of {sizes[wrong]} (outputs, inputs), which no decompose_factor "
        f"of PEFT gives{also}. Keep the native format, or kohya's."
    )


def _divides(factor: int, pairs: tuple[_Pair, _Pair]) -> bool:
    return pairs == tuple(_split(math.prod(pair), factor) for pair in pairs)


def _split(size: int, factor: int) -> _Pair:
    """peft's ``factorization``: LyCORIS's, but that what divides is always the first."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    return lokr.split(size, factor)
