"""The two functions of peft's that scripts save and load by, for an attached model."""

import pytest
import torch

import paramlora
from paramlora.integrations.peft import get_peft_model_state_dict, set_peft_model_state_dict

peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")
LAYERS = ["to_k", "to_q", "to_v", "to_out.0", "conv1"]


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=6,
        attention_head_dim=2,
        norm_num_groups=2,
    )


def attached(seed, **entry):
    model = paramlora.attach(unet(), {name: {"r": 2, **entry} for name in LAYERS})
    torch.manual_seed(seed)
    for parameter in paramlora.trainable_parameters(model):
        torch.nn.init.normal_(parameter)
    return model


def test_the_state_is_peft_own():
    theirs = unet()
    theirs.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=LAYERS))
    want = peft.utils.get_peft_model_state_dict(theirs)
    model = attached(1)
    state = get_peft_model_state_dict(model)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in want.items()}
    told = peft.utils.set_peft_model_state_dict(theirs, state)
    assert not told.unexpected_keys
    model, theirs = model.double(), theirs.double()
    x, t, c = torch.randn(1, 4, 8, 8).double(), 3, torch.randn(1, 5, 6).double()
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, c).sample, theirs(x, t, c).sample)


def test_it_comes_back_to_the_last_bit_or_not_at_all():
    model, other = attached(1), attached(2)
    state = get_peft_model_state_dict(model)
    set_peft_model_state_dict(other, state)
    want, got = paramlora.adapter_state_dict(model), paramlora.adapter_state_dict(other)
    assert want.keys() == got.keys() and all(torch.equal(want[k], got[k]) for k in want)
    fresh = attached(2)
    before = {k: v.clone() for k, v in paramlora.adapter_state_dict(fresh).items()}
    for broken in ("conv1.lora_A.weight", "to_q.lora_B.weight"):
        without = {k: v for k, v in state.items() if not k.endswith(broken)}
        with pytest.raises(paramlora.FileError):
            set_peft_model_state_dict(fresh, without)
    now = paramlora.adapter_state_dict(fresh)
    assert all(torch.equal(before[k], now[k]) for k in before)


def test_a_scale_that_it_could_not_tell_is_refused():
    with pytest.raises(paramlora.FileError, match="has the scale 2, which a state dict of peft's"):
        get_peft_model_state_dict(attached(1, alpha=4))
    with pytest.raises(paramlora.AdapterError, match='no adapter "other"'):
        get_peft_model_state_dict(attached(1), "other")
