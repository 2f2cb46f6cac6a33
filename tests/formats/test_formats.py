"""Every format: which layers and parts it can hold, and what is refused."""

import warnings

import pytest
import torch

from paramlora import formats
from paramlora.errors import FileError, ParamloraWarning
from paramlora.formats import Slot
from paramlora.update.value import Adapter, Update
from tests.formats.linears import adapter, read, same

TOOLS = "comfyui diffusers kohya litgpt peft sglang torchtune vllm"


def kinds():
    """One update of each kind of layer, with the formats that hold it."""
    torch.manual_seed(0)
    a, b, e = torch.randn(2, 6), torch.randn(4, 2), torch.randn(3, 2, 6)
    yield Update(a, b, 0.7, (4, 6), kind="linear"), f"{TOOLS} original"
    yield Update(a, b, 0.7, (4, 3, 2), kind="convolution"), "comfyui diffusers peft"
    yield Update(a, b, 0.7, (4, 6, 1, 1), kind="convolution"), "comfyui diffusers kohya peft"
    yield Update(a, b, 0.7, (4, 6, 1, 1, 1), kind="convolution"), "comfyui diffusers peft"
    yield Update(a, b, 1.0, (6, 4), "transposed", kind="embedding"), "loralib peft sglang vllm"
    yield Update(a, b, 0.7, (6, 4), "transposed", kind="linear"), "peft sglang vllm"
    yield Update(a, b, 0.7, (6, 4, 1, 1), "transposed", kind="ConvTranspose2d"), ""
    yield Update(a, b, 0.7, (4, 6), kind="parameter"), "peft"
    yield Update(e, e.mT, 0.7, (3, 6, 6), "stack", kind="parameter"), "peft"
    yield Update(a, b, 0.7, (4, 2, 3), kind="Bilinear"), ""
    same_kernel = Update(a, b[..., None, None], 0.7, (4, 6, 1, 1), kind="convolution")
    yield Update(**{**same_kernel.__dict__, "hard": False, "up_kernel": "same"}), ""


@pytest.mark.parametrize("update, holds", list(kinds()))
@pytest.mark.parametrize("name", sorted(formats.WRITERS))
def test_a_layer_that_a_format_cannot_hold_is_named(update, holds, name):
    one = Adapter({"inner.layer": update})
    if name in holds.split():
        base = {"inner.layer": Slot(update.shape, update.layout, update.kind, update.groups)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ParamloraWarning)  # loralib's, for want of a scale
            same(formats.read(formats.write(one, name), base), one)
    else:
        with pytest.raises(FileError, match="inner.layer"):
            formats.write(one, name)


@pytest.mark.parametrize("name", sorted(formats.WRITERS))
def test_whole_tensors_are_never_left_out(name):
    more = Adapter(adapter(scales=(1.0,) * 3).updates, whole={"norm": torch.ones(3)})
    if formats.FORMATS[name].whole:
        content = formats.write(more, name)
        (held,) = (tensor for key, tensor in content.state.items() if "norm" in key)
        assert held is more.whole["norm"] and content.config["modules_to_save"] == ["norm"]
        return
    with pytest.raises(FileError, match="norm: whole tensors beside the updates"):
        formats.write(more, name)


@pytest.mark.parametrize("name", sorted(formats.WRITERS))
def test_an_adapter_without_updates_is_told(name):
    with pytest.raises(FileError, match="norm: whole tensors alone, .* Keep the native format"):
        formats.write(Adapter({}, whole={"norm": torch.ones(3)}), name)
    for empty in (name, formats.OWN):
        with pytest.raises(FileError, match="no updates, so a file would hold nothing"):
            formats.write(Adapter({}), empty)


@pytest.mark.parametrize("name", ["litgpt", "loralib", "torchtune"])
def test_a_scale_without_a_place_can_be_folded(name):
    first = adapter(scales=(0.7, 2.0, 1 / 3))
    found = read(formats.write(first, name, fold_scale=True))
    for path, update in first.updates.items():
        want = update.scale * update.lora_B.double() @ update.lora_A.double()
        assert found.updates[path].scale == 1.0
        torch.testing.assert_close(found.updates[path].delta().double(), want)
