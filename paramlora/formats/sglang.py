"""SGLang's adapters: PEFT's folder, of one rank and one alpha for all layers, however large.

Read from the loader's sources by commit: python/sglang/srt/lora/lora_config.py at 0ceb81fe and
mem_pool.py at 00639c4d. It reads one ``r`` and one ``lora_alpha``, wants every factor to be of that
rank, and its ``max_lora_rank`` may be any number.
"""

from dataclasses import replace
from typing import Any, Optional

from paramlora.formats import vllm
from paramlora.formats.base import Base
from paramlora.formats.content import Content
from paramlora.formats.vllm import of_one_rank, unloaded
from paramlora.update.value import Adapter


def write(adapter: Adapter, base: Optional[Base] = None, **_: Any) -> Content:
    """An adapter as the folder that SGLang's ``--lora-paths`` takes, see `vllm`.

    Args:
        adapter, base: as for vLLM's.

    Raises:
        FileError: a part that SGLang does not load, named.
    """
    return of_one_rank(adapter, base, unloaded(adapter, "SGLang"))


# in the same files as vLLM's
FORMAT = replace(
    vllm.FORMAT, name="sglang", write=write, servers={"sglang": "SGLang"}, unserved=unloaded
)
