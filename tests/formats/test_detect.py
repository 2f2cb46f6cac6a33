"""Which tool wrote a file, told by its content."""

import pytest
import torch

from paramlora import formats
from paramlora.errors import FileError
from paramlora.formats import Content
from tests.formats.linears import adapter, read, same


def test_names_are_told_by_content():
    for name in formats.WRITERS:
        content = formats.write(adapter(scales=(1.0,) * 3), name)
        told = formats.FORMATS[name].like or name
        assert formats.detect(Content(content.state, content.metadata)) in (told, "loralib")
    for outer in ("state_dict", "model"):
        state = formats.write(adapter(), "original").state
        nested = Content({f"{outer}.{key}": value for key, value in state.items()})
        same(read(nested), adapter())


@pytest.mark.parametrize(
    "key, text",
    [
        ("head.weight", "no adapter format that is known. Its first keys: head.weight"),
        ("head.parametrizations.weight.0.lora_A", "use paramlora extract"),
        ("head.w_lora_A", "a file of LoRA-Torch, which is not read"),
    ],
)
def test_what_is_no_adapter_file(key, text):
    with pytest.raises(FileError, match=text):
        formats.read(Content({key: torch.ones(2, 2)}))
