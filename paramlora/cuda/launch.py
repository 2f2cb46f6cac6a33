"""One kernel's launch: all but its tensors is settled once for each kind of them.

Triton's own launch studies every argument again and takes longer than a small layer.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from paramlora.cuda.native.handed import launcher
from paramlora.errors import warn
from paramlora.update.compat import cuda_device, cuda_stream

Layout = tuple[list[int], ...]  # of a matrix: its shape, its strides, and the shape of a block


# a `TensorDescriptor` checks strides and alignment in Python at each launch; a plan did so once
class Block:
    """What Triton reads of a `TensorDescriptor`, without its checks."""

    __slots__ = ("base", "block_shape", "padding", "round_f32_to_tf32", "shape", "strides")

    def __init__(self, base: Tensor, layout: Layout) -> None:
        self.base, self.padding = base, "zero"
        self.shape, self.strides, self.block_shape = layout
        self.round_f32_to_tf32 = False  # read by Triton 3.7 and later


_TRUSTED: dict[Any, Any] = {}  # of kernels, by all that Triton specialises on: how to launch them
_warned = False
_TICKETS: dict[tuple[int, int], Tensor] = {}  # by device and stream


class Launch:
    """One kernel with its grid and all of its arguments that are no tensors.

    These are given by the kernel's own names and put into its order once, when a plan is made. What
    changes from call to call stays in the kernel's order: to look names up there would take a step
    longer on the host.

    The first launch of each kind is Triton's own, and shows whether this class would have handed
    over the same; if not, as with a Triton whose inside has changed, all are Triton's own. Kinds
    are told apart by all that Triton specialises on: types, whether addresses are multiples of 16,
    and whether integers are 1, multiples of 16, or wide.
    """

    def __init__(
        self,
        kernel: Any,
        device: int,
        grid: int,
        *,
        numbers: Mapping[str, int],
        constants: Mapping[str, Any],
        stages: int,
        warps: int,
        early: bool = False,
        layouts: tuple[Layout, ...] = (),
    ) -> None:
        self.kernel, self.device, self.grid = kernel, device, grid
        # of the first arguments, where the tensor memory engine loads them
        self.layouts = layouts
        # pointers and values come first, so that all that is settled is one tail
        self.ahead, *names = _named(kernel, (*numbers,), (*constants,))
        self.numbers, self.constants = map(_in_order, (numbers, constants), names)
        self.tail = (*self.numbers, *self.constants)
        self.options: dict[str, Any] = {"num_stages": stages, "num_warps": warps}
        if early:  # may start before the kernel ahead ends (programmatic dependent launch)
            self.options["launch_pdl"] = True
        self.run: Any = None
        self.head: tuple[Any, ...] = ()
        self.compiled: Any = None  # the kernel, from the second launch of its kind on
        self.by_driver: Any = None  # the launch without Triton, see `native.handed.launcher`

    def __call__(
        self,
        pointers: tuple[Tensor, ...],
        addresses: tuple[int, ...],
        values: tuple[float, ...] = (),
    ) -> None:
        """Launch on the current stream.

        Args:
            pointers: tensors that tell the types and alignments of the addresses. The first ones,
                as many as there are `layouts`, are described to the tensor memory engine.
            addresses: what the kernel gets; of what is described, that of the tensor itself.
            values: numbers that change from call to call.
        """
        if self.run is None and not self._is_ready(pointers, addresses, values):
            return
        stream = cuda_stream(self.device)
        if self.by_driver is not None:
            self.by_driver(stream, *addresses, *values)
            return
        start = (self.grid, 1, 1, stream, *self.head)
        self.run(*start, *self._arguments(pointers, addresses, values))

    def _arguments(
        self, pointers: tuple[Tensor, ...], addresses: tuple[int, ...], values: tuple[float, ...]
    ) -> tuple[Any, ...]:
        """All of the kernel's, as its compiled function takes them."""
        blocks = map(Block, pointers, self.layouts)
        return (*blocks, *addresses[len(self.layouts) :], *values, *self.tail)

    def _is_ready(
        self, pointers: tuple[Tensor, ...], addresses: tuple[int, ...], values: tuple[float, ...]
    ) -> bool:
        """Whether it is known how to launch; if not, it was launched by Triton."""
        if len(pointers) + len(values) != len(self.ahead):
            raise TypeError(
                f"the launch of {_name_of(self.kernel)}: ahead of its numbers it takes "
                f"{', '.join(self.ahead)}, but is called with {len(pointers)} pointers and "
                f"{len(values)} values"
            )
        # plans of one kind share what Triton compiled: only the first of them tries it
        kind = self._kind(pointers)
        if kind not in _TRUSTED:
            _TRUSTED[kind] = self._tried(pointers, addresses, values)
            return False
        if _TRUSTED[kind] is None:
            self._by_triton(pointers, addresses, values)
            return False
        self.compiled, self.head = _TRUSTED[kind]
        self.run = self.compiled.run
        kinds = (*map(type, addresses), *map(type, values))
        self.by_driver = launcher(self.compiled, self.grid, self.layouts, kinds, self.tail)
        return True

    def _kind(self, pointers: tuple[Tensor, ...]) -> tuple[Any, ...]:
        return (
            self.kernel,
            self.device,
            tuple(t.dtype for t in pointers),
            tuple(t.data_ptr() & 15 == 0 for t in pointers),
            # of an integer Triton compiles in that it is 1 or a multiple of 16, and 32 or 64 bits
            tuple((n == 1, n & 15 == 0, n >> 31 != 0) for n in self.numbers),
            self.constants,
            *self.options.items(),
        )

    def _by_triton(
        self, pointers: tuple[Tensor, ...], addresses: tuple[int, ...], values: tuple[float, ...]
    ) -> Any:
        """Launch as Triton does, which takes tensors: the compiled kernel."""
        count = len(self.layouts)
        placed = (*pointers[:count], *map(_from, pointers[count:], addresses[count:]))
        return self.kernel[(self.grid,)](*self._as_tensors(placed, values), **self.options)

    def _as_tensors(self, pointers: tuple[Tensor, ...], values: tuple[float, ...]) -> Any:
        """All of the kernel's arguments as Triton's own launch takes them."""
        described = [TensorDescriptor(t, *layout) for t, layout in zip(pointers, self.layouts)]
        return *described, *pointers[len(described) :], *values, *self.tail

    def _tried(
        self, pointers: tuple[Tensor, ...], addresses: tuple[int, ...], values: tuple[float, ...]
    ) -> Optional[tuple[Any, tuple[Any, ...]]]:
        """Launch as Triton does: the compiled kernel, and what its launcher takes between the
        stream and the arguments; or None where Triton hands over something else than `__call__`
        would."""
        # by the tensors, not the places in them: by their types and alignments, as `_kind`
        arguments = self._as_tensors(pointers, values)
        compiled = self.kernel.warmup(*arguments, grid=(self.grid,), **self.options)
        with _recorded(compiled) as calls:
            self._by_triton(pointers, addresses, values)
        try:
            # metadata for profilers and the hooks before and after stay None, see `_OWN`
            head = (compiled.function, compiled.packed_metadata, None, None, None)
            start = (self.grid, 1, 1, cuda_stream(self.device), *head)
            if _same((*start, *self._arguments(pointers, addresses, values)), calls):
                return compiled, head
        except AttributeError:  # of a Triton that names them otherwise
            pass
        _warn()
        return None


