"""Qwen-Image, whose original names are diffusers': only ComfyUI's fused layer of 2.1 differs.

Read from diffusers 0.42 loaders/single_file_utils.py
(``convert_qwen_image21_transformer_checkpoint_to_diffusers``) and ComfyUI comfy/lora.py.
"""

from paramlora.formats.names.table import Table

_MLP = "transformer_blocks.*.img_mlp"
TABLE = Table({f"{_MLP}.gate_up": f"{_MLP}.{{gate_layer,proj}}"})
