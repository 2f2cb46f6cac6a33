"""litgpt's ``lit_model.pth.lora`` and ``hyperparameters.yaml``.

Read from litgpt lora.py (``LoRAQKVLinear``, ``lora_filter``) and finetune/lora.py.
"""

import re
from collections.abc import Mapping
from typing import Any, Optional

from torch import Tensor

from paramlora.errors import FileError, counted
from paramlora.formats.base import Base
from paramlora.formats.content import DEFAULTS, Content, Options, halves, number
from paramlora.formats.factors import pair
from paramlora.formats.format import Format, Mark, any_key
from paramlora.formats.fused import fused_linear, parted
from paramlora.formats.loaders import of_state_dict
from paramlora.formats.scale import KEY, alpha_of, recorded, scale_of, unreachable
from paramlora.formats.torchtune import check_uniform
from paramlora.update.value import Adapter, Update

_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?P<role>[AB])", re.DOTALL)
_PARTS = ("lora_query", "lora_key", "lora_value")
_LAYERS = r"transformer\.h\.\d+\.(?:attn\.(?:qkv|attn|proj)|mlp\.(?:fc\w*|proj))|lm_head"


def read(content: Content, base: Optional[Base] = None, options: Options = DEFAULTS) -> Adapter:
    """The adapter in a litgpt file.

    Args:
        content: `config` is ``hyperparameters.yaml``: ``lora_r``, ``lora_alpha``, and which of
            query, key and value were trained.
        base: tells the sizes of queries and keys where the file's own shapes do not.
        options: `Options.alpha` where there is no configuration.

    Raises:
        FileError: no alpha, half an update, or tensors of something else.
    """
    found = halves(content, _FACTOR, options.strict)
    updates = {
        path: _update(path, half["A"], half["B"], found, content, base, options)
        for path, half in found.items()
    }
    return Adapter(updates)


def _update(
    path: str,
    a: Tensor,
    b: Tensor,
    found: Mapping[str, Mapping[str, Tensor]],
    content: Content,
    base: Optional[Base],
    options: Options,
) -> Update:
    where, r = f"{content.source}: {path}", b.shape[1]
    alpha = content.config.get("lora_alpha", options.alpha)
    if alpha is None:
        raise FileError(
            f"{where}: the scale is in hyperparameters.yaml, which is missing. Put it "
            "beside the file, or give alpha (--alpha)."
        )
    exact = recorded(content).get(path)
    scale = scale_of(number(alpha, where), r, exact, where)
    if not path.endswith((".qkv", ".attn.attn")):
        return pair(a, b, scale, where)
    # litgpt's finetune trains any of the three: lora_query, lora_key, lora_value
    on = [bool(content.config.get(name, True)) for name in _PARTS]
    proj = found.get(f"{path.rpartition('.')[0]}.proj")
    q = None if proj is None else proj["A"].shape[1]
    return fused_linear(a, b, scale, _rows(path, a, b, on, q, base, where), on, where)


def _rows(
    path: str,
    a: Tensor,
    b: Tensor,
    on: list[bool],
    q: Optional[int],
    base: Optional[Base],
    where: str,
) -> list[int]:
    """Rows of query, key and value; the output projection reads as many as the query has."""
    proj = f"{path.rpartition('.')[0]}.proj"
    if base is not None and proj in base:
        q = base[proj].shape[1]
    q = b.shape[0] if on == [True, False, False] else q or a.shape[1]
    others = on[1] + on[2]
    if others:
        # grouped-query attention: keys and values are of one size, and narrower than queries
        kv, extra = divmod(b.shape[0] - q * on[0], others)
    elif base is not None and path in base:
        kv, extra = divmod(base[path].shape[0] - q, 2)
    else:
        raise FileError(
            f"{where}: only queries were trained; give the model, which tells the size "
            "of keys and values (--model)."
        )
    if extra or kv < 1:
        rows = counted(b.shape[0], "row")
        raise FileError(f"{where}: {rows} for queries of {q}. Give the model (--model).")
    return [q, kv, kv]


def write(adapter: Adapter, base: Optional[Base] = None, **_: Any) -> Content:
    """An adapter of a litgpt model's Linear layers, of one rank and one scale.

    The rank of ``attn.qkv`` counts each of its three parts.

    Raises:
        FileError: another kind of layer, or another rank or scale than the first, named.
    """
    fused = {p: u for p, u in adapter.updates.items() if p.endswith(".qkv")}
    state: dict[str, Tensor] = {}
    plain: dict[str, Update] = {}
    for path, update in adapter.updates.items():
        a, b = update.lora_A, update.lora_B
        if path in fused:
            a, b = parted(update, _sizes(path, update, adapter, base))
        state[f"{path}.lora_A"], state[f"{path}.lora_B"] = a.contiguous(), b.contiguous()
        plain[path] = Update(
            # of qkv the rows of one part: litgpt's lora_r counts each
            a[: b.shape[1]],
            b,
            update.scale,
            None,
            update.layout,
            kind=update.kind,
            up_kernel=update.up_kernel,
        )
    check_uniform(Adapter(plain), "litgpt")
    first = next(iter(plain.values()))
    config: dict[str, Any] = {
        "lora_r": first.r,
        "lora_alpha": alpha_of(first.scale, first.r),
        "lora_query": bool(fused),
        "lora_key": bool(fused),
        "lora_value": bool(fused),
    }
    rest = unreachable({path: (u.scale, u.r) for path, u in plain.items()})
    return Content(state, {}, {**config, KEY: rest} if rest else config)


def _sizes(path: str, update: Update, adapter: Adapter, base: Optional[Base]) -> list[int]:
    proj = f"{path.rpartition('.')[0]}.proj"
    if base is not None and proj in base:
        q = base[proj].shape[1]
    elif proj in adapter.updates:
        q = adapter.updates[proj].lora_A.shape[1]
    else:
        q = update.lora_A.shape[1]
    out = update.lora_B.shape[0]
    kv, extra = divmod(out - q, 2)
    if extra or kv < 1:
        raise FileError(
            f"{path}: {counted(out, 'row')} for queries of {q}. Give the model (--model)."
        )
    return [q, kv, kv]


FORMAT = Format(
    "litgpt",
    marks=(
        Mark(90, any_key(rf"(?:{_LAYERS})\.lora_[AB]")),
        Mark(91, lambda content: {"lora_r", "lora_alpha"} <= content.config.keys()),
    ),
    read=read,
    write=write,
    passed_over=of_state_dict,
    weights=("lit_model.pth.lora",),
    weights_rank=40,
    config="hyperparameters.yaml",
    pickled=True,
    wrap="model",
)
