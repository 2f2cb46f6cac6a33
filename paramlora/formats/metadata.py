"""What a file says beside its tensors, kept on the way to another tool's file."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from paramlora.formats.content import Content, parsed, report
from paramlora.formats.format import Format

# of a header: what describes the file's own layout, and hashes that are true of it alone
_OWN = re.compile(
    r"format|paramlora\w*|lora_adapter_metadata|ss_network_(?:dim|alpha|module)"
    r"|sshs_\w*hash|modelspec\.hash_\w+|.*:[0-9]+:rank"
    r"|(?:\w+\.)?(?:lora_alpha|alpha|ss_network_alpha)",  # each format has its own place for it
    re.DOTALL,
)
# of PEFT's configuration: what says nothing of the updates, and is needed to find their model
_OF_PEFT = ("task_type", "base_model_name_or_path", "revision")
_DROPOUT = "lora_dropout"  # of training, which peft has in the same place
_SHARE = re.compile(r"0\.[0-9]{1,20}|[0-9](?:\.[0-9]{1,20})?e-[0-9]{1,2}")
METADATA = "lora_adapter_metadata"  # has PEFT's configuration, under the names of components


def kept(content: Content) -> dict[str, str]:
    """What a file says that is as true of its adapter in another file."""
    told = {key: text for key, text in content.metadata.items() if not _OWN.fullmatch(key)}
    config = _config(content)
    for key in _OF_PEFT:
        if isinstance(config.get(key), str):
            told[key] = config[key]
    dropout = config.get(_DROPOUT)
    if isinstance(dropout, float) and 0 < dropout < 1:
        told[_DROPOUT] = repr(dropout)
    return told


def _config(content: Content) -> Mapping[str, Any]:
    """PEFT's configuration beside a file, or what all components in diffusers' header have."""
    if content.config or METADATA not in content.metadata:
        return content.config
    found: dict[str, set[Any]] = {}
    for key, value in parsed(content.metadata[METADATA], content.source).items():
        name = key.rpartition(".")[2]
        if name in (*_OF_PEFT, _DROPOUT) and isinstance(value, (str, float)):
            found.setdefault(name, set()).add(value)
    # where components differ, none speaks for the whole file
    return {name: values.pop() for name, values in found.items() if len(values) == 1}


def placed(content: Content, metadata: Mapping[str, str], form: Format) -> Content:
    """A file to be written, with what its adapter's file said where it has a place for that.

    A safetensors header has one for any text. A warning names what has none.
    """
    known = content.config.keys() & metadata.keys()
    config: dict[str, Any] = {key: metadata[key] for key in _OF_PEFT if key in known}
    if _DROPOUT in known and not content.config.get("target_parameters"):  # which have none there
        config[_DROPOUT] = _share(metadata[_DROPOUT], content.config[_DROPOUT])
    rest = {key: text for key, text in metadata.items() if key not in config}
    if form.pickled:
        report(
            "adapter",
            f"{form.name}'s files have no place for what is said beside the tensors",
            rest,
            False,
            "It was left out; the native format keeps it.",
        )
        rest = {}
    return replace(
        content,
        metadata={**rest, **content.metadata},
        config={**content.config, **config},
    )


def _share(text: str, usual: float) -> float:
    """A probability out of a header that anyone may have written."""
    return float(text) if _SHARE.fullmatch(text) else usual
