"""What tools call the weights of each architecture, against diffusers' own converters."""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from safetensors.torch import save_file

from paramlora import formats
from paramlora.errors import FileError
from paramlora.files import adapters
from paramlora.formats import Content, Slot
from paramlora.formats.names import TABLES, Name
from paramlora.formats.parts import WITH, has_ratio, instance, parts_of
from paramlora.formats.places import Places

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
from diffusers.loaders import lora_conversion_utils as converters  # noqa: E402
from diffusers.loaders import single_file_utils as single  # noqa: E402


@dataclass(frozen=True)
class Architecture:
    """A tiny model of diffusers, and diffusers' reader of its original checkpoint.

    Args:
        make: the model; of its weights the names count.
        convert: of a whole original checkpoint.
        table: the name of its file.
        rows: how many rows a weight of such a name has, where the converter wants a number.
        skip: names of other tools, which the converter does not know.
    """

    make: Callable
    convert: Callable
    table: str
    rows: dict[str, int] = field(default_factory=dict)
    skip: str = "-"


def flux():
    return diffusers.FluxTransformer2DModel(
        num_layers=2, num_single_layers=2, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(1, 1, 2), in_channels=4,
        guidance_embeds=True,
    )  # fmt: skip


def chroma():
    return diffusers.ChromaTransformer2DModel(
        num_layers=2, num_single_layers=2, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(1, 1, 2), in_channels=4, approximator_layers=2,
        approximator_hidden_dim=8, approximator_num_channels=4,
    )  # fmt: skip


def flux_2():
    return diffusers.Flux2Transformer2DModel(
        num_layers=2, num_single_layers=2, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(1, 1, 1, 1), in_channels=4,
        timestep_guidance_channels=8,
    )  # fmt: skip


def wan():
    return diffusers.WanTransformer3DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4,
        text_dim=8, freq_dim=8, ffn_dim=16, image_dim=8, added_kv_proj_dim=16, rope_max_seq_len=8,
    )  # fmt: skip


def vace():
    return diffusers.WanVACETransformer3DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4,
        text_dim=8, freq_dim=8, ffn_dim=16, rope_max_seq_len=8, vace_layers=[0, 1],
        vace_in_channels=4,
    )  # fmt: skip


def z_image():
    return diffusers.ZImageTransformer2DModel(
        dim=16, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, in_channels=4,
        cap_feat_dim=8, axes_dims=[4, 2, 2], axes_lens=[8, 8, 8],
    )  # fmt: skip


def sd3():
    return diffusers.SD3Transformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=8, in_channels=4,
        out_channels=4, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip


def hunyuan_video():
    return diffusers.HunyuanVideoTransformer3DModel(
        num_layers=2, num_single_layers=2, num_refiner_layers=1, attention_head_dim=4,
        num_attention_heads=2, in_channels=4, out_channels=4, text_embed_dim=8,
        pooled_projection_dim=8, rope_axes_dim=(1, 1, 2),
    )  # fmt: skip


def ltx():
    return diffusers.LTXVideoTransformer3DModel(
        num_layers=2, attention_head_dim=4, num_attention_heads=2, in_channels=4, out_channels=4,
        cross_attention_dim=8, caption_channels=8,
    )  # fmt: skip


def ltx_2():
    return diffusers.LTX2VideoTransformer3DModel(
        num_layers=2, attention_head_dim=4, num_attention_heads=2, in_channels=4, out_channels=4,
        cross_attention_dim=8, caption_channels=8, audio_in_channels=4, audio_out_channels=4,
        audio_attention_head_dim=4, audio_num_attention_heads=2, audio_cross_attention_dim=8,
    )  # fmt: skip


def lumina_2():
    return diffusers.Lumina2Transformer2DModel(
        hidden_size=24, num_layers=2, num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1,
        in_channels=4, cap_feat_dim=8, multiple_of=8, axes_dim_rope=(4, 2, 2),
        axes_lens=(8, 8, 8),
    )  # fmt: skip


