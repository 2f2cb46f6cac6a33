"""The bytes of tensors, and whether all of them are numbers."""

import ctypes
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

_CHUNK = 8 << 20


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied nor kept alive by this."""
    place = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(place).cast("B")


def pieces_of(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of any tensor, in pieces."""
    held = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    whole = bytes_of(held) if held.nbytes else memoryview(b"")
    for at in range(0, len(whole), _CHUNK):
        yield whole[at : at + _CHUNK]


_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_DEVICES = ("cpu", "cuda")


def runs_of(tensors: Iterable[Tensor]) -> dict[int, tuple[Tensor, int]]:
    """By a tensor's `id` the run that it lies in, and where: tensors that lie one behind the other
    in one memory, as those that were read of one file, are one flat run. Others are their own.

    Args:
        tensors: plain ones, on whichever devices; one that is given twice is taken once.
    """
    found: dict[int, tuple[Tensor, int]] = {}
    same = {id(t): t for t in tensors}
    by_place = sorted(same.values(), key=lambda t: (str(t.dtype), str(t.device), t.data_ptr()))
    for some in _behind_each_other(by_place):
        first, ends = some[0], [*accumulate(t.numel() for t in some)]
        flat = first.reshape(-1)
        if len(some) > 1:
            flat = first.as_strided((ends[-1],), (1,), first.storage_offset())
        found.update((id(t), (flat, end - t.numel())) for t, end in zip(some, ends))
    return found


def _behind_each_other(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in the order of their places, cut where one does not follow the one before."""
    some: list[Tensor] = []
    end: object = None
    for t in tensors:
        memory, solid = t.untyped_storage().data_ptr(), t.is_contiguous()
        if some and (not solid or end != (t.dtype, memory, t.storage_offset())):
            yield some
            some = []
        some.append(t)
        end = (t.dtype, memory, t.storage_offset() + t.numel()) if solid else None
    if some:
        yield some


def moved(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The same on another device, by two copies for each type, however many they are: a copy from
    the host's memory waits for the device. The longest run is copied as it lies, the others as one.
    """
    places, out = runs_of(tensors), {}
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        runs = list({id(run): run for run, _ in places.values() if run.dtype == dtype}.values())
        longest = max(runs, key=Tensor.numel)
        rest = [run for run in runs if run is not longest]
        out[id(longest)] = longest.to(device)
        if rest:
            parts = torch.cat(rest).to(device).split([run.numel() for run in rest])
            out.update((id(run), part) for run, part in zip(rest, parts))
    taken = ((t, out[id(run)], at) for t in tensors for run, at in [places[id(t)]])
    return [whole[at : at + t.numel()].view(t.shape) for t, whole, at in taken]


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds anything that is not finite: a thousand are asked at once."""
    held = [t.detach() for t in tensors if t.numel()]
    # torch takes no mixture of plain and sharded ones
    if any(
        type(t) is not Tensor or t.dtype not in _FLOATS or t.device.type not in _DEVICES
        for t in held
    ):
        return all(bool(torch.isfinite(t).all()) for t in held)
    held = list({id(run): run for run, _ in runs_of(held).values()}.values())
    # of nothing the norm is no tensor in older versions
    largest = nn.utils.get_total_norm(held, math.inf, foreach=True) if held else 0.0
    return math.isfinite(largest)
