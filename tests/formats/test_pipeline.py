"""What is written is taken where it is loaded, under names that tools read."""

import pytest
import torch
from safetensors.torch import load_file

import paramlora
from paramlora import files
from paramlora.errors import FileError
from paramlora.formats import base_of
from paramlora.formats.pipeline import part_told
from paramlora.update.value import Adapter, Update

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(4, 8), layers_per_block=1, cross_attention_dim=6,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=2,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=2,
    )  # fmt: skip


def clip():
    torch.manual_seed(1)
    config = transformers.CLIPTextConfig(
        hidden_size=6, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=20, max_position_embeddings=8, projection_dim=6,
    )  # fmt: skip
    return transformers.CLIPTextModel(config)


def trained(model, config, path):
    paramlora.attach(model, config)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter)
    paramlora.save_adapter(model, path)
    return paramlora.merge(model)


@pytest.fixture
def both(tmp_path):
    """Adapters of a U-Net and of a text encoder, and the merged models."""
    one = trained(unet(), {"to_q": {"r": 2, "alpha": 3}, "conv1": {"r": 2}}, tmp_path / "unet.st")
    two = trained(clip(), {"q_proj": {"r": 2}, "fc1": {"r": 1}}, tmp_path / "text.st")
    return one, two


def pipe():
    return diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=clip(), tokenizer=None, unet=unet(), scheduler=None,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def equal(found, expected):
    there = {key.replace(".base_layer", ""): value for key, value in found.state_dict().items()}
    assert all((there[k] - v).abs().max() < 1e-5 for k, v in expected.state_dict().items())


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_a_pipeline_takes_a_file_written_without_more(both, tmp_path, to):
    files.convert(tmp_path / "unet.st", tmp_path / "out.safetensors", to)
    loaded = pipe()
    loaded.load_lora_weights(tmp_path, weight_name="out.safetensors")
    loaded.fuse_lora(components=["unet"])
    loaded.unload_lora_weights()
    equal(loaded.unet, both[0])


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_one_file_of_several_parts(both, tmp_path, to):
    whole = files.together({"unet": tmp_path / "unet.st", "text_encoder": tmp_path / "text.st"})
    files.write_adapter(whole, tmp_path / "one.safetensors", to)
    if to == "kohya":
        names = {key.split(".")[0] for key in load_file(tmp_path / "one.safetensors")}
        assert "lora_te_text_model_encoder_layers_0_mlp_fc1" in names
    loaded = pipe()
    loaded.load_lora_weights(tmp_path, weight_name="one.safetensors")
    parts = ["unet", "text_encoder"]
    if to == "kohya":  # diffusers 0.42 gives its text encoder names that transformers 5 lacks
        parts = ["unet"]
        path = tmp_path / "one.safetensors"
        again = paramlora.load_adapter(clip(), path, component="text_encoder")
        equal(paramlora.merge(again), both[1])
    loaded.fuse_lora(components=parts)
    loaded.unload_lora_weights()
    equal(loaded.unet, both[0])
    if to == "diffusers":
        equal(loaded.text_encoder, both[1])


def test_a_text_encoder_is_asked_for_its_place(both, tmp_path):
    for to in ("diffusers", "kohya"):
        with pytest.raises(FileError, match=r"a text encoder, .*\(--prefix\)"):
            files.convert(tmp_path / "text.st", tmp_path / "o.safetensors", to)
    files.convert(
        tmp_path / "text.st", tmp_path / "o.safetensors", "diffusers", component="text_encoder"
    )
    assert all(key.startswith("text_encoder.") for key in load_file(tmp_path / "o.safetensors"))


@pytest.mark.parametrize(("to", "how"), [
    ("kohya", {"prefix": "lora_unit"}), ("diffusers", {"component": "unit"}),
])  # fmt: skip
def test_a_prefix_that_no_tool_reads_is_refused(both, tmp_path, to, how):
    with pytest.raises(FileError, match='"(lora_)?unit".*(Prefixes|Parts): '):
        files.convert(tmp_path / "unet.st", tmp_path / "o.safetensors", to, **how)


def test_parts_are_told_by_a_class_where_names_tell_nothing():
    class TinyTransformer2DModel(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Linear(2, 2)

    assert part_told(["proj"], base_of(TinyTransformer2DModel())) == "transformer"
    assert part_told(["proj"], base_of(torch.nn.Sequential(torch.nn.Linear(2, 2)))) is None


def test_parts_that_are_none_are_refused(tmp_path):
    one = Adapter({"q": Update(torch.ones(1, 3), torch.ones(2, 1), shape=(2, 3))})
    with pytest.raises(FileError, match='"unit" is no part of a pipeline. Parts: decoder'):
        files.together({"unit": one})
    files.write_adapter(one, tmp_path / "k.safetensors", "kohya")
    with pytest.raises(FileError, match="names of layers cannot be read back without the model"):
        files.together({"unet": tmp_path / "k.safetensors"})
