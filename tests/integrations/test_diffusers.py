"""diffusers' models: saving them attached, and what it does to save memory."""

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

import paramlora
from paramlora.model.attach import updates

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
LINEAR = {"to_q": {"r": 2, "scale": 0.7}, "to_out.0": {"r": 3}}
SOFT = {"to_q": {"r": 2, "hard": 0}, "conv1": {"r": 2, "hard": 0}}
BOTH = {"to_q": {"r": 2}, "conv1": {"r": 2}}

# tensors that a file brings lie at other addresses, from which some processors sum in another order
NEAR = dict(rtol=1e-4, atol=1e-6)


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=4,
    ).eval()


def outputs(model, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, 8, 8, generator=generator).to(dtype)
    text = torch.randn(1, 3, 8, generator=generator).to(dtype)
    with torch.no_grad():
        return model(x, 1, text).sample


def fill(model):
    generator = torch.Generator().manual_seed(3)
    for _, _, update in updates(model):
        value = update.lora_B
        value.data += 0.3 * torch.randn(value.shape, generator=generator)
    return model


def attached(config):
    return fill(paramlora.attach(unet(), config))


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


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("config", (BOTH, SOFT))
@pytest.mark.filterwarnings("ignore")
def test_under_layerwise_casting_the_factors_keep_their_type(config, dtype):
    stored = torch.float8_e4m3fn
    model = fill(paramlora.attach(unet().to(dtype), config))
    factors = {n: p.clone() for n, p in model.named_parameters() if "lora" in n}
    model.enable_layerwise_casting(stored, dtype)
    got = outputs(model, dtype)
    assert model.down_blocks[0].resnets[0].conv2.weight.dtype == stored
    # the reference: the same factors on a base that was rounded once
    plain = unet().to(dtype)
    plain.enable_layerwise_casting(stored, dtype)
    rounded = unet().to(dtype)
    with torch.no_grad():
        for parameter, narrow in zip(rounded.parameters(), plain.parameters()):
            parameter.copy_(narrow.to(dtype))
    fill(paramlora.attach(rounded, config))
    if (
        config is SOFT
    ):  # beside a forward that is somebody's, as casting's, the output stays rounded
        for layer in rounded.modules():
            layer.forward = layer.forward
    want = outputs(rounded, dtype)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    for _ in range(2):
        after = {n: p for n, p in model.named_parameters() if "lora" in n}
        assert {p.dtype for p in after.values()} == {torch.float32}
        assert all(torch.equal(value, after[name]) for name, value in factors.items())
        assert torch.equal(outputs(model, dtype), got)


@pytest.mark.filterwarnings("ignore")
def test_attached_under_layerwise_casting():
    model = unet()
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    model.to(torch.float8_e4m3fn)
    with pytest.raises(paramlora.TargetError, match="float8_e4m3fn: a hard update needs one of"):
        paramlora.attach(model, BOTH)
    model = unet().to(torch.bfloat16)
    other = fill(paramlora.attach(copy.deepcopy(model), SOFT))
    for one in (model, other):
        one.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    fill(paramlora.attach(model, SOFT))
    for (_, _, a), (_, _, b) in zip(updates(model), updates(other)):
        a.load_plain(b.plain())
    want = outputs(other, torch.bfloat16)
    torch.testing.assert_close(outputs(model, torch.bfloat16), want, rtol=0, atol=0)
    assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {torch.float32}


@pytest.mark.parametrize("kind", ("block_level", "leaf_level"))
@pytest.mark.parametrize("config", (BOTH, SOFT))
def test_group_offloading(config, kind):
    model = attached(config)
    want, cpu = outputs(model), torch.device("cpu")
    model.enable_group_offload(cpu, cpu, offload_type=kind, num_blocks_per_group=1)
    assert torch.equal(outputs(model), want)


@pytest.mark.parametrize("config", (BOTH, SOFT))
def test_accelerates_offloading_is_told_of_the_updates(config):
    accelerate = pytest.importorskip("accelerate")
    model, cpu = attached(config), torch.device("cpu")
    want = outputs(model)
    moved, _ = accelerate.cpu_offload_with_hook(copy.deepcopy(model), cpu)
    assert torch.equal(outputs(moved), want)
    with pytest.raises(paramlora.AdapterError, match="cannot keep an update elsewhere between"):
        accelerate.cpu_offload(model, cpu)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(outputs(model), want)
    accelerate.cpu_offload(paramlora.merge(model), cpu)
    torch.testing.assert_close(outputs(model), want, rtol=1e-4, atol=1e-4)
