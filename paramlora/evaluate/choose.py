"""Which way a hard layer's forward is computed: the one place that chooses, and its one table.

The ways give the same number. Linear layers, convolutions and experts ask `way`, with dropout or
without; embeddings, LoKr, DoRA, and rows that take different updates ask a function of their own
below. All do what they are told; what no kernel serves after all (`paramlora.cuda.operands`) falls
back to torch's operations, by the way that each names. What was measured of one device stands in
the table, what holds on all or was measured of one kind of update alone in a constant here.
"""

import json
from dataclasses import dataclass
from enum import Enum
from importlib.resources import files
from math import prod
from typing import NamedTuple, Optional, Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from paramlora.cuda.launches import launches as launches
from paramlora.update.compat import constant_result, grouped_product

# what our kernels hold: of a higher rank the device's memory would be in the way
NORMS_RANK = 128  # whose factors the kernel of DoRA's norms holds in registers
EMBEDDING_RANK = 128  # whose thin products the kernels of embeddings hold in registers
EXPERTS_RANK = 128  # whose thin products the kernels of experts hold in registers
EXPERTS = 1024  # groups of rows among which a block of rows looks for its own
ROWS_RANK = 32  # of each row's own update: its factors lie beside a tile of the frozen product
# LoKr; measured on an H200: the low-rank kernels are twice as fast at a rank of 256 of 1280, where
# both factors make many small products, and slower at 1024 of 4096
KRONECKER_RANK = 256
REPAID = 4  # rows for each rank that repay forming the low-rank factors
SMALL_WEIGHT = 2**16  # elements of a weight whose sum costs less than a small product for each row
# rows that take different updates
LONG = 16  # positions of a row from which it is a block of its own: packing would only move it
FEW = 128  # rows up to which reading all factors takes longer than their arithmetic
# torch's `grouped_mm` wants every stride a multiple of 16 bytes
ALIGNED = 8  # numbers of 16 bits that the grouped product of a device takes at a time


class Way(Enum):
    """A way of computing ``x (W + scale·B·A)ᵀ``, or the same of a convolution."""

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
    DROPPED = "an autograd function that keeps the seed of the masks, and adds the thin product"
    LOW_RANK = "a Kronecker product of a low rank as the low-rank layer that it is"
    FEW_ROWS = "our kernels for few rows, which read all factors where they lie"


@dataclass(frozen=True)
class Thresholds:
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
        never_run: whether nothing was measured: they follow from the card's own figures by the rule
            of ``benchmarks.tune``, and no kernel has run there.
    """

    tiny: int = 0
    brief: int = 0
    small: int = 0
    light: int = 0
    capability: tuple[int, int] = (0, 0)
    processors: int = 0
    experts: bool = False
    dropout: bool = False
    never_run: bool = False

    def far(self, capability: tuple[int, int], processors: int) -> tuple[int, int, int]:
        """How far it is from another: by generation, then by its number, then by size."""
        (major, minor), (own, inner) = capability, self.capability
        return abs(major - own), abs(minor - inner), abs(processors - self.processors)


def read_cards() -> dict[str, Thresholds]:
    """The table: what was measured, by the device's name."""
    told = json.loads((files("paramlora.evaluate") / "cards.json").read_text(encoding="utf-8"))
    return {
        name: Thresholds(**{**of, "capability": tuple(of.get("capability", (0, 0)))})
        for name, of in told.items()
    }


CARDS = read_cards()


def nearest(name: str, capability: tuple[int, int], processors: int) -> Thresholds:
    """A card's measurements, or those of the nearest one that was measured."""
    if name in CARDS:
        return CARDS[name]
    # an unknown card follows the one likest to it; the CPU's entry has no capability
    measured = [card for card in CARDS.values() if card.capability != (0, 0)]
    return min(measured, key=lambda card: card.far(capability, processors))


_CPU, _UNKNOWN = CARDS["cpu"], Thresholds()
_SEEN: dict[int, Thresholds] = {}  # of CUDA, by index


def thresholds_of(x: Tensor) -> Thresholds:
    """What is known of a tensor's device; all zeros, by which nothing is too small for an autograd
    function, of one that is neither a CPU nor CUDA's."""
    if x.is_cpu:
        return _CPU
    if not x.is_cuda or is_compiling():  # compiled code asks nothing of a CUDA device
        return _UNKNOWN
    return _thresholds_at(x.get_device())


