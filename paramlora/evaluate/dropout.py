"""Dropout on the input of an update's branch (Srivastava et al. 2014; in Hu et al. 2021's code).

A mask is drawn from a seed, and drawn again where the backward needs it: it is a function of the
seed and of the element's place, so it is never stored, nor is a masked input, and blocks of rows
give the same mask as the whole. The seed is drawn from torch's own generator, so that
``torch.manual_seed`` reproduces it and activation checkpointing restores it; on a device it never
leaves it, so that each replay of a CUDA graph has a mask of its own.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from paramlora.cuda import operators
from paramlora.cuda.launches import WIDEST
from paramlora.cuda.operands import (
    Drop,
    Operands,
    Wanted,
    fits,
    has_kernel,
    masks_fit,
    padded,
    power,
    switched_on,
    threshold,
)
from paramlora.cuda.operators import gradient_of_second
from paramlora.evaluate import choose
from paramlora.evaluate.choose import Asked, Way
from paramlora.evaluate.functional import (
    both,
    cast,
    cast_for_autocast,
    differentiable,
    image_of,
    in_a_row,
    in_torch_alone,
    input_of,
    kept_input,
    narrowed,
    positions,
    unflattened,
)
from paramlora.update import narrow
from paramlora.update.compat import applied, is_batched
from paramlora.update.contexts import autocast_of, without_autocast

_Maybe = Optional[Tensor]
_BLOCK, _BLOCK_OF_A_DEVICE = 1 << 17, 1 << 24  # elements of an input that are masked at a time


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

    Rows and columns have odd numbers of 32 bits, mixed as in lowbias32 (Wellons 2018). Of an
    element the product of its row's and its column's is compared (multiplicative hashing,
    Dietzfelbinger et al. 1997): of two elements, and of any four in two rows and two columns, no
    small multiples of the products add up to zero but by chance, so they fall independently.
    """
    # an odd step apart, so that updates have masks of their own
    of_rows, of_columns = _keys(drops.seed + which * 0x632BE5AB)
    # of 32 bits, whose products wrap as the kernels' do
    steps = torch.arange(max(rows, columns), dtype=torch.int32, device=drops.seed.device)
    row, column = _numbers(steps[:rows] + start, of_rows), _numbers(steps[:columns], of_columns)
    return row[:, None] * column < threshold(drops.rates[which])


def _keys(seed: Tensor) -> tuple[Tensor, Tensor]:
    """Two keys of 32 bits, from which `_numbers` makes those of the rows and of the columns."""
    # int64 holds the bits of an unsigned constant only as the negative number; products wrap alike
    n = seed * (0x9E3779B97F4A7C15 - 2**64)
    # `>>` of a signed number copies its sign, which the mask cuts off
    n = (n ^ (n >> 32 & 2**32 - 1)) * (0xD1342543DE82EF95 - 2**64)
    n = n ^ (n >> 32 & 2**32 - 1)
    # the low half for rows, the high one for columns
    return n.to(torch.int32), (n >> 32).to(torch.int32)


def _numbers(places: Tensor, key: Tensor) -> Tensor:
    """The odd numbers of 32 bits that stand for rows or for columns in a mask."""
    # the same in int32
    n = places * (0x9E3779B1 - 2**32) + key
    n = (n ^ (n >> 15 & 2**17 - 1)) * (0x846CA68B - 2**32)
    # odd: a bijection on what it multiplies, so that no bit is lost
    return (n ^ (n >> 16 & 2**16 - 1)) | 1


