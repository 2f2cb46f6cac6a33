"""Which way a hard layer's forward is computed: the one place that chooses, and its one table.

The ways give the same number. Linear layers and convolutions ask here, and do what they are told;
what no kernel serves after all (`paramlora.cuda.operands`) falls back to torch's operations, by the
way that each names.
"""

import json
from dataclasses import dataclass
from enum import Enum
from importlib.resources import files
from math import prod
from typing import Optional, Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from paramlora.update.compat import constant_result


class Way(Enum):
    """A way of computing ``x (W + scale·B·A)ᵀ``, or the same of a convolution or a look-up."""

    KERNELS = "our kernels: one accumulator, one launch; else as FACTORED"
    OPERATOR = "our kernels as one operator, which a compiler sees whole"
    PLAIN = "both products in torch's operations, each with its own gradient"
    SUM = "the dense sum in torch's operations, with a dense gradient"
    DENSE = "an autograd function that forms the dense sum, twice, and keeps x alone"
    FACTORED = "an autograd function that adds the thin product, and keeps x and x·Aᵀ"
    POINTWISE = "a convolution as a linear layer of every position, in our kernels"
    JOINED = "one convolution of both kernels, whose one accumulator takes both products"
    DEPTHWISE = "our kernels for single channels"
    OWN_KERNEL = "the update as a kernel of its own: a branch would repeat A for each group"


@dataclass(frozen=True)
class Card:
    """What was measured of a device, in multiplications (see ``python -m benchmarks.tune``).

    Args:
        tiny: that it does in the time that an autograd function takes to call.
        brief: of a float32 layer that takes it no longer than Python.
        small: of a convolution below which an autograd function costs more than it saves.
        light: numbers of a kernel that it passes over in no time.
        capability: CUDA's, of a card.
        processors: of a card.
        experts: whether our kernels for experts were the faster there.
        dropout: whether they were for a linear layer that drops inputs, as one expert.
    """

    tiny: int = 0
    brief: int = 0
    small: int = 0
    light: int = 0
    capability: tuple[int, int] = (0, 0)
    processors: int = 0
    experts: bool = False
    dropout: bool = False

    def far(self, capability: tuple[int, int], processors: int) -> tuple[int, int, int]:
        """How far it is from another: by generation, then by its number, then by size."""
        (major, minor), (own, inner) = capability, self.capability
        return abs(major - own), abs(minor - inner), abs(processors - self.processors)


def read_cards() -> dict[str, Card]:
    """The table: what was measured, by the device's name."""
    told = json.loads((files("paramlora.evaluate") / "cards.json").read_text(encoding="utf-8"))
    return {
        name: Card(**{**of, "capability": tuple(of.get("capability", (0, 0)))})
        for name, of in told.items()
    }


CARDS = read_cards()


def nearest(name: str, capability: tuple[int, int], processors: int) -> Card:
    """A card's measurements, or those of the nearest one that was measured."""
    if name in CARDS:
        return CARDS[name]
    measured = [card for card in CARDS.values() if card.capability != (0, 0)]
    return min(measured, key=lambda card: card.far(capability, processors))


_CPU, _UNKNOWN = CARDS["cpu"], Card()
_SEEN: dict[int, Card] = {}  # of CUDA, by index


def card_of(x: Tensor) -> Card:
    """What is known of a tensor's device; all zeros, by which nothing is too small for an autograd
    function, of one that is neither a CPU nor CUDA's."""
    if x.is_cpu:
        return _CPU
    if not x.is_cuda or is_compiling():  # compiled code asks nothing of a CUDA device
        return _UNKNOWN
    return card_at(x.get_device())


def card_at(index: int) -> Card:
    """What is known of a CUDA device, by its index."""
    if index not in _SEEN:
        about = torch.cuda.get_device_properties(index)
        found = nearest(about.name, (about.major, about.minor), about.multi_processor_count)
        _SEEN[index] = found
    return _SEEN[index]


