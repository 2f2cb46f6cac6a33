"""FLUX.2, whose single blocks are fused in diffusers too.

Read from diffusers 0.42 loaders/single_file_utils.py
(``convert_flux2_transformer_checkpoint_to_diffusers``) and lora_conversion_utils.py.
"""

from paramlora.formats.names.table import Table

_DOUBLE, _SINGLE, _TIMES = (
    "transformer_blocks.*",
    "single_transformer_blocks.*",
    "time_guidance_embed",
)
_MODULATIONS = (
    "single_stream_modulation double_stream_modulation_img double_stream_modulation_txt".split()
)
TABLE = Table(
    {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": f"{_TIMES}.timestep_embedder.linear_1",
        "time_in.out_layer": f"{_TIMES}.timestep_embedder.linear_2",
        "guidance_in.in_layer": f"{_TIMES}.guidance_embedder.linear_1",
        "guidance_in.out_layer": f"{_TIMES}.guidance_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear[1,0]",
        "double_blocks.*.img_attn.qkv": f"{_DOUBLE}.attn.{{to_q,to_k,to_v}}",
        "double_blocks.*.txt_attn.qkv": f"{_DOUBLE}.attn.{{add_q_proj,add_k_proj,add_v_proj}}",
        "double_blocks.*.img_attn.proj": f"{_DOUBLE}.attn.to_out.0",
        "double_blocks.*.txt_attn.proj": f"{_DOUBLE}.attn.to_add_out",
        "double_blocks.*.img_attn.norm.query_norm.scale": f"{_DOUBLE}.attn.norm_q",
        "double_blocks.*.img_attn.norm.key_norm.scale": f"{_DOUBLE}.attn.norm_k",
        "double_blocks.*.txt_attn.norm.query_norm.scale": f"{_DOUBLE}.attn.norm_added_q",
        "double_blocks.*.txt_attn.norm.key_norm.scale": f"{_DOUBLE}.attn.norm_added_k",
        "double_blocks.*.img_mlp.0": f"{_DOUBLE}.ff.linear_in",
        "double_blocks.*.img_mlp.2": f"{_DOUBLE}.ff.linear_out",
        "double_blocks.*.txt_mlp.0": f"{_DOUBLE}.ff_context.linear_in",
        "double_blocks.*.txt_mlp.2": f"{_DOUBLE}.ff_context.linear_out",
        "single_blocks.*.linear1": f"{_SINGLE}.attn.to_qkv_mlp_proj",
        "single_blocks.*.linear2": f"{_SINGLE}.attn.to_out",
        "single_blocks.*.norm.query_norm.scale": f"{_SINGLE}.attn.norm_q",
        "single_blocks.*.norm.key_norm.scale": f"{_SINGLE}.attn.norm_k",
    }
    | {f"{name}.lin": f"{name}.linear" for name in _MODULATIONS}
)
