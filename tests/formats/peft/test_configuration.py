"""What PEFT's ``adapter_config.json`` may say, and what is refused."""

import pytest

from paramlora import formats
from paramlora.errors import FileError
from paramlora.formats import Content
from tests.formats.linears import BASE, adapter


@pytest.mark.parametrize(
    "change, text",
    [
        ({"use_dora": True}, "use_dora, and no magnitude in the file of: "),
        ({"init_lora_weights": "pissa_niter_4"}, "which changed the base weights"),
        ({"peft_type": "OFT"}, 'peft_type "OFT"; only LORA, '),
        ({"alpha_pattern": {"[": 3}}, '"\\[" is no regular expression'),
        ({"lora_alpha": "much"}, "'much' is not a number"),
        ({"lora_alpha": None}, "null is not a number"),
    ],
)
def test_configurations_of_peft_that_are_refused(change, text):
    content = formats.write(adapter(), "peft", BASE)
    with pytest.raises(FileError, match=text):
        formats.read(Content(content.state, {}, {**content.config, **change}), BASE)
