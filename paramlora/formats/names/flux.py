"""FLUX.1, and Chroma, which has its blocks and a guidance network instead of the modulations.

Read from diffusers 0.42 loaders/single_file_utils.py and lora_conversion_utils.py, ComfyUI
comfy/utils.py (``flux_to_diffusers``) and lora.py, sd-scripts networks/convert_flux_lora.py;
``qkv_lora1`` and its like are XLabs',
without their ``processor``.
"""

from paramlora.formats.names.table import Table

_DOUBLE, _SINGLE = "transformer_blocks.*", "single_transformer_blocks.*"
_TIMES = "time_text_embed"
TABLE = Table(
    {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": f"{_TIMES}.timestep_embedder.linear_1",
        "time_in.out_layer": f"{_TIMES}.timestep_embedder.linear_2",
        "vector_in.in_layer": f"{_TIMES}.text_embedder.linear_1",
        "vector_in.out_layer": f"{_TIMES}.text_embedder.linear_2",
        "guidance_in.in_layer": f"{_TIMES}.guidance_embedder.linear_1",
        "guidance_in.out_layer": f"{_TIMES}.guidance_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear[1,0]",
        "distilled_guidance_layer.layers.*.in_layer": "distilled_guidance_layer.layers.*.linear_1",
        "distilled_guidance_layer.layers.*.out_layer": "distilled_guidance_layer.layers.*.linear_2",
        "distilled_guidance_layer.norms.*.scale": "distilled_guidance_layer.norms.*",
        "double_blocks.*.img_attn.qkv": f"{_DOUBLE}.attn.{{to_q,to_k,to_v}}",
        "double_blocks.*.txt_attn.qkv": f"{_DOUBLE}.attn.{{add_q_proj,add_k_proj,add_v_proj}}",
        "double_blocks.*.img_attn.proj": f"{_DOUBLE}.attn.to_out.0",
        "double_blocks.*.txt_attn.proj": f"{_DOUBLE}.attn.to_add_out",
        "double_blocks.*.img_attn.norm.query_norm.scale": f"{_DOUBLE}.attn.norm_q",
        "double_blocks.*.img_attn.norm.key_norm.scale": f"{_DOUBLE}.attn.norm_k",
        "double_blocks.*.txt_attn.norm.query_norm.scale": f"{_DOUBLE}.attn.norm_added_q",
        "double_blocks.*.txt_attn.norm.key_norm.scale": f"{_DOUBLE}.attn.norm_added_k",
        "double_blocks.*.img_mod.lin": f"{_DOUBLE}.norm1.linear",
        "double_blocks.*.txt_mod.lin": f"{_DOUBLE}.norm1_context.linear",
        "double_blocks.*.img_mlp.0": f"{_DOUBLE}.ff.net.0.proj",
        "double_blocks.*.img_mlp.2": f"{_DOUBLE}.ff.net.2",
        "double_blocks.*.txt_mlp.0": f"{_DOUBLE}.ff_context.net.0.proj",
        "double_blocks.*.txt_mlp.2": f"{_DOUBLE}.ff_context.net.2",
        "single_blocks.*.linear1": f"{_SINGLE}.{{attn.to_q,attn.to_k,attn.to_v|proj_mlp}}",
        "single_blocks.*.linear1_qkv": f"{_SINGLE}.attn.{{to_q,to_k,to_v}}",
        "single_blocks.*.linear2": f"{_SINGLE}.proj_out",
        "single_blocks.*.modulation.lin": f"{_SINGLE}.norm.linear",
        "single_blocks.*.norm.query_norm.scale": f"{_SINGLE}.attn.norm_q",
        "single_blocks.*.norm.key_norm.scale": f"{_SINGLE}.attn.norm_k",
        "double_blocks.*.qkv_lora1": f"{_DOUBLE}.attn.{{to_q,to_k,to_v}}",
        "double_blocks.*.qkv_lora2": (f"{_DOUBLE}.attn.{{add_q_proj,add_k_proj,add_v_proj}}"),
        "double_blocks.*.proj_lora1": f"{_DOUBLE}.attn.to_out.0",
        "double_blocks.*.proj_lora2": f"{_DOUBLE}.attn.to_add_out",
        "single_blocks.*.qkv_lora": f"{_SINGLE}.attn.{{to_q,to_k,to_v}}",
        "single_blocks.*.proj_lora": f"{_SINGLE}.proj_out",
    }
)
