"""One kernel's launch: all but its tensors is settled once for each kind of them.

Triton's own launch studies every argument again and takes longer than a small layer.
"""

from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from paramlora.update.compat import cuda_stream


class Block:
    """What a launch reads of a `TensorDescriptor`, without its checks."""

    __slots__ = ("base", "block_shape", "padding", "round_f32_to_tf32", "shape", "strides")

    def __init__(self, base: Tensor, layout: tuple[list[int], ...]) -> None:
        self.base, self.padding = base, "zero"
        self.shape, self.strides, self.block_shape = layout
        self.round_f32_to_tf32 = False  # read by Triton 3.7 and later


_COMPILED: dict[Any, Any] = {}  # kernels, by all that Triton specialises on


class Launch:
    """One kernel with its grid and all of its arguments that are no tensors.

    Compiled kernels are told apart by all that Triton specialises on: types, whether addresses are
    multiples of 16, and whether integers are 1, multiples of 16, or wide.
    """

    def __init__(
        self,
        kernel: Any,
        device: int,
        grid: int,
        numbers: tuple[int, ...],
        constants: tuple[Any, ...],
        stages: int,
        warps: int,
        early: bool = False,
        checked: bool = False,
    ) -> None:
        self.kernel, self.device, self.grid = kernel, device, grid
        self.numbers, self.constants, self.tail = numbers, constants, (*numbers, *constants)
        self.options: dict[str, Any] = {"num_stages": stages, "num_warps": warps}
        if early:  # may start before the kernel ahead ends (programmatic dependent launch)
            self.options["launch_pdl"] = True
        if checked:  # compiled with its own assertions, but not Triton's of every integer
            self.options.update(debug=True, sanitize_overflow=False)
        self.run: Any = None
        self.head: tuple[Any, ...] = ()

    def __call__(
        self,
        pointers: tuple[Tensor, ...],
        addresses: tuple[int, ...],
        values: tuple[float, ...] = (),
        blocks: tuple[Block, ...] = (),
    ) -> None:
        """Launch on the current stream; the kernel takes the blocks first, then the rest.

        Args:
            pointers: tensors that tell the types and alignments of the addresses.
            addresses: what the kernel gets.
            values: numbers that change from call to call.
            blocks: for the tensor memory engine.
        """
        if self.run is None:
            self._compile(pointers, values, blocks)
        stream = cuda_stream(self.device)
        self.run(
            self.grid, 1, 1, stream, *self.head, *blocks, *addresses, *values, *self.tail
        )  # fmt: skip

    def _compile(
        self, pointers: tuple[Tensor, ...], values: tuple[float, ...], blocks: tuple[Block, ...]
    ) -> None:
        kind = (
            self.kernel,
            self.device,
            tuple(t.dtype for t in pointers),
            tuple(t.data_ptr() & 15 == 0 for t in pointers),
            tuple((n == 1, n & 15 == 0, n >> 31 != 0) for n in self.numbers),
            self.constants,
            *self.options.items(),
        )
        if kind not in _COMPILED:
            described = [
                TensorDescriptor(b.base, b.shape, b.strides, b.block_shape) for b in blocks
            ]
            arguments = (*described, *pointers, *values, *self.tail)
            _COMPILED[kind] = self.kernel.warmup(*arguments, grid=(self.grid,), **self.options)
        compiled = _COMPILED[kind]
        run = compiled.run  # which loads the kernel: only then there is a function
        self.head = (compiled.function, compiled.packed_metadata, None, None, None)
        self.run = run


def changed(named: str, tensors: tuple[Tensor, ...]) -> ValueError:
    """What to raise where a backward is not given what its forward had: kernels take addresses."""
    described = ", ".join(f"{t.dtype} {list(t.shape)} on {t.device}" for t in tensors)
    return ValueError(
        f"{named} do not belong together ({described}): did one of them change after the forward? "
        "Run the forward again"
    )


def bound(held: dict[Any, Any]) -> None:
    """Forget shapes before a run of ever new ones fills the host's memory."""
    if len(held) >= 4096:
        held.clear()


_HOPPER: dict[int, bool] = {}


def is_hopper(device: int) -> bool:
    """Whether the device has the tensor memory engine, lets a kernel start before the one ahead
    ends, and has the shared memory of the tiles that use them: Hopper and Blackwell for data
    centres, not for games (12.0)."""
    if device not in _HOPPER:
        _HOPPER[device] = (9, 0) <= torch.cuda.get_device_capability(device) < (12, 0)
    return _HOPPER[device]
