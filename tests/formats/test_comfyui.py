"""Files for ComfyUI: what its own rule of names and formula make of them."""

import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import paramlora
from paramlora import files, formats
from paramlora.errors import FileError
from paramlora.formats import Content, Slot
from paramlora.update.value import Adapter, Update
from tests.formats.architectures import (
    ARCHITECTURES,
    clip,
    delta,
    file_of,
    originals_of,
    pairs_of,
    slots_of,
    through,
)
from tests.formats.test_names import single

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


def loaded(state):
    """What ComfyUI's LoRAAdapter makes of each stem: ``alpha / r · up · down``, flattened."""
    found = {}
    for key, up in state.items():
        if key.endswith(".lora_B.weight"):
            stem = key.removesuffix(".lora_B.weight")
            down = state[f"{stem}.lora_A.weight"]
            scale = state[f"{stem}.alpha"].item() / down.shape[0]
            found[stem] = scale * up.flatten(1).double() @ down.flatten(1).double()
    assert set(state) == {
        f"{n}.{e}" for n in found for e in ("lora_A.weight", "lora_B.weight", "alpha")
    }
    return found


def in_comfyui(architecture, name):
    """What ComfyUI's ``process_unet_state_dict`` of HunyuanVideo makes of a published name."""
    if architecture != "hunyuan video":
        return name
    name = re.sub(r"^(txt_in\.t_embedder|\w+_in)\.mlp\.(0|2)$", r"\1.L\2", name)
    name = re.sub(r"(c_embedder)\.linear_([12])$", lambda m: f"{m[1]}.L{2 * int(m[2]) - 2}", name)
    name = name.replace(".L0", ".in_layer").replace(".L2", ".out_layer")
    name = re.sub(r"(mlp)\.fc([12])$", lambda m: f"{m[1]}.{2 * int(m[2]) - 2}", name)
    name = re.sub(r"_attn_(qkv|proj)$", r"_attn.\1", name)
    return re.sub(r"(_mod|\.modulation)\.linear$", r"\1.lin", name)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_comfyui_has_every_denoiser_under_its_published_names(name):
    """diffusers' converter makes the model's own update of what ComfyUI loads."""
    case = ARCHITECTURES[name]
    slots = slots_of(case)
    factors = pairs_of({path: slot.shape[0] for path, slot in slots.items()})
    ours = formats.read(file_of(factors, ""), slots)
    content = formats.write(ours, "comfyui", slots)
    there = loaded(content.state)
    published = {f"diffusion_model.{in_comfyui(name, n)}": n for n in originals_of(case, slots)}
    assert published.keys() == there.keys()
    converted = through(case, {published[n]: d for n, d in there.items()})
    for path, dense in converted.items():
        torch.testing.assert_close(dense, delta(factors[path], 2.0), rtol=1e-12, atol=1e-12)
    assert converted.keys() == factors.keys()
    formats.check_loads(content, ours, "comfyui", slots)


def chosen(model, ends):
    torch.manual_seed(0)
    found = {}
    for path, slot in formats.base_of(model).items():
        if path.endswith(ends):
            fan_in = math.prod(slot.shape[1:])
            a, b = torch.randn(2, fan_in), torch.randn(slot.shape[0], 2)
            found[path] = Update(a, b, 0.7, slot.shape, kind=slot.kind)
    return found


def unet():
    return diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8), layers_per_block=1, cross_attention_dim=6, norm_num_groups=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=2,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def test_a_u_net_without_its_model_keeps_the_names_that_comfyui_knows_mangled():
    """``unet_to_diffusers`` and ``lora_unet_``, of Linear and convolutions."""
    updates = chosen(unet(), ("to_q", "to_out.0", "conv1"))
    for start in ("", "unet."):
        adapter = Adapter({f"{start}{path}": update for path, update in updates.items()})
        there = loaded(formats.write(adapter, "comfyui").state)
        assert there.keys() == {f"lora_unet_{path.replace('.', '_')}" for path in updates}
        for path, update in updates.items():
            want = 0.7 * update.lora_B.double() @ update.lora_A.double()
            torch.testing.assert_close(there[f"lora_unet_{path.replace('.', '_')}"], want)


