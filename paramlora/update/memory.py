"""The bytes of tensors, and whether all of them are numbers."""

import ctypes
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Optional

import torch
from torch import Tensor, nn

from paramlora.update.geometry import FLOATS, MOST_SIDE

_CHUNK = 8 << 20


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied nor kept alive by this."""
    # by the address: numpy has no bfloat16
    place = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(place).cast("B")


def pieces_of(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of any tensor, in pieces."""
    # what only shows another's conjugate or negative is made real
    held = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    content = bytes_of(held) if held.nbytes else memoryview(b"")
    for at in range(0, len(content), _CHUNK):
        yield content[at : at + _CHUNK]


def installed() -> int:
    """The bytes of the machine's memory, or the most that there can be where it does not tell."""
    names = getattr(os, "sysconf_names", {})
    if not {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= names.keys():
        return MOST_SIDE
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


_DEVICES = ("cpu", "cuda")


def runs_of(tensors: Iterable[Tensor]) -> dict[int, tuple[Tensor, int]]:
    """By a tensor's `id` the run that it lies in, and where: tensors that lie near each other in
    one memory, as those that were read of one file, are one flat run with what is between them.
    Others are their own.

    Args:
        tensors: plain ones, on whichever devices; one that is given twice is taken once.
    """
    found: dict[int, tuple[Tensor, int]] = {}
    same = {id(t): t for t in tensors}
    # by type and device first, then by address: neighbours of one storage come together
    by_place = sorted(same.values(), key=lambda t: (str(t.dtype), str(t.device), t.data_ptr()))
    for some in _near_each_other(by_place):
        start, last = int(some[0].storage_offset()), some[-1]
        flat = last.reshape(-1)
        if len(some) > 1:
            # from the first to the last, with the gaps of a file's padding in between
            flat = last.as_strided((last.storage_offset() + last.numel() - start,), (1,), start)
        found.update((id(t), (flat, int(t.storage_offset()) - start)) for t in some)
    return found


def _near_each_other(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in the order of their places, cut where one does not come soon after the last."""
    some: list[Tensor] = []
    before, end = None, 0
    for t in tensors:
        # strided ones are in no flat run
        memory = (t.dtype, t.untyped_storage().data_ptr()) if t.is_contiguous() else None
        # a gap of padding, and no tensor that is left out
        if some and (memory is None or memory != before or not 0 <= t.storage_offset() - end < 64):
            yield some
            some = []
        some.append(t)
        before, end = memory, int(t.storage_offset()) + t.numel()
    if some:
        yield some


def moved(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies of tensors on another device, made by two copies for each type, however many they
    are: one from the host's memory waits for the device. The longest run is copied as it lies, the
    others as one.
    """
    places, out = runs_of(tensors), {}
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        runs = list({id(run): run for run, _ in places.values() if run.dtype == dtype}.values())
        longest = max(runs, key=Tensor.numel)
        rest = [run for run in runs if run is not longest]
        out[id(longest)] = longest.to(device)
        if rest:
            parts = torch.split(torch.cat(rest).to(device), [run.numel() for run in rest])
            out.update((id(run), part) for run, part in zip(rest, parts))
    taken = ((t, out[id(run)], at) for t in tensors for run, at in [places[id(t)]])
    return [run[at : at + t.numel()].view(t.shape) for t, run, at in taken]


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds anything that is not finite: a thousand are asked at once, and those
    of one file as one. Those on the meta device hold nothing."""
    held = [t.detach() for t in tensors if t.numel() and not t.is_meta]
    # other devices and classes have no such functions
    if any(type(t) is not Tensor or t.device.type not in _DEVICES for t in held):
        return largest(held) is not None
    runs = list({id(run): run for run, _ in runs_of(held).values()}.values())
    # what is between them may be anything
    return largest(runs) is not None or len(runs) < len(held) and largest(held) is not None


def largest(tensors: Iterable[Tensor]) -> Optional[float]:
    """What no size of an element of their floats is above; infinite where it is only known that
    they are finite, and None where they are not. A device is waited for once for a thousand."""
    held = [t.detach() for t in tensors if t.numel() and (t.is_floating_point() or t.is_complex())]
    # torch takes no mixture of plain and sharded ones
    if any(
        type(t) is not Tensor or t.dtype not in FLOATS or t.device.type not in _DEVICES
        for t in held
    ):
        # infinite: only that all are finite is known
        return math.inf if all(bool(torch.isfinite(t).all()) for t in held) else None
    host, device = ([t for t in held if t.is_cpu is here] for here in (True, False))
    numbers = [*_largest_on_host(host), _largest_on_device(device)]
    return max(numbers) if all(map(math.isfinite, numbers)) else None


def _largest_on_host(tensors: Iterable[Tensor]) -> list[float]:
    """For each type the largest size of a number in tensors of the host: by their least and largest
    numbers, in a sixth of a norm's time; NaN where there is one."""
    extremes: dict[torch.dtype, list[Tensor]] = {}
    for t in tensors:
        once = t if t.is_contiguous() else _once(t)
        # 0-dimensional ones are their own least and largest
        extremes.setdefault(t.dtype, []).extend(torch.aminmax(once) if t.dim() else (t,))
    return [float(torch.stack(some).abs().max()) for some in extremes.values()]


def _once(tensor: Tensor) -> Tensor:
    """A view of an expanded tensor without the numbers that it repeats, which torch would copy."""
    sizes = [size if step else 1 for size, step in zip(tensor.shape, tensor.stride())]
    return tensor.as_strided(sizes, tensor.stride(), tensor.storage_offset())


def _largest_on_device(tensors: list[Tensor]) -> float:
    """The largest size of a number in tensors of a device: by a norm, for which a few kernels read
    a thousand of them."""
    # of nothing the norm is no tensor in older versions
    return float(nn.utils.get_total_norm(tensors, math.inf, foreach=True)) if tensors else 0.0
