r"""unsloth's path through transformers' experts, as a way of `benchmarks.experts`.

`import unsloth` replaces, for the whole process, the forwards of transformers' experts and of
peft's layer on a parameter. Here they stand in their places only while a call of this way runs, so
that the ways beside it in the same process are what they are without unsloth.

unsloth 2026.10.9 needs no more than torch, transformers and peft, and these wheels (6.7 MB with the
parts of the first that are no library left out; its other requirements are asked for when used):

    pip download --no-deps -d wheels unsloth==2026.10.9 unsloth_zoo==2026.10.9 trl==1.15.0 \
        datasets==4.8.5 dill==0.4.1 multiprocess==0.70.19
    zip -q -d wheels/unsloth-2026.10.9-py3-none-any.whl 'studio/*' 'unsloth_cli/*'
    pip install --no-deps --no-index wheels/*.whl
    python -m benchmarks.experts --ways frozen paramlora peft unsloth unfused --out FOLDER
    python -m benchmarks.models --models llama --ways paramlora "peft bf16" unsloth "unsloth bf16" \
        --out FOLDER

(for another Python, ``--python-version 3.12 --only-binary=:all:``). Without a card,
``UNSLOTH_ALLOW_CPU=1 TRITON_INTERPRET=1`` runs both with ``--tiny``, the second in float32 alone
(``--dtypes float32``): Triton's interpreter multiplies no bfloat16.
"""

import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from benchmarks.machine import version


@contextmanager
def patched() -> Iterator[None]:
    """unsloth's functions in the places that it gives them."""
    with _in_place({place: theirs for place, (_, theirs) in _functions().items()}):
        yield


@functools.cache
def _functions() -> dict[tuple[Any, str], tuple[Any, Any]]:
    """By owner and name: what was there before unsloth, and unsloth's."""
    assert "unsloth" not in sys.modules, "unsloth is imported: what it replaced is not known"
    import peft
    from peft.tuners.lora.layer import ParamWrapper
    from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen

    places = [
        (ParamWrapper, "forward"),
        (ParamWrapper, "get_delta_weight"),
        (peft, "get_peft_model"),
    ]
    places += [(qwen.Qwen3MoeExperts, "forward"), (qwen.Qwen3MoeSparseMoeBlock, "forward")]
    places += [(qwen.Qwen3MoeForCausalLM, "forward")]
    before = {place: getattr(*place) for place in places}
    with _in_place(before):
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", tempfile.mkdtemp())
        import unsloth  # noqa: F401

        found = {place: (own, getattr(*place)) for place, own in before.items()}
    same = [place for place, (own, theirs) in found.items() if own is theirs]
    assert (qwen.Qwen3MoeExperts, "forward") not in same, "unsloth left the experts as they were"
    assert (ParamWrapper, "forward") not in same, "unsloth left peft's layer as it was"
    return found


@contextmanager
def _in_place(functions: dict[tuple[Any, str], Any]) -> Iterator[None]:
    before = {place: getattr(*place) for place in functions}
    try:
        for place, function in functions.items():
            setattr(*place, function)
        yield
    finally:
        for place, function in before.items():
            setattr(*place, function)


class Within(nn.Module):
    """A model built and called while unsloth's functions are in their places."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        with patched():
            self.model = build()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        with patched():
            return self.model(*args, **kwargs)  # type: ignore[no-any-return]


def told() -> str:
    """Version and switches."""
    _functions()  # its parts refuse to be imported before it
    from unsloth_zoo.temporary_patches.moe_utils import select_moe_backend

    backend = select_moe_backend()
    return f"{version('unsloth')}, zoo {version('unsloth_zoo')}, peft's factors, {backend}"
