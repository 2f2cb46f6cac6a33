"""A sweep of files as tools write them: onto a model here, and through diffusers' pipeline and
fuse_lora."""

import copy
import inspect
import logging
import warnings

import pytest
import torch

from paramlora import formats
from paramlora.formats import Content
from tests.formats.architectures import ARCHITECTURES, file_of

diffusers = pytest.importorskip("diffusers")

DOUBLE, SINGLE = "double_blocks.1", "single_blocks.1"
WAN = [f"blocks.{i}.{a}.{n}" for i in (0, 1) for a in ("self_attn", "cross_attn") for n in "qkvo"]
WAN += [f"blocks.{i}.ffn.{n}" for i in (0, 1) for n in (0, 2)]
QWEN = (
    "attn.to_q attn.to_out.0 attn.add_k_proj attn.to_add_out img_mlp.net.0.proj img_mod.1".split()
)
# of each file: the pipeline that reads it, the model, how it is spelled, and the names of layers
FILES = {
    "flux kohya": ("FluxPipeline", "flux", "kohya", [
        f"{DOUBLE}.img_attn.qkv", f"{DOUBLE}.txt_attn.qkv", f"{DOUBLE}.img_attn.proj",
        f"{DOUBLE}.txt_attn.proj", f"{DOUBLE}.img_mlp.0", f"{DOUBLE}.txt_mlp.2",
        f"{DOUBLE}.img_mod.lin", f"{SINGLE}.linear2", f"{SINGLE}.modulation.lin",
    ]),
    "flux comfyui": ("FluxPipeline", "flux", "diffusion_model.down", [
        f"{DOUBLE}.img_attn.qkv", f"{DOUBLE}.img_attn.proj", f"{DOUBLE}.txt_mod.lin",
    ]),
    "flux onetrainer": ("FluxPipeline", "flux", "lora_transformer", [
        "transformer_blocks.1.attn.to_q", "single_transformer_blocks.0.attn.to_v",
        "transformer_blocks.0.attn.to_out.0", "transformer_blocks.1.attn.add_k_proj",
    ]),
    "flux ai-toolkit": ("FluxPipeline", "flux", "transformer.", [
        "transformer_blocks.1.attn.to_q", "single_transformer_blocks.0.proj_out", "x_embedder",
    ]),
    "flux 2 kohya": ("Flux2Pipeline", "flux 2", "kohya", [
        f"{DOUBLE}.img_attn.qkv", f"{DOUBLE}.txt_attn.qkv", f"{DOUBLE}.img_attn.proj",
        f"{DOUBLE}.img_mlp.0", f"{SINGLE}.linear1", f"{SINGLE}.linear2", "img_in",
    ]),
    "wan musubi": ("WanPipeline", "wan", "kohya", WAN),
    "wan comfyui": ("WanPipeline", "wan", "diffusion_model.down", WAN),
    "z-image kohya": ("ZImagePipeline", "z-image", "kohya", [
        "layers.1.attention.to_q", "layers.0.attention.to_out.0", "layers.1.feed_forward.w1",
        "noise_refiner.0.attention.to_k", "context_refiner.0.feed_forward.w2",
    ]),
    "hunyuan video": ("HunyuanVideoPipeline", "hunyuan video", "diffusion_model.", [
        f"{DOUBLE}.img_attn_qkv", f"{DOUBLE}.txt_attn_qkv", f"{DOUBLE}.img_attn_proj",
        f"{DOUBLE}.txt_mlp.fc1", f"{SINGLE}.linear2",
    ]),
    "ltx": ("LTXPipeline", "ltx", "diffusion_model.", [
        "transformer_blocks.1.attn1.to_q", "transformer_blocks.0.ff.net.0.proj",
    ]),
    "qwen kohya": ("QwenImagePipeline", "qwen", "kohya", [
        f"transformer_blocks.{i}.{name}" for i in (0, 1) for name in QWEN
    ]),
    "qwen comfyui": ("QwenImagePipeline", "qwen", "diffusion_model.", [
        f"transformer_blocks.{i}.{name}" for i in (0, 1) for name in QWEN
    ]),
    "sd3": ("StableDiffusion3Pipeline", "sd3", "transformer.", ["transformer_blocks.1.attn.to_q"]),
    "chroma": ("ChromaPipeline", "chroma", "kohya", [
        f"{DOUBLE}.img_attn.qkv", f"{DOUBLE}.txt_attn.proj", f"{SINGLE}.linear2",
    ]),
    "aura flow": ("AuraFlowPipeline", "aura flow", "transformer.", [
        "joint_transformer_blocks.1.attn.to_q", "single_transformer_blocks.0.ff.linear_1",
    ]),
    "lumina 2": ("Lumina2Pipeline", "lumina 2", "transformer.", ["layers.0.attn.to_q"]),
}  # fmt: skip