def masked(x: Tensor, drops: Drops, which: int, start: int = 0) -> Tensor:
    """An input as an update gets it, not scaled up yet.

    Args:
        x: of any shape; as rows of its last dimension.
        start: how many rows of the whole input lie before it.
    """
    # also where a row has no columns, by which the line below divides
    if drops.rates[which] == 0 or x.numel() == 0:
        return x
    if x.is_cuda and not (in_torch_alone(x) or is_batched(x)):
        if torch.is_grad_enabled() and x.requires_grad:
            return applied(_Masked, x, drops, which, start)
        y = operators.masked(x, drops.seed, which, start, threshold(drops.rates[which]))
        if y is not None:
            return y
    columns = x.shape[-1]
    mask = dropped(drops, which, start, x.numel() // columns, columns)
    # filled, not multiplied: what is not finite must not reach through as NaN
    return x.masked_fill(mask.view(x.shape), 0)


class _Masked(torch.autograd.Function):
    """`masked` of a kernel, which autograd does not see. Keeps the seed alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, drops: Drops, which: int, start: int) -> Tensor:
        ctx.rates, ctx.ranks, ctx.place = drops.rates, drops.ranks, (which, start)
        ctx.save_for_backward(drops.seed)
        return masked(x, drops, which, start)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        (seed,) = ctx.saved_tensors
        return masked(dy, Drops(ctx.rates, ctx.ranks, seed), *ctx.place), None, None, None


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
    second = second / (1 - rate)  # here, where it costs r columns, and not on all of x
    drops = drops_for(x, (rate,), (1,))
    if in_torch_alone(x):
        return compute(masked(x, drops, 0), first, second)
    return applied(_Redrawn, x, first, second, compute, rate, drops.seed)


def blocks(x: Tensor) -> Iterator[slice]:
    """Some rows of ``[rows, in]`` at a time."""
    rows, columns = x.shape
    # what is alive at once: a block's mask and masked input, not those of all of x
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
    # each update masks x its own way, so that A's rows cannot be one product
    u = x.new_empty(len(x), len(down))
    for rows in blocks(x):
        for which, ranks in ranks_of(drops):
            u[rows, ranks] = masked(x[rows], drops, which, rows.start) @ down[ranks].t()
    return u


def thin_sums(v: Tensor, x: Tensor, drops: Drops) -> Tensor:
    """``vᵀ @ (mask ∘ x)``, in float32 where both are of 16 bits: ``[r, in]``."""
    low = x.dtype.itemsize == 2
    # a sum over blocks: in 16 bits each `+=` would round
    total = x.new_zeros(v.shape[1], x.shape[1], dtype=torch.float32 if low else x.dtype)
    for rows in blocks(x):
        for which, ranks in ranks_of(drops):
            own, some = masked(x[rows], drops, which, rows.start), v[rows, ranks]
            # a block's sums leave float16's range; bfloat16 has float32's
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
        # `sum` of 16 bits adds in float32, and rounds once
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
    if len(drops.ranks) > 1 and has_kernel(x, weight):
        lora_A, lora_B, drops = shared_out(lora_A, lora_B, drops)
    compiling, ours = in_torch_alone(x), None
    # the operator draws the mask under a compiler; transforms and make_fx know neither way
    if is_compiling() or not compiling:
        ours = _served(Operands(x, weight, bias, lora_A, lora_B, scale), drops)
    about = (choose.thresholds_of(x), x.dtype, x.numel(), weight.shape, len(lora_A))
    way = choose.way(Asked("linear", *about, ours, compiling, dropout=True))
    if way is Way.OPERATOR:
        flat, mask = x.reshape(-1, x.shape[-1]), ([*drops.rates], drops.seed)
        op: Any = torch.ops.paramlora.linear
        y, _ = op(flat, weight, bias, lora_A, lora_B, scale * strength, *mask)
        return y.reshape(*x.shape[:-1], len(weight))  # type: ignore[no-any-return]
    if way is Way.PLAIN:
        scale = scale * strength
        return dropped_by_definition(x, weight, bias, lora_A, lora_B, scale, drops)
    values = (weight, bias, lora_A, lora_B, scale, strength)
    return applied(_Dropped, x, *values, drops.rates, drops.ranks, drops.seed, False, way)


def dropped_pointwise(
    x: Tensor,
    weight: Tensor,
    bias: _Maybe,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Tensor,
    drops: Drops,
) -> _Maybe:
    """`dropped_linear` of every position of an image, in x's memory format, no copies; None where
    our kernels do not serve it. Rows of the mask are the positions, and columns the channels.

    Args:
        x: ``[N, in, ...]``.
        weight: ``[out, in]``.
        bias, lora_A, lora_B, scale, drops: as of `dropped_linear`.
    """
    if len(drops.ranks) > 1:
        lora_A, lora_B, drops = shared_out(lora_A, lora_B, drops)
    rows = positions(x)
    if _served(Operands(rows, weight, bias, lora_A, lora_B, scale), drops) is None:
        return None
    rest = (drops.rates, drops.ranks, drops.seed, True, Way.KERNELS)
    y = applied(_Dropped, rows, weight, bias, lora_A, lora_B, scale, 1.0, *rest)
    return image_of(y, x.shape)


def shared_out(a: Tensor, b: Tensor, drops: Drops) -> tuple[Tensor, Tensor, Drops]:
    """Factors ``[r, in]`` and ``[out, r]`` with zeros between, so that each mask has as many ranks,
    and as many masks, as the kernels take, see `masks_fit`; of more, as they are."""
    masks, share = power(len(drops.ranks)), max(map(padded, drops.ranks))
    if masks * share > WIDEST:
        return a, b, drops
    missing, none = masks - len(drops.ranks), a.new_zeros(share, a.shape[1])
    downs, ups = [], []
    for which, ranks in ranks_of(drops):
        rest = share - drops.ranks[which]
        downs += [a[ranks], none[:rest]]
        ups += [b[:, ranks], b.new_zeros(len(b), rest)]
    downs += [none] * missing
    ups += [b.new_zeros(len(b), share)] * missing
    rates = (*drops.rates, *(0.0,) * missing)
    return torch.cat(downs), torch.cat(ups, -1), Drops(rates, (share,) * masks, drops.seed)


def dropped_by_definition(
    x: Tensor,
    weight: Tensor,
    bias: _Maybe,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Tensor,
    drops: Drops,
) -> Tensor:
    """`dropped_linear` in plain operations: for compilers, and for gradients of gradients."""
    y, up = F.linear(x, weight, bias), narrow.of_factor(lora_B) * scale
    for which, ranks in ranks_of(drops):
        own = masked(x, drops, which)
        y = y + in_a_row(own, lora_A[ranks], up[:, ranks], narrow.LINEAR, narrow.LINEAR)
    return y


def _served(of: Operands, drops: Drops) -> Optional[Way]:
    """`Way.KERNELS` where they serve the operands with masks that drop anything, and were found the
    faster on the device; else None."""
    x = of.x
    ours = any(drops.rates) and has_kernel(x, of.weight) and fits(of)
    ours = ours and masks_fit(of, Drop(drops.rates, drops.seed))
    return Way.KERNELS if ours and choose.measured(x.get_device(), "dropout") else None


class _Dropped(torch.autograd.Function):
    """A linear layer with dropout on its update's input. Keeps x by reference, the seed, and the
    thin product; where the kernels computed it, also both factors in x's type."""

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
        image: bool,
        way: Way,
    ) -> Tensor:
        ctx.strength, ctx.drops, ctx.image, result = strength, (rates, ranks), image, None
        if way is Way.KERNELS:
            of = Operands(x, weight, bias, a, b, scale)
            result = operators.forward(of, strength, image, Drop(rates, seed))
        ctx.kernel, held = result is not None, kept_input(ctx, x)
        if result is not None:
            ctx.save_for_backward(held, weight, a, b, scale, seed, result[1])
            return result[0]
        flat, drops = x.reshape(-1, x.shape[-1]), Drops(rates, ranks, seed)
        down, up, ctx.power = narrowed(flat, a, b, scale, strength)
        u = thin(flat, down, drops)
        y = both(flat, weight.t(), u, up.t(), bias)
        ctx.save_for_backward(held, weight, a, b, scale, seed, None if held is None else u)
        return unflattened(y, x)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        held, weight, a, b, scale, seed, u = ctx.saved_tensors
        needs, x, drops = ctx.needs_input_grad, input_of(ctx, held, weight), (*ctx.drops, seed)
        dbias = dy.flatten(0, -2).sum(0) if needs[2] else None
        # many gradients have no address, nor a block that can be written into
        if torch.is_grad_enabled() or is_batched(dy) or (ctx.kernel and not switched_on()):

            def again(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
                values = (x, weight, None, a, b, scale * ctx.strength)
                return dropped_by_definition(*values, Drops(*drops))

            wanted = (*needs[:2], *needs[3:6])
            dx, dweight, *others = differentiable(again, (x, weight, a, b, scale), wanted, dy)
            return dx, dweight, dbias, *others, *(None,) * 6
        of, mask = Operands(x, weight, None, a, b, scale), Drops(*drops)
        if ctx.kernel:
            drop, asked = Drop(mask.rates, seed), Wanted(*needs[:6])
            grads = operators.backward(dy, of, ctx.strength, u, asked, ctx.image, drop)
        else:
            grads = _gradients(ctx, dy, of, mask, u)
        dweight = dy.flatten(0, -2).t() @ x.flatten(0, -2) if needs[1] else None
        dx, *others = grads
        return dx, dweight, dbias, *others, *(None,) * 6


def _gradients(ctx: Any, dy: Tensor, of: Operands, drops: Drops, u: _Maybe) -> operators.Gradients:
    """The gradients of x, A, B and the scale that are wanted."""
    x, weight, _, a, b, scale = of
    needs, flat, dy = ctx.needs_input_grad, x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dx = da = db = dscale = None
    if needs[0] or needs[3]:
        # the gradient meets B first: B's scale is in it, and A's part is B's in the forward
        wide = narrow.of_factor(b)
        one = torch.ones((), dtype=wide.dtype, device=b.device)
        # transposed: `narrowed` wants the first as [r, n], the second as [n, r]
        up, down, h = narrowed(dy, (wide * scale * ctx.strength).t(), a.t(), one, 1.0)
        v = dy @ up.t()  # [rows, r]
        if needs[0]:
            dx = _input_gradient(dy, weight, v, down.t(), drops).view(x.shape)
        if needs[3]:
            da = thin_sums(v, flat, drops)
            da = cast(da if h is None else da / h, a.dtype)
    # u was kept only where x was
    if u is not None and (needs[4] or needs[5]):
        if ctx.power is None:
            product = (u.t() @ dy).t()
        # of float16 u has the power of two of its forward
        else:
            product = narrow.outer(u, dy).t() / ctx.power
        db, dscale = gradient_of_second(product, b, scale, ctx.strength, needs[5])
    return dx, da, db, dscale


def _input_gradient(dy: Tensor, weight: Tensor, v: Tensor, down: Tensor, drops: Drops) -> Tensor:
    """``dy @ W + mask ∘ (v @ down)``, rounded once."""
    # the mask allows no joined product
    if dy.dtype.itemsize == 2 and choose.by_cublas(dy):
        dx = torch.mm(dy, weight, out_dtype=torch.float32)
        return dx.add_(spread(v, down, drops, dy.dtype)).to(dy.dtype)
    return spread(v, down, drops, dy.dtype).addmm_(dy, weight)
