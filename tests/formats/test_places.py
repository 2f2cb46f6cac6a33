"""Where in a model the weight lies that a file names."""

import pytest
import torch
from diffusers.loaders import single_file_utils as single

from paramlora import formats
from paramlora.errors import FileError
from paramlora.formats import Content, Slot
from tests.formats.architectures import clip, delta, file_of, pairs_of, same


def test_a_name_that_the_model_has_is_never_taken_apart():
    """What is spelled as the model has it is that, whatever else it could be."""
    slots = {name: Slot((4, 6), "matrix", "linear") for name in ("model.a", "a", "transformer.a")}
    for name in slots:
        state = file_of({name: (torch.randn(2, 6), torch.randn(4, 2))}, "")
        assert formats.read(state, slots).updates.keys() == {name}


def test_parts_of_a_pipeline_stay_apart():
    slots = {
        f"{start}encoder.layers.0.q": Slot((4, 6), "matrix", "linear")
        for start in ("conditioner.embedders.0.transformer.text_model.",
                      "conditioner.embedders.1.model.")
    }  # fmt: skip
    state = {}
    for name in ("lora_te1", "lora_te2"):
        one = {f"{name}_text_model_encoder_layers_0_q": (torch.randn(2, 6), torch.randn(4, 2))}
        state |= file_of(one, "").state
    found = formats.read(Content(state), slots).updates
    assert found.keys() == slots.keys()
    first = found["conditioner.embedders.0.transformer.text_model.encoder.layers.0.q"]
    stem = "lora_te1_text_model_encoder_layers_0_q"
    assert torch.equal(first.lora_A, state[f"{stem}.lora_A.weight"])
    with pytest.raises(FileError, match="means conditioner.*, which its name does not tell apart"):
        formats.read(
            file_of({"encoder.layers.0.q": (torch.ones(2, 6), torch.ones(4, 2))}, ""), slots
        )


def test_the_two_models_of_a_pipeline_are_told_by_its_component():
    """As Wan 2.2 has them: one of high and one of low noise."""
    slots = {"blocks.0.attn1.to_q": Slot((4, 6), "matrix", "linear")}
    factors = {
        f"{part}.blocks.0.self_attn.q": (torch.randn(2, 6), torch.randn(4, 2))
        for part in ("transformer", "transformer_2")
    }
    content = file_of(factors, "")
    with pytest.raises(FileError, match="second update of blocks.0.attn1.to_q. Choose one part"):
        formats.read(content, slots)
    for path, (a, _) in factors.items():
        component = path.partition(".")[0]
        found = formats.read(content, slots, formats.Options(component=component)).updates
        assert torch.equal(found["blocks.0.attn1.to_q"].lora_A, a)


@pytest.mark.parametrize("file", ["model.", "language_model.model.", "model.language_model.", ""])
@pytest.mark.parametrize("own", ["model.", "language_model.model.", "model.language_model."])
def test_a_language_model_beside_a_vision_tower(file, own):
    """As transformers' versions have named it; the tower's layers stay its own."""
    slots = {f"{start}layers.0.q_proj": Slot((4, 6)) for start in (own, "model.visual.")}
    factors = {f"base_model.model.{file}layers.0.q_proj": (torch.ones(3, 6), torch.ones(4, 3))}
    content = file_of({p[17:]: f for p, f in factors.items()}, "base_model.model.")
    assert formats.read(content, slots).updates.keys() == {f"{own}layers.0.q_proj"}


@pytest.mark.parametrize(
    "style", ["lora_te2_", "text_encoder_2.", "text_encoders.clip_g.transformer."]
)
def test_open_clips_projection_is_the_transpose_of_transformers(style):
    """Through diffusers' converter of the sum; the parameter is [in, out], the weight [out, in]."""
    start = "conditioner.embedders.1.model."
    shapes = {f"{start}text_projection": (6, 5)}
    shapes |= {f"{start}transformer.resblocks.0.mlp.c_fc.weight": (6, 6)}
    factors = pairs_of({"text_projection": 5})
    content = file_of({f"{style}text_projection": factors["text_projection"]}, "")
    found = formats.read(content, formats.base_of_shapes(shapes)).updates
    whole = {k: torch.zeros(s).double() for k, s in shapes.items()}
    assert list(found) == [f"{start}text_projection"]
    whole[f"{start}text_projection"] = found[f"{start}text_projection"].delta()
    theirs = single.convert_open_clip_checkpoint(clip(), whole, prefix=start)
    want = delta(factors["text_projection"], 2.0)
    torch.testing.assert_close(theirs["text_projection.weight"], want)
    own = {"text_encoder_2.text_projection": Slot((5, 6), "matrix", "linear")}
    same(
        formats.read(content, own).updates,
        {"text_encoder_2.text_projection": want},
    )