def _thresholds_at(index: int) -> Thresholds:
    """What is known of a CUDA device, by its index."""
    if index not in _SEEN:
        about = torch.cuda.get_device_properties(index)
        found = nearest(about.name, (about.major, about.minor), about.multi_processor_count)
        _SEEN[index] = found
    return _SEEN[index]


class Asked(NamedTuple):
    """All that the choice depends on.

    Args:
        layer: "linear", "convolution" or "experts".
        device: what was measured of x's, see `thresholds_of`.
        dtype: of x, after autocast.
        numbers: elements of x.
        shape: of the weight: ``[out, in]``, ``[C_out, C_in / groups, *kernel]``.
        rank: of all updates together.
        kernels: the way in which ours serve these operands, if any; of experts and of dropout where
            they are also the faster, see `measured`.
        compiling: whether a compiler is at work, or whatever else knows no autograd function.
        dropout: whether the update's input is dropped.
        stride, groups: of a convolution.
    """

    layer: str
    device: Thresholds
    dtype: torch.dtype
    numbers: int
    shape: Sequence[int]
    rank: int
    kernels: Optional[Way] = None
    compiling: bool = False
    dropout: bool = False
    stride: Sequence[int] = ()
    groups: int = 1


def way(asked: Asked) -> Way:
    """How a hard layer is computed. How many launches `Way.KERNELS` then takes of a linear layer
    also depends on a CUDA graph and on the gradients that are wanted, see `launches`."""
    if asked.layer == "experts":
        # nothing smaller to choose: no way of experts forms a dense sum
        return asked.kernels or Way.FACTORED
    # a compiler cannot enter an autograd function with launches; the operator it takes whole
    if asked.dropout and asked.kernels and asked.layer == "linear":
        return Way.OPERATOR if asked.compiling else Way.KERNELS
    if asked.dropout:
        return Way.PLAIN if asked.compiling else Way.DROPPED
    return _linear(asked) if asked.layer == "linear" else _convolution(asked)


