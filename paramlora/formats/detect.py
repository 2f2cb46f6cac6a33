"""Which tool wrote a file, told by its keys and shapes, never by its name."""

import re
from collections.abc import Callable, Mapping

from torch import Tensor

from paramlora.errors import FileError, listed
from paramlora.formats.cloneofsimo import NUMBER
from paramlora.formats.content import Content
from paramlora.formats.kohya import PREFIXES

_LITGPT = (
    r"(?:transformer\.h\.\d+\.(?:attn\.(?:qkv|attn|proj)|mlp\.(?:fc\w*|proj))|lm_head)\.lora_[AB]"
)
_MANGLED = rf"(?:{'|'.join(PREFIXES)})_[^.]+\..+"
_LEAF = r".+\.(?:lora_(?:down|mid)\.weight|hada_w1_a|lokr_w1(?:_a)?|dora_scale)"
_OLDER = r".+(?:_lora\.down\.weight|\.lora_linear_layer\..+|\.lora\.down\.weight)"
_REFUSED = {
    r".*\bparametrizations\..+": "a model with an adapter attached; use paramlora extract on it",
    r".+_lora_A": "a file of LoRA-Torch, which is not read",
}


def detect(content: Content) -> str:
    """The name of the format.

    Raises:
        FileError: none that is known, with the first keys.
    """
    keys = list(content.state)
    for name, fits in _RULES:
        if fits(content, keys):
            return name
    first = listed(keys, 4) or "none"
    raise FileError(f"{content.source}: no adapter format that is known. Its first keys: {first}.")


def _any(pattern: str) -> "Callable[[Content, list[str]], bool]":
    compiled = re.compile(pattern, re.DOTALL)  # names hold any character (see `paramlora.keys`)
    return lambda content, keys: any(compiled.fullmatch(key) for key in keys)


def _peft(content: Content, keys: list[str]) -> bool:
    inside = any(".lora_A" in key or ".lora_embedding_A" in key for key in keys)
    prefixed = any(key.startswith("base_model.") or "lora_embedding_A" in key for key in keys)
    return inside and (prefixed or "peft_type" in content.config)


def _refused(content: Content, keys: list[str]) -> bool:
    for pattern, what in _REFUSED.items():
        if any(re.fullmatch(pattern, key, re.DOTALL) for key in keys):
            raise FileError(f"{content.source}: {what}.")
    return False


def _swapped(content: Content, keys: list[str]) -> bool:
    """The original's soft branches, whose ``lora_B`` comes first, apart from PEFT's layers."""
    return any(_comes_second(content.state, key) for key in keys if key.endswith(".lora_A.weight"))


def _comes_second(state: Mapping[str, Tensor], key: str) -> bool:
    a, b = state[key], state.get(key.replace(".lora_A.", ".lora_B."))
    if b is None or min(a.dim(), b.dim()) < 2 or not a.numel() or not b.numel():
        return False
    if a.shape[0] == b.shape[1]:
        return False
    grouped = b.shape[0] % a.shape[1] == 0 and a.shape[0] % b.shape[1] != 0
    return a.shape[1] == b.shape[0] or grouped


# in the order of asking: what is told for certain first
_RULES: "tuple[tuple[str, Callable[[Content, list[str]], bool]], ...]" = (
    ("native", lambda content, keys: "paramlora" in content.metadata),
    ("cloneofsimo", _any(r".+:\d+:(?:up|down)")),
    (
        "cloneofsimo",
        lambda content, keys: bool(keys) and all(NUMBER.fullmatch(key) for key in keys),
    ),
    ("torchtune", _any(r".+\.lora_[ab]\.weight|.+\.experts\.lora_gate_a")),
    ("peft", _peft),
    ("", _refused),
    ("kohya", _any(_MANGLED)),
    ("kohya", _any(_LEAF)),
    ("diffusers", _any(_OLDER)),
    ("original", _any(r"(?:.+\.)?lora_scale")),
    ("original", _swapped),
    ("diffusers", _any(r".+\.lora_A(?:\.[^.]+)?\.weight")),
    ("diffusers", lambda content, keys: "lora_adapter_metadata" in content.metadata),
    ("litgpt", _any(_LITGPT)),
    ("litgpt", lambda content, keys: "lora_r" in content.config and "lora_alpha" in content.config),
    ("loralib", _any(r".+\.lora_A")),
)
