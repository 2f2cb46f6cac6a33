"""PixArt-α and -Σ.

Read from diffusers scripts/convert_pixart_sigma_to_diffusers.py and ComfyUI comfy/utils.py
(``pixart_to_diffusers``).
"""

from paramlora.formats.names.table import Table

_OWN, _EMBED = "transformer_blocks.*", "adaln_single.emb"
TABLE = Table(
    {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": f"{_EMBED}.timestep_embedder.linear_1",
        "t_embedder.mlp.2": f"{_EMBED}.timestep_embedder.linear_2",
        "csize_embedder.mlp.0": f"{_EMBED}.resolution_embedder.linear_1",
        "csize_embedder.mlp.2": f"{_EMBED}.resolution_embedder.linear_2",
        "ar_embedder.mlp.0": f"{_EMBED}.aspect_ratio_embedder.linear_1",
        "ar_embedder.mlp.2": f"{_EMBED}.aspect_ratio_embedder.linear_2",
        "y_embedder.y_proj.fc1": "caption_projection.linear_1",
        "y_embedder.y_proj.fc2": "caption_projection.linear_2",
        "t_block.1": "adaln_single.linear",
        "final_layer.linear": "proj_out",
        "final_layer.scale_shift_table": "scale_shift_table",
        "blocks.*.scale_shift_table": f"{_OWN}.scale_shift_table",
        "blocks.*.attn.qkv": f"{_OWN}.attn1.{{to_q,to_k,to_v}}",
        "blocks.*.attn.proj": f"{_OWN}.attn1.to_out.0",
        "blocks.*.cross_attn.q_linear": f"{_OWN}.attn2.to_q",
        "blocks.*.cross_attn.kv_linear": f"{_OWN}.attn2.{{to_k,to_v}}",
        "blocks.*.cross_attn.proj": f"{_OWN}.attn2.to_out.0",
        "blocks.*.mlp.fc1": f"{_OWN}.ff.net.0.proj",
        "blocks.*.mlp.fc2": f"{_OWN}.ff.net.2",
    }
)
