"""torchtune's ``adapter_model.pt`` and ``adapter_config.json``.

Read from torchtune modules/peft/lora.py, modules/peft/_utils.py and
training/checkpointing/_checkpointer.py.
"""

import re
from collections.abc import Mapping
from typing import Any, Optional

from torch import Tensor

from paramlora.errors import FileError, with_article
from paramlora.formats.base import Base
from paramlora.formats.content import DEFAULTS, Content, Options, halves, refuse_dora
from paramlora.formats.factors import pair
from paramlora.formats.format import Format, Mark, any_key
from paramlora.formats.loaders import of_state_dict
from paramlora.formats.peft import alpha, by_pattern, check_config, check_ranks
from paramlora.formats.scale import KEY, alpha_of, recorded, scale_of, unreachable
from paramlora.update.value import Adapter, Update

_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?P<role>[ab])\.weight", re.DOTALL)


def read(content: Content, base: Optional[Base] = None, options: Options = DEFAULTS) -> Adapter:
    """The adapter in a torchtune file, under torchtune's own names of layers.

    Args:
        content: `config` is ``adapter_config.json``, which holds ``r`` and ``lora_alpha``.
        base: not needed.
        options: `Options.alpha` where there is no configuration.

    Raises:
        FileError: DoRA, expert layers, half an update, or tensors of something else.
    """
    magnitudes = [key for key in content.state if key.endswith(".magnitude")]
    refuse_dora(content, magnitudes)
    check_config(content.config, content.source)
    found = halves(content, _FACTOR, options.strict)
    alphas = by_pattern(content.config, "alpha_pattern", found, content.source)
    ranks = {path: half["a"].shape[0] for path, half in found.items() if half["a"].dim()}
    check_ranks(content.config, ranks, content.source, options.strict)
    updates = {p: _update(p, half, alphas, content, options) for p, half in found.items()}
    return Adapter(updates)


def _update(
    path: str,
    half: dict[str, Tensor],
    alphas: Mapping[str, Any],
    content: Content,
    options: Options,
) -> Update:
    where = f"{content.source}: {path}"
    if "lora_alpha" not in content.config and options.alpha is None:
        raise FileError(
            f"{where}: the scale is in adapter_config.json, which is missing. "
            "Put it beside the file, or give alpha (--alpha)."
        )
    r = half["a"].shape[0]
    value = alpha(content.config, alphas, path, r, options, content.source)
    exact = recorded(content).get(path)
    return pair(half["a"], half["b"], scale_of(value, r, exact, where), where)


def write(adapter: Adapter, base: Optional[Base] = None, **_: Any) -> Content:
    """An adapter of Linear layers that share one rank and one scale, as torchtune's.

    Raises:
        FileError: another kind of layer, or another rank or scale than the first, named.
    """
    check_uniform(adapter, "torchtune")
    first = next(iter(adapter.updates.values()))
    state = {}
    for path, update in adapter.updates.items():
        state[f"{path}.lora_a.weight"] = update.lora_A.contiguous()
        state[f"{path}.lora_b.weight"] = update.lora_B.contiguous()
    config: dict[str, Any] = {
        "r": first.r,
        "lora_alpha": alpha_of(first.scale, first.r),
        "target_modules": sorted({path.rpartition(".")[2] for path in adapter.updates}),
        "peft_type": "LORA",
    }
    rest = unreachable({path: (u.scale, u.r) for path, u in adapter.updates.items()})
    return Content(state, {}, {**config, KEY: rest} if rest else config)


def check_uniform(adapter: Adapter, tool: str) -> None:
    """Refuse all but Linear layers of one rank and one scale."""
    for path, update in adapter.updates.items():
        flat = update.layout == "matrix" and (update.shape is None or len(update.shape) == 2)
        if not path or not flat or update.kind not in (None, "linear") or update.up_kernel != 1:
            raise FileError(
                f"{path or '(model)'}: {with_article(update.kind or update.layout)}; {tool}'s "
                "files hold Linear layers inside a model only. Keep the native format."
            )
    head, first = next(iter(adapter.updates.items()))
    ranks = {update.r for update in adapter.updates.values()}
    # ranks first: a scale folded into a factor leaves its rank
    way = "Fold scales into lora_B (fold_scale, --fold-scale)"
    way = way if len(ranks) == 1 else f"Cut all to rank {min(ranks)} (paramlora resize)"
    for path, update in adapter.updates.items():
        if (update.r, update.scale) != (first.r, first.scale):
            raise FileError(
                f"{path}: r = {update.r} and scale {update.scale:g}, while {head} has {first.r} "
                f"and {first.scale:g}: {tool}'s files hold one of each for all layers. {way}, "
                "or keep the native format."
            )


FORMAT = Format(
    "torchtune",
    marks=(Mark(20, any_key(r".+\.lora_[ab]\.weight|.+\.experts\.lora_gate_a")),),
    read=read,
    write=write,
    passed_over=of_state_dict,
    weights=("adapter_model.pt",),
    weights_rank=20,
    config="adapter_config.json",
    pickled=True,
)
