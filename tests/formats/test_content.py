"""What every reader does: no tensor and no target is left out, and every value is a number."""

import math

import pytest
import torch

from paramlora import formats
from paramlora.errors import FileError, ParamloraWarning
from paramlora.formats import Content, Options, Slot
from tests.formats.linears import BASE, adapter, read, same


def test_every_tensor_is_accounted_for():
    content = formats.write(adapter(), "peft", BASE)
    extra = {**content.state, "base_model.model.head.modules_to_save.weight": torch.ones(2)}
    content = Content(extra, {}, content.config)
    with pytest.raises(FileError, match="no update of one weight: .*head.modules_to_save.weight"):
        formats.read(content, BASE)
    with pytest.warns(ParamloraWarning, match="modules_to_save"):
        same(formats.read(content, BASE, Options(strict=False)), adapter())


def test_a_target_without_tensors_and_an_update_without_a_layer():
    content = formats.write(adapter(), "peft", BASE)
    more = {**BASE, "other.head": Slot((3, 5), "matrix", "linear", 1)}
    with pytest.raises(FileError, match="targets without tensors: other.head"):
        formats.read(content, more)
    fewer = {path: slot for path, slot in BASE.items() if path != "head"}
    with pytest.raises(FileError, match="what the model does not have: head"):
        formats.read(content, fewer)
    with pytest.warns(ParamloraWarning, match="what the model does not have: head"):
        found = formats.read(content, fewer, Options(strict=False))
    assert set(found.updates) == set(fewer)


@pytest.mark.parametrize("name", sorted(formats.WRITERS))
def test_values_that_are_not_finite_or_all_zero(name):
    first = adapter(scales=(1.0, 1.0, 1.0))
    content = formats.write(first, name)
    key = next(k for k in content.state if "head" in k and not k.endswith(("alpha", "scale")))
    bad = Content({**content.state, key: content.state[key] * math.nan}, {}, content.config)
    with pytest.raises(FileError, match=r"not finite: (lora_unet_|diffusion_model.)?head.lora_A"):
        read(bad)
    zero = Content({**content.state, key: content.state[key] * 0}, {}, content.config)
    with pytest.warns(ParamloraWarning, match="all zero, so without effect: .*head"):
        formats.read(zero, BASE, Options(alpha=2.0))
