"""Which kernel computes what, in which tiles, and its launch; imported only for 16-bit CUDA.

Everything works without Triton, and so without this file.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from paramlora import kernels

_PROCESSORS = 132  # of the device that the choices were measured on
WIDEST = 64  # above this rank the thin products go to cuBLAS, which is efficient there
_SPAN = kernels.SPAN.value
_Maybe = Optional[Tensor]


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


def tiling(M: int, N: int, K: int, aligned: bool, local: bool) -> Tiling:
    """The table of choices, measured on an H200, of 132 multiprocessors, by Triton 3.6.

    `aligned`: the device has the engine, and its rules on addresses and strides are met.
    `local`: the thin product is computed in the same grid. That spares a launch, and `project`
    beside it is a little faster, so it is chosen where the host takes longer than the device:
    small products, but not in a CUDA graph. There also describing blocks to the engine costs more
    than it saves.
    """
    if not aligned or (local and M * N * K < 2**32):
        if M <= 512:
            return Tiling(64, 64, 64, 8, 4, 4, False)
        wide = N <= 512 and K <= 512 or not aligned
        return Tiling(128, 128, 64, 8, 3, 8, False) if wide else Tiling(64, 128, 64, 8, 3, 4, False)
    if M <= 512:
        return Tiling(64, 64, 128, 8, 3 if K <= 2048 else 4, 4, True)
    if min(N, K) >= 2048 and -(-M // 128) * -(-N // 256) >= 90 and not local:
        return Tiling(128, 256, 64, 16, 3, 8, True)
    if K >= 2048 and -(-M // 128) * -(-N // 128) < _PROCESSORS:
        return Tiling(64, 128, 64, 8, 4, 4, True)
    return Tiling(128, 128, 64, 16 if M >= 8192 else 8, 3, 4, True)


class _Block:
    """What a launch reads of a `TensorDescriptor`, without its checks."""

    __slots__ = ("base", "block_shape", "padding", "round_f32_to_tf32", "shape", "strides")

    def __init__(self, base: Tensor, block: list[int]) -> None:
        self.base, self.block_shape, self.padding = base, block, "zero"
        self.round_f32_to_tf32 = False  # read by Triton 3.7 and later
        self.shape, self.strides = base.shape, base.stride()


class _Plan(NamedTuple):
    """All that a launch needs but its pointers and its strength."""

    grid: tuple[int, int]
    numbers: tuple[int, ...]
    constants: tuple[Any, ...]
    stages: int
    warps: int
    early: bool = False  # may start before the kernel ahead ends (programmatic dependent launch)


def _bound(held: dict[Any, Any]) -> None:
    """Forget shapes before a run of ever new ones fills the host's memory."""
    if len(held) >= 4096:
        held.clear()


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
            _bound(self.known)
            found = self.known[key] = self._find(device, plan(), pointers, strength, blocks)
        compiled, (grid, numbers, constants, _, _, _) = found
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
            *plan[2:],
        )
        if kind not in self.compiled:
            described = [TensorDescriptor.from_tensor(b.base, b.block_shape) for b in blocks]
            arguments = (*described, *pointers, *strength, *plan.numbers, *plan.constants)
            options = {"num_stages": plan.stages, "num_warps": plan.warps}
            if plan.early:
                options["launch_pdl"] = True
            self.compiled[kind] = self.kernel.warmup(*arguments, grid=plan.grid, **options)
        return self.compiled[kind], plan


_PACK, _PROJECT = Launcher(kernels.pack), Launcher(kernels.project)
_PRODUCT, _BACKWARD = Launcher(kernels.product), Launcher(kernels.backward)
_DEEP = 128  # dimensions of a block of the factors' gradients


class Packed(NamedTuple):
    """Both factors in the input's type and the signals between programs, see `kernels`."""

    tensor: Tensor
    R: int
    fan_in: int
    out: int

    def factor(self, backward: bool) -> Tensor:
        """``A[R, in]``, or ``B.T[R, out]`` with the scale."""
        half = self.R * self.fan_in
        rest = self.tensor[half : half + self.R * self.out] if backward else self.tensor[:half]
        return rest.view(self.R, -1)


