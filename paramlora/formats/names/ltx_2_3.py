"""LTX-2.3: LTX-2 with modulations of the prompt.

Read from diffusers 0.42 loaders/lora_conversion_utils.py
(``_convert_non_diffusers_ltx2_lora_to_diffusers``).
"""

from paramlora.formats.names import ltx_2
from paramlora.formats.names.table import Table

_MODULATIONS = {
    "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
}
TABLE = Table(
    {
        **ltx_2.TABLE.spellings,
        **{
            f"{other}.{inside}": f"{own}.{inside}"
            for other, own in _MODULATIONS.items()
            for inside in ltx_2.INSIDE
        },
    }
)
