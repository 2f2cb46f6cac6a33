"""Stable Diffusion 3 and 3.5.

Read from diffusers 0.42 loaders/single_file_utils.py
(``convert_sd3_transformer_checkpoint_to_diffusers``) and ComfyUI comfy/utils.py
(``mmdit_to_diffusers``). The last block's modulation of the text has two parts, of all others six.
"""

from paramlora.formats.names.table import Table

_TEXT, _IMAGE, _OWN = (
    "joint_blocks.*.context_block",
    "joint_blocks.*.x_block",
    "transformer_blocks.*",
)
TABLE = Table(
    {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear[1,0]",
        f"{_IMAGE}.attn.qkv": f"{_OWN}.attn.{{to_q,to_k,to_v}}",
        f"{_IMAGE}.attn.proj": f"{_OWN}.attn.to_out.0",
        f"{_IMAGE}.attn.ln_q": f"{_OWN}.attn.norm_q",
        f"{_IMAGE}.attn.ln_k": f"{_OWN}.attn.norm_k",
        f"{_IMAGE}.attn2.qkv": f"{_OWN}.attn2.{{to_q,to_k,to_v}}",
        f"{_IMAGE}.attn2.proj": f"{_OWN}.attn2.to_out.0",
        f"{_IMAGE}.attn2.ln_q": f"{_OWN}.attn2.norm_q",
        f"{_IMAGE}.attn2.ln_k": f"{_OWN}.attn2.norm_k",
        f"{_IMAGE}.mlp.fc1": f"{_OWN}.ff.net.0.proj",
        f"{_IMAGE}.mlp.fc2": f"{_OWN}.ff.net.2",
        f"{_IMAGE}.adaLN_modulation.1": f"{_OWN}.norm1.linear",
        f"{_TEXT}.attn.qkv": f"{_OWN}.attn.{{add_q_proj,add_k_proj,add_v_proj}}",
        f"{_TEXT}.attn.proj": f"{_OWN}.attn.to_add_out",
        f"{_TEXT}.attn.ln_q": f"{_OWN}.attn.norm_added_q",
        f"{_TEXT}.attn.ln_k": f"{_OWN}.attn.norm_added_k",
        f"{_TEXT}.mlp.fc1": f"{_OWN}.ff_context.net.0.proj",
        f"{_TEXT}.mlp.fc2": f"{_OWN}.ff_context.net.2",
        f"{_TEXT}.adaLN_modulation.1@6": f"{_OWN}.norm1_context.linear",
        f"{_TEXT}.adaLN_modulation.1@2": f"{_OWN}.norm1_context.linear[1,0]",
    }
)
