"""Stable Diffusion's U-Nets (1, 2, XL), whose original names count blocks in another way.

Read from diffusers 0.42 loaders/single_file_utils.py (``convert_ldm_unet_checkpoint``) and ComfyUI
comfy/utils.py (``unet_to_diffusers``). The original U-Net has every layer of every block in one
list, its downsampler or upsampler last.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Optional

from paramlora.formats.names.table import Table

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_SINGLE = {
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_ORIGINAL = {own: other for other, own in _RESNET.items()}
_PLACE = re.compile(
    r"(?:(?P<side>down|up)_blocks\.(?P<block>[0-9]{1,9})|mid_block)\."
    r"(?P<part>resnets|attentions|downsamplers|upsamplers)\.(?P<index>[0-9]{1,9})\.(?P<rest>.+)",
    re.DOTALL,
)
_LISTED = re.compile(
    r"(?P<list>input_blocks|middle_block|output_blocks)\."
    r"(?:(?P<place>[0-9]{1,9})\.)??(?P<inner>[0-9]{1,9})\.(?P<rest>[^0-9].*)",
    re.DOTALL,
)


def pairs(paths: Iterable[str]) -> dict[str, str]:
    """``{original name: diffusers' name}`` of a U-Net's layers, whichever of the two it has.

    Args:
        paths: of the whole model, since they tell how many layers a block has.

    Example:
        >>> names = pairs([f"down_blocks.{i}.resnets.1.conv1" for i in range(2)])
        >>> names["input_blocks.5.0.in_layers.2"]
        'down_blocks.1.resnets.1.conv1'
    """
    known = list(paths)
    numbers = [
        m[1] for p in known if (m := re.match(r"down_blocks\.0\.resnets\.([0-9]{1,9})\.", p))
    ]
    if numbers:
        attends = {m[1] for p in known if (m := re.match(r"up_blocks\.([0-9]{1,9})\.att", p))}
        names = ((_original(p, 1 + max(map(int, numbers)), attends), p) for p in known)
        return {other: path for other, path in names if other is not None}
    layers = _layers(known)
    listed = ((path, _own(path, layers)) for path in known) if layers else ()
    return {path: own for path, own in listed if own is not None}


def _original(path: str, layers: int, attends: set[str]) -> Optional[str]:
    match = _PLACE.fullmatch(path)
    if match is None:
        return next((other for other, own in _SINGLE.items() if own == path), None)
    part, index, rest = match["part"], int(match["index"]), match["rest"]
    inside = _ORIGINAL.get(rest, rest) if part == "resnets" else rest
    # resnet, attention, resnet
    if match["side"] is None:
        return f"middle_block.{2 * index + (part != 'resnets')}.{inside}"
    # a block has layers + 1 places: its layers and a downsampler, or on the way up a layer more
    first = (layers + 1) * int(match["block"])
    if part == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.{rest.replace('conv', 'op')}"
    # at the place of the block's last layer, behind its resnet and its attention, if it has one
    if part == "upsamplers":
        return f"output_blocks.{first + layers}.{1 + (match['block'] in attends)}.{rest}"
    down = match["side"] == "down"
    # place 0 of the way down is conv_in's
    place = f"input_blocks.{first + index + 1}" if down else f"output_blocks.{first + index}"
    return f"{place}.{int(part == 'attentions')}.{inside}"


def _layers(paths: Iterable[str]) -> int:
    """How many layers a block has: the first downsampler stands behind them, and else nothing."""
    places = {int(m[1]): m[2] for m in _down(paths)}
    ends = [place for place, kind in places.items() if kind == "op"]
    return min(ends, default=max(places, default=0) + 1) - 1


def _down(paths: Iterable[str]) -> "Iterator[re.Match[str]]":
    pattern = re.compile(r"input_blocks\.([1-9][0-9]{0,8})\.0\.([a-z]+)(?:[._].*)?", re.DOTALL)
    return (match for path in paths if (match := pattern.fullmatch(path)))


def _own(path: str, layers: int) -> Optional[str]:
    match = _LISTED.fullmatch(path)
    if path in _SINGLE or match is None:
        return _SINGLE.get(path)
    inner, rest = int(match["inner"]), match["rest"]
    if match["list"] == "middle_block":
        part = "attentions.0" if inner == 1 else f"resnets.{inner // 2}"
        return f"mid_block.{part}.{_RESNET.get(rest, rest) if inner != 1 else rest}"
    down = match["list"] == "input_blocks"
    place = int(match["place"] or -1) - down
    if place < 0:
        return None
    side, (block, layer) = "down" if down else "up", divmod(place, layers + 1)
    if rest in ("op", "conv"):
        return f"{side}_blocks.{block}.{side}samplers.0.conv"
    if inner:
        return f"{side}_blocks.{block}.attentions.{layer}.{rest}"
    return f"{side}_blocks.{block}.resnets.{layer}.{_RESNET.get(rest, rest)}"


TABLE = Table({}, pairs)
