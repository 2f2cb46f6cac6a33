"""An entry of a configuration, for type checkers and `help`."""

from collections.abc import Sequence
from typing import Literal, TypedDict, Union

Dtype = Literal["bfloat16", "float16", "float32", "float64"]
Init = Literal["default", "kaiming", "olora", "orthogonal", "pissa"]


class Entry(TypedDict, total=False):
    """What a configuration says of the tensors that a name means.

    ``r`` is required, but for ``whole`` and ``rows``; the rest has defaults. A kind that you
    register may have further keys.

    Args:
        r: rank of the update, at least 1.
        scale: the factor in ``W + scale·B·A``; 1 by default.
        alpha: instead of `scale`: ``scale = alpha / r``.
        rslora: with `alpha`: ``scale = alpha / sqrt(r)``.
        trainable_scale: train the factor too.
        hard: 1 (by default) parametrizes the weight, 0 adds a parallel branch to the output.
        up_kernel: of soft convolutions: the kernel of the second factor, 1 or ``"same"``.
        dropout: on the input of the low-rank branch, in training; at least 0 and below 1.
        init: how the factors start.
        adapter_dtype: the factors' type; float32 on a 16-bit weight by default.
        kind: what the update makes of a weight: ``"lora"``, ``"dora"``, ``"loha"``, ``"lokr"``,
            ``"rows"``, or one that you registered.
        whole: train the tensors themselves, and everything in a module that is named.
        rows: numbers of the rows that train whole, such as those of new tokens.
        decompose_both, factor, full_matrix, sizes: of the kind ``"lokr"``.
        tucker: of the kinds ``"loha"`` and ``"lokr"``.

    Example:
        >>> from paramlora import Entry, LoRAConfig
        >>> entries: dict[str, Entry] = {"to_q": {"r": 8, "alpha": 16}, "head": {"whole": True}}
        >>> assert LoRAConfig.from_dict(entries).entries[0].scale == 2.0
    """

    r: int
    scale: float
    alpha: float
    rslora: Union[bool, int]
    trainable_scale: Union[bool, int]
    hard: Union[bool, int]
    up_kernel: Literal[1, "same"]
    dropout: float
    init: Init
    adapter_dtype: Dtype
    kind: str
    whole: Union[bool, int]
    rows: Sequence[int]
    decompose_both: Union[bool, int]
    factor: int
    full_matrix: Union[bool, int]
    sizes: Sequence[Sequence[int]]
    tucker: Union[bool, int]