def test_text_encoders_have_transformers_names_behind_comfyuis():
    """CLIP-L, CLIP-G and T5 of a pipeline; with the model and without."""
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(d_model=6, d_kv=3, d_ff=8, num_layers=2, num_heads=2, vocab_size=9)
    )
    models = {"text_encoder": clip(), "text_encoder_2": clip(), "text_encoder_3": t5}
    ends = ("q_proj", "fc1", "SelfAttention.q")
    found = {name: chosen(model, ends) for name, model in models.items()}
    adapter = Adapter({f"{n}.{p}": u for n, own in found.items() for p, u in own.items()})
    base = {f"{n}.{p}": s for n, m in models.items() for p, s in formats.base_of(m).items()}
    names = set()
    for i in range(2):
        for which in "lg":
            stem = f"text_encoders.clip_{which}.transformer.text_model.encoder.layers.{i}"
            names |= {f"{stem}.self_attn.q_proj", f"{stem}.mlp.fc1"}
        names.add(f"text_encoders.t5xxl.transformer.encoder.block.{i}.layer.0.SelfAttention.q")
    for known in (None, base):
        content = formats.write(adapter, "comfyui", known)
        assert loaded(content.state).keys() == names
    formats.check_loads(content, adapter, "comfyui", base)
    wide = {"text_encoder.encoder.layers.0.mlp.fc1": Slot((4096, 1024), "matrix", "linear")}
    one = {
        path: Update(torch.ones(1, 1024), torch.ones(4096, 1), 1.0, (4096, 1024)) for path in wide
    }
    (stem,) = loaded(formats.write(Adapter(one), "comfyui", wide).state)
    assert stem == "text_encoders.clip_h.transformer.text_model.encoder.layers.0.mlp.fc1"


def test_an_open_clip_checkpoint_gives_comfyui_its_parts():
    """``in_proj_weight`` is q, k and v there; and diffusers' converter agrees."""
    start = "conditioner.embedders.1.model."
    shapes = {f"{start}text_projection": (6, 6), f"{start}token_embedding.weight": (9, 6)}
    for i in range(2):
        stem = f"{start}transformer.resblocks.{i}"
        shapes |= {f"{stem}.attn.in_proj_weight": (18, 6), f"{stem}.attn.out_proj.weight": (6, 6)}
        shapes |= {f"{stem}.mlp.c_fc.weight": (6, 6), f"{stem}.mlp.c_proj.weight": (6, 6)}
    base = formats.base_of_shapes(shapes)
    factors = {
        path.removesuffix(".weight"): f
        for path, f in pairs_of({p: s[0] for p, s in shapes.items() if "resblocks" in p}).items()
    }
    updates = {p: Update(a, b, 0.5, tuple(base[p].shape)) for p, (a, b) in factors.items()}
    content = formats.write(Adapter(updates), "comfyui", base)
    there = loaded(content.state)
    level = "text_encoders.clip_g.transformer."
    whole = {k: torch.zeros(s).double() for k, s in shapes.items()}
    whole |= {k: delta(f, 0.5) for k, f in factors.items() if k in whole}
    whole |= {f"{p}.weight": delta(f, 0.5) for p, f in factors.items() if p not in whole}
    theirs = single.convert_open_clip_checkpoint(clip(), whole, prefix=start)
    want = {f"{level}{k.removesuffix('.weight')}": t for k, t in theirs.items() if "layers" in k}
    want = {name: t for name, t in want.items() if t.dim() == 2}
    assert there.keys() == want.keys() and len(want) == 12
    for name, dense in there.items():
        torch.testing.assert_close(dense, want[name], rtol=1e-12, atol=1e-12)


def test_a_language_model_as_text_encoder_needs_its_name_there():
    config = transformers.Qwen2Config(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=9,
    )  # fmt: skip
    model = transformers.Qwen2Model(config)
    adapter = Adapter(chosen(model, ("q_proj",)))
    prefix = "text_encoders.qwen25_7b.transformer"
    content = formats.write(adapter, "comfyui", formats.base_of(model), prefix=prefix)
    assert list(loaded(content.state)) == [f"{prefix}.model.layers.0.self_attn.q_proj"]
    with pytest.raises(
        FileError, match='"qwen" is no model in ComfyUI, .* Prefixes: diffusion_mod'
    ):
        formats.write(adapter, "comfyui", formats.base_of(model), prefix="qwen")


