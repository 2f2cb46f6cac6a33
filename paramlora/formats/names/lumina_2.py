"""Lumina Image 2.

Read from diffusers 0.42 loaders/single_file_utils.py (``convert_lumina2_to_diffusers``) and
lora_conversion_utils.py. Its keys and values are narrower than its queries.
"""

from paramlora.formats.names.table import Table

_EMBED = "time_caption_embed"
_BLOCK = {
    "attention.qkv": "attn.{to_q|to_k,to_v}",
    "attention.out": "attn.to_out.0",
    "attention.q_norm": "attn.norm_q",
    "attention.k_norm": "attn.norm_k",
    "feed_forward.w1": "feed_forward.linear_1",
    "feed_forward.w2": "feed_forward.linear_2",
    "feed_forward.w3": "feed_forward.linear_3",
    "attention_norm2": "norm2",
}
_MODULATED = {"adaLN_modulation.1": "norm1.linear", "attention_norm1": "norm1.norm"}
TABLE = Table(
    {
        "cap_embedder.0": f"{_EMBED}.caption_embedder.0",
        "cap_embedder.1": f"{_EMBED}.caption_embedder.1",
        "t_embedder.mlp.0": f"{_EMBED}.timestep_embedder.linear_1",
        "t_embedder.mlp.2": f"{_EMBED}.timestep_embedder.linear_2",
        "final_layer.adaLN_modulation.1": "norm_out.linear_1",
        "final_layer.linear": "norm_out.linear_2",
        "context_refiner.*.attention_norm1": "context_refiner.*.norm1",
    }
    | {
        f"{blocks}.*.{other}": f"{blocks}.*.{own}"
        for blocks in ("layers", "noise_refiner", "context_refiner")
        for other, own in _BLOCK.items()
    }
    | {
        f"{blocks}.*.{other}": f"{blocks}.*.{own}"
        for blocks in ("layers", "noise_refiner")
        for other, own in _MODULATED.items()
    }
)