def _linear(asked: Asked) -> Way:
    _, device, dtype, numbers, (out, fan_in), rank, kernels, compiling, *_ = asked
    if compiling:
        return Way.OPERATOR if kernels else Way.PLAIN
    if kernels:
        return Way.KERNELS
    if dtype.itemsize <= 2:  # the dense sum rounds a small update away
        return Way.FACTORED
    # what autograd does in C++ is the quicker where Python takes longer than the device
    if tiny(numbers, (out, fan_in), rank, device.tiny):
        return Way.SUM
    if numbers * out < device.brief:
        return Way.PLAIN
    return Way.DENSE if denser(numbers // max(fan_in, 1), fan_in, out, dtype) else Way.FACTORED


def _convolution(asked: Asked) -> Way:
    device, dtype, shape, groups = asked.device, asked.dtype, asked.shape, asked.groups
    low, size, out, inner = dtype.itemsize == 2, prod(shape), shape[0], shape[1] * groups
    if low and not asked.compiling and (asked.kernels is not None or groups == 1):
        # other groups have no kernel for 16 bits but those of single channels
        return asked.kernels or Way.JOINED
    if not low:
        if asked.numbers * size < device.small * inner and size < device.light:
            return Way.SUM  # a layer so small feels each line of Python
        # about as many as outputs: padding and what a kernel cuts off are left out
        tokens = asked.numbers // (inner * prod(asked.stride))
        if groups > 1 or denser(tokens, size // out, out, dtype):
            # in groups a branch repeats A for each, so the dense kernel is formed whatever the
            # tokens
            return Way.SUM if asked.compiling or tokens * size < device.small else Way.DENSE
    return Way.PLAIN if groups == 1 else Way.OWN_KERNEL


@constant_result
def measured(device: int, name: str) -> bool:
    """Whether the table has our kernels for something, "experts" or "dropout", as the faster on a
    CUDA device, by its index; compiled code asks once."""
    return bool(getattr(_thresholds_at(device), name))


def kronecker(
    dtype: torch.dtype, rows: int, shape: Sequence[int], rank: int, compiling: bool
) -> Way:
    """How LoKr beside a linear layer is computed: `Way.LOW_RANK`, `Way.SUM`, `Way.FACTORED` or
    `Way.PLAIN`.

    Args:
        dtype: of x, after autocast.
        rows: of x.
        shape: of the weight.
        rank: of the Kronecker product where our kernels serve a low-rank layer, else 0: elsewhere
            two small products are the faster.
        compiling: as of `Asked`.
    """
    # a rank beyond half of the smaller side has more products than the dense sum
    few, repaid = 2 * rank <= min(shape), REPAID * rank <= rows
    if 0 < rank <= KRONECKER_RANK and few and repaid:
        return Way.LOW_RANK
    if dtype.itemsize > 2 and shape[0] * shape[1] <= SMALL_WEIGHT:
        return Way.SUM
    return Way.PLAIN if compiling else Way.FACTORED


def rescaled(way: Way, compiling: bool) -> Way:
    """How DoRA of a linear layer is computed, whose low-rank layer would be by `way`: rescaled
    behind it (`Way.PLAIN`), or both in one autograd function (but for `Way.SUM`)."""
    return Way.PLAIN if compiling or way is Way.OPERATOR else way


def norms(kernels: bool, rank: int, compiling: bool) -> Way:
    """How the norms of a DoRA are found: `Way.KERNELS`, which read the weight once, or `Way.PLAIN`.

    Args:
        kernels: whether ours serve the operands.
        rank: padded.
        compiling: as of `Asked`.
    """
    return Way.KERNELS if kernels and rank <= NORMS_RANK and not compiling else Way.PLAIN


def embedding(kernels: bool, rank: int) -> Way:
    """How an embedding is computed: `Way.KERNELS`, which sort no indices, or `Way.PLAIN`.

    Args:
        kernels: whether ours serve the operands.
        rank: padded.
    """
    return Way.KERNELS if kernels and rank <= EMBEDDING_RANK else Way.PLAIN


def of_rows(
    dtype: torch.dtype,
    rows: int,
    kernels: Optional[Way],
    compiling: bool,
    dropout: bool = False,
    gradients: bool = True,
) -> Way:
    """How a linear layer is computed whose rows take different updates: `Way.FEW_ROWS`,
    `Way.KERNELS`, `Way.FACTORED`, `Way.DROPPED` or `Way.PLAIN`.

    Args:
        dtype: of x, after autocast.
        rows: of x, all positions.
        kernels: the way in which ours serve the operands, if any; `Way.FEW_ROWS` where also that.
        compiling, dropout: as of `Asked`.
        gradients: whether any are wanted.
    """
    # only in 16 bits does it matter where the one rounding falls
    if dtype.itemsize > 2 or compiling:
        return Way.PLAIN
    if dropout:
        return Way.DROPPED
    if kernels is Way.FEW_ROWS and (gradients or rows > FEW):
        return Way.KERNELS
    return kernels or Way.FACTORED


def of_pairs(
    dtype: torch.dtype, kernels: bool, compiling: bool, dropout: bool, on_cpu: bool
) -> Way:
    """How experts are computed whose rows take different updates: `Way.KERNELS`, `Way.FACTORED` or
    `Way.PLAIN`.

    Args:
        dtype: of x, after autocast.
        kernels: whether ours serve the operands.
        compiling, dropout: as of `Asked`; or where a server's rounding, in between, is wanted.
        on_cpu: elsewhere torch has no grouped product that adds onto a tensor.
    """
    if dtype.itemsize > 2 or compiling:
        return Way.PLAIN
    if kernels and not dropout:
        return Way.KERNELS
    return Way.FACTORED if on_cpu and dtype == torch.bfloat16 else Way.PLAIN


def grouped_serves(x: Tensor, *sizes: int) -> bool:
    """Whether a device's grouped product serves x and what is multiplied by it, of such sizes: it
    takes bfloat16 alone, and ROCm's is another. It then waits for no sizes of the groups."""
    serves = x.is_cuda and x.dtype == torch.bfloat16 and torch.version.hip is None
    return serves and grouped_product is not None and not any(n % ALIGNED for n in sizes)


def dense_gradient(on_cpu: bool, groups: int) -> bool:
    """Whether the gradients of a convolution's factors follow from the dense kernel's; else they
    are four thin convolutions, which a CPU runs badly, and which in groups repeat A for each."""
    return on_cpu or groups > 1


def by_cublas(x: Tensor) -> bool:
    """Whether cuBLAS multiplies x, which in 16 bits rounds before it adds onto a tensor, but gives
    a product in float32; a CPU adds in float32, and ROCm gives no such product."""
    return x.is_cuda and torch.version.hip is None


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
        least: multiplications, see `Thresholds.tiny`.
    """
    out, fan_in = shape
    return (numbers + 3 * (r + 16) * fan_in) * out < least