def qwen():
    return diffusers.QwenImageTransformer2DModel(
        num_layers=2, attention_head_dim=8, num_attention_heads=2, in_channels=4, out_channels=4,
        joint_attention_dim=8, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip


def model_of(name):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that diffusers gives up
        return qwen() if name == "qwen" else ARCHITECTURES[name].make()


def content_of(model, style, names):
    """Random updates of these layers, whose sizes their parts in the model tell."""
    base = formats.base_of(model)
    places = formats.places_of(base)
    factors = {}
    torch.manual_seed(1)
    for name in names:
        there = places.find(name, name)
        rows = sum(base[path].shape[0] for path in there.paths)
        fan_in = torch.Size(base[there.paths[0]].shape[1:]).numel()
        factors[name] = (torch.randn(4, fan_in), torch.randn(rows, 4) / 4)
    if style == "lora_transformer":
        named = {f"lora_transformer_{n.replace('.', '_')}": f for n, f in factors.items()}
        state = file_of(named, "").state
        swap = {"lora_A": "lora_down", "lora_B": "lora_up"}
        return {k.replace(a, b): t for k, t in state.items() for a, b in swap.items() if a in k or (
            k.endswith("alpha") and a == "lora_A")}  # fmt: skip
    state = file_of(factors, style.removesuffix("down"), 2.0).state
    if style in ("transformer.", "diffusion_model."):  # for which diffusers asks no tensor
        state = {k: t for k, t in state.items() if not k.endswith(".alpha")}
    if style.endswith("down"):
        return {
            k.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t
            for k, t in state.items()
        }
    return state


@pytest.mark.parametrize("case", FILES)
def test_a_tools_file_does_what_it_does_in_its_pipeline(case, caplog):
    pipeline, name, style, names = FILES[case]
    model = model_of(name)
    state = dict(content_of(model, style, names))
    theirs, pipe = copy.deepcopy(model), getattr(diffusers, pipeline)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "diffusers"):
        warnings.simplefilter("ignore")
        wanted = inspect.signature(pipe.load_lora_into_transformer).parameters
        more = {"return_alphas": True} if "network_alphas" in wanted else {}
        found = pipe.lora_state_dict({key: t.clone() for key, t in state.items()}, **more)
        found, alphas = found if isinstance(found, tuple) else (found, None)
        more = {"network_alphas": alphas} if "network_alphas" in wanted else {}
        pipe.load_lora_into_transformer(found, transformer=theirs, **more)
        theirs.fuse_lora()
    weights = {n.replace(".base_layer", ""): p for n, p in theirs.named_parameters()}
    updates = formats.read(Content(state), formats.base_of(model)).updates
    changed = 0
    for path, weight in model.named_parameters():
        update = updates.get(path.removesuffix(".weight"))
        want = weight.double() if update is None else weight.double() + update.delta().double()
        torch.testing.assert_close(weights[path].double(), want, rtol=1e-5, atol=1e-6)
        changed += update is not None and bool((want - weight).abs().max() > 1e-3)
    assert changed == len(updates) >= len(names)
