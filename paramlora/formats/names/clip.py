"""CLIP's text encoders: those of OpenCLIP (CLIP-G, Stable Diffusion 2) have names of their own.

Read from diffusers 0.42 loaders/single_file_utils.py (``convert_open_clip_checkpoint``) and
ComfyUI comfy/utils.py (``transformers_convert``). The ``text_model`` of transformers is a level
that may be missing (see `LEVELS`); T5 has one spelling alone. OpenCLIP multiplies by its
``text_projection`` from the right, so it is the transpose of the ``weight`` of transformers.
"""

from paramlora.formats.names.table import Table

TURNED = {"text_projection": "transformer.resblocks"}  # and the layers that are beside it
_OTHER, _OWN = "transformer.resblocks.*", "encoder.layers.*"
TABLE = Table(
    {
        "token_embedding": "embeddings.token_embedding",
        "positional_embedding": "embeddings.position_embedding",
        "ln_final": "final_layer_norm",
        f"{_OTHER}.ln_1": f"{_OWN}.layer_norm1",
        f"{_OTHER}.ln_2": f"{_OWN}.layer_norm2",
        f"{_OTHER}.attn.in_proj_weight": f"{_OWN}.self_attn.{{q_proj,k_proj,v_proj}}",
        f"{_OTHER}.attn.in_proj_bias": f"{_OWN}.self_attn.{{q_proj,k_proj,v_proj}}.bias",
        f"{_OTHER}.attn.out_proj": f"{_OWN}.self_attn.out_proj",
        f"{_OTHER}.mlp.c_fc": f"{_OWN}.mlp.fc1",
        f"{_OTHER}.mlp.c_proj": f"{_OWN}.mlp.fc2",
    }
)