def linear(
    card: Card,
    dtype: torch.dtype,
    numbers: int,
    shape: Sequence[int],
    r: int,
    kernels: bool,
    compiling: bool,
) -> Way:
    """How a hard linear layer is computed.

    Args:
        card: of x's device.
        dtype: of x, after autocast.
        numbers: elements of x.
        shape: of the weight, ``[out, in]``.
        r: rank.
        kernels: whether ours serve a tensor such as x (`paramlora.cuda.operands.served`).
        compiling: whether a compiler is at work, which knows no autograd function.
    """
    if compiling:
        return Way.OPERATOR if kernels else Way.PLAIN
    if kernels:
        return Way.KERNELS
    if dtype.itemsize <= 2:  # the dense sum rounds a small update away
        return Way.FACTORED
    out, fan_in = shape
    # what autograd does in C++ is the quicker where Python takes longer than the device
    if tiny(numbers, shape, r, card.tiny):
        return Way.SUM
    if numbers * out < card.brief:
        return Way.PLAIN
    return Way.DENSE if denser(numbers // max(fan_in, 1), fan_in, out, dtype) else Way.FACTORED


def convolution(
    card: Card,
    dtype: torch.dtype,
    numbers: int,
    shape: Sequence[int],
    stride: Sequence[int],
    groups: int,
    kernels: Optional[Way],
    compiling: bool,
) -> Way:
    """How a hard convolution is computed.

    Args:
        card, dtype, numbers, compiling: as of `linear`.
        shape: of the weight, ``[C_out, C_in / groups, *kernel]``.
        stride, groups: of the layer.
        kernels: the way in which ours serve it, if any.
    """
    low, size, out = dtype.itemsize == 2, prod(shape), shape[0]
    if low and not compiling and (kernels is not None or groups == 1):
        return kernels or Way.JOINED
    if not low:
        if numbers * size < card.small * shape[1] * groups and size < card.light:
            return Way.SUM  # a layer so small feels each line of Python
        tokens = numbers // (shape[1] * groups * prod(stride))
        if groups > 1 or denser(tokens, size // out, out, dtype):
            return Way.SUM if compiling or tokens * size < card.small else Way.DENSE
    return Way.PLAIN if groups == 1 else Way.OWN_KERNEL


def experts(card: Card, kernels: bool) -> Way:
    """How the grouped products of experts are computed.

    Args:
        card: of x's device.
        kernels: whether ours serve the operands.
    """
    return Way.KERNELS if kernels and card.experts else Way.FACTORED


def dropped(x: Tensor, kernels: bool) -> Way:
    """How a linear layer that drops inputs is computed.

    Args:
        x: its input.
        kernels: whether ours serve the operands.
    """
    return Way.KERNELS if kernels and _drops_faster(x.get_device()) else Way.FACTORED


@constant_result
def _drops_faster(index: int) -> bool:
    """Whether `Card.dropout` holds of a CUDA device; compiled code asks once."""
    return card_at(index).dropout


def denser(tokens: int, fan_in: int, out: int, dtype: torch.dtype) -> bool:
    """Whether the dense sum is the cheaper way: where tokens outnumber ``2·in·out/(in+out)``.

    Beyond that the factored form needs more operations and moves more bytes, whatever the rank:
    ``6·N·r·(in+out)`` against ``4·r·in·out + 4·N·r·(in+out)``. Never in 16 bits, where the dense
    sum rounds a small update away.
    """
    return dtype.itemsize > 2 and tokens * (fan_in + out) > 2 * fan_in * out


def tiny(numbers: int, shape: Sequence[int], r: int, least: int) -> bool:
    """Whether not even an autograd function pays: the dense sum then goes through autograd,
    gradient and all.

    That costs ``tokens·in·out`` multiplications for the dense gradient, ``3·r·in·out`` for the
    sum and its gradients, and six passes over a dense matrix, each as long as 8 multiplications
    of every element. Measured on a CPU in float32 at 43 shapes of 1 to 4096 tokens, the function
    is the faster from `least` on, but for some of very many tokens and few inputs.

    Args:
        numbers: elements of the input.
        shape: of the weight, ``[out, in]``.
        r: rank.
        least: multiplications, see `Card.tiny`.
    """
    out, fan_in = shape
    return (numbers + 3 * (r + 16) * fan_in) * out < least
