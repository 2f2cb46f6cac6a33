"""What other tools' loaders would match to nothing, by their own rules of names.

Each rule is asked of a file before it is put in its place, where the model's layers are known. Read
from peft 0.20 utils/save_and_load.py (``base_model.model.`` and a module's path), diffusers 0.42
loaders/lora_base.py (a pipeline gives each model the keys behind its name) and sd-scripts
networks/lora.py (a prefix for each model and its modules' paths with ``_`` for ``.``).
"""

from collections.abc import Iterable
from typing import Optional

from paramlora.formats.base import Base, places_of
from paramlora.formats.content import Content
from paramlora.formats.names.levels import DENOISER, MANGLED, flat, in_checkpoint
from paramlora.formats.pipeline import PARTS, part_told

_LEAVES = ("lora_", "hada_", "lokr_", "oft_", "trainable_tokens")
_LEAF = set(
    "alpha dora_scale diff diff_b w_norm b_norm set_weight bias weight base_layer token_adapter "
    "modules_to_save".split()
)


def of_peft(content: Content, base: Base) -> list[str]:
    """The keys that PEFT would put into no layer."""
    start = "base_model.model."
    known = {*base, *(path.rpartition(".")[0] for path in base)}  # a parameter is its owner's
    inside = {key: key.removeprefix(start) for key in content.state}
    return [
        key
        for key, rest in inside.items()
        if rest == key or not (_is_whole(rest) or stem(rest) in known)
    ]


def of_state_dict(content: Content, base: Base) -> list[str]:
    """The keys that ``model.load_state_dict`` would have no layer for: litgpt's, torchtune's,
    loralib's and the original wrapper's way, whose keys are the modules' own paths."""
    return [key for key in content.state if stem(key) not in base]


def of_diffusers(content: Content, base: Base) -> list[str]:
    """The keys that a pipeline would give to another model or, without a model's name in front,
    that the model itself has no layer for."""
    part = part_told(base, base)
    keys = (key for key in content.state if not _is_whole(key))
    return [key for key in keys if not _in_pipeline(stem(key), base, part)]


def _in_pipeline(path: str, base: Base, part: Optional[str]) -> bool:
    component, _, rest = path.partition(".")
    if path in base or component not in PARTS:
        return path in base
    return rest in base and can_be((component,), part)


def of_kohya(content: Content, base: Base) -> list[str]:
    """The keys whose name is mangled from no layer, or whose prefix is another model's."""
    known, part = mangled(base), part_told(base, base)
    names = {key: key.partition(".")[0] for key in content.state if not _is_whole(key)}
    # once for each layer, of which a file has three keys or more
    fits = {name: _is_mangled(name, known, part) for name in set(names.values())}
    return [key for key, name in names.items() if not fits[name]]


def _is_mangled(name: str, known: "set[str]", part: Optional[str]) -> bool:
    level = max((one for one in MANGLED if name.startswith(f"{one}_")), key=len, default="")
    if not level or not can_be(MANGLED[level], part):
        return False
    return any(rest in known for rest, _ in flat(name[len(level) + 1 :]))


def _is_whole(key: str) -> bool:
    """Whether a key is of a vector, or of a whole tensor: a `Base` has matrices alone."""
    parts = key.split(".")
    low = any(part.startswith(_LEAVES) for part in parts)
    return not low and parts[-1] in ("weight", "bias", "diff_b", "w_norm", "b_norm")


def mangled(base: Base) -> "set[str]":
    """The names of a model's layers, its own and the published ones, with ``_`` for ``.``."""
    names = (*base, *places_of(base).others)
    inside = (in_checkpoint(name)[1] for name in names)
    return {rest for name in inside for rest, _ in flat(name)}


def can_be(components: Iterable[str], part: Optional[str]) -> bool:
    """Whether a model of this part of a pipeline (see `part_told`) can have one of these names.

    Example:
        >>> can_be(["text_encoder_2"], "text_encoder"), can_be(["text_encoder"], "unet")
        (True, False)
    """
    if not part:
        return True
    if part == "text_encoder":
        return any(one.startswith("text_encoder") for one in components)
    return any(one in (*DENOISER, "transformer_2") for one in components)


def stem(key: str) -> str:
    """The path of the layer that a key is of.

    Example:
        >>> stem("unet.a.lora_A.weight"), stem("a.base_layer.lora_B.weight"), stem("norm.bias")
        ('unet.a', 'a', 'norm')
    """
    parts = key.split(".")
    ends = (n for n, part in enumerate(parts) if part in _LEAF or part.startswith(_LEAVES))
    return ".".join(parts[: next(ends, len(parts))])
