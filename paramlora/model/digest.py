"""Some bytes of a base, by which an adapter's file tells another base from its own."""

import math
from collections.abc import Mapping
from typing import Optional

import torch
from torch import Tensor

from paramlora.model.quantised import is_quantised
from paramlora.update.sharded import is_sharded

_COUNT = 16  # neighbouring numbers from the middle of a tensor
_NEAR = 2**-6  # what casting to bfloat16 by way of another type may change, relatively
_LEAST = 2**-23  # between float16's smallest numbers, and what rounding to bfloat16 adds
_MOST = 2.0**16  # float16's largest number in bfloat16; what is beyond it is infinite in the former


def digest(tensor: Tensor) -> Optional[str]:
    """Sixteen numbers of a tensor in bfloat16, as hexadecimal digits; None where it has none to
    give: on the meta device, over several processes, or quantised or stored in eight bits, which
    changes them.

    In bfloat16, because a base may be loaded in another type than it was trained in.
    """
    return digests({"": tensor})[""]


@torch.no_grad()
def digests(tensors: Mapping[str, Tensor]) -> dict[str, Optional[str]]:
    """The `digest` of each; a device is waited for once, however many they are."""
    there: dict[torch.device, list[Tensor]] = {}
    taken = {name: _values(tensor) for name, tensor in tensors.items()}
    some = [values for values in taken.values() if values is not None]
    for values in some:
        there.setdefault(values.device, []).append(values)
    read = {
        device: iter(torch.split(torch.cat(held).cpu(), [len(values) for values in held]))
        for device, held in there.items()
    }
    return {
        name: None if values is None else digits_of(next(read[values.device]))
        for name, values in taken.items()
    }


def _values(tensor: Tensor) -> Optional[Tensor]:
    """The few numbers that a tensor's `digest` is made of, in bfloat16 on its device; None
    without."""
    none = tensor.is_meta or is_sharded(tensor) or is_quantised(tensor) or not tensor.numel()
    if none or tensor.dtype.itemsize == 1:
        return None
    # neighbours: one read of a file, too, whose tensors are not all loaded for it
    some = middle(tensor.numel())
    if tensor.is_contiguous():
        values = tensor.detach().view(-1)[some]
    else:
        # of other strides the elements that are the same in a contiguous one
        flat = torch.arange(some.start, some.stop, device=tensor.device)
        values = tensor.detach()[torch.unravel_index(flat, tensor.shape)]
    return values.to(torch.bfloat16)


def middle(elements: int) -> slice:
    """Which of a tensor's elements tell it from another."""
    start = max(0, elements // 2 - _COUNT // 2)
    return slice(start, min(start + _COUNT, elements))


def digits_of(values: Tensor) -> Optional[str]:
    """The `digest` of a tensor with these elements in its `middle`."""
    if values.dtype.itemsize == 1:
        return None
    bits = values.reshape(-1).to("cpu", torch.bfloat16).view(torch.int16)
    # the bits without a sign: a negative number would have one in its digits
    return "".join(f"{number & 0xFFFF:04x}" for number in bits.tolist())


def others(told: Mapping[str, str], found: Mapping[str, Optional[str]]) -> list[str]:
    """The paths whose tensors are not those that were told of."""
    # what is not found is no proof of another base
    return [path for path, one in told.items() if (own := found.get(path)) and not _near(one, own)]


def _near(one: str, other: str) -> bool:
    pairs = list(zip(_numbers(one), _numbers(other)))
    most = max(max(map(abs, pair)) for pair in pairs)
    # near zero casts are off by more than a share of the number itself
    least = max(_NEAR * most * 2**-6, _LEAST)
    # NaN is like anything: it says nothing of the base
    return len(one) == len(other) and all(
        math.isclose(a, b, rel_tol=_NEAR, abs_tol=least) or a != a for a, b in pairs
    )


def _numbers(text: str) -> list[float]:
    bits = [int(text[at : at + 4], 16) for at in range(0, len(text), 4)]
    # int16 has no numbers from 2**15 on
    signed = torch.tensor([b - (1 << 16) if b >> 15 else b for b in bits], dtype=torch.int16)
    return signed.view(torch.bfloat16).float().clamp(-_MOST, _MOST).tolist()
