"""Forward and backward of a 16-bit linear layer on CUDA, in the kernels; imported only there.

Everything works without Triton, and so without this file. A small layer takes the device less time
than Python, so all that a step needs but its tensors is planned once for each kind of operands:
`forward` and `backward` find their plan by one key, reserve memory, and launch.
"""

import functools
import itertools
import math
import secrets
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from paramlora.cuda.device import card
from paramlora.cuda.launch import Launch, along, changed, on_its_device, planned, tickets
from paramlora.cuda.launches import Launches, launches
from paramlora.cuda.linear import kernels
from paramlora.cuda.linear.tiles import (
    Rows,
    Tiles,
    gradients,
    groups_of,
    is_even,
    projection,
    rows_of,
)
from paramlora.cuda.operands import (
    DEEP,
    SPAN,
    Drop,
    Operands,
    Rescale,
    fits,
    has_kernel,
    kept_size,
    masks_fit,
    pack_width,
    packs,
    padded,
)

_Maybe = Optional[Tensor]
# a signal's number: no other launch has it, nor by chance what the memory held before
NUMBERS = itertools.count(2**62 + secrets.randbits(61))


class _Rescales(NamedTuple):
    """Whether a product rescales what it sums, and whether it keeps what that was before."""

    on: bool
    keeps: bool

    @property
    def constants(self) -> dict[str, bool]:
        return {"RESCALES": self.on, "KEEPS": self.keeps}

    def layouts(self, tiles: Tiles) -> tuple[Any, ...]:
        """Those of the product, whose z lies as its y does."""
        return (*tiles.layouts, *tiles.layouts[2:]) if self.keeps else tiles.layouts


_PLAIN = _Rescales(False, False)


def _masks(drop: Optional[Drop]) -> tuple[int, int, tuple[int, ...]]:
    """What a plan must know of masks: the threshold of one, how many there are, and the thresholds
    of several, which kernels are compiled for."""
    each = () if drop is None else drop.thresholds
    return (0, len(each), each) if len(each) > 1 else (sum(each), len(each), ())


