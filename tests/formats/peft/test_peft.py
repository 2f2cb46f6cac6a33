"""What tells a folder of PEFT's from other tools' files of the same keys."""

import pytest
import torch

from paramlora.formats import Content, detect
from paramlora.formats.peft import FORMAT

ONE = torch.ones(1, 1)


@pytest.mark.parametrize(
    "key, config",
    [
        ("base_model.model.a.lora_A.weight", {}),
        ("a.lora_A.weight", {"peft_type": "LORA"}),
        ("wte.lora_embedding_A", {}),
        ("base_model.model.wte.token_adapter.trainable_tokens_delta", {}),
        ("base_model.model.a.hada_w1_a", {"peft_type": "LOHA"}),
        ("base_model.model.a.lokr_w1", {"peft_type": "LOKR"}),
    ],
)
def test_its_tensors_are_told_by_prefix_or_configuration(key, config):
    (mark,) = FORMAT.marks
    assert mark.fits(Content({key: ONE}, {}, config))
    assert detect(Content({key: ONE}, {}, config)) == "peft"


@pytest.mark.parametrize(
    "key", ["lora_unet_a.lora_down.weight", "a.lora_A", "transformer.a.lokr_w1"]
)
def test_the_same_names_without_either_are_another_tools(key):
    assert detect(Content({key: ONE})) != "peft"
