"""Which kernel computes what, in which tiles, and its launch; imported only for 16-bit CUDA.

Everything works without Triton, and so without this file.
"""

from collections.abc import Callable
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
        few = Tiling(64, 64, 64, 8, 4, 4, False)
        return few if M <= 512 else Tiling(128, 128, 64, 8, 3, 8, False)
    # describing blocks to the engine takes longer on the host than it saves in a small product
    small = M * N * K < 2**32
    if M <= 512:
        pointers = small and K < 2048
        return (
            Tiling(64, 64, 64, 8, 4, 4, False) if pointers else Tiling(64, 64, 128, 8, 3, 4, True)
        )
    if N <= 512 and K <= 512:
        return Tiling(128, 128, 64, 8, 3, 8, False)
    if small:
        return Tiling(64, 128, 64, 8, 3, 4, False)
    if M <= 2048 and N <= 2048:
        return Tiling(64, 256, 64, 8, 4, 4, True)
    if N <= 512:
        return Tiling(128, 128, 64, 8, 4, 4, True)
    if -(-M // 128) * -(-N // 256) >= 90:
        return Tiling(128, 256, 64, 16, 3, 8, True)
    return Tiling(64, 128, 64, 8, 4, 4, True)


def fuses(M: int, N: int, R: int) -> bool:
    """Whether `matmul` computes p inside: R more columns for each column of tiles, against a
    launch and a read of x; measured like `tiling`."""
    return R <= 16 and (M <= 512 or N <= 1024 or (M <= 2048 and N <= 2048))


class _Block:
    """What a launch reads of a `TensorDescriptor`, without its checks."""

    __slots__ = ("base", "block_shape", "padding", "shape", "strides")

    def __init__(self, base: Tensor, block: list[int]) -> None:
        self.base, self.block_shape, self.padding = base, block, "zero"
        self.shape, self.strides = base.shape, base.stride()


class _Plan(NamedTuple):
    """All that a launch needs but its pointers and its strength."""

    grid: tuple[int, int]
    numbers: tuple[int, ...]
    constants: tuple[Any, ...]
    stages: int
    warps: int


class Launcher:
    """One kernel, compiled once for each kind of arguments.

    Triton's own launch studies every argument again and takes longer than a small layer; here a
    key that the caller knows finds the plan and the compiled kernel. Kernels are told apart by all
    that Triton specialises on: types, whether addresses are multiples of 16, and whether integers
    are 1, multiples of 16, or wide.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.known: dict[Any, tuple[Any, _Plan]] = {}
        self.compiled: dict[Any, Any] = {}

    def __call__(
        self,
        key: tuple[Any, ...],
        plan: Callable[[], _Plan],
        pointers: tuple[Tensor, ...],
        strength: tuple[float, ...] = (),
        blocks: tuple[_Block, ...] = (),
    ) -> None:
        """Launch on the pointers' device and its current stream.

        Args:
            key: decides the plan; the dtypes of all pointers follow from it.
            plan: makes it, where the key is new.
            pointers, strength, blocks: arguments of the kernel: its blocks come first, then the
                pointers, the strength, and the plan's numbers and constants.
        """
        device = pointers[0].get_device()
        if device != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                return self(key, plan, pointers, strength, blocks)
        addresses = [t.data_ptr() for t in pointers]
        odd = 0
        for address in addresses:
            odd |= address & 15
        key = (device, odd and tuple(a & 15 for a in addresses), key)
        found = self.known.get(key)
        if found is None:
            found = self.known[key] = self._find(device, plan(), pointers, strength, blocks)
        compiled, (grid, numbers, constants, _, _) = found
        stream = torch._C._cuda_getCurrentRawStream(device)
        compiled.run(
            *grid, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
            *blocks, *addresses, *strength, *numbers, *constants,
        )  # fmt: skip

    def _find(
        self,
        device: int,
        plan: _Plan,
        pointers: tuple[Tensor, ...],
        strength: tuple[float, ...],
        blocks: tuple[_Block, ...],
    ) -> tuple[Any, _Plan]:
        kind = (
            device,
            tuple(t.dtype for t in pointers),
            tuple(t.data_ptr() & 15 == 0 for t in pointers),
            tuple((n == 1, n & 15 == 0, n >> 31 != 0) for n in plan.numbers),
            plan.constants,
            plan.stages,
            plan.warps,
        )
        if kind not in self.compiled:
            described = [TensorDescriptor.from_tensor(b.base, b.block_shape) for b in blocks]
            arguments = (*described, *pointers, *strength, *plan.numbers, *plan.constants)
            options = {"num_stages": plan.stages, "num_warps": plan.warps}
            self.compiled[kind] = self.kernel.warmup(*arguments, grid=plan.grid, **options)
        return self.compiled[kind], plan


_MATMUL, _MATMUL_TMA = Launcher(kernels.matmul), Launcher(kernels.matmul_tma)
_PACK, _PROJECT = Launcher(kernels.pack), Launcher(kernels.project)
_OUTER, _REDUCE = Launcher(kernels.outer), Launcher(kernels.reduce)


def pack(
    lora_A: Tensor, lora_B: Tensor, scale: Tensor, strength: float, dtype: torch.dtype, R: int
) -> tuple[Tensor, Tensor]:
    """``A[R, in]`` and ``strength · scale · B.T[R, out]`` in `dtype`, padded with zeros."""
    (r, fan_in), out = lora_A.shape, lora_B.shape[0]
    a, b = lora_A.new_empty((R, fan_in), dtype=dtype), lora_B.new_empty((R, out), dtype=dtype)
    strides = (*lora_A.stride(), *lora_B.stride())

    def plan() -> _Plan:
        BD = max(16, 2048 // R)
        grid = (-(-fan_in // BD) + -(-out // BD), 1)
        return _Plan(grid, (fan_in, out, r, *strides), (R, BD), 1, 4)

    key = (fan_in, out, r, strides, dtype, lora_A.dtype, lora_B.dtype, scale.dtype)
    _PACK(key, plan, (lora_A, lora_B, scale, a, b), (strength,))
    return a, b


def matmul(
    x: Tensor,
    w: Tensor,
    f: Tensor,
    q: Tensor,
    bias: Optional[Tensor] = None,
    p: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor]:
    """``y = x @ w + p @ q + bias`` with one rounding, and ``p = x @ f.T``.

    Args:
        x: ``[M, K]``, 16-bit, rows contiguous.
        w: ``[K, N]``, 16-bit, any strides of which one is 1.
        f: ``[R, K]`` of `pack`.
        q: ``[R, N]`` of `pack`.
        bias: ``[N]``.
        p: ``[M, R]`` of `project`, where it is there already.

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
    fused = p is None and fuses(M, N, R)
    if p is None:
        p = x.new_empty((M, R)) if fused else project(x, f)
    rest = (p, q, p if bias is None else bias)

    def plan() -> _Plan:
        numbers = (M, N, K) if tma else (M, N, K, x_row, w_k, w_n)
        flags = (fused, bias is not None, rows_out if tma else K % BK == 0)
        constants = (*flags, R, min(R, 32), BM, BN, BK, group)
        return _Plan((-(-M // BM) * -(-N // BN), 1), numbers, constants, stages, warps)

    key = (M, N, K, R, fused, x_row, w_k, w_n, x.dtype, bias is None or bias.dtype)
    if tma:
        blocks = (
            _Block(x, [BM, BK]),
            _Block(w.t(), [BN, BK]) if rows_out else _Block(w, [BK, BN]),
            _Block(f, [R if fused else 16, BK]),
            _Block(y, [BM, BN // 2]),
        )
        _MATMUL_TMA(key, plan, rest, (), blocks)
    else:
        _MATMUL(key, plan, (x, w, f, y, *rest))
    return y, p


def overlaps(M: int, N: int, K: int, R: int) -> bool:
    """Whether `outer` runs beside the product that gives the input's gradient: one waits for
    memory and the other for arithmetic. Handing over to a second stream takes time on the host,
    which only a large product or a captured graph has to spare."""
    size = M * N * K
    if fuses(M, N, R) or size < 2**34:
        return False
    return size >= 2**36 or torch.cuda.is_current_stream_capturing()


_SIDES: dict[int, torch.cuda.Stream] = {}


def side(device: int) -> torch.cuda.Stream:
    """The second stream of a device. Nothing else runs or allocates there, and it always waits
    for the first before it starts, so what it allocates may be used and freed on the first."""
    if device not in _SIDES:
        _SIDES[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _SIDES[device]


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

    def plan() -> _Plan:
        BM, BK = (64, 128) if M >= 8192 else (32, 128) if M >= 2048 else (16, 256)
        return _Plan((-(-M // BM), 1), (M, K, x.stride(0)), (K % BK == 0, R, BM, BK), 4, 4)

    _PROJECT((M, K, R, x.stride(0), x.dtype), plan, (x, f, p))
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
    part = da if groups == 1 else da.new_empty((groups, fan_in + out, R))
    scaled, factor = (False, part) if scale is None else (True, scale)
    rows = (x.stride(0), dy.stride(0))

    def plan() -> _Plan:
        each = -(-M // groups // BM) * BM
        numbers = (M, fan_in, out, r, *rows, each)
        return _Plan((blocks, groups), numbers, (groups == 1, scaled, R, BM, BD), 4, 4)

    def adding() -> _Plan:
        numbers = (fan_in, out, r, groups)
        many = min(1 << (groups - 1).bit_length(), max(1, 1024 // R))
        return _Plan((-(-(fan_in + out) // 8), 1), numbers, (scaled, R, 8, many), 1, 4)

    key = (M, fan_in, out, r, rows, scaled, x.dtype, factor.dtype)
    _OUTER(key, plan, (x, v, dy, u, part, da, db, factor), (strength,))
    if groups > 1:
        _REDUCE(key, adding, (part, da, db, factor), (strength,))
    return da, db
