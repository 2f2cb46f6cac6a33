"""Dropout on the input of an update's branch (Srivastava et al. 2014; in Hu et al. 2021's code).

A mask is drawn from a seed, and drawn again where the backward needs it: it is a function of the
seed and of the element's place, so it is never stored, nor is a masked input, and blocks of rows
give the same mask as the whole. The seed is drawn from torch's own generator, so that
``torch.manual_seed`` reproduces it and activation checkpointing restores it; on a device it never
leaves it, so that each replay of a CUDA graph has a mask of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from paramlora.cuda import dropped as kernels
from paramlora.cuda.operands import has_kernel, switched_on
from paramlora.cuda.operators import gradient_of_second, scaled_down
from paramlora.evaluate import choose
from paramlora.evaluate.choose import Asked, Way
from paramlora.evaluate.functional import (
    cast,
    cast_for_autocast,
    differentiable,
    in_a_row,
    input_of,
    kept_input,
    untold,
    without_autocast,
)
from paramlora.update import narrow
from paramlora.update.compat import applied, is_batched, recorded
from paramlora.update.contexts import autocast_of

_Maybe = Optional[Tensor]
_BLOCK, _BLOCK_OF_A_DEVICE = 1 << 17, 1 << 24  # elements of an input that are masked at a time
_HIGHEST = 128  # rank whose thin products the kernels hold in registers


class Drops(NamedTuple):
    """What is dropped: of updates whose ranks lie one after the other, each with its own mask.

    Args:
        rates: the chance that an element of an update's input is dropped.
        ranks: of each update.
        seed: ``[]``, whole numbers, where the input lies.
    """

    rates: tuple[float, ...]
    ranks: tuple[int, ...]
    seed: Tensor


def drops_for(x: Tensor, rates: tuple[float, ...], ranks: tuple[int, ...]) -> Drops:
    """New masks, by a seed out of torch's generator of x's device."""
    return Drops(rates, ranks, torch.randint(2**62, (), device=x.device))


# --- masks ---------------------------------------------------------------------------------------


def dropped(drops: Drops, which: int, start: int, rows: int, columns: int) -> Tensor:
    """Which elements of some rows of its input an update does not get.

    The numbers of rows and of columns are mixed by SplitMix64 (Steele et al. 2014), and both by
    lowbias32 (Wellons 2018) for each element.
    """
    seed = _mixed(drops.seed + which * 0x632BE5AB)
    steps = torch.arange(max(rows, columns), device=seed.device)
    row = _mixed((steps[:rows] + start) * _GOLDEN + seed)
    column = _mixed(steps[:columns] * _GOLDEN + _mixed(seed))
    h = row.to(torch.int32)[:, None] ^ column.to(torch.int32)
    h ^= (h >> 16).bitwise_and_(0xFFFF)
    h *= 0x7FEB352D
    h ^= (h >> 15).bitwise_and_(0x1FFFF)
    h *= 0x846CA68B - 2**32
    return h < round(drops.rates[which] * 2**32) - 2**31


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def _mixed(n: Tensor) -> Tensor:
    n = (n ^ (n >> 30 & 2**34 - 1)) * (0xBF58476D1CE4E5B9 - 2**64)
    n = (n ^ (n >> 27 & 2**37 - 1)) * (0x94D049BB133111EB - 2**64)
    return n ^ (n >> 31 & 2**33 - 1)


def masked(x: Tensor, drops: Drops, which: int, start: int = 0) -> Tensor:
    """An input as an update gets it, not scaled up yet.

    Args:
        x: of any shape; as rows of its last dimension.
        start: how many rows of the whole input lie before it.
    """
    if drops.rates[which] == 0 or x.numel() == 0:
        return x
    columns = x.shape[-1]
    mask = dropped(drops, which, start, x.numel() // columns, columns)
    return x.masked_fill(mask.view(x.shape), 0)


class _Redrawn(torch.autograd.Function):
    """``compute(mask ∘ x, first, second)``; keeps x by reference, and computes it again for the
    gradients, with the mask drawn again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, first: Tensor, second: Tensor, compute: Any, rate: float, seed: Tensor
    ) -> Tensor:
        ctx.compute, ctx.rate = compute, rate
        ctx.save_for_backward(x, first, second, seed)
        y: Tensor = compute(masked(x, Drops((rate,), (1,), seed), 0), first, second)
        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        *inputs, seed = ctx.saved_tensors
        drops = Drops((ctx.rate,), (1,), seed)

        def again(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
            y: Tensor = ctx.compute(masked(x, drops, 0), first, second)
            return y

        return *differentiable(again, inputs, ctx.needs_input_grad[:3], dy), None, None, None


def dropped_branch(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    rate: float,
    compute: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """``compute(mask ∘ x / (1 - rate), first, second)``, which is linear in x, with a new mask.

    Args:
        x: of any shape.
        first, second: what else it is computed from.
        rate: the chance that an element of x is dropped; of none there is no mask.
    """
    if rate == 0:
        return compute(x, first, second)
    second = second / (1 - rate)
    drops = drops_for(x, (rate,), (1,))
    if untold() or recorded():
        return compute(masked(x, drops, 0), first, second)
    return applied(_Redrawn, x, first, second, compute, rate, drops.seed)


def blocks(x: Tensor) -> Iterator[slice]:
    """Some rows of ``[rows, in]`` at a time."""
    rows, columns = x.shape
    size = _BLOCK if x.is_cpu else _BLOCK_OF_A_DEVICE
    step = max(1, size // max(columns, 1))
    yield from (slice(at, min(at + step, rows)) for at in range(0, rows, step))


def ranks_of(drops: Drops) -> Iterator[tuple[int, slice]]:
    """(which update, where its ranks lie) of each."""
    start = 0
    for which, rank in enumerate(drops.ranks):
        yield which, slice(start, start + rank)
        start += rank


def thin(x: Tensor, down: Tensor, drops: Drops) -> Tensor:
    """``(mask ∘ x) @ downᵀ``: ``[rows, in]``, ``[r, in]``."""
    u = x.new_empty(len(x), len(down))
    for rows in blocks(x):
        for which, ranks in ranks_of(drops):
            u[rows, ranks] = masked(x[rows], drops, which, rows.start) @ down[ranks].t()
    return u


def thin_sums(v: Tensor, x: Tensor, drops: Drops) -> Tensor:
    """``vᵀ @ (mask ∘ x)``, in float32 where both are of 16 bits: ``[r, in]``."""
    low = x.dtype.itemsize == 2
    total = x.new_zeros(v.shape[1], x.shape[1], dtype=torch.float32 if low else x.dtype)
    for rows in blocks(x):
        for which, ranks in ranks_of(drops):
            own, some = masked(x[rows], drops, which, rows.start), v[rows, ranks]
            if x.dtype == torch.float16:
                total[ranks] += some.t().float() @ own.float()
            else:
                total[ranks] += some.t() @ own
    return total


def spread(v: Tensor, down: Tensor, drops: Drops, dtype: torch.dtype) -> Tensor:
    """``mask ∘ (v @ down)``, the sum of all updates: ``[rows, in]``."""
    total = v.new_empty(len(v), down.shape[1], dtype=dtype)
    for rows in blocks(total):
        parts = [
            masked(v[rows, ranks] @ down[ranks], drops, which, rows.start)
            for which, ranks in ranks_of(drops)
        ]
        total[rows] = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
    return total


# --- a linear layer ------------------------------------------------------------------------------


def dropped_linear(
    x: Tensor,
    weight: Tensor,
    bias: _Maybe,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Tensor,
    strength: float,
    drops: Drops,
) -> Tensor:
    """``x Wᵀ + strength · scale · (mask ∘ x) Aᵀ Bᵀ + bias``; see `functional.linear`.

    `scale` and B hold what makes up for what is dropped, ``1 / (1 - rate)``.
    """
    device = autocast_of(x)
    if device is not None:
        x, weight, bias = cast_for_autocast(device, x, weight, bias)
        with torch.autocast(device, enabled=False):
            return dropped_linear(x, weight, bias, lora_A, lora_B, scale, strength, drops)
    compiling, ours = untold() or recorded(), None
    if is_compiling() or not compiling:
        ours = _served(x, weight, bias, lora_A, drops)
    about = (choose.thresholds_of(x), x.dtype, x.numel(), weight.shape, len(lora_A))
    way = choose.way(Asked("linear", *about, ours, compiling, dropout=True))
    if way is Way.OPERATOR:
        flat, scale, seed = x.reshape(-1, x.shape[-1]), scale * strength, drops.seed
        op: Any = torch.ops.paramlora.dropped_linear
        y, _ = op(flat, weight, bias, lora_A, lora_B, scale, drops.rates[0], seed)
        return y.reshape(*x.shape[:-1], len(weight))  # type: ignore[no-any-return]
    if way is Way.PLAIN:
        scale = scale * strength
        return dropped_by_definition(x, weight, bias, lora_A, lora_B, scale, drops)
    values = (weight, bias, lora_A, lora_B, scale, strength)
    return applied(_Dropped, x, *values, drops.rates, drops.ranks, drops.seed, way)


def dropped_by_definition(
    x: Tensor,
    weight: Tensor,
    bias: _Maybe,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Tensor,
    drops: Drops,
) -> Tensor:
    """The same in plain operations: for compilers, and for gradients of gradients."""
    y, up = F.linear(x, weight, bias), narrow.wide(lora_B) * scale
    for which, ranks in ranks_of(drops):
        own = masked(x, drops, which)
        y = y + in_a_row(own, lora_A[ranks], up[:, ranks], narrow.LINEAR, narrow.LINEAR)
    return y


def _served(x: Tensor, weight: Tensor, bias: _Maybe, a: Tensor, drops: Drops) -> Optional[Way]:
    """Our kernels where they serve, of one mask that drops anything, and were found the faster."""
    fits = len(drops.rates) == 1 and drops.rates[0] > 0 and 0 < len(a) <= _HIGHEST
    fits = fits and x.numel() > 0 and weight.numel() > 0 and x.shape[-1] == weight.shape[1]
    near = all(t is None or t.device == x.device for t in (weight, bias, a))
    typed = bias is None or bias.dtype == x.dtype
    ours = fits and near and typed and has_kernel(x, weight)
    return Way.KERNELS if ours and choose.measured(x.get_device(), "dropout") else None


class _Dropped(torch.autograd.Function):
    """Keeps x by reference, the seed, and the thin product."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: _Maybe,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        strength: float,
        rates: tuple[float, ...],
        ranks: tuple[int, ...],
        seed: Tensor,
        way: Way,
    ) -> Tensor:
        ctx.strength, ctx.way, ctx.drops = strength, way, (rates, ranks)
        flat, drops = x.reshape(-1, x.shape[-1]), Drops(rates, ranks, seed)
        down, up, ctx.power = _narrowed(flat, a, b, scale, strength)
        if way is Way.KERNELS:
            y, u = kernels.forward(flat, weight, bias, down, up, rates[0], seed)
        else:
            u = thin(flat, down, drops)
            y = _base_and(torch.mm(u, up.t()), u, up.t(), flat, weight.t())
            y = y if bias is None else y.add_(bias)
        held = kept_input(ctx, x)
        ctx.save_for_backward(held, weight, a, b, scale, seed, None if held is None else u)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        held, weight, a, b, scale, seed, u = ctx.saved_tensors
        needs, x, drops = ctx.needs_input_grad, input_of(ctx, held, weight), (*ctx.drops, seed)
        dbias = dy.flatten(0, -2).sum(0) if needs[2] else None
        if torch.is_grad_enabled() or is_batched(dy):

            def again(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
                values = (x, weight, None, a, b, scale * ctx.strength)
                return dropped_by_definition(*values, Drops(*drops))

            wanted = (*needs[:2], *needs[3:6])
            dx, dweight, *others = differentiable(again, (x, weight, a, b, scale), wanted, dy)
        else:
            how = _in_kernels if ctx.way is Way.KERNELS and switched_on() else _gradients
            dx, *others = how(ctx, dy, x, weight, a, b, scale, Drops(*drops), u)
            dweight = None
            if needs[1]:
                dweight = dy.flatten(0, -2).t() @ x.flatten(0, -2)
        return dx, dweight, dbias, *others, *(None,) * 5


def _narrowed(
    x: Tensor, a: Tensor, b: Tensor, scale: Tensor, strength: float
) -> tuple[Tensor, Tensor, _Maybe]:
    """Both factors in x's type; in float16 with a power of two, see `narrow`."""
    if x.dtype != torch.float16:
        return cast(a, x.dtype), scaled_down(b, scale, strength, x.dtype), None
    down, up, g = narrow.in_range(x, a, b.float() * (scale.float() * strength), x.shape[-1])
    return down.half(), up.half(), g


def _base_and(update: Tensor, u: Tensor, second: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """``x @ w + update``, written into the update; rounded once."""
    if x.is_cuda and x.dtype.itemsize == 2 and torch.version.hip is None:  # cuBLAS rounds between
        y = torch.mm(x, w, out_dtype=torch.float32)
        return y.addmm_(u.float(), second.float()).to(x.dtype)
    return update.addmm_(x, w)


def _gradients(
    ctx: Any,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    drops: Drops,
    u: _Maybe,
) -> tuple[_Maybe, _Maybe, _Maybe, _Maybe]:
    """Those of x, A, B and the scale that are wanted."""
    needs, flat, dy = ctx.needs_input_grad, x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dx = da = db = dscale = None
    if needs[0] or needs[3]:
        one = torch.ones((), dtype=narrow.wide(b).dtype, device=b.device)
        up, down, h = _narrowed(dy, (narrow.wide(b) * scale * ctx.strength).t(), a.t(), one, 1.0)
        v = dy @ up.t()  # [rows, r]
        if needs[0]:
            dx = _input_gradient(dy, weight, v, down.t(), drops).view(x.shape)
        if needs[3]:
            da = thin_sums(v, flat, drops)
            da = cast(da if h is None else da / h, a.dtype)
    if u is not None and (needs[4] or needs[5]):
        u = u[:, : len(a)]  # the kernels pad it
        if ctx.power is None:
            product = (u.t() @ dy).t()
        else:
            product = narrow.outer(u, dy).t() / ctx.power
        db, dscale = gradient_of_second(product, b, scale, ctx.strength, needs[5])
    return dx, da, db, dscale


def _in_kernels(
    ctx: Any,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    drops: Drops,
    u: _Maybe,
) -> tuple[_Maybe, _Maybe, _Maybe, _Maybe]:
    """The same by the kernels."""
    needs, flat, dy = ctx.needs_input_grad, x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    wanted = (needs[0], needs[3], needs[4], needs[5])
    mask = drops.rates[0], drops.seed
    dx, *others = _kernels_backward(
        dy, flat, weight, a, b, scale, ctx.strength, ctx.power, *mask, u, wanted
    )
    return None if dx is None else dx.view(x.shape), *others  # type: ignore[return-value]


def _kernels_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    strength: float,
    power: _Maybe,
    rate: float,
    seed: Tensor,
    u: _Maybe,
    wanted: Sequence[bool],
) -> tuple[_Maybe, _Maybe, _Maybe, _Maybe]:
    one = torch.ones((), dtype=narrow.wide(b).dtype, device=b.device)
    scaled = (narrow.wide(b) * scale * strength).t()
    up, down, h = _narrowed(dy, scaled, a.t(), one, 1.0)
    also = wanted[2] or wanted[3]
    too = wanted[0], wanted[1], also
    dx, da, db = kernels.backward(dy, x, weight, down.t(), up.t(), u, rate, seed, too)
    if da is not None:
        da = cast(da if h is None else da / h, a.dtype)
    if db is None:
        return dx, da, None, None
    db = db if power is None else db / power
    db, dscale = gradient_of_second(db, b, scale, strength, wanted[3])
    return dx, da, db if wanted[2] else None, dscale


@torch.library.custom_op("paramlora::dropped_linear", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    rate: float,
    seed: Tensor,
) -> tuple[Tensor, Tensor]:
    down, up, _ = _narrowed(x, a, b, scale, 1.0)
    return kernels.forward(x, weight, bias, down, up, rate, seed)


@_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    rate: float,
    seed: Tensor,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), len(weight)), x.new_empty(len(x), kernels.width(len(a)))


@torch.library.custom_op("paramlora::dropped_linear_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    rate: float,
    seed: Tensor,
    u: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    power = None
    if x.dtype == torch.float16:
        power = narrow.balance(x, a, b.float() * scale.float(), x.shape[1])
    values = (dy, x, weight, a, b, scale, 1.0, power, rate, seed, u, wanted)
    dx, da, db, dscale = (x.new_empty(0) if g is None else g for g in _kernels_backward(*values))
    return dx, da, db, dscale


@_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    rate: float,
    seed: Tensor,
    u: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = zip((x, a, b, scale), wanted)
    dx, da, db, dscale = (t.new_empty(t.shape) if want else x.new_empty(0) for t, want in found)
    return dx, da, db, dscale


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, a, b, scale, ctx.rate, seed = inputs
    ctx.save_for_backward(x, weight, a, b, scale, seed, output[1])


def _op_backward(ctx: Any, dy: Tensor, _: Any) -> Any:
    x, weight, a, b, scale, seed, u = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[3], needs[4], needs[5]]
    op: Any = torch.ops.paramlora.dropped_linear_backward
    grads = op(dy, x, weight, a, b, scale, ctx.rate, seed, u, wanted)
    dx, *others = (g if want else None for g, want in zip(grads, wanted))
    dweight = dy.t() @ x if needs[1] else None
    return dx, dweight, dy.sum(0) if needs[2] else None, *others, None, None


_op.register_autograd(_op_backward, setup_context=_keep)


def _input_gradient(dy: Tensor, weight: Tensor, v: Tensor, down: Tensor, drops: Drops) -> Tensor:
    """``dy @ W + mask ∘ (v @ down)``, rounded once."""
    if dy.is_cuda and dy.dtype.itemsize == 2 and torch.version.hip is None:
        dx = torch.mm(dy, weight, out_dtype=torch.float32)
        return dx.add_(spread(v, down, drops, dy.dtype)).to(dy.dtype)
    return spread(v, down, drops, dy.dtype).addmm_(dy, weight)
