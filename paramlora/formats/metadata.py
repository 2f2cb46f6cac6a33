"""What a file says beside its tensors, kept on the way to another tool's file."""

import re
from collections.abc import Mapping
from dataclasses import replace

from paramlora.formats.content import Content, report
from paramlora.formats.format import Format

# of a header: what describes the file's own layout, and hashes that are true of it alone
_OWN = re.compile(
    r"format|paramlora\w*|lora_adapter_metadata|ss_network_(?:dim|alpha|module)"
    r"|sshs_\w*hash|modelspec\.hash_\w+|.*:[0-9]+:rank",
    re.DOTALL,
)
# of PEFT's configuration: what says nothing of the updates, and is needed to find their model
_OF_PEFT = ("task_type", "base_model_name_or_path", "revision")


def kept(content: Content) -> dict[str, str]:
    """What a file says that is as true of its adapter in another file."""
    told = {key: text for key, text in content.metadata.items() if not _OWN.fullmatch(key)}
    for key in _OF_PEFT:
        value = content.config.get(key)
        if isinstance(value, str):
            told[key] = value
    return told


def placed(content: Content, metadata: Mapping[str, str], form: Format) -> Content:
    """A file to be written, with what its adapter's file said where it has a place for that.

    A safetensors header has one for any text. A warning names what has none.
    """
    config = {key: metadata[key] for key in content.config if key in metadata and key in _OF_PEFT}
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