def _projection(
    device: int, left: Rows, N: int, K: int, R: int, after_pack: bool, drop: Optional[Drop]
) -> Launch:
    """``(mask ∘ left[M, K]) @ f[R, K].T``, of a layer that has N outputs."""
    M, hopper, (least, masks, each) = left.M, card(device).hopper, _masks(drop)
    wide = max(1, masks)
    BM, BK, stages, warps = projection(M, R // wide, hopper, masks > 0)
    return Launch(
        kernels.project,
        device,
        -(-M // BM) * wide,
        numbers=dict(
            M=M,
            N=N,  # tells the kernel only where in `kept` the masks' numbers lie
            K=K,
            P=left.period,
            **along("stride_x", "bmk", left.places(left.period)),
            threshold=least,
        ),
        constants=dict(
            DROP=masks,
            THRESHOLDS=each,
            EARLY=hopper,
            EVEN_P=is_even(left.period, M),
            EVEN_K=K % BK == 0,
            R=R,
            BLOCK_M=BM,
            BLOCK_K=BK,
        ),
        stages=stages,
        warps=warps,
        # with nothing of ours right ahead, there is no launch to start beside
        early=hopper and after_pack,
    )


def _product(
    device: int, tiles: Tiles, bias: bool, drop: Optional[Drop], rescales: _Rescales = _PLAIN
) -> Launch:
    """``left @ w + mask ∘ (p @ q) + bias``, of a p that `_projection` computed."""
    least, masks, each = _masks(drop)
    return Launch(
        kernels.product,
        device,
        tiles.grid,
        numbers=dict(**tiles.numbers("x", "y"), threshold=least),
        constants=dict(
            DROP=masks,
            THRESHOLDS=each,
            EARLY=tiles.early,
            BIAS=bias,
            **rescales.constants,
            **tiles.constants,
        ),
        stages=tiles.tiling.stages,
        warps=tiles.tiling.warps,
        early=tiles.early,
        layouts=rescales.layouts(tiles),
    )


class _Result(NamedTuple):
    """A new matrix, contiguous or with its columns apart as those of an image; made by its strides,
    in two thirds of the time that its shape alone would take."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    rows: Rows

    def new(self, like: Tensor) -> Tensor:
        return like.new_empty_strided(self.shape, self.stride)


def _result(shape: tuple[int, ...], columns: int, rows: Rows) -> _Result:
    """A new matrix ``[..., columns]`` of as many rows as one of `shape`, which lie in memory in the
    order in which `rows` says that those do."""
    M, lead, steps = rows.M, shape[:-1], [1, columns]
    if rows.column == 1:
        steps += (columns * math.prod(lead[i:]) for i in range(len(lead) - 1, 0, -1))
        # of a vector, which has no lead, only the 1 is left
        flat = Rows(M, M, M * columns, columns, 1)
        return _Result((*lead, columns), tuple(steps[len(lead) :: -1]), flat)
    period = lead[1]
    apart = Rows(M, period, period * columns, 1, period)
    return _Result((*lead, columns), (period * columns, 1, period), apart)


def _part(kept: Tensor, start: int, rows: int, columns: int) -> Tensor:
    return kept[start : start + rows * columns].view(rows, columns)


class Forward:
    """The plan of a forward: one launch, or two or three of large products and in a CUDA graph."""

    def __init__(
        self,
        of: Operands,
        rows: Rows,
        drop: Optional[Drop],
        rescales: _Rescales,
        captured: bool,
        misaligned: bool,
    ) -> None:
        x, weight, bias, a, b, _ = of
        (r, K), N, M, device = a.shape, len(weight), rows.M, x.get_device()
        # of the weight [out, in] the kernels read [K, N], so its strides are taken backwards
        self.sizes, self.R = (M, N, K), padded(r)
        R, card_of = self.R, card(device)
        hopper = card_of.hopper
        least, masks, _ = _masks(drop)
        how = launches(self.sizes, R, captured, hopper, masks=masks)
        self.size, self.row_bytes = kept_size(M, N, K, r, masks), x.element_size() * R
        self.result = _result(x.shape, N, rows)
        out, w = self.result.rows, weight.stride()[::-1]
        # of a flat matrix any period will do, so the one that is not flat settles it
        period = min(rows.period, out.period)
        shared = (period, w, self.sizes, R, card_of, misaligned, how)
        self.tiles = tiles = Tiles(rows, out, *shared, True)
        width, first = pack_width(R), packs(N, K, R)
        factors = dict(
            r=r, **along("stride_a", "rk", a.stride()), **along("stride_b", "nr", b.stride())
        )
        self.single: Optional[Launch] = None
        if how is Launches.TOGETHER:
            self.single = Launch(
                kernels.forward,
                device,
                first + tiles.grid,
                numbers=dict(packs=first, **tiles.numbers("x", "y"), **factors, threshold=least),
                constants=dict(
                    DROP=masks,
                    BIAS=bias is not None,
                    **rescales.constants,
                    **tiles.constants,
                    BLOCK_D=width,
                ),
                stages=tiles.tiling.stages,
                warps=tiles.tiling.warps,
                layouts=rescales.layouts(tiles),
            )
            return
        self.product = _product(device, tiles, bias is not None, None, rescales)
        self.pack = Launch(
            kernels.pack,
            device,
            first,
            numbers=dict(M=M, N=N, K=K, **factors),
            constants=dict(DROP=masks, EARLY=hopper, R=R, BLOCK_D=width),
            stages=1,
            warps=4,
        )
        self.project = None
        if how is Launches.APART:
            self.project = _projection(device, rows, N, K, R, True, drop)

    def __call__(
        self,
        of: Operands,
        strength: float,
        seed: _Maybe,
        addresses: tuple[int, ...],
        rescale: Optional[Rescale] = None,
    ) -> tuple[_Maybe, ...]:
        (x, weight, bias, a, b, scale), (px, pw, pbias, pa, pb, ps, *_) = of, addresses
        y, kept = self.result.new(x), x.new_empty(self.size)
        z = self.result.new(x) if rescale is not None and rescale.keeps else None
        pk = kept.data_ptr()
        # the kernel wants some address of all that there may be, and reads none of what is not
        more, pmore = (kept, pk) if bias is None else (bias, pbias)
        seed, own = kept if seed is None else seed, kept if z is None else z
        m, norm = (kept, kept) if rescale is None else rescale[:2]
        first, places = (x, weight, y, own), (px, pw, y.data_ptr(), own.data_ptr())
        last, behind = (more, m, norm), (pmore, m.data_ptr(), norm.data_ptr())
        if self.single is not None:
            drawn = tickets(kept)
            self.single(
                (*first, x, a, b, scale, kept, *last, seed, drawn),
                # x once more: the thin product reads it by its pointer, engine or not
                (*places, px, pa, pb, ps, pk, *behind, seed.data_ptr(), drawn.data_ptr()),
                (float(strength), next(NUMBERS)),
            )
        else:
            pu, pq = self._thin(of, strength, seed, kept, addresses)
            self.product((*first, kept, kept, *last), (*places, pq, pu, *behind))
        return (y, kept) if rescale is None else (y, kept, z)

    def _thin(
        self, of: Operands, strength: float, seed: Tensor, kept: Tensor, addresses: tuple[int, ...]
    ) -> tuple[int, int]:
        """The factors cast and the thin product, in launches of their own: where that and B's part
        lie in `kept`."""
        (x, _, _, a, b, scale), (px, _, _, pa, pb, ps, *_) = of, addresses
        (M, N, K), R, pk, pseed = self.sizes, self.R, kept.data_ptr(), seed.data_ptr()
        pu = pk + self.row_bytes * (K + N)
        self.pack((a, b, scale, kept, seed), (pa, pb, ps, pk, pseed), (float(strength),))
        if self.project is None:
            _multiply(x, _part(kept, 0, R, K), _part(kept, R * (K + N), M, R))
        else:
            self.project((x, kept, kept, kept, seed), (px, pk, pu, pk, pseed))
        return pu, pk + self.row_bytes * K


def _multiply(left: Tensor, f: Tensor, p: Tensor) -> None:
    """``p[M, R] = left[..., K] @ f[R, K].T`` by cuBLAS."""
    left = left[None] if left.dim() == 1 else left
    torch.matmul(left, f.t(), out=p.view(*left.shape[:-1], len(f)))


_FORWARDS: dict[Any, Any] = {}
_BACKWARDS: dict[Any, Any] = {}


class _Copy(NamedTuple):
    """What stands in place of a plan: which operands must first be made contiguous. Of a forward
    x and the bias, of a backward dy and x."""

    left: bool
    right: bool


@on_its_device
def forward(
    of: Operands,
    strength: float = 1.0,
    image: bool = False,
    drop: Optional[Drop] = None,
    rescale: Optional[Rescale] = None,
) -> Optional[tuple[_Maybe, ...]]:
    """``x (W + strength · scale · B A)ᵀ + bias`` with one rounding, and what `backward` takes.

    Args:
        of: x ``[..., in]``, 16-bit, of positions ``[batch, P, in]`` where `image`; and a weight
            ``[out, in]`` of its type.
        strength: a number on top of the scale.
        image: x's columns may lie apart, and the result lies in memory as x does.
        drop: the mask of the x that the factors get, of a rank up to `WIDEST`; what makes up for
            what is dropped is in the strength.
        rescale: what DoRA multiplies the outputs by, ahead of the bias; without a mask.

    Returns:
        ``[..., out]`` and `kept`, and of what is rescaled the outputs from before that, or None in
        their place; None where the kernels do not serve these operands.
    """
    # another plan while a CUDA graph is captured: a replay would find its own signals set
    captured = torch.cuda.is_current_stream_capturing()
    plan, addresses = planned_forward(of, image, drop, captured, rescale)
    if plan is None:
        return None
    if type(plan) is _Copy:
        x = of.x.contiguous() if plan.left else of.x
        bias = of.bias.contiguous() if plan.right and of.bias is not None else of.bias
        of = of._replace(x=x, bias=bias)
        return forward(of, strength, image, drop, rescale)  # type: ignore[no-any-return]
    seed = None if drop is None else drop.seed
    return plan(of, strength, seed, addresses, rescale)  # type: ignore[no-any-return]


def planned_forward(
    of: Operands,
    image: bool,
    drop: Optional[Drop],
    captured: bool,
    rescale: Optional[Rescale] = None,
) -> tuple[Any, tuple[int, ...]]:
    """The plan of a forward, None where the kernels do not serve it; and the addresses."""

    def plan_of(addresses: tuple[int, ...]) -> Any:
        x, bias = of.x, of.bias
        if not (has_kernel(x, of.weight) and fits(of)) or not masks_fit(of, drop):
            return None
        if not x.numel():
            return functools.partial(_of_no_rows, 0 if drop is None else len(drop.rates))
        rows = rows_of(x.shape, x.stride(), image)
        spread = bias is not None and not bias.is_contiguous()
        if rows is None or spread:
            return _Copy(rows is None, spread)
        # of x and the weight, which the engine loads: the result is new, and so aligned
        misaligned = bool((addresses[0] | addresses[1]) & 15)
        return Forward(of, rows, drop, rescales, captured, misaligned)

    rescales = _PLAIN if rescale is None else _Rescales(True, rescale.keeps)
    tensors = of.tensors if rescale is None else (*of.tensors, *rescale[:2])
    rest = (of.bias is None, image, _masks(drop), rescales, captured)
    return planned(_FORWARDS, tensors, rest, plan_of)


def _of_no_rows(
    masks: int, of: Operands, _: float, __: _Maybe, ___: Any, rescale: Optional[Rescale]
) -> tuple[Tensor, ...]:
    (N, K), x = of.weight.shape, of.x
    y, kept = x.new_empty((*x.shape[:-1], N)), x.new_empty(kept_size(0, N, K, len(of.a), masks))
    return (y, kept) if rescale is None else (y, kept, torch.empty_like(y))


class Backward:
    """The plan of a backward: one launch, or two of large products and in a CUDA graph."""

    def __init__(
        self,
        of: Operands,
        rows: tuple[Rows, Rows],
        scaled: bool,
        wanted: tuple[bool, bool],
        drop: Optional[Drop],
        captured: bool,
        misaligned: bool,
    ) -> None:
        x, weight, r = of.x, of.weight, len(of.a)
        # a product of its own, dy[M, K] @ weight[K, N]: N are the inputs here, and K the outputs
        (K, N), M, device, R = weight.shape, rows[0].M, x.get_device(), padded(r)
        self.sizes, self.r, self.R, self.row_bytes = (M, N, K), r, R, x.element_size() * R
        (self.input_too, self.factors_too), self.scaled = wanted, scaled
        on, w, (_, masks, _) = card(device), weight.stride(), _masks(drop)
        how = launches(self.sizes, R, captured, on.hopper, wanted, masks)
        self.together = how is Launches.TOGETHER
        # the grid has no work but the input's gradient, if that
        self.separate = how is Launches.CUBLAS or not self.factors_too
        self.result = _result(x.shape, N, rows[1])
        out = self.result.rows
        period = min(rows[0].period, rows[1].period, out.period)
        alone, input_too = self.separate, self.input_too
        self.tiles = tiles = Tiles(
            rows[0], out, period, w, self.sizes, R, on, misaligned, how, alone, input_too
        )
        self.project = None
        if how is Launches.APART:
            self.project = _projection(device, rows[0], N, K, R, False, None)
        self.size = M * R
        if self.separate:
            self.launch = _product(device, tiles, False, drop)
        else:
            self.launch = self._with_factors(device, rows, period, drop)

    def _with_factors(
        self, device: int, rows: tuple[Rows, Rows], period: int, drop: Optional[Drop]
    ) -> Launch:
        """The launch whose grid has the factors' gradients beside the input's."""
        (M, N, K), R, tiles, on = self.sizes, self.R, self.tiles, card(device)
        least, masks, every = _masks(drop)
        deep, stages, warps = gradients(tiles.tiling, R, masks)
        # of A's gradient, then of B's
        blocks = -(-N // DEEP) + -(-K // DEEP)
        together = rows[0].column == rows[1].column == 1
        # columns of an image that lie apart take longer to load, and a masked block longer than
        # one that is not, so twice as many programs do
        programs = on.processors if together and not masks else 2 * on.processors
        groups, each = groups_of(-(-M // deep), blocks, programs)
        strips = -(-M // SPAN)
        # in elements of 16 bits: a signal of 64 for each strip, and the groups' sums of 32
        self.size += 4 * (strips + strips % 2) + (2 * groups * (N + K) * R if groups > 1 else 0)
        return Launch(
            kernels.backward,
            device,
            tiles.grid + blocks * groups,
            numbers=dict(
                tiles=tiles.grid,
                **tiles.numbers("dy", "dx"),
                **along("stride_x", "bmk", rows[1].places(period)),
                r=self.r,
                groups=groups,
                rows_per_group=each * deep,
                threshold=least,
            ),
            constants=dict(
                DROP=masks,
                THRESHOLDS=every,
                LOCAL=self.together,
                EARLY=tiles.early,
                SCALED=self.scaled,
                **tiles.constants,
                BLOCK_ROWS=deep,
            ),
            stages=stages,
            warps=warps,
            early=tiles.early,
            layouts=tiles.layouts,
        )

    def __call__(
        self,
        dy: Tensor,
        of: Operands,
        kept: Tensor,
        strength: float,
        addresses: tuple[int, ...],
    ) -> tuple[_Maybe, _Maybe, _Maybe]:
        x, weight, scale = of.x, of.weight, of.scale
        dx = self.result.new(x) if self.input_too else None
        scratch = x.new_empty(self.size)
        (py, px, pw, *ps), pk, pv = addresses, kept.data_ptr(), scratch.data_ptr()
        if pk & 15:  # a hook on saved tensors may have laid it anywhere
            # new memory is aligned, and the compiled kernel counts on that of the first launch
            kept = kept.clone()
            pk = kept.data_ptr()
        if self.project is not None:
            places = (py, pk + self.row_bytes * self.sizes[1], pv, pk, pk)
            self.project((dy, kept, scratch, kept, kept), places)
        if self.separate:
            return self._separately(dy, of, kept, strength, dx, scratch)
        (_, N, K), r, wide = self.sizes, self.r, torch.float32
        da = x.new_empty_strided((r, N), (N, 1), dtype=wide)
        db = x.new_empty_strided((K, r), (r, 1), dtype=wide)
        # what is not wanted still needs an address: any that there is
        out, factor = da if dx is None else dx, scale if self.scaled else da
        pa, drawn = da.data_ptr(), tickets(kept) if self.together else scratch
        of_scale = ps[0] if ps else pa
        self.launch(
            (dy, weight, out, dy, kept, scratch, x, da, db, factor, drawn),
            (
                *(py, pw, out.data_ptr(), py, pk, pv, px, pa, db.data_ptr()),
                *(of_scale, drawn.data_ptr()),
            ),
            (float(strength), next(NUMBERS)),
        )
        return dx, da, db

    def _separately(
        self,
        dy: Tensor,
        of: Operands,
        kept: Tensor,
        strength: float,
        dx: _Maybe,
        scratch: Tensor,
    ) -> tuple[_Maybe, _Maybe, _Maybe]:
        """The input's gradient by itself, and those of wide factors by cuBLAS."""
        (M, N, K), R, r = self.sizes, self.R, self.r
        v = scratch.view(M, R)
        if self.project is None:
            _multiply(dy, _part(kept, R * N, R, K), v)
        if dx is not None:
            pointers = (dy, of.weight, dx, kept, kept, scratch, kept, kept, kept)
            self.launch(pointers, tuple(map(Tensor.data_ptr, pointers)))
        if not self.factors_too:
            return dx, None, None
        u = _part(kept, R * (N + K), M, R)
        # without the columns that pad the rank; in float32, as the kernels' sums are
        da = torch.mm(v[:, :r].t(), of.x.reshape(M, N), out_dtype=torch.float32)
        db = torch.mm(dy.reshape(M, K).t(), u[:, :r], out_dtype=torch.float32)
        return dx, da, db * (of.scale * strength) if self.scaled else db


@on_its_device
def backward(
    dy: Tensor,
    of: Operands,
    kept: Tensor,
    strength: float,
    scaled: bool,
    wanted: tuple[bool, bool],
    image: bool = False,
    drop: Optional[Drop] = None,
) -> tuple[_Maybe, _Maybe, _Maybe]:
    """The gradients of `forward` that are wanted: the input's ``dy @ W + v @ A``, and of the
    factors in float32 ``(v.T @ x)[r, in]`` and ``strength · scale · (dy.T @ u)[out, r]``, where
    ``v = strength · scale · dy @ B``.

    Args:
        dy: ``[..., out]``.
        of, strength, image, drop: of the forward.
        kept: of the forward.
        scaled: whether the scale and the strength are in the last gradient.
        wanted: of the input, of the factors.
    """
    captured = torch.cuda.is_current_stream_capturing()
    plan, addresses = planned_backward(dy, of, scaled, wanted, image, drop, captured)
    if type(plan) is _Copy:
        dy = dy.contiguous() if plan.left else dy
        of = of._replace(x=of.x.contiguous()) if plan.right else of
        same = (kept, strength, scaled, wanted, image, drop)
        return backward(dy, of, *same)  # type: ignore[no-any-return]
    return plan(dy, of, kept, strength, addresses)  # type: ignore[no-any-return]


def planned_backward(
    dy: Tensor,
    of: Operands,
    scaled: bool,
    wanted: tuple[bool, bool],
    image: bool,
    drop: Optional[Drop],
    captured: bool,
) -> tuple[Any, tuple[int, ...]]:
    """The plan of a `backward`, and the addresses of dy, x, the weight and, where `scaled`, the
    scale."""
    # not A and B, whose casts are in `kept`; of A the rank is in the key
    tensors: tuple[Tensor, ...] = (dy, of.x, of.weight)
    tensors = (*tensors, of.scale) if scaled else tensors

    def plan_of(addresses: tuple[int, ...]) -> Any:
        x, weight = of.x, of.weight
        sizes = dy.shape == (*x.shape[:-1], len(weight)) and x.shape[-1:] == weight.shape[1:]
        types = dy.dtype == x.dtype and has_kernel(x, weight)
        # between the two somebody may have moved or replaced one: the kernel would read past it
        if not (sizes and types) or len({t.get_device() for t in tensors}) > 1:
            raise changed("the gradient, the input, the weight and the scale", tensors)
        if not x.numel():
            return functools.partial(_gradients_of_no_rows, wanted)
        left, right = rows_of(dy.shape, dy.stride(), image), rows_of(x.shape, x.stride(), image)
        if left is None or right is None:
            return _Copy(left is None, right is None)
        # of dy and the weight, see `planned_forward`
        misaligned = bool((addresses[0] | addresses[2]) & 15)
        return Backward(of, (left, right), scaled, wanted, drop, captured, misaligned)

    rest = (len(of.a), scaled, wanted, image, _masks(drop), captured)
    return planned(_BACKWARDS, tensors, rest, plan_of)


def _gradients_of_no_rows(
    wanted: tuple[bool, bool], dy: Tensor, of: Operands, *_: Any
) -> tuple[_Maybe, _Maybe, _Maybe]:
    (out, fan_in), x, r, wide = of.weight.shape, of.x, len(of.a), torch.float32
    factors = (x.new_zeros((r, fan_in), dtype=wide), x.new_zeros((out, r), dtype=wide))
    return torch.empty_like(x) if wanted[0] else None, *(factors if wanted[1] else (None, None))
