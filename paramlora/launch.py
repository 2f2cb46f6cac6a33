"""Which kernel computes what, in which tiles, and its launch; imported only for 16-bit CUDA.

Everything works without Triton, and so without this file.
"""

from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from paramlora import kernels

WIDEST = 64  # above this rank the thin products go to cuBLAS, which is efficient there


class Tiling(NamedTuple):
    """The tile of a product, Triton's stages and warps, and whether the tensor memory engine
    loads it."""

    BM: int
    BN: int
    BK: int
    GROUP: int
    stages: int
    warps: int
    tma: bool


def tiling(M: int, N: int, K: int, aligned: bool) -> Tiling:
    """The table of choices, measured on an H200 with torch 2.11 and Triton 3.6.

    `aligned`: the device has the engine, and its rules on addresses and strides are met.
    """
    if not aligned:
        return (
            Tiling(64, 64, 64, 8, 4, 4, False) if M <= 512 else Tiling(128, 128, 64, 8, 3, 8, False)
        )
    if M <= 512:
        return Tiling(64, 64, 128, 8, 3, 4, True)
    if M <= 2048 and N <= 2048:
        return Tiling(64, 256, 64, 8, 4, 4, True)
    if N <= 512:
        few = Tiling(128, 128, 64, 8, 3, 8, False)
        return few if K <= 512 else Tiling(128, 128, 64, 8, 4, 4, True)
    if -(-M // 128) * -(-N // 256) >= 90:
        return Tiling(128, 256, 64, 16, 3, 8, True)
    return Tiling(64, 128, 64, 8, 4, 4, True)


def fuses(M: int, N: int, R: int) -> bool:
    """Whether `matmul` computes p inside: R more columns for each column of tiles, against a
    launch and a read of x; measured like `tiling`."""
    return R <= 16 and (M <= 512 or N <= 1024 or (M <= 2048 and N <= 2048))


def padded(r: int) -> int:
    """The rank that tensor cores take: a power of two of at least 16."""
    return max(16, 1 << (r - 1).bit_length())


class _Block:
    """What a launch reads of a `TensorDescriptor`, without its checks."""

    __slots__ = ("base", "block_shape", "padding", "shape", "strides")

    def __init__(self, base: Tensor, block: list[int]) -> None:
        self.base, self.block_shape, self.padding = base, block, "zero"
        self.shape, self.strides = base.shape, base.stride()


class Launcher:
    """One kernel, compiled once for each kind of arguments.

    Triton's own launch studies every argument again and takes longer than a small layer; here a
    short key of all that it would look at finds the compiled kernel: types, whether addresses are
    multiples of 16, and whether integers are 1, multiples of 16, or wide.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.compiled = kernel, dict[Any, Any]()

    def __call__(
        self,
        grid: tuple[int, int],
        pointers: tuple[Tensor, ...],
        numbers: tuple[int, ...],
        constants: tuple[Any, ...],
        options: tuple[int, int],
        blocks: tuple[_Block, ...] = (),
        strength: tuple[float, ...] = (),
    ) -> None:
        device = pointers[0].get_device()
        addresses = [t.data_ptr() for t in pointers]
        key = (
            device,
            tuple([t.dtype for t in pointers]),
            tuple([a & 15 == 0 for a in addresses]),
            tuple([(n == 1) + 2 * (n & 15 == 0) + 4 * (n >> 31) for n in numbers]),
            constants,
            options,
        )
        compiled = self.compiled.get(key)
        if compiled is None:
            described = [TensorDescriptor.from_tensor(b.base, b.block_shape) for b in blocks]
            self.compiled[key] = self.kernel[grid](
                *described, *pointers, *strength, *numbers, *constants,
                num_stages=options[0], num_warps=options[1],
            )  # fmt: skip
            return
        stream = torch._C._cuda_getCurrentRawStream(device)
        compiled.run(
            *grid, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
            *blocks, *addresses, *strength, *numbers, *constants,
        )  # fmt: skip


_MATMUL, _MATMUL_TMA = Launcher(kernels.matmul), Launcher(kernels.matmul_tma)
_PACK, _PROJECT = Launcher(kernels.pack), Launcher(kernels.project)
_OUTER, _REDUCE = Launcher(kernels.outer), Launcher(kernels.reduce)


def pack(
    lora_A: Tensor, lora_B: Tensor, scale: Tensor, strength: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``A[R, in]`` and ``strength · scale · B.T[R, out]`` in `dtype`, padded with zeros."""
    (r, fan_in), out = lora_A.shape, lora_B.shape[0]
    R = padded(r)
    a, b = lora_A.new_empty((R, fan_in), dtype=dtype), lora_B.new_empty((R, out), dtype=dtype)
    BD = max(16, 2048 // R)
    _PACK(
        (-(-fan_in // BD) + -(-out // BD), 1),
        (lora_A, lora_B, scale, a, b),
        (fan_in, out, r, *lora_A.stride(), *lora_B.stride()),
        (R, BD),
        (1, 4),
        strength=(strength,),
    )
    return a, b


def matmul(
    x: Tensor, w: Tensor, f: Tensor, q: Tensor, bias: Optional[Tensor] = None
) -> tuple[Tensor, Tensor]:
    """``y = x @ w + p @ q + bias`` with one rounding, and ``p = x @ f.T``.

    Args:
        x: ``[M, K]``, 16-bit, rows contiguous.
        w: ``[K, N]``, 16-bit, any strides of which one is 1.
        f: ``[R, K]`` of `pack`.
        q: ``[R, N]`` of `pack`.
        bias: ``[N]``.

    Returns:
        ``y[M, N]`` and ``p[M, R]``.
    """
    (M, K), N, R = x.shape, w.shape[1], f.shape[0]
    y = x.new_empty((M, N))
    if M == 0:
        return y, x.new_empty((0, R))
    x_row, (w_k, w_n) = x.stride(0), w.stride()
    rows_out = w_k == 1
    strides = K | N | x_row | (w_n if rows_out else w_k)
    aligned = not strides & 7 and not (x.data_ptr() | w.data_ptr()) & 15 and _engine(x)
    BM, BN, BK, group, stages, warps, tma = tiling(M, N, K, aligned)
    fused = fuses(M, N, R)
    p = x.new_empty((M, R)) if fused else project(x, f)
    grid = (-(-M // BM) * -(-N // BN), 1)
    rest = (p, q, p if bias is None else bias)
    tiles = (R, min(R, 32), BM, BN, BK, group)
    if tma:
        blocks = (
            _Block(x, [BM, BK]),
            _Block(w.t(), [BN, BK]) if rows_out else _Block(w, [BK, BN]),
            _Block(f, [R if fused else 16, BK]),
            _Block(y, [BM, BN // 2]),
        )
        flags = (fused, bias is not None, rows_out)
        _MATMUL_TMA(grid, rest, (M, N, K), (*flags, *tiles), (stages, warps), blocks)
    else:
        flags = (fused, bias is not None, K % BK == 0)
        numbers = (M, N, K, x_row, w_k, w_n)
        _MATMUL(grid, (x, w, f, y, *rest), numbers, (*flags, *tiles), (stages, warps))
    return y, p


_ENGINES: dict[int, bool] = {}


def _engine(x: Tensor) -> bool:
    """Whether the tensor's device has the tensor memory engine: Hopper and later."""
    device = x.get_device()
    if device not in _ENGINES:
        _ENGINES[device] = torch.cuda.get_device_capability(device) >= (9, 0)
    return _ENGINES[device]


def project(x: Tensor, f: Tensor) -> Tensor:
    """``x[M, K] @ f[R, K].T``, in x's type."""
    (M, K), R = x.shape, f.shape[0]
    if R > WIDEST or M == 0:
        return x @ f.t()
    p = x.new_empty((M, R))
    BM, BK = (64, 128) if M >= 8192 else (32, 128) if M >= 2048 else (16, 256)
    numbers, constants = (M, K, x.stride(0)), (K % BK == 0, R, BM, BK)
    _PROJECT((-(-M // BM), 1), (x, f, p), numbers, constants, (4, 4))
    return p


def outer(
    x: Tensor,
    v: Tensor,
    dy: Tensor,
    u: Tensor,
    r: int,
    scale: Optional[Tensor] = None,
    strength: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The factors' gradients in float32: ``(v.T @ x)[r, in]``, ``scale · (dy.T @ u)[out, r]``.

    Without a scale the second is left unscaled.
    """
    (M, fan_in), out, R = x.shape, dy.shape[1], v.shape[1]
    if R > WIDEST or M == 0:
        da = torch.mm(v[:, :r].t(), x, out_dtype=torch.float32)
        db = torch.mm(dy.t(), u[:, :r], out_dtype=torch.float32)
        return da, db if scale is None else db * (scale * strength)
    da = x.new_empty((r, fan_in), dtype=torch.float32)
    db = x.new_empty((out, r), dtype=torch.float32)
    BD, BM = 128, 64
    blocks = -(-fan_in // BD) + -(-out // BD)
    groups = max(1, min(-(-M // (4 * BM)), -(-528 // blocks)))
    rows = -(-M // groups // BM) * BM if groups > 1 else M
    part = da if groups == 1 else da.new_empty((groups, fan_in + out, R))
    scaled, factor = scale is not None, part if scale is None else scale
    _OUTER(
        (blocks, groups),
        (x, v, dy, u, part, da, db, factor),
        (M, fan_in, out, r, x.stride(0), dy.stride(0), rows),
        (groups == 1, scaled, R, BM, BD),
        (4, 4),
        strength=(strength,),
    )
    if groups > 1:
        grid, numbers = (-(-(fan_in + out) // 32), 1), (fan_in, out, r, groups)
        _REDUCE(
            grid, (part, da, db, factor), numbers, (scaled, R, 32), (1, 4), strength=(strength,)
        )
    return da, db