def pack(
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Tensor,
    strength: float,
    dtype: torch.dtype,
    R: int,
    tokens: int,
) -> Packed:
    """``A[R, in]`` and ``strength · scale · B.T[R, out]`` in `dtype`, padded with zeros, and the
    signals of one forward and one backward of `tokens` rows."""
    (r, fan_in), out = lora_A.shape, lora_B.shape[0]
    signals = 2 * -(-tokens // _SPAN) + -(-fan_in // _DEEP) + -(-out // _DEEP)
    packed = lora_A.new_empty(R * (fan_in + out) + 2 * signals, dtype=dtype)
    strides = (*lora_A.stride(), *lora_B.stride())

    def plan() -> _Plan:
        BD = max(16, 2048 // R)
        grid = (-(-fan_in // BD) + -(-out // BD) + 1, 1)
        return _Plan(grid, (fan_in, out, r, *strides, signals), (_hopper(packed), R, BD), 1, 4)

    key = (fan_in, out, r, signals, strides, dtype, lora_A.dtype, lora_B.dtype, scale.dtype)
    _PACK(key, plan, (lora_A, lora_B, scale, packed), (float(strength),))
    return Packed(packed, R, fan_in, out)


def _rows_of(x: Tensor) -> int:
    return x.shape[0] if x.dim() == 2 else x.shape[0] * x.shape[1]


def _places(period: int, x: Tensor) -> tuple[int, int, int]:
    """What a batch of `period` rows, a row and a column are apart in memory."""
    if x.dim() == 3:
        batch, row, column = x.stride()
        return batch, row, column
    row, column = x.stride()
    return period * row, row, column


def _even(period: int, M: int) -> bool:
    """Whether no block of rows, of 128 or a divisor, reaches over the end of a batch."""
    return period == M or period % 128 == 0


def project(x: Tensor, packed: Packed, backward: bool, after_pack: bool) -> Tensor:
    """``x @ f.T`` for ``f[R, K]`` of `packed`, as ``[M, R]`` in x's type."""
    M, K, R = _rows_of(x), x.shape[-1], packed.R
    if R > WIDEST:
        return (x @ packed.factor(backward).t()).view(M, R)
    p = x.new_empty((M, R))
    hopper, period = _hopper(x), x.shape[-2]

    def plan() -> _Plan:
        deep = 256 if R <= 32 else 128  # fits the shared memory of every device
        BM, BK = (16, deep) if M <= 512 else (64, 64) if M < 16384 else (128, 64)
        numbers = (M, K, packed.fan_in if backward else 0, period, *_places(period, x))
        constants = (hopper, _even(period, M), K % BK == 0, R, BM, BK)
        return _Plan((-(-M // BM), 1), numbers, constants, 4, 4, hopper and after_pack)

    key = (M, K, R, packed.fan_in, x.shape, x.stride(), x.dtype, backward, after_pack)
    _PROJECT(key, plan, (x, packed.tensor, p))
    return p


class _Choice(NamedTuple):
    """How a product is computed: its tiles, and where its thin product comes from."""

    tiles: Tiling
    local: bool  # from the same grid
    early: bool  # from `project`, beside which it starts
    rows_out: bool  # w is stored as [N, K]

    def grid(self, M: int, N: int) -> int:
        return -(-M // self.tiles.BM) * (-(-N // self.tiles.BN) + self.local)

    def constants(self, M: int, K: int, R: int, period: int) -> tuple[Any, ...]:
        BM, BN, BK, GROUP, _, _, tma = self.tiles
        return (tma, self.rows_out, _even(period, M), K % BK == 0, R, BM, BN, BK, GROUP)

    def operands(
        self, x: Tensor, w: Tensor, y: Tensor
    ) -> tuple[tuple[_Block, ...], tuple[Tensor, ...]]:
        """As blocks for the tensor memory engine, or as pointers."""
        BM, BN, BK, _, _, _, tma = self.tiles
        if not tma:
            return (), (x, w, y)
        right = _Block(w.t(), [BN, BK]) if self.rows_out else _Block(w, [BK, BN])
        return (_Block(x, [BM, BK]), right, _Block(y, [BM, BN // 2])), ()


_CHOICES: dict[tuple[Any, ...], _Choice] = {}


def _chosen(x: Tensor, w: Tensor, R: int) -> tuple[_Choice, tuple[Any, ...]]:
    """The choice, and all that it and a plan depend on."""
    device, odd = x.get_device(), (x.data_ptr() | w.data_ptr()) & 15
    if device == torch._C._cuda_getDevice():
        captured = torch.cuda.is_current_stream_capturing()
    else:
        with torch.cuda.device(device):
            captured = torch.cuda.is_current_stream_capturing()
    key = (x.shape, x.stride(), w.shape, w.stride(), R, odd, captured, x.dtype, device)
    choice = _CHOICES.get(key)
    if choice is None:
        _bound(_CHOICES)
        choice = _CHOICES[key] = _choose(x, w, R, bool(odd), captured)
    return choice, key


def _choose(x: Tensor, w: Tensor, R: int, odd: bool, captured: bool) -> _Choice:
    M, K, N = _rows_of(x), x.shape[-1], w.shape[1]
    w_k, w_n = w.stride()
    hopper = _hopper(x)
    strides = K | N | x.stride(0) | (w_n if w_k == 1 else w_k)
    aligned = hopper and x.dim() == 2 and not odd and not strides & 7
    local = R <= WIDEST and not captured and M * N * K <= 2**35
    early = hopper and R <= WIDEST and not local
    return _Choice(tiling(M, N, K, aligned, local), local, early, w_k == 1)


def product(
    x: Tensor,
    w: Tensor,
    packed: Packed,
    bias: _Maybe = None,
    backward: bool = False,
) -> tuple[Tensor, Tensor]:
    """``y = x @ w + p @ q + bias`` with one rounding, and ``p = x @ f.T``.

    Args:
        x: ``[M, K]``, 16-bit, or of positions ``[batch, P, K]``; one of the last two strides is 1,
            of ``[M, K]`` the last.
        w: ``[K, N]``, 16-bit, any strides of which one is 1.
        packed: f is its A and q its B, or with `backward` the other way round.
        bias: ``[N]``.

    Returns:
        y, ``[M, N]`` or ``[batch, P, N]`` in memory as x, and ``p[M, R]``.
    """
    (M, K), N, R = (_rows_of(x), x.shape[-1]), w.shape[1], packed.R
    y = _like(x, N)
    if M == 0:
        return y, x.new_empty((0, R))
    choice, key = _chosen(x, w, R)
    p = x.new_empty((M, R)) if choice.local else project(x, packed, backward, not backward)

    def plan() -> _Plan:
        period = x.shape[-2]
        places = (*_places(period, x), *w.stride(), *_places(period, y))
        flags = (backward, choice.local, choice.early, bias is not None)
        constants = (*flags, *choice.constants(M, K, R, period))
        grid, (stages, warps) = (choice.grid(M, N), 1), choice.tiles[4:6]
        return _Plan(grid, (M, N, K, period, *places), constants, stages, warps, choice.early)

    blocks, pointers = choice.operands(x, w, y)
    rest = (x, packed.tensor, p, p if bias is None else bias)
    key = (key, backward, bias is None or bias.dtype)
    _PRODUCT(key, plan, (*pointers, *rest), (), blocks)
    return y, p


def _like(x: Tensor, columns: int) -> Tensor:
    """A new tensor of as many rows, in memory as x."""
    if x.dim() == 2:
        return x.new_empty((x.shape[0], columns))
    batch, period, _ = x.shape
    if x.stride(1) == 1:
        return x.new_empty((batch, columns, period)).transpose(1, 2)
    return x.new_empty((batch, period, columns))


def gradients(
    dy: Tensor,
    w: Tensor,
    packed: Packed,
    x: Tensor,
    u: Tensor,
    r: int,
    scale: _Maybe,
    strength: float,
    input_too: bool,
) -> tuple[_Maybe, Tensor, Tensor]:
    """The input's gradient ``dy @ w + v @ A`` where wanted, and the factors' in float32:
    ``(v.T @ x)[r, in]`` and ``scale · (dy.T @ u)[out, r]``, where ``v = dy @ B``.

    Args:
        dy: ``[M, out]`` or ``[batch, P, out]``, as x in `product`, but not necessarily as the x.
        w: ``[out, in]``, 16-bit, any strides of which one is 1.
        packed: of `pack`, for this backward alone.
        x: ``[M, in]`` or ``[batch, P, in]`` of the forward.
        u: ``[M, R]`` of the forward.
        r: the rank.
        scale: ``[]``, or None to leave the last unscaled.
    """
    (M, K), N, R = (_rows_of(dy), dy.shape[-1]), w.shape[1], packed.R
    if R > WIDEST or M == 0:
        return _wide_gradients(dy, w, packed, x, u, r, scale, strength, input_too)
    dx = _like(x, N) if input_too else None
    da = x.new_empty((r, N), dtype=torch.float32)
    db = x.new_empty((K, r), dtype=torch.float32)
    choice, key = _chosen(dy, w, R)
    if dx is None:
        choice = choice._replace(tiles=_NONE, local=False, early=_hopper(dy))
    elif dx.dim() == 3 and choice.tiles.tma:  # the engine would store rows
        choice = choice._replace(tiles=tiling(M, N, K, False, choice.local))
    v = x.new_empty((M, R)) if choice.local else project(dy, packed, True, False)
    deep = 128 if R <= 16 and choice.tiles.stages <= 3 else 64
    blocks = -(-N // _DEEP) + -(-K // _DEEP)
    groups = max(1, min(-(-M // (4 * deep)), -(-_PROCESSORS // blocks)))
    each = -(-M // groups // deep) * deep
    groups = -(-M // each)
    part = da if groups == 1 else da.new_empty((groups, N + K, R))
    factor = part if scale is None else scale
    out = da if dx is None else dx

    def plan() -> _Plan:
        tiles = 0 if dx is None else choice.grid(M, N)
        period = x.shape[1] if x.dim() == 3 else dy.shape[-2]
        places = (*_places(period, dy), *w.stride(), *_places(period, out), *_places(period, x))
        numbers = (tiles, M, N, K, period, *places, r, groups, each)
        flags = (choice.local, choice.early, scale is not None)
        constants = (*flags, *choice.constants(M, K, R, period), deep, _DEEP)
        grid, (stages, warps) = (tiles + blocks * groups, 1), choice.tiles[4:6]
        return _Plan(grid, numbers, constants, stages, warps, choice.early)

    described, pointers = choice.operands(dy, w, out)
    rest = (dy, packed.tensor, v, x, u, part, da, db, factor)
    key = (key, r, x.shape, x.stride(), input_too, scale is not None, factor.dtype)
    _BACKWARD(key, plan, (*pointers, *rest), (float(strength),), described)
    return dx, da, db


_NONE = Tiling(64, 64, 64, 8, 3, 8, False)  # of a grid without tiles


def _wide_gradients(
    dy: Tensor,
    w: Tensor,
    packed: Packed,
    x: Tensor,
    u: Tensor,
    r: int,
    scale: _Maybe,
    strength: float,
    input_too: bool,
) -> tuple[_Maybe, Tensor, Tensor]:
    """The same with the thin products by cuBLAS."""
    if input_too:
        dx, v = product(dy, w, packed, backward=True)
    else:
        dx, v = None, project(dy, packed, True, False)
    da = torch.mm(v[:, :r].t(), x.reshape(-1, x.shape[-1]), out_dtype=torch.float32)
    db = torch.mm(dy.reshape(-1, dy.shape[-1]).t(), u[:, :r], out_dtype=torch.float32)
    return dx, da, db if scale is None else db * (scale * strength)


_HOPPER: dict[int, bool] = {}


def _hopper(x: Tensor) -> bool:
    """Whether the tensor's device has the tensor memory engine and lets a kernel start before the
    one ahead ends: Hopper and later."""
    device = x.get_device()
    if device not in _HOPPER:
        _HOPPER[device] = torch.cuda.get_device_capability(device) >= (9, 0)
    return _HOPPER[device]
