"""PEFT's folders: ``adapter_model.safetensors`` and ``adapter_config.json``.

Read from peft 0.21's writers and readers: utils/save_and_load.py, tuners/lora/layer.py,
utils/other.py (patterns), tuners/tuners_utils.py (targets).
"""

from paramlora.formats.content import Content
from paramlora.formats.format import Format, Mark
from paramlora.formats.loaders import of_peft
from paramlora.formats.peft.configuration import (
    alpha,
    by_pattern,
    check_config,
    check_magnitudes,
    check_ranks,
    config_of,
    report_targets,
)
from paramlora.formats.peft.reading import read
from paramlora.formats.peft.writing import (
    MAGNITUDE,
    check_all_rescaled,
    check_writable,
    magnitude_of,
    write,
)

__all__ = [
    "FORMAT",
    "alpha",
    "by_pattern",
    "check_all_rescaled",
    "check_config",
    "check_magnitudes",
    "check_ranks",
    "check_writable",
    "config_of",
    "magnitude_of",
    "read",
    "report_targets",
    "write",
]


def _is_peft(content: Content) -> bool:
    keys = list(content.state)
    names = (".lora_A", ".lora_embedding_A", ".trainable_tokens_delta", ".hada_w", ".lokr_w")
    inside = any(name in key for key in keys for name in names)
    prefixed = any(key.startswith("base_model.") or "lora_embedding_A" in key for key in keys)
    return inside and (prefixed or "peft_type" in content.config)


FORMAT = Format(
    "peft",
    marks=(Mark(30, _is_peft),),
    read=read,
    write=write,
    passed_over=of_peft,
    kinds=("lora", "soft", "dora", "rows", "loha", "lokr"),
    whole=True,
    weights=("adapter_model.safetensors", "adapter_model.bin"),
    weights_rank=10,  # before torchtune's, which writes this form beside its own
    config="adapter_config.json",
    servers={"peft": "PEFT"},
    # transformers 5 takes a file's keys for the model's own, among which a magnitude is the weight
    # of a module, and starts anew what it does not find; peft itself reads both
    beside={"transformers": {"magnitude": f"{MAGNITUDE}.weight"}},
)
