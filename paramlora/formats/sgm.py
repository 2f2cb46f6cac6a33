"""The original names of a Stable Diffusion U-Net, which kohya's SDXL files use."""

import re
from collections.abc import Iterable
from typing import Optional

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_SINGLE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_PLACE = re.compile(
    r"(?:(?P<side>down|up)_blocks\.(?P<block>[0-9]{1,9})|mid_block)\."
    r"(?P<part>resnets|attentions|downsamplers|upsamplers)\.(?P<index>[0-9]{1,9})\.(?P<rest>.+)",
    re.DOTALL,
)


def original_names(paths: Iterable[str]) -> dict[str, str]:
    """``{diffusers' name: original name}`` of a U-Net's layers; other paths are left out.

    Args:
        paths: of the whole model, since they tell how many layers a block has; ``unet.`` may
            stand in front, and stays.

    Example:
        >>> names = original_names([f"down_blocks.{i}.resnets.1.conv1" for i in range(2)])
        >>> names["down_blocks.1.resnets.1.conv1"]
        'input_blocks.5.0.in_layers.2'
    """
    known = list(paths)
    rest = [path.removeprefix("unet.") for path in known]
    numbers = [
        int(m[1]) for p in rest if (m := re.match(r"down_blocks\.0\.resnets\.([0-9]{1,9})\.", p))
    ]
    attends = {m[1] for p in rest if (m := re.match(r"up_blocks\.([0-9]{1,9})\.attentions\.", p))}
    found = {}
    for path, short in zip(known, rest):
        name = _name(short, 1 + max(numbers, default=0), attends)
        if name is not None:
            found[path] = path.removesuffix(short) + name
    return found


def _name(path: str, layers: int, attends: set[str]) -> Optional[str]:
    match = _PLACE.fullmatch(path)
    if match is None:
        return _SINGLE.get(path)
    part, index, rest = match["part"], int(match["index"]), match["rest"]
    if match["side"] is None:
        position = 2 * index if part == "resnets" else 2 * index + 1
        return f"middle_block.{position}.{_inside(part, rest)}"
    first = (layers + 1) * int(match["block"])
    if part == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.{rest.replace('conv', 'op')}"
    if part == "upsamplers":
        return f"output_blocks.{first + layers}.{1 + (match['block'] in attends)}.{rest}"
    inside = f"{int(part == 'attentions')}.{_inside(part, rest)}"
    down = match["side"] == "down"
    return (
        f"input_blocks.{first + index + 1}.{inside}"
        if down
        else (f"output_blocks.{first + index}.{inside}")
    )


def _inside(part: str, rest: str) -> str:
    return _RESNET.get(rest, rest) if part == "resnets" else rest
