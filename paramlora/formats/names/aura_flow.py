"""AuraFlow.

Read from diffusers 0.42 loaders/single_file_utils.py
(``convert_auraflow_transformer_checkpoint_to_diffusers``) and ComfyUI comfy/utils.py.
"""

from paramlora.formats.names.table import Table

_DOUBLE, _SINGLE = "joint_transformer_blocks.*", "single_transformer_blocks.*"
TABLE = Table(
    {
        "t_embedder.mlp.0": "time_step_proj.linear_1",
        "t_embedder.mlp.2": "time_step_proj.linear_2",
        "cond_seq_linear": "context_embedder",
        "init_x_linear": "pos_embed.proj",
        "final_linear": "proj_out",
        "modF.1": "norm_out.linear[1,0]",
        "double_layers.*.attn.w2q": f"{_DOUBLE}.attn.to_q",
        "double_layers.*.attn.w2k": f"{_DOUBLE}.attn.to_k",
        "double_layers.*.attn.w2v": f"{_DOUBLE}.attn.to_v",
        "double_layers.*.attn.w2o": f"{_DOUBLE}.attn.to_out.0",
        "double_layers.*.attn.w1q": f"{_DOUBLE}.attn.add_q_proj",
        "double_layers.*.attn.w1k": f"{_DOUBLE}.attn.add_k_proj",
        "double_layers.*.attn.w1v": f"{_DOUBLE}.attn.add_v_proj",
        "double_layers.*.attn.w1o": f"{_DOUBLE}.attn.to_add_out",
        "double_layers.*.mlpX.c_fc1": f"{_DOUBLE}.ff.linear_1",
        "double_layers.*.mlpX.c_fc2": f"{_DOUBLE}.ff.linear_2",
        "double_layers.*.mlpX.c_proj": f"{_DOUBLE}.ff.out_projection",
        "double_layers.*.mlpC.c_fc1": f"{_DOUBLE}.ff_context.linear_1",
        "double_layers.*.mlpC.c_fc2": f"{_DOUBLE}.ff_context.linear_2",
        "double_layers.*.mlpC.c_proj": f"{_DOUBLE}.ff_context.out_projection",
        "double_layers.*.modX.1": f"{_DOUBLE}.norm1.linear",
        "double_layers.*.modC.1": f"{_DOUBLE}.norm1_context.linear",
        "single_layers.*.attn.w1q": f"{_SINGLE}.attn.to_q",
        "single_layers.*.attn.w1k": f"{_SINGLE}.attn.to_k",
        "single_layers.*.attn.w1v": f"{_SINGLE}.attn.to_v",
        "single_layers.*.attn.w1o": f"{_SINGLE}.attn.to_out.0",
        "single_layers.*.mlp.c_fc1": f"{_SINGLE}.ff.linear_1",
        "single_layers.*.mlp.c_fc2": f"{_SINGLE}.ff.linear_2",
        "single_layers.*.mlp.c_proj": f"{_SINGLE}.ff.out_projection",
        "single_layers.*.modCX.1": f"{_SINGLE}.norm1.linear",
    }
)
