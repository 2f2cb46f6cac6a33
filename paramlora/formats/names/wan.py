"""Wan 2.1 and 2.2, text and image to video, and VACE.

Read from diffusers 0.42 loaders/single_file_utils.py (``convert_wan_transformer_to_diffusers``)
and lora_conversion_utils.py; musubi-tuner mangles the same names.
"""

from paramlora.formats.names.table import Table

_EMBEDDER = "condition_embedder"
_BLOCKS = ("blocks.*", "vace_blocks.*")
_BLOCK = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm3": "norm2",
    "modulation": "scale_shift_table",
    "before_proj": "proj_in",
    "after_proj": "proj_out",
}
TABLE = Table(
    {
        "time_embedding.0": f"{_EMBEDDER}.time_embedder.linear_1",
        "time_embedding.2": f"{_EMBEDDER}.time_embedder.linear_2",
        "text_embedding.0": f"{_EMBEDDER}.text_embedder.linear_1",
        "text_embedding.2": f"{_EMBEDDER}.text_embedder.linear_2",
        "time_projection.1": f"{_EMBEDDER}.time_proj",
        "img_emb.proj.0": f"{_EMBEDDER}.image_embedder.norm1",
        "img_emb.proj.1": f"{_EMBEDDER}.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": f"{_EMBEDDER}.image_embedder.ff.net.2",
        "img_emb.proj.4": f"{_EMBEDDER}.image_embedder.norm2",
        "head.head": "proj_out",
        "head.modulation": "scale_shift_table",
    }
    | {f"{b}.{other}": f"{b}.{own}" for b in _BLOCKS for other, own in _BLOCK.items()}
)