@functools.cache  # a kernel has a plan for each shape, and the names of all are the same
def _named(
    kernel: Any, numbers: tuple[str, ...], constants: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The parameters of a kernel in its order: those ahead of its numbers, the numbers, and the
    constants, each of which is given exactly once."""
    names = list(kernel.arg_names)
    compiled_in = [n for n in names if kernel.fn.__annotations__.get(n) is tl.constexpr]
    others = [n for n in names if n not in compiled_in]
    # ahead of the first number are pointers and values, whose count `_is_ready` looks at
    first = min((others.index(n) for n in numbers if n in others), default=len(others))
    given = (*numbers, *constants)
    faults = [
        *(f"it has no {n}" for n in given if n not in names),
        *(f"{n} is missing" for n in (*others[first:], *compiled_in) if n not in given),
        *(f"{n} is given twice" for n in numbers if n in constants),
        *(f"{n} is a constant" for n in numbers if n in compiled_in),
        *(f"{n} is no constant" for n in constants if n in others),
        *(f"{n} comes before a number" for n in compiled_in if n in names[: len(others)]),
    ]
    if faults:
        raise TypeError(f"the launch of {_name_of(kernel)}: {', '.join(faults)}")
    return tuple(others[:first]), tuple(others[first:]), tuple(compiled_in)


def _in_order(given: Mapping[str, Any], names: Iterable[str]) -> tuple[Any, ...]:
    return tuple(given[name] for name in names)


def _name_of(kernel: Any) -> str:
    return f"{kernel.fn.__module__}.{kernel.fn.__name__}"


def along(prefix: str, axes: Iterable[str], numbers: Iterable[int]) -> dict[str, int]:
    """A number for each axis by the names of a kernel's parameters, such as `stride_xm` and
    `stride_xk` of ``along("stride_x", "mk", x.stride())``."""
    return {prefix + axis: number for axis, number in zip(axes, numbers, strict=True)}


@contextmanager
def _recorded(compiled: Any) -> Iterator[list[tuple[Any, ...]]]:
    """The arguments of each launch of a compiled kernel, as Triton hands them over."""
    calls: list[tuple[Any, ...]] = []
    # `run` is a property that loads the kernel onto the device and keeps its launcher as `_run`
    run = getattr(compiled, "run", None)

    def record(*given: Any) -> None:
        calls.append(given)
        run(*given)  # type: ignore[misc]

    if run is None or getattr(compiled, "_run", None) is not run:
        yield calls
        return
    compiled._run = record
    try:
        yield calls
    finally:
        compiled._run = run


_OWN = slice(6, 9)  # metadata for profilers and their two hooks, which ours leaves out


def _same(ours: tuple[Any, ...], calls: list[tuple[Any, ...]]) -> bool:
    """Whether Triton launched once, and handed over what ours would."""
    if len(calls) != 1 or len(calls[0]) != len(ours):
        return False
    pairs = list(zip(ours, calls[0]))
    del pairs[_OWN]
    return all(_equal(one, other) for one, other in pairs)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(other, Tensor):
        return bool(one == other.data_ptr())
    if isinstance(one, Block):
        fields = ("shape", "strides", "block_shape", "padding")
        told = [list(getattr(one, f)) == list(getattr(other, f, ())) for f in fields]
        return all(told) and one.base.data_ptr() == other.base.data_ptr()
    return bool(one is other or one == other)


def _from(tensor: Tensor, address: int) -> Tensor:
    """The rest of a tensor's memory from an address in it on."""
    # Triton takes an address from a tensor alone, and ours may lie inside of one, such as `kept`
    skipped = (address - tensor.data_ptr()) // tensor.element_size()
    left = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    return tensor.as_strided((left - skipped,), (1,), tensor.storage_offset() + skipped)


def _warn() -> None:
    global _warned
    if not _warned:
        _warned = True
        warn(
            f"Triton {triton.__version__} launches kernels otherwise than paramlora knows, so its "
            "own launch is used, which takes the host longer. The numbers are the same."
        )


def distrusted() -> bool:
    """Whether this Triton launches otherwise than `Launch` knows."""
    return _warned


def tickets(like: Tensor) -> Tensor:
    """The count of programs that have started of the grid that now runs on the current stream; zero
    between grids, so kernels of one stream, which never run beside each other, share it.

    `like`: a tensor on the current device. Not for a CUDA graph, whose replays choose their stream.
    """
    device = like.get_device()
    place = device, cuda_stream(device)
    if place not in _TICKETS:
        _TICKETS[place] = outside_of_pools(lambda: _zero(like.device))
    return _TICKETS[place]


def outside_of_pools(make: Callable[[], Tensor]) -> Tensor:
    """What `make` allocates, in a thread of its own: steps that warm up for a CUDA graph have all
    that their thread allocates in the graph's pool, where nothing may outlive them."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


def _zero(device: torch.device) -> Tensor:
    """A count that is zero before any stream's kernel draws from it."""
    count = torch.zeros(1, dtype=torch.int32, device=device)
    count.item()  # waits for the memory to be cleared
    return count


def changed(named: str, tensors: tuple[Tensor, ...]) -> ValueError:
    """What to raise where a backward is not given what its forward had: kernels take addresses."""
    described = ", ".join(f"{t.dtype} {list(t.shape)} on {t.device}" for t in tensors)
    return ValueError(
        f"{named} do not belong together ({described}): did one of them change after the forward? "
        "Run the forward again"
    )


def planned(
    plans: dict[Any, Any],
    tensors: tuple[Tensor, ...],
    rest: tuple[Any, ...],
    plan_of: Callable[[tuple[int, ...]], Any],
) -> tuple[Any, tuple[int, ...]]:
    """The plan for tensors of such shapes, types, strides, devices and alignments, made where it is
    the first of its kind; and their addresses.

    Args:
        plans: those that were made. Forgotten before a run of ever new shapes fills the memory.
        tensors: all that the plan depends on.
        rest: what else it depends on.
        plan_of: makes a plan, from the addresses.
    """
    # in one loop that calls no function of Python: it takes longer than all else before a launch
    addresses: list[int] = []
    odd, about = 0, [*rest]
    for t in tensors:
        address = t.data_ptr()
        # by all addresses at once: nearly all are multiples of 16, and then tell no kinds apart
        odd |= address
        addresses.append(address)
        about += (t.shape, t.dtype, t.stride(), t.get_device())
    if odd & 15:
        about += [address & 15 for address in addresses]
    key, places = tuple(about), tuple(addresses)
    # its own default: a plan may well be None
    plan = plans.get(key, plans)
    if plan is plans:
        if len(plans) >= 4096:
            plans.clear()
        _ready_for_capture()
        plan = plans[key] = plan_of(places)
    return plan, places


def _ready_for_capture() -> None:
    """Have this thread's handle of cuBLAS made, which no CUDA graph may be asked to make.

    A captured step takes cuBLAS for a thin product where the steps before it, which warm up for it,
    took one grid of programs that wait for each other.
    """
    if torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_blas_handle()  # type: ignore[no-untyped-call]


def on_its_device(call: Callable[..., Any]) -> Callable[..., Any]:
    """A function that launches, called with the device of its first tensor as the current one:
    Triton launches there, whatever device its arguments are on."""

    @functools.wraps(call)
    def called(first: Any, *others: Any, **named: Any) -> Any:
        device = (first if isinstance(first, Tensor) else first[0]).get_device()
        if device == cuda_device():
            return call(first, *others, **named)
        with torch.cuda.device(device):
            return call(first, *others, **named)

    return called
