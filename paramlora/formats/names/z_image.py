"""Z-Image.

Read from diffusers 0.42 loaders/single_file_utils.py
(``convert_z_image_transformer_checkpoint_to_diffusers``) and ComfyUI comfy/utils.py.
"""

from paramlora.formats.names.table import Table

_BLOCK = {
    "attention.qkv": "attention.{to_q,to_k,to_v}",
    "attention.out": "attention.to_out.0",
    "attention.q_norm": "attention.norm_q",
    "attention.k_norm": "attention.norm_k",
}
TABLE = Table(
    {
        "x_embedder": "all_x_embedder.2-1",
        "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    }
    | {
        f"{blocks}.*.{other}": f"{blocks}.*.{own}"
        for blocks in ("layers", "noise_refiner", "context_refiner")
        for other, own in _BLOCK.items()
    }
)
