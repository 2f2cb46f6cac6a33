"""diffusers' files: written here and loaded there, written there and read here, old spellings."""

import json
import logging

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import paramlora
from paramlora import formats
from paramlora.update.value import Adapter, Update

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

SCALES = {"to_q": 0.7, "to_out.0": 2.0, "conv1": 1 / 3, "proj_in": 1.5}
RANKS = {"to_q": 2, "to_out.0": 3, "conv1": 4, "proj_in": 2}


def unet(seed=0):
    torch.manual_seed(seed)
    net = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=6,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    return net.double().requires_grad_(False).eval()


def inputs():
    torch.manual_seed(9)
    return torch.randn(1, 4, 8, 8).double(), 3, torch.randn(1, 5, 6).double()


def answer(net):
    return net(*inputs()).sample


def adapter(net):
    torch.manual_seed(1)
    updates = {}
    for path, slot in formats.base_of(net).items():
        kind = next((k for k in SCALES if path.endswith(f".{k}")), None)
        if kind is not None:
            out, fan_in = slot.shape[0], torch.Size(slot.shape[1:]).numel()
            a, b = torch.randn(RANKS[kind], fan_in), torch.randn(out, RANKS[kind])
            updates[path] = Update(a.double(), b.double() / 4, SCALES[kind], slot.shape)
    return Adapter(updates)


def dense(net, adapter):
    for path, update in adapter.updates.items():
        weight = net.get_submodule(path).weight
        delta = torch.einsum("or,ri->oi", update.lora_B, update.lora_A) * update.scale
        weight.data += delta.reshape(weight.shape)
    return net


def close(a, b):
    assert (a - b).abs().max() <= 1e-6 * b.abs().max()


def saved(path, content):
    save_file(dict(content.state), path, dict(content.metadata))
    return path


def opened(path):
    with safe_open(path, "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}
        return formats.Content(state, file.metadata() or {})


@pytest.mark.parametrize("component", ["", "unet"])
def test_what_is_written_here_acts_in_diffusers(tmp_path, caplog, component):
    net = unet()
    ours = adapter(net)
    content = formats.write(ours, "diffusers", formats.base_of(net), component=component)
    saved(tmp_path / "pytorch_lora_weights.safetensors", content)
    want = answer(dense(unet(), ours))
    assert (want - answer(net)).abs().max() > 0.05
    if component:
        found, alphas, metadata = diffusers.StableDiffusionPipeline.lora_state_dict(
            tmp_path, unet_config=net.config, return_lora_metadata=True
        )
        diffusers.StableDiffusionPipeline.load_lora_into_unet(
            found, network_alphas=alphas, unet=net, metadata=metadata
        )
    else:
        net.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    close(answer(net.double()), want)
    # such as keys that were missing or left over
    loud = [r for r in caplog.records if r.name.startswith("diffusers.loaders")]
    assert not [r for r in loud if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("rslora", [False, True])
def test_what_diffusers_writes_acts_here(tmp_path, rslora):
    theirs = unet()
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=list(SCALES),
        rank_pattern={"conv1": 4},
        alpha_pattern={"to_q": 5},
        use_rslora=rslora,
        init_lora_weights=False,
    )
    torch.manual_seed(4)
    theirs.add_adapter(config)
    theirs.double()
    theirs.save_lora_adapter(tmp_path)
    base = formats.base_of(unet())
    found = formats.read(opened(tmp_path / "pytorch_lora_weights.safetensors"), base)
    close(answer(dense(unet(), found)), answer(theirs))
    # and the pipeline's form, where the component stands in front of keys and metadata
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path / "pipe",
        unet_lora_layers=peft.get_peft_model_state_dict(theirs),
        unet_lora_adapter_metadata=config.to_dict() | {"target_modules": list(SCALES)},
    )
    content = opened(tmp_path / "pipe" / "pytorch_lora_weights.safetensors")
    assert all(key.startswith("unet.") for key in content.state)
    again = formats.read(content, base)
    close(answer(dense(unet(), again)), answer(theirs))


def test_without_metadata_the_scale_is_1_as_in_diffusers(tmp_path):
    net = unet()
    ours = adapter(net)
    state = formats.write(ours, "diffusers", formats.base_of(net), component="").state
    save_file(dict(state), tmp_path / "pytorch_lora_weights.safetensors")
    net.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    found = formats.read(formats.Content(state), formats.base_of(unet()))
    assert {update.scale for update in found.updates.values()} == {1.0}
    close(answer(dense(unet(), found)), answer(net.double()))


def respelled(path, spelling):
    if spelling == "processor":  # 0.16
        owner, _, name = path.removesuffix(".0").rpartition(".")
        return f"{owner}.processor.{name}_lora"
    return f"{path}.{spelling}"


@pytest.mark.parametrize("start", ["", "unet."])
@pytest.mark.parametrize("spelling", ["processor", "lora", "lora_linear_layer"])
def test_older_spellings_act_as_in_diffusers(start, spelling):
    net = unet()
    updates = {
        path: update
        for path, update in adapter(net).updates.items()
        if spelling != "processor" or path.endswith(("to_q", "to_out.0"))
    }
    state = {}
    for path, update in updates.items():
        *_, kernel = update.shape[2:] or (0,)
        a = update.lora_A.reshape(update.r, *update.shape[1:])
        b = update.lora_B.reshape(*update.lora_B.shape, *([1, 1] if kernel else []))
        stem = f"{start}{respelled(path, spelling)}"
        state |= {f"{stem}.down.weight": a, f"{stem}.up.weight": b}
    content = formats.Content(state)
    assert formats.detect(content) == "diffusers"
    found = formats.read(content, formats.base_of(net))
    assert found.updates.keys() == updates.keys()
    want = answer(dense(unet(), found))
    if spelling == "lora" and start:  # what today's diffusers still reads itself
        alphas = None
        diffusers.StableDiffusionPipeline.load_lora_into_unet(state, alphas, unet=net)
        close(answer(net.double()), want)
    for path, update in updates.items():
        assert found.updates[path].scale == 1.0
        assert torch.equal(found.updates[path].lora_A, update.lora_A)


def test_the_older_text_encoder_names():
    a, b = torch.randn(2, 6), torch.randn(6, 2)
    stem = "text_encoder.text_model.encoder.layers.0.self_attn"
    state = {f"{stem}.to_out_lora.down.weight": a, f"{stem}.to_out_lora.up.weight": b}
    state |= {f"{stem}.q_proj.lora_linear_layer.down.weight": a}
    state |= {f"{stem}.q_proj.lora_linear_layer.up.weight": b}
    found = formats.read(formats.Content(state))
    assert set(found.updates) == {f"{stem}.out_proj", f"{stem}.q_proj"}


@pytest.mark.parametrize("component", ["", "unet"])
def test_a_target_without_tensors_is_reported(component):
    net = unet()
    content = formats.write(adapter(net), "diffusers", formats.base_of(net), component=component)
    state = {key: tensor for key, tensor in content.state.items() if ".mid_block." not in f".{key}"}
    with pytest.raises(paramlora.FileError, match="targets without tensors: mid_block.attentions"):
        formats.read(formats.Content(state, content.metadata), formats.base_of(net))


def test_a_flat_metadata_has_the_components_in_front(tmp_path):
    net = unet()
    content = formats.write(adapter(net), "diffusers", formats.base_of(net), component="unet")
    flat = json.loads(content.metadata["lora_adapter_metadata"])
    assert all(key.startswith("unet.") for key in flat) and flat["unet.peft_type"] == "LORA"
