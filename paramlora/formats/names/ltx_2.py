"""LTX-2, with sound.

Read from diffusers 0.42 loaders/single_file_utils.py (``convert_ltx2_transformer_to_diffusers``)
and lora_conversion_utils.py. All other layers have diffusers' names.
"""

from paramlora.formats.names.table import Table

_MODULATIONS = {
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
}
INSIDE = ("linear", "emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2")
_ATTENTIONS = "attn1 attn2 audio_attn1 audio_attn2 audio_to_video_attn video_to_audio_attn".split()
_BLOCK = "transformer_blocks.*"
_TABLE = "cross_attn_scale_shift_table"
TABLE = Table(
    {
        "patchify_proj": "proj_in",
        "audio_patchify_proj": "audio_proj_in",
        f"{_BLOCK}.scale_shift_table_a2v_ca_video": f"{_BLOCK}.video_a2v_{_TABLE}",
        f"{_BLOCK}.scale_shift_table_a2v_ca_audio": f"{_BLOCK}.audio_a2v_{_TABLE}",
    }
    | {f"{m}.{inside}": f"{own}.{inside}" for m, own in _MODULATIONS.items() for inside in INSIDE}
    | {
        f"{_BLOCK}.{attention}.{which}_norm": f"{_BLOCK}.{attention}.norm_{which}"
        for attention in _ATTENTIONS
        for which in "qk"
    }
)