def aura_flow():
    return diffusers.AuraFlowTransformer2DModel(
        sample_size=8, num_mmdit_layers=2, num_single_dit_layers=2, attention_head_dim=4,
        num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=8, in_channels=4,
        out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip


class qwen_21(torch.nn.Module):
    """Its names alone."""

    def __init__(self):
        super().__init__()
        block = torch.nn.ModuleDict({"to_q": torch.nn.Linear(6, 6)})
        block["img_mlp"] = torch.nn.ModuleDict(
            {name: torch.nn.Linear(6, 12) for name in ("gate_layer", "proj")}
        )
        self.transformer_blocks = torch.nn.ModuleList([block])


def pixart():
    return diffusers.PixArtTransformer2DModel(
        sample_size=128, num_layers=2, attention_head_dim=4, num_attention_heads=2,
        cross_attention_dim=8, caption_channels=8, in_channels=4, out_channels=8,
    )  # fmt: skip


def unet(**more):
    sizes = {"sample_size": 8, "cross_attention_dim": 6, "attention_head_dim": 2}
    return diffusers.UNet2DConditionModel(norm_num_groups=2, layers_per_block=2, **sizes, **more)


def sd():
    return unet(
        block_out_channels=(4, 4, 8),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )


def sdxl():
    return unet(
        block_out_channels=(4, 8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=18,
    )


def unet_to_diffusers(make):
    """diffusers' converter, which asks the configuration for the blocks."""

    def convert(checkpoint):
        return single.convert_ldm_unet_checkpoint(
            {f"model.diffusion_model.{name}": tensor for name, tensor in checkpoint.items()},
            {**make().config, "num_class_embeds": None},
        )

    return convert


def pixart_to_diffusers(checkpoint):
    """As ComfyUI's ``pixart_to_diffusers`` cuts and names the weights."""
    basic = {
        "x_embedder.proj": "pos_embed.proj",
        "y_embedder.y_proj.fc": "caption_projection.linear_",
        "t_block.1": "adaln_single.linear",
        "final_layer.linear": "proj_out",
        "attn.proj": "attn1.to_out.0",
        "cross_attn.proj": "attn2.to_out.0",
        "cross_attn.q_linear": "attn2.to_q",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
    }
    for short, long in {"t": "timestep", "csize": "resolution", "ar": "aspect_ratio"}.items():
        for number in (0, 2):
            own = f"adaln_single.emb.{long}_embedder.linear_{1 + number // 2}"
            basic[f"{short}_embedder.mlp.{number}"] = own
    out = {}
    for key, value in checkpoint.items():
        start = re.match(r"blocks\.([0-9]+)\.", key)
        name = key[start.end() :] if start else key
        prefix = f"transformer_blocks.{start[1]}." if start else ""
        stem, _, end = name.rpartition(".")
        if stem == "attn.qkv":
            for part, own in zip(value.chunk(3), ("to_q", "to_k", "to_v")):
                out[f"{prefix}attn1.{own}.{end}"] = part
        elif stem == "cross_attn.kv_linear":
            for part, own in zip(value.chunk(2), ("to_k", "to_v")):
                out[f"{prefix}attn2.{own}.{end}"] = part
        else:
            fitting = max((k for k in basic if stem.startswith(k)), key=len)
            out[f"{prefix}{stem.replace(fitting, basic[fitting], 1)}.{end}"] = value
    return out


INNER = {r"single.*\.to_[qkv]": 3072, r".*proj_mlp": 12288}
XLABS = r".*(_lora.?|linear1_qkv)"
COMFY = (
    r"(time|guidance)_in\.(in|out)_layer|txt_in\.._embedder\.(in|out)_layer"
    r"|txt_in\.individual.*(self_attn\.(qkv|proj)|mlp\.[02])"
)
ARCHITECTURES = {
    "sd": Architecture(sd, unet_to_diffusers(sd), "stable_diffusion"),
    "sdxl": Architecture(sdxl, unet_to_diffusers(sdxl), "stable_diffusion"),
    "flux": Architecture(
        flux, single.convert_flux_transformer_checkpoint_to_diffusers, "flux", INNER, XLABS
    ),
    "chroma": Architecture(
        chroma, single.convert_chroma_transformer_checkpoint_to_diffusers, "flux", INNER, XLABS
    ),
    "flux 2": Architecture(
        flux_2, single.convert_flux2_transformer_checkpoint_to_diffusers, "flux_2"
    ),
    "wan": Architecture(wan, single.convert_wan_transformer_to_diffusers, "wan"),
    "vace": Architecture(vace, single.convert_wan_transformer_to_diffusers, "wan"),
    "z-image": Architecture(
        z_image, single.convert_z_image_transformer_checkpoint_to_diffusers, "z_image"
    ),
    "sd3": Architecture(
        sd3,
        single.convert_sd3_transformer_checkpoint_to_diffusers,
        "stable_diffusion_3",
        {r"transformer_blocks\.0\.norm1_context\.linear": 36},
    ),
    "hunyuan video": Architecture(
        hunyuan_video,
        single.convert_hunyuan_video_transformer_to_diffusers,
        "hunyuan_video",
        INNER,
        COMFY,
    ),
    "ltx": Architecture(ltx, single.convert_ltx_transformer_checkpoint_to_diffusers, "ltx"),
    "ltx 2": Architecture(ltx_2, single.convert_ltx2_transformer_to_diffusers, "ltx_2"),
    "qwen-image 2.1": Architecture(
        qwen_21, single.convert_qwen_image21_transformer_checkpoint_to_diffusers, "qwen_image"
    ),
    "lumina 2": Architecture(
        lumina_2,
        single.convert_lumina2_to_diffusers,
        "lumina_2",
        {r".*\.to_q": 2304, r".*\.to_[kv]": 768},
    ),
    "aura flow": Architecture(
        aura_flow, single.convert_auraflow_transformer_checkpoint_to_diffusers, "aura_flow"
    ),
    "pixart": Architecture(pixart, pixart_to_diffusers, "pixart"),
}


def slots_of(case):
    """The weights of the model, in float64, each with rows of its own and few columns."""
    with torch.device("meta"):
        names = [n for n, p in case.make().named_parameters() if n.endswith(".weight")]
    paths = [name.removesuffix(".weight") for name in names]
    found = {}
    for path in paths:
        rows = next((n for pattern, n in case.rows.items() if re.fullmatch(pattern, path)), 12)
        found[path] = Slot((rows, 6), "matrix", "linear")
    return found


def originals_of(case, slots):
    """``{original name: rows}`` that the model's weights come from; what has no other, as it is."""
    places = Places({path: slot.shape for path, slot in slots.items()})
    size = {path: slot.shape[0] for path, slot in slots.items()}
    known = [Name.parse(n.partition("@")[0]) for n in TABLES[case.table].spellings]
    found, covered = {}, set()
    for name, there in places.others.items():
        matches = [pattern.match(tuple(name.split("."))) for pattern in known]
        spelled = not known or any(m is not None and m[0] == 0 for m in matches)
        if not spelled or re.fullmatch(case.skip, name):
            continue
        found[name] = sum(size[path] for path in there.paths)
        covered |= set(there.paths)
    return found | {path: rows for path, rows in size.items() if path not in covered}


def pairs_of(rows, seed=0):
    torch.manual_seed(seed)
    return {
        name: (torch.randn(3, 6).double(), torch.randn(n, 3).double()) for name, n in rows.items()
    }


def through(case, deltas):
    """What diffusers makes of an original checkpoint of these weights."""
    biases = {f"{n}.bias": d.new_zeros(len(d)) for n, d in deltas.items() if ".scale" not in n}
    weights = {n if n.endswith(".scale") else f"{n}.weight": d for n, d in deltas.items()}
    converted = case.convert(Checkpoint(biases | weights))
    return {
        n.removesuffix(".weight"): d
        for n, d in converted.items()
        if d is not None and d.any() and not n.endswith(".bias")
    }


class Checkpoint(dict):
    """Tensors by name; what is no matrix may be missing."""

    def pop(self, key, *default):
        return super().pop(key, default[0] if default else torch.zeros(1))


def delta(factors, scale):
    return scale * factors[1] @ factors[0]


def spelled(name, style):
    if style == "kohya":
        return f"lora_unet_{name.replace('.', '_')}", ("lora_down", "lora_up")
    if style == "half mangled":
        first, _, rest = name.partition(".")
        return f"lora_unet_{first}_{rest}" if rest else f"lora_unet_{first}", (
            "lora_down",
            "lora_up",
        )
    if style.endswith("_"):
        return f"{style}{name.replace('.', '_')}", ("lora_down", "lora_up")
    return f"{style}{name}", ("lora_A", "lora_B")


def file_of(factors, style, alpha=6.0):
    state = {}
    for name, (a, b) in factors.items():
        stem, (down, up) = spelled(name, style)
        state |= {f"{stem}.{down}.weight": a, f"{stem}.{up}.weight": b}
        state[f"{stem}.alpha"] = torch.tensor(alpha)
    if style != "base_model.model.":
        return Content(state)
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": alpha}
    return Content({k: t for k, t in state.items() if not k.endswith(".alpha")}, config=config)


def same(found, want):
    assert found.keys() == want.keys()
    for path, update in found.items():
        torch.testing.assert_close(update.delta(), want[path], rtol=1e-12, atol=1e-12)


STYLES = ["kohya", "half mangled", "diffusion_model.", "", "transformer.", "_orig_mod.module."]
STYLES += ["base_model.model.", "lycoris_", "lora_transformer_", "lora_unet__"]
CASES = [(name, style) for name in ARCHITECTURES for style in ("kohya", "diffusion_model.")]
CASES += [
    (name, style) for name in ("flux", "wan") for style in STYLES if (name, style) not in CASES
]


@pytest.mark.parametrize("name, style", CASES)
def test_a_file_of_the_original_names_onto_diffusers_model(name, style):
    """Dense, in float64, through diffusers' own converter of the original weights."""
    case = ARCHITECTURES[name]
    slots = slots_of(case)
    factors = pairs_of(originals_of(case, slots))
    want = through(case, {n: delta(f, 2.0) for n, f in factors.items()})
    assert want.keys() == slots.keys()
    found = formats.read(file_of(factors, style), slots).updates
    same(found, want)


@pytest.mark.parametrize("name, style", CASES)
def test_a_file_of_diffusers_names_onto_the_original_model(name, style):
    """What it does to the original weights, diffusers' converter makes into the file's own."""
    case = ARCHITECTURES[name]
    slots = slots_of(case)
    rows = originals_of(case, slots)
    factors = pairs_of({path: slot.shape[0] for path, slot in slots.items()})
    base = formats.base_of_shapes({f"model.diffusion_model.{n}": (r, 6) for n, r in rows.items()})
    found = formats.read(file_of(factors, style), base).updates
    assert found.keys() == base.keys()
    deltas = {n.removeprefix("model.diffusion_model."): u.delta() for n, u in found.items()}
    want = {path: delta(f, 2.0) for path, f in factors.items()}
    converted = through(case, deltas)
    assert converted.keys() == want.keys()
    for path, dense in converted.items():
        torch.testing.assert_close(dense, want[path], rtol=1e-12, atol=1e-12)


def test_what_xlabs_writes_is_what_diffusers_reads_of_it():
    """Its single blocks have no feed-forward: onto the original it is some rows of linear1."""
    case, hidden = ARCHITECTURES["flux"], 12
    slots = slots_of(replace(case, rows={}))
    state, stems = {}, {}
    torch.manual_seed(1)
    for block, names in (("double", ("qkv_lora1", "qkv_lora2", "proj_lora1", "proj_lora2")),
                         ("single", ("qkv_lora", "proj_lora"))):  # fmt: skip
        for name in names:
            stem = f"{block}_blocks.1.processor.{name}"
            rows = 3 * hidden if "qkv" in name else hidden
            state[f"{stem}.down.weight"] = torch.randn(3, 6).double()
            state[f"{stem}.up.weight"] = torch.randn(rows, 3).double()
            stems[stem] = rows
    theirs = converters._convert_xlabs_flux_lora_to_diffusers(dict(state))
    want = products(theirs, "transformer.")
    assert formats.detect(Content(state)) == "diffusers"
    same(formats.read(Content(state), slots).updates, want)
    rows = originals_of(case, slots) | {"single_blocks.1.linear1": 3 * hidden + 30}
    base = formats.base_of_shapes({f"{n}.weight": (r, 6) for n, r in rows.items()})
    found = formats.read(Content(state), base).updates
    a, b = (state[f"single_blocks.1.processor.qkv_lora.{n}.weight"] for n in ("down", "up"))
    linear1 = found["single_blocks.1.linear1"]
    assert linear1.r == 3  # no more than the file has
    assert torch.equal(linear1.delta(), torch.cat([b @ a, torch.zeros(30, 6).double()]))
    assert len(found) == len(stems)


def products(state, start):
    """The dense update of each layer of a file without alphas, by diffusers' names."""
    found = {}
    for key, a in state.items():
        if ".lora_A." in key:
            path = key.removeprefix(start).partition(".lora_A.")[0]
            found[path] = state[key.replace(".lora_A.", ".lora_B.")] @ a
    return found


def clip():
    config = transformers.CLIPTextConfig(
        hidden_size=6, intermediate_size=6, num_attention_heads=2, num_hidden_layers=2,
        vocab_size=9, max_position_embeddings=7,
    )  # fmt: skip
    return transformers.CLIPTextModel(config)


def layers_of(model):
    """The Linear layers, of as many rows as columns."""
    base = formats.base_of(model)
    return {path: slot for path, slot in base.items() if slot.kind == "linear"}


@pytest.mark.parametrize(
    "style",
    [
        "lora_te_text_model_",
        "lora_te1_text_model_",
        "text_encoder.text_model.",
        "text_encoders.clip_l.transformer.text_model.",
        "cond_stage_model.transformer.text_model.",
    ],
)
def test_clip_under_every_tools_names(style):
    slots = layers_of(clip())
    factors = pairs_of({path: 6 for path in slots})
    mangled = {
        f"{style}{p.removeprefix('text_model.')}"
        if style.endswith(".")
        else f"{style}{p.removeprefix('text_model.').replace('.', '_')}": f
        for p, f in factors.items()
    }
    found = formats.read(file_of(mangled, ""), slots).updates
    same(found, {path: delta(f, 2.0) for path, f in factors.items()})


@pytest.mark.parametrize("start", ["cond_stage_model.model.", "conditioner.embedders.1.model."])
def test_clip_onto_a_checkpoint_of_open_clip(start):
    """q, k and v of one in_proj_weight, through diffusers' own converter of the sum."""
    model = clip()
    own = layers_of(model)
    shapes = {f"{start}text_projection": (6, 6)}
    for i in range(2):
        stem = f"{start}transformer.resblocks.{i}"
        shapes |= {f"{stem}.attn.in_proj_weight": (18, 6), f"{stem}.attn.out_proj.weight": (6, 6)}
        shapes |= {f"{stem}.mlp.c_fc.weight": (6, 6), f"{stem}.mlp.c_proj.weight": (6, 6)}
    factors = pairs_of({path: 6 for path in own})
    component = "te" if "cond" in start[:5] and "stage" in start else "te2"
    keys = {path: path.removeprefix("text_model.").replace(".", "_") for path in own}
    state = file_of({f"lora_{component}_text_model_{keys[p]}": f for p, f in factors.items()}, "")
    found = formats.read(state, formats.base_of_shapes(shapes)).updates
    whole = {k: torch.zeros(s).double() for k, s in shapes.items()}
    for path, update in found.items():
        key = f"{path}.weight" if f"{path}.weight" in whole else path
        whole[key] = update.delta()
    theirs = single.convert_open_clip_checkpoint(model, whole, prefix=start)
    for path, f in factors.items():
        stem = f"text_model.{path.removeprefix('text_model.')}.weight"
        torch.testing.assert_close(theirs[stem], delta(f, 2.0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "style", ["lora_te3_", "text_encoders.t5xxl.transformer.", "text_encoder_3.", "text_encoder_2."]
)
def test_t5_under_every_tools_names(style):
    sizes = {"d_model": 6, "d_kv": 3, "d_ff": 6, "num_layers": 2, "num_heads": 2, "vocab_size": 9}
    slots = layers_of(
        transformers.T5EncoderModel(transformers.T5Config(feed_forward_proj="gated-gelu", **sizes))
    )
    factors = pairs_of({path: 6 for path in slots})
    name = (lambda p: p) if style.endswith(".") else (lambda p: p.replace(".", "_"))
    found = formats.read(file_of({f"{style}{name(p)}": f for p, f in factors.items()}, ""), slots)
    same(found.updates, {path: delta(f, 2.0) for path, f in factors.items()})


PREFIXES = [
    "_orig_mod.",
    "module.",
    "base_model.model.",
    "_orig_mod.base_model.model.",
    "base_model.model._orig_mod.",
    "module.base_model.model.model.",
    "base_model.",
    "model.",
    "state_dict.module.",
    "model.diffusion_model.",
]


@pytest.mark.parametrize("start", PREFIXES)
@pytest.mark.parametrize("leaf", ["lora_{}.weight", "lora_{}.default.weight"])
def test_prefixes_that_are_no_part_of_a_path(start, leaf):
    """Alone and in stacks, an adapter's name in the keys or not, and one that the model has."""
    for inside in ("blocks.0.to_q", "model.blocks.0.to_q"):
        slots = {inside: Slot((4, 6), "matrix", "linear"), "blocks_0.to": Slot((4, 6))}
        a, b = torch.randn(2, 6), torch.randn(4, 2)
        for name in (inside, "blocks.0.to_q"):
            state = {f"{start}{name}.{leaf.format(n)}": t for n, t in zip("AB", (a, b))}
            found = formats.read(Content(state, config={"r": 2, "lora_alpha": 4}), slots).updates
            assert found.keys() == {inside}
            assert torch.equal(found[inside].lora_B, b) and found[inside].scale == 2.0


def test_a_wrapper_inside_of_a_path():
    slots = {"blocks.0.to_q": Slot((4, 6), "matrix", "linear")}
    for name in ("blocks.0._orig_mod.to_q", "lora_unet__orig_mod_blocks_0_to_q"):
        state = file_of({name: (torch.randn(2, 6), torch.randn(4, 2))}, "")
        assert formats.read(state, slots).updates.keys() == slots.keys()


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


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_adapter_under_the_original_names_is_the_same(name):
    """As for ComfyUI and kohya: fused, and diffusers' converter makes the model's own of it."""
    case = ARCHITECTURES[name]
    slots = slots_of(case)
    factors = pairs_of({path: slot.shape[0] for path, slot in slots.items()})
    ours = formats.read(file_of(factors, ""), slots)
    original = formats.original_of(slots)
    assert original.keys() == originals_of(case, slots).keys()
    assert formats.original_of(original) == original
    spelled = formats.fit(ours, original, formats.Options(), "adapter")
    want = {path: delta(f, 2.0) for path, f in factors.items()}
    converted = through(case, {n: u.delta() for n, u in spelled.updates.items()})
    assert converted.keys() == want.keys()
    for path, dense in converted.items():
        torch.testing.assert_close(dense, want[path], rtol=1e-12, atol=1e-12)
    real = formats.base_of(case.make())  # without norms, and of its own sizes
    names = {n for n, slot in formats.original_of(real).items() if slot.kind != "parameter"}
    assert names <= set(original)
    back = formats.read(formats.write(spelled, "kohya", original), slots).updates
    same(back, want)


@pytest.mark.parametrize("safe", [True, False])
def test_a_module_called_model_keeps_its_level(tmp_path, safe):
    """With no model to ask, and with one; only what torch.save put in a dictionary is inside."""
    stem = "model.layers.0.q_proj"
    state = {f"{stem}.lora_A.weight": torch.ones(2, 6), f"{stem}.lora_B.weight": torch.ones(4, 2)}
    path = tmp_path / ("a.safetensors" if safe else "a.pt")
    save_file(state, path) if safe else torch.save(state, path)
    with warnings.catch_warnings():
        assert adapters.read_adapter(path).updates.keys() == {stem}
        for inside in (stem, "layers.0.q_proj", f"vision_{stem}"):
            slots = {inside: Slot((4, 6), "matrix", "linear")}
            if inside.startswith("vision"):
                with pytest.raises(FileError, match="updates of what the model does not have"):
                    adapters.read_adapter(path, slots)
            else:
                assert adapters.read_adapter(path, slots).updates.keys() == {inside}


def test_a_dictionary_around_the_tensors_is_no_module(tmp_path):
    state = {
        "q.lora_A": torch.ones(2, 6),
        "q.lora_B": torch.ones(4, 2),
        "q.lora_scale": torch.ones(()),
    }
    for outer in ("model", "state_dict"):
        torch.save({outer: state, "epoch": 3}, tmp_path / "a.pt")
        assert adapters.read_adapter(tmp_path / "a.pt").updates.keys() == {"q"}


def test_a_table_that_knows_nothing_of_a_model_leaves_it():
    slots = {"blocks.0.x": Slot((4, 6)), "head": Slot((4, 6))}
    assert formats.original_of(slots) == slots
    assert Places({}).find("a", "a") is None


@pytest.mark.parametrize("name", TABLES)
def test_the_names_of_a_table_are_apart(name):
    """No two of its names for a module are those of different modules of a model."""
    told = {}
    for row in TABLES[name].rows():
        told.setdefault((".".join(row.name.parts), row.ratio), set()).add(row.parts)
    assert all(len(parts) == 1 for parts in told.values())


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


@pytest.mark.parametrize("start", ["lora_unet_q", "q"])
@pytest.mark.parametrize("other", ["lora_down.style.weight", "lora_A.style.weight", "lora_down"])
def test_one_factor_in_two_spellings_is_refused(start, other):
    content = Content({
        f"{start}.lora_down.weight": torch.ones(2, 6), f"{start}.lora_up.weight": torch.ones(4, 2),
        f"{start}.{other}": torch.ones(2, 6),
    })  # fmt: skip
    with pytest.raises(FileError, match=f"{start}.{other} is a second tensor for one factor"):
        formats.read(content)


def test_a_bias_is_no_factor():
    content = file_of({"lora_unet_q": (torch.ones(2, 6), torch.ones(4, 2))}, "")
    state = {**content.state, "lora_unet_q.lora_up.bias": torch.ones(4)}
    with pytest.raises(FileError, match="no update of one weight: lora_unet_q.lora_up.bias"):
        formats.read(Content(state))


@pytest.mark.parametrize("file", ["model.", "language_model.model.", "model.language_model.", ""])
@pytest.mark.parametrize("own", ["model.", "language_model.model.", "model.language_model."])
def test_a_language_model_beside_a_vision_tower(file, own):
    """As transformers' versions have named it; the tower's layers stay its own."""
    slots = {f"{start}layers.0.q_proj": Slot((4, 6)) for start in (own, "model.visual.")}
    factors = {f"base_model.model.{file}layers.0.q_proj": (torch.ones(3, 6), torch.ones(4, 3))}
    content = file_of({p[17:]: f for p, f in factors.items()}, "base_model.model.")
    assert formats.read(content, slots).updates.keys() == {f"{own}layers.0.q_proj"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_two_tables_disagree_on_a_model(name):
    """Nor does one table: what a name stands for there is one thing, in both namings."""
    slots = slots_of(ARCHITECTURES[name])
    for base in (slots, formats.original_of(slots)):
        shapes = {path: slot.shape for path, slot in base.items()}
        known, told = parts_of(shapes), {}
        for held in known.values():
            for row in WITH[held.template.name, held.template.piece]:
                rows = instance(row, held.before, held.numbers, known)
                if rows is not None and has_ratio(row, shapes[held.path]):
                    other = row.name.filled(held.before, held.numbers)
                    told.setdefault(other, set()).add(
                        tuple((known[part.name].path, part.name) for part in rows[0])
                    )
        for other, meanings in told.items():
            weights = {tuple(path for path, _ in meaning) for meaning in meanings}
            assert len({tuple(dict.fromkeys(paths)) for paths in weights}) == 1, (other, weights)


@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_what_a_checkpoint_stands_for_is_no_part_of_kohyas_names(name):
    """Converted with a checkpoint of several models, and read onto a model of one."""
    case = ARCHITECTURES[name]
    slots = slots_of(case)
    original = {f"model.diffusion_model.{p}": s for p, s in formats.original_of(slots).items()}
    factors = pairs_of({path: slot.shape[0] for path, slot in slots.items()})
    spelled = formats.read(file_of(factors, ""), original)
    content = formats.write(spelled, "kohya", original)
    stems = {f"lora_unet_{p[22:].replace('.', '_')}" for p in original}
    assert {key.partition(".")[0] for key in content.state} == stems
    same(formats.read(content, slots).updates, {p: delta(f, 2.0) for p, f in factors.items()})


@pytest.mark.parametrize("fused_model", [True, False])
def test_a_file_with_a_fused_update_and_those_of_its_parts_means_the_sum(fused_model):
    """As ComfyUI adds them: one patch of the whole weight, and one of some of its rows."""
    stem = "double_blocks.0.img_attn.qkv" if fused_model else "transformer_blocks.0.attn.to_{}"
    parts = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"]
    rows = {"double_blocks.0.img_attn.qkv": 12, **dict.fromkeys(parts, 4)}
    factors = pairs_of(rows)
    names = [stem] if fused_model else [stem.format(n) for n in "qkv"]
    slots = {n: Slot((12 if fused_model else 4, 6), "matrix", "linear") for n in names}
    file = file_of(factors, "diffusion_model.", alpha=3.0)
    file.state["diffusion_model.transformer_blocks.0.attn.to_k.alpha"].fill_(6.0)
    want = delta(factors["double_blocks.0.img_attn.qkv"], 1.0)
    want[:4] += delta(factors[parts[0]], 1.0)
    want[4:8] += delta(factors[parts[1]], 2.0)
    found = formats.read(file, slots).updates
    whole = torch.cat([found[name].delta() for name in names])
    torch.testing.assert_close(whole, want, rtol=1e-12, atol=1e-12)


def test_the_same_rows_twice_are_refused_still():
    factors = pairs_of({"blocks.0.self_attn.q": 4, "blocks.0.attn1.to_q": 4})
    slots = {"blocks.0.attn1.to_q": Slot((4, 6), "matrix", "linear")}
    with pytest.raises(FileError, match="second update of blocks.0.attn1.to_q. Choose one part"):
        formats.read(file_of(factors, ""), slots)


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