def refused():
    one = Update(torch.ones(1, 6), torch.ones(4, 1), 1.0, (4, 6), kind="linear")
    yield {"encoder.layers.0.mlp.fc1": one}, "a text encoder, .* prefix .--prefix.: text_encoders"
    yield {"transformer_blocks.0.attn.to_q": one}, "published checkpoint. Give the model .--model."
    rank3 = Update(torch.ones(3, 1, 6), torch.ones(3, 4, 1), 1.0, (3, 4, 6), "stack")
    yield {"x.experts": rank3}, r"diffusion_model.x.experts: a stack of shape \[3, 4, 6\]; ComfyUI"


@pytest.mark.parametrize("updates, text", list(refused()))
def test_what_comfyui_would_load_nothing_of_is_refused(updates, text):
    with pytest.raises(FileError, match=text):
        formats.write(Adapter(updates), "comfyui")


def test_a_dora_that_comfyui_computes_in_another_way_is_refused():
    state = {"q.lora_down.weight": torch.ones(1, 6), "q.lora_up.weight": torch.ones(4, 1)}
    base = {"q": Slot((4, 6), "matrix", "linear")}
    for magnitude, told in ((torch.ones(4, 1), "a DoRA of each output"), (torch.ones(1, 6), "")):
        dora = formats.read(Content({**state, "q.dora_scale": magnitude}), base)
        if told:
            with pytest.raises(FileError, match=told):
                formats.write(dora, "comfyui", base)
        else:
            written = formats.write(dora, "comfyui", base).state
            assert torch.equal(written["diffusion_model.q.dora_scale"], magnitude)


def test_products_keep_their_kind():
    torch.manual_seed(0)
    state = {"q.hada_w1_a": torch.randn(4, 2), "q.hada_w1_b": torch.randn(2, 6)}
    state |= {"q.hada_w2_a": torch.randn(4, 2), "q.hada_w2_b": torch.randn(2, 6)}
    base = {"q": Slot((4, 6), "matrix", "linear")}
    adapter = formats.read(Content({**state, "q.alpha": torch.tensor(1.0)}), base)
    written = formats.write(adapter, "comfyui", base)
    for key, tensor in state.items():
        assert torch.equal(written.state[f"diffusion_model.{key}"], tensor)
    assert written.state["diffusion_model.q.alpha"] == 1.0
    formats.check_loads(written, adapter, "comfyui", base)


# the command line


def test_the_command_line_writes_both(tmp_path, capsys):
    pytest.importorskip("typer")
    from paramlora.cli import main

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        return stop.value.code, capsys.readouterr().err

    model = ARCHITECTURES["flux"].make()
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "flux.safetensors")
    adapter = Adapter(chosen(model, ("to_q", "to_k", "to_v", "to_out.0")))
    files.write_adapter(adapter, tmp_path / "style.safetensors", "diffusers")
    order = ("convert", tmp_path / "style.safetensors", "-o", tmp_path / "comfy.safetensors")
    code, err = run(*order, "--to", "comfyui")
    assert code == 2 and "Give the model (--model), or its checkpoint as base" in err
    code, err = run(*order, "--to", "comfyui", "--base", tmp_path / "flux.safetensors")
    assert code == 0 and err.startswith("converted ") and err.endswith("as comfyui\n")
    names = set(loaded(load_file(tmp_path / "comfy.safetensors")))
    assert "diffusion_model.double_blocks.0.img_attn.qkv" in names
    order = ("convert", tmp_path / "style.safetensors", "-o", tmp_path / "out", "--to", "vllm")
    code, err = run(*order)
    assert code == 0 and err.endswith("as vllm\n")
    back = files.read_adapter(tmp_path / "out").updates
    assert len(back) == len(adapter.updates)
    paramlora.load_adapter(ARCHITECTURES["flux"].make(), tmp_path / "comfy.safetensors")
