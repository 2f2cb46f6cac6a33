"""transformers' language models: fused projections, and experts in a stack or one by one.

Read from transformers 5.23 conversion_mapping.py, which makes the stacks out of single experts,
and vLLM model_executor/models (``packed_modules_mapping``). What is on the right is as checkpoints
have had it; ``w1``, ``w3`` and ``w2`` are Mixtral's gate, up and down.
"""

from paramlora.formats.names.table import Table

_EXPERTS = "**.mlp.experts"
_MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
TABLE = Table(
    {
        "**.self_attn.qkv_proj": "**.self_attn.{q_proj|k_proj,v_proj}",
        "**.mlp.gate_up_proj": "**.mlp.{gate_proj,up_proj}",
        "**.mlp.shared_expert.gate_up_proj": "**.mlp.shared_expert.{gate_proj,up_proj}",
        "**.mlp.shared_experts.gate_up_proj": "**.mlp.shared_experts.{gate_proj,up_proj}",
        f"{_EXPERTS}.gate_up_proj": f"{_EXPERTS}.*.{{gate_proj,up_proj}}",
        f"{_EXPERTS}.down_proj": f"{_EXPERTS}.*.down_proj",
        "**.block_sparse_moe.gate": "**.mlp.gate",
    }
    | {f"**.block_sparse_moe.experts.*.{w}": f"{_EXPERTS}.*.{own}" for w, own in _MIXTRAL.items()},
    published=False,
)
