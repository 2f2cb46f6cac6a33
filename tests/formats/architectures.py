"""Models of every architecture by their names alone, what tools call these, and files of them."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from diffusers.loaders import single_file_utils as single

from paramlora.formats import Content, Slot
from paramlora.formats.names import TABLES, Name
from paramlora.formats.places import Places

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


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


def clip():
    config = transformers.CLIPTextConfig(
        hidden_size=6, intermediate_size=6, num_attention_heads=2, num_hidden_layers=2,
        vocab_size=9, max_position_embeddings=7,
    )  # fmt: skip
    return transformers.CLIPTextModel(config)
