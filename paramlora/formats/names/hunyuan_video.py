"""HunyuanVideo.

Read from diffusers 0.42 loaders/single_file_utils.py
(``convert_hunyuan_video_transformer_to_diffusers``) and lora_conversion_utils.py; the names with
a dot more (``img_attn.qkv``) are ComfyUI's, comfy/lora.py.
"""

from paramlora.formats.names.table import Table

_TIMES, _TEXT = "time_text_embed", "context_embedder"
_DOUBLE, _SINGLE = "transformer_blocks.*", "single_transformer_blocks.*"
_REFINER = "txt_in.individual_token_refiner.blocks.*"
_REFINED = f"{_TEXT}.token_refiner.refiner_blocks.*"
TABLE = Table(
    {
        "img_in.proj": "x_embedder.proj",
        "time_in.mlp.0": f"{_TIMES}.timestep_embedder.linear_1",
        "time_in.mlp.2": f"{_TIMES}.timestep_embedder.linear_2",
        "time_in.in_layer": f"{_TIMES}.timestep_embedder.linear_1",
        "time_in.out_layer": f"{_TIMES}.timestep_embedder.linear_2",
        "guidance_in.mlp.0": f"{_TIMES}.guidance_embedder.linear_1",
        "guidance_in.mlp.2": f"{_TIMES}.guidance_embedder.linear_2",
        "guidance_in.in_layer": f"{_TIMES}.guidance_embedder.linear_1",
        "guidance_in.out_layer": f"{_TIMES}.guidance_embedder.linear_2",
        "vector_in.in_layer": f"{_TIMES}.text_embedder.linear_1",
        "vector_in.out_layer": f"{_TIMES}.text_embedder.linear_2",
        "txt_in.input_embedder": f"{_TEXT}.proj_in",
        "txt_in.c_embedder.linear_1": f"{_TEXT}.{_TIMES}.text_embedder.linear_1",
        "txt_in.c_embedder.linear_2": f"{_TEXT}.{_TIMES}.text_embedder.linear_2",
        "txt_in.c_embedder.in_layer": f"{_TEXT}.{_TIMES}.text_embedder.linear_1",
        "txt_in.c_embedder.out_layer": f"{_TEXT}.{_TIMES}.text_embedder.linear_2",
        "txt_in.t_embedder.mlp.0": f"{_TEXT}.{_TIMES}.timestep_embedder.linear_1",
        "txt_in.t_embedder.mlp.2": f"{_TEXT}.{_TIMES}.timestep_embedder.linear_2",
        "txt_in.t_embedder.in_layer": f"{_TEXT}.{_TIMES}.timestep_embedder.linear_1",
        "txt_in.t_embedder.out_layer": f"{_TEXT}.{_TIMES}.timestep_embedder.linear_2",
        f"{_REFINER}.self_attn_qkv": f"{_REFINED}.attn.{{to_q,to_k,to_v}}",
        f"{_REFINER}.self_attn_proj": f"{_REFINED}.attn.to_out.0",
        f"{_REFINER}.self_attn.qkv": f"{_REFINED}.attn.{{to_q,to_k,to_v}}",
        f"{_REFINER}.self_attn.proj": f"{_REFINED}.attn.to_out.0",
        f"{_REFINER}.mlp.fc1": f"{_REFINED}.ff.net.0.proj",
        f"{_REFINER}.mlp.fc2": f"{_REFINED}.ff.net.2",
        f"{_REFINER}.mlp.0": f"{_REFINED}.ff.net.0.proj",
        f"{_REFINER}.mlp.2": f"{_REFINED}.ff.net.2",
        f"{_REFINER}.adaLN_modulation.1": f"{_REFINED}.norm_out.linear",
        f"{_REFINER}.norm1": f"{_REFINED}.norm1",
        f"{_REFINER}.norm2": f"{_REFINED}.norm2",
        "double_blocks.*.img_attn_qkv": f"{_DOUBLE}.attn.{{to_q,to_k,to_v}}",
        "double_blocks.*.txt_attn_qkv": f"{_DOUBLE}.attn.{{add_q_proj,add_k_proj,add_v_proj}}",
        "double_blocks.*.img_attn_proj": f"{_DOUBLE}.attn.to_out.0",
        "double_blocks.*.txt_attn_proj": f"{_DOUBLE}.attn.to_add_out",
        "double_blocks.*.img_attn_q_norm": f"{_DOUBLE}.attn.norm_q",
        "double_blocks.*.img_attn_k_norm": f"{_DOUBLE}.attn.norm_k",
        "double_blocks.*.txt_attn_q_norm": f"{_DOUBLE}.attn.norm_added_q",
        "double_blocks.*.txt_attn_k_norm": f"{_DOUBLE}.attn.norm_added_k",
        "double_blocks.*.img_mod.linear": f"{_DOUBLE}.norm1.linear",
        "double_blocks.*.txt_mod.linear": f"{_DOUBLE}.norm1_context.linear",
        "double_blocks.*.img_mlp.fc1": f"{_DOUBLE}.ff.net.0.proj",
        "double_blocks.*.img_mlp.fc2": f"{_DOUBLE}.ff.net.2",
        "double_blocks.*.txt_mlp.fc1": f"{_DOUBLE}.ff_context.net.0.proj",
        "double_blocks.*.txt_mlp.fc2": f"{_DOUBLE}.ff_context.net.2",
        "single_blocks.*.linear1": f"{_SINGLE}.{{attn.to_q,attn.to_k,attn.to_v|proj_mlp}}",
        "single_blocks.*.linear2": f"{_SINGLE}.proj_out",
        "single_blocks.*.q_norm": f"{_SINGLE}.attn.norm_q",
        "single_blocks.*.k_norm": f"{_SINGLE}.attn.norm_k",
        "single_blocks.*.modulation.linear": f"{_SINGLE}.norm.linear",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear[1,0]",
    }
)
