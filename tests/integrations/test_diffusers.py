"""A sweep of diffusers' models: saving them attached."""

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("peft")


import paramlora
from tests.integrations.unets import BOTH, SOFT, attached, outputs, unet

diffusers = pytest.importorskip("diffusers")
LINEAR = {"to_q": {"r": 2, "scale": 0.7}, "to_out.0": {"r": 3}}

# tensors that a file brings lie at other addresses, from which some processors sum in another order
NEAR = dict(rtol=1e-4, atol=1e-6)


def saved(model, folder, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(folder, **options)
    ours = [str(w.message) for w in caught if w.category is paramlora.ParamloraWarning]
    return ours, {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("options", ({}, {"max_shard_size": "8KB"}, {"safe_serialization": False}))
@pytest.mark.parametrize("config", (LINEAR, SOFT, BOTH))
def test_base_and_adapter_are_saved_and_a_warning_names_the_call(config, options, tmp_path):
    model = attached(config)
    want, plain = outputs(model), outputs(paramlora.detach(copy.deepcopy(model)))
    (warned,), names = saved(model, tmp_path, **options)
    assert "pytorch_lora_weights.safetensors" in names
    path = tmp_path / "pytorch_lora_weights.safetensors"
    call = f'paramlora.load_adapter(model, "{path}")'
    assert warned == f"{tmp_path}: from_pretrained loads the base alone; then call {call}."
    load = dict(use_safetensors=options.get("safe_serialization", True))
    found = diffusers.UNet2DConditionModel.from_pretrained(tmp_path, **load).eval()
    torch.testing.assert_close(outputs(found), plain, **NEAR)
    other = copy.deepcopy(found)
    exec(call, {"paramlora": paramlora, "model": found})
    torch.testing.assert_close(outputs(found), want, rtol=1e-5, atol=1e-5)
    other.load_lora_adapter(str(tmp_path), weight_name=path.name, prefix=None)  # diffusers' own
    torch.testing.assert_close(outputs(other), want, rtol=1e-5, atol=1e-5)


def test_what_diffusers_cannot_hold_is_a_native_file(tmp_path):
    model = attached({**LINEAR, "conv_in": {"r": 2, "hard": 0, "up_kernel": "same"}})
    (warned,), names = saved(model, tmp_path)
    assert "adapter.safetensors" in names and "pytorch_lora_weights.safetensors" not in names
    found = diffusers.UNet2DConditionModel.from_pretrained(tmp_path).eval()
    exec(
        warned.partition("then call ")[2].removesuffix("."),
        {"paramlora": paramlora, "model": found},
    )
    torch.testing.assert_close(outputs(found), outputs(model), **NEAR)


@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_saves_its_attached_part(tmp_path):
    model = attached(LINEAR)
    pipe = diffusers.DDPMPipeline(model, diffusers.DDPMScheduler())
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "unet" / "pytorch_lora_weights.safetensors").exists()
    state = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert state.keys() == unet().state_dict().keys()
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
