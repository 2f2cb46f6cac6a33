"""Which part of a pipeline a model is, told by its class or by the names of its layers."""

import re
from collections.abc import Iterable
from typing import Optional

from paramlora.formats.base import Base
from paramlora.formats.names.levels import LEVELS

# as diffusers' pipelines call their models
PARTS = tuple(sorted({name for told in LEVELS.values() for name in told}))
_UNET = re.compile(r"(?:(?:down|up)_blocks\.[0-9]+|mid_block)\.(?:resnets|attentions)\..+")
_TRANSFORMER = re.compile(
    r"(?:transformer_blocks|single_transformer_blocks|joint_transformer_blocks)\.[0-9]+\..+"
    r"|blocks\.[0-9]+\.attn[12]\..+"
)
_TEXT = re.compile(r"(?:text_model\.)?encoder\.layers\.[0-9]+\.(?:self_attn|mlp)\..+")
_CLASSES = {"UNet": "unet", "Transformer": "transformer"}  # of diffusers, by what is in the name


def part_told(paths: Iterable[str], base: Optional[Base] = None) -> Optional[str]:
    """The part: ``"unet"`` or ``"transformer"``, ``"text_encoder"`` for any text encoder, empty
    where each path tells its own, and None where nothing tells.

    Example:
        >>> part_told(["down_blocks.0.resnets.0.conv1"]), part_told(["encoder.layers.0.mlp.fc1"])
        ('unet', 'text_encoder')
        >>> part_told(["unet.a", "text_encoder.b"]), part_told(["a"])
        ('', None)
    """
    known = list(paths)
    if all("." in path and path.partition(".")[0] in PARTS for path in known):
        return ""
    for pattern, part in ((_UNET, "unet"), (_TRANSFORMER, "transformer"), (_TEXT, "text_encoder")):
        if any(pattern.fullmatch(path) for path in known):
            return part
    model = next((slot.classes[0] for slot in (base or {}).values() if slot.classes), "")
    if model.startswith("CLIPText"):
        return "text_encoder"
    end = re.search(r"(UNet|Transformer)\w*Model$", model)
    return _CLASSES[end[1]] if end else None
