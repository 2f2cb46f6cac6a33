"""Low-rank updates of a batch whose rows take different ones: grouped products, no loop.

Each row is multiplied by its own update and by nothing else, so that what is not finite in one row
reaches neither another row nor another update's gradient. Tensors only.
"""

from collections.abc import Sequence
from functools import reduce
from operator import attrgetter
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from paramlora.cuda.operands import has_kernel
from paramlora.evaluate import choose
from paramlora.evaluate.choose import Way
from paramlora.evaluate.functional import (
    cast,
    cast_for_autocast,
    differentiable,
    in_plain_operations,
    unflattened,
    untold,
    without_gradient,
)
from paramlora.update import narrow
from paramlora.update.choice import Choice
from paramlora.update.compat import applied, is_batched, recorded
from paramlora.update.contexts import autocast_of, without_autocast

_Maybe = Optional[Tensor]
Window = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
_VERSION = attrgetter("_version")


def joined(factors: Sequence[_Maybe], ranks: Sequence[int], dim: int) -> Tensor:
    """The factors of all adapters one after the other, filled up with zeros, and one rank of zeros.

    Args:
        factors: of each adapter, None where it does not act.
        ranks: of each, see `Choice.ranks`.
        dim: in which the ranks lie: 0 of ``[r, in]``, 1 of ``[out, r]``.
    """
    like = next(factor for factor in factors if factor is not None)
    # one number for all zeros, expanded: nothing of their size is made
    side, zero, parts = like.shape[1 - dim], like.new_zeros(1, 1), []
    # behind all the base's one rank of zeros, which rows of the base pick
    for factor, rank in zip((*factors, None), (*ranks, 1)):
        if factor is not None:
            parts.append(factor)
            rank -= factor.shape[dim]
        if rank:
            parts.append(zero.expand((rank, side) if dim == 0 else (side, rank)))
    return torch.cat(parts, dim)


def linear(
    x: Tensor,
    weight: _Maybe,
    bias: _Maybe,
    down: Tensor,
    up: Tensor,
    rows: Choice,
    dropped: _Maybe = None,
) -> Tensor:
    """``x (W + B_i A_i)ᵀ + bias`` where ``i`` is each row's.

    Args:
        x: ``[N, ..., in]``.
        weight: ``[out, in]``, any strides; None for the updates' part alone.
        bias: ``[out]`` or None.
        down: ``[ranks, in]``, the ``A`` of all adapters, see `joined`.
        up: ``[ranks, out]``, their ``Bᵀ`` with their scales.
        rows: which each row takes.
        dropped: what the updates get instead of x.

    Returns:
        ``[N, ..., out]``. In 16 bits the update is added before the only rounding, and so is its
        part of x's gradient where nothing is dropped; but for what is compiled.

    Example:
        >>> x, W, A, B = (torch.randn(*s).double() for s in ((3, 4), (5, 4), (2, 4), (5, 2)))
        >>> rows = Choice(("a",), (2,), torch.tensor([0, 1, 0]), 0)
        >>> y = linear(x, W, None, joined([A], rows.ranks, 0), joined([B], rows.ranks, 1).t(), rows)
        >>> assert torch.allclose(y[0], x[0] @ (W + B @ A).T) and torch.allclose(y[1], x[1] @ W.T)
    """
    device = autocast_of(x)
    if device is not None:
        x, weight, bias, dropped = cast_for_autocast(device, x, weight, bias, dropped)
        with torch.autocast(device, enabled=False):
            return linear(x, weight, bias, down, up, rows, dropped)
    # whether they serve is decided once: the backward must read what that forward kept
    compiling, ours = untold(), False
    if weight is not None and dropped is None and not compiling:
        ours = _has_kernel(x, weight, bias, down, up, rows)
    about = (x.dtype, x.shape[:-1].numel(), Way.KERNELS if ours else None)
    way = choose.of_rows(*about, compiling, dropped is not None)
    if weight is not None and way in (Way.KERNELS, Way.FACTORED):
        return applied(_Linear, x, weight, bias, down, up, rows, way)
    own = x if dropped is None else dropped
    thin = grouped(_positions(own), rows, down, up).view(*x.shape[:-1], up.shape[-1])
    if weight is None:
        return thin
    if way is Way.PLAIN:  # the parts are rounded apart
        return F.linear(x, weight, bias) + thin
    # what is dropped is another input than x, so that the joined gradients of `_Linear` do not hold
    flat = applied(_Onto, thin.flatten(0, -2), x.flatten(0, -2), weight, bias)
    return flat.view(thin.shape)


def _positions(x: Tensor) -> Tensor:
    """``[N, positions, side]`` of ``[N, ..., side]``."""
    return x.reshape(len(x), x.shape[1:-1].numel(), x.shape[-1])


def grouped(x: Tensor, rows: Choice, down: Tensor, up: Tensor) -> Tensor:
    """Each row times its own ``A_iᵀ`` and ``B_iᵀ``, in x's type; float16, of whose range it knows
    nothing, in float32.

    Args:
        x: ``[N, positions, in]``.
        rows: which each row takes.
        down, up: as of `linear`.
    """
    own, picks = _blocks(narrow.wide(x), rows)
    thin = _thin(own, down, picks)
    return _in_rows(_spread(thin, up, picks), rows, x.shape[1]).to(x.dtype)


def _thin(x: Tensor, factor: Tensor, picks: Sequence[Tensor]) -> list[Tensor]:
    """``x f_iᵀ`` of each row's own factor, as one tensor for each of the `steps` of the ranks."""
    return [x @ picked(factor, some, x.dtype).mT for some in picks]


def _spread(thin: Sequence[Tensor], factor: Tensor, picks: Sequence[Tensor]) -> Tensor:
    """The sum of the products of what `_thin` gives, in order; those beyond a row's own ranks are
    zeros, which change no bit."""
    return reduce(torch.add, (u @ picked(factor, some, u.dtype) for u, some in zip(thin, picks)))


def _blocks(x: Tensor, rows: Choice) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Rows ``[N, positions, side]`` as matrices that each take one update, and what each picks:
    the rows themselves where they are long, else blocks of them, filled up with zeros."""
    places, picks, positions = rows.places, rows.block_picks, x.shape[1]
    if places is None or positions >= choose.LONG:
        return x, rows.picks
    # `index_copy` is differentiable, and writes each row once: nothing is added up
    packed = x.new_zeros(len(picks[0]) * rows.block, *x.shape[1:]).index_copy(0, places, x)
    return packed.view(len(picks[0]), rows.block * positions, -1), picks


def _in_rows(y: Tensor, rows: Choice, positions: int) -> Tensor:
    """``[N, positions, side]`` again, from what was computed of the matrices that `_blocks`
    gave."""
    if rows.places is None or positions >= choose.LONG:
        return y
    # a gather by places, each of which is there once: its gradient collides nowhere
    return y.reshape(-1, positions, y.shape[-1]).index_select(0, rows.places)


def picked(factors: Tensor, picks: Tensor, dtype: torch.dtype) -> Tensor:
    """``[N, r, side]``, the ranks that each row picks among those of all."""
    # not index_select, whose gradient CUDA adds up in an order of its own each time
    return F.embedding(picks, cast(factors, dtype))


def _sums(thin: Sequence[Tensor], x: Tensor, picks: Sequence[Tensor], like: Tensor) -> Tensor:
    """The gradient of all adapters' factor, in its type: each block's ``thinᵀ x``, summed.

    Args:
        thin: ``[blocks, rows, r]``, of each of the ranks that are multiplied at once.
        x: ``[blocks, rows, side]``.
        picks: of the blocks.
        like: ``[ranks, side]``, the factor.
    """
    # in float32: a factor of 16 bits would round at each block that is added
    total = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    for u, some in zip(thin, picks):
        # one gradient for each block's copy of its ranks; blocks of one adapter add up
        parts, at = (u.mT @ x).flatten(0, 1).float(), some.flatten()
        # `index_add_` is atomic on CUDA, `index_put_` sorts first
        if total.is_cuda:  # in one order each time, as the other is on a CPU
            total.index_put_((at,), parts, accumulate=True)
        else:
            total.index_add_(0, at, parts)
    return total.to(like.dtype)


def _onto(thin: Tensor, x: Tensor, matrix: Tensor, bias: _Maybe = None) -> Tensor:
    """``x @ matrix + thin + bias`` in 16 bits with one rounding: the small product comes first,
    where one float32 accumulator takes both, and the bias last, so that a large one does not drown
    it."""
    if choose.by_cublas(x):
        y = torch.mm(x, matrix, out_dtype=torch.float32).add_(thin)
        return (y if bias is None else y.add_(bias)).to(x.dtype)
    y = torch.addmm(thin, x, matrix)
    return y if bias is None else y.add_(bias)


class _Linear(torch.autograd.Function):
    """`linear` in 16 bits, whose output and gradient of x are each rounded once. Keeps x by
    reference, and ``x·A_iᵀ``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: _Maybe,
        down: Tensor,
        up: Tensor,
        rows: Choice,
        way: Way,
    ) -> Tensor:
        ctx.rows, ctx.kernel = rows, way is Way.KERNELS
        if ctx.kernel:
            y, u = _by_kernels(x.flatten(0, -2), weight.t(), bias, down, up, rows)
            ctx.save_for_backward(x, weight, down, up, u)
            return unflattened(y, x)
        own, picks = _blocks(narrow.wide(_positions(x)), rows)
        us = _thin(own, down, picks)
        thin = _in_rows(_spread(us, up, picks), rows, _positions(x).shape[1]).to(x.dtype)
        ctx.save_for_backward(x, weight, down, up, *us)
        y = _onto(thin.flatten(0, 1), x.flatten(0, -2), weight.t(), bias)
        return unflattened(y, x)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x, weight, down, up, *us), needs, rows = ctx.saved_tensors, ctx.needs_input_grad, ctx.rows
        dbias = dy.flatten(0, -2).sum(0) if needs[2] else None
        if torch.is_grad_enabled() or is_batched(dy) or in_plain_operations(ctx.kernel, dy):

            def again(x: Tensor, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
                thin = grouped(_positions(x), rows, down, up)
                # plain sums in x's type: here a graph matters more than the one rounding
                return F.linear(x, weight) + thin.view(*x.shape[:-1], up.shape[-1])

            wanted = (*needs[:2], *needs[3:5])
            dx, dweight, *others = differentiable(again, (x, weight, down, up), wanted, dy)
            return dx, dweight, dbias, *others, None, None
        flat, positions = dy.flatten(0, -2), _positions(dy).shape[1]
        if ctx.kernel:
            # kept by the kernels: one thin product of all ranks
            dx, *others = _kernels_backward(
                flat, x.flatten(0, -2), weight, down, up, us[0], rows, needs
            )
            dx = None if dx is None else dx.view(x.shape)
            dweight = flat.t() @ x.flatten(0, -2) if needs[1] else None
            return dx, dweight, dbias, *others, None, None
        own, picks = _blocks(narrow.wide(_positions(dy)), rows)
        vs = _thin(own, up, picks)
        dx = ddown = None
        if needs[0]:
            thin = _in_rows(_spread(vs, down, picks), rows, positions).to(dy.dtype)
            dx = _onto(thin.flatten(0, 1), flat, weight).view(x.shape)
        if needs[3]:
            # x's blocks, made again: they are copies, and x is kept anyway
            ddown = _sums(vs, _blocks(narrow.wide(_positions(x)), rows)[0], picks, down)
        dup = _sums(us, own, picks, up) if needs[4] else None
        dweight = flat.t() @ x.flatten(0, -2) if needs[1] else None
        return dx, dweight, dbias, ddown, dup, None, None


def _has_kernel(
    x: Tensor, weight: Tensor, bias: _Maybe, down: Tensor, up: Tensor, rows: Choice
) -> bool:
    """Whether the kernels serve these rows: in bfloat16 alone, as float16 has a range."""
    fits = x.dtype == torch.bfloat16 and has_kernel(x, weight) and x.numel() > 0 and not recorded()
    plain = fits and weight.numel() > 0 and (bias is None or bias.is_contiguous())
    # launches are given addresses, all of one device
    near = plain and {t.get_device() for t in (weight, down, up)} == {x.get_device()}
    held = 0 < max(rows.ranks, default=0) <= choose.ROWS_RANK
    return near and held and x.shape[-1] == weight.shape[1]


_Given = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]


def in_place(x: Tensor, weight: Tensor, bias: _Maybe, updates: _Given, rows: Choice) -> _Maybe:
    """`linear` of factors where they lie, which no operation of torch joins, casts, scales or takes
    apart again: a step of many adapters would start dozens of them for each layer. None where no
    kernels serve that.

    Args:
        x, weight, bias, rows: as of `linear`.
        updates: of all adapters their A's ``[r, in]``, B's ``[out, r]``, scales, which get no
            gradient, and strengths.
    """
    # x in place of the factors, of which it asks the device: `table_of` looks at these itself
    if untold() or autocast_of(x) is not None or not _has_kernel(x, weight, bias, x, x, rows):
        return None
    downs, ups, scales, _ = updates
    # the kernels read a scale by its address, and give it no gradient
    if any([scale.requires_grad for scale in scales]):
        return None
    from paramlora.cuda.decoding import plan

    # by address: A, B, scale and gain of each, which a launch reads where they lie
    table = plan.table_of(*updates, weight)
    if table is None:
        return None
    # the kernel of few rows reads rows of the weight, so they must be contiguous
    ours = Way.FEW_ROWS if weight.stride(1) == 1 else Way.KERNELS
    about = (x.dtype, x.shape[:-1].numel(), ours)
    way = choose.of_rows(*about, False, gradients=torch.is_grad_enabled())
    if way is Way.FEW_ROWS:
        return _of_few(x, weight, bias, table, rows)
    return applied(_InPlace, x, weight, bias, rows, table, updates, *downs, *ups)


class _InPlace(torch.autograd.Function):
    """What `in_place` applies: keeps x by reference, all updates' factors cast, and ``x·A_iᵀ``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: _Maybe,
        rows: Choice,
        table: Any,
        updates: _Given,
        *factors: Tensor,
    ) -> Tensor:
        from paramlora.cuda.routed import plan

        # an optimizer may step one update's factors before another's backward reads its own: of
        # all of them that reads what was cast here
        by = rows.sorted_by(_positions_of(x, rows))
        y: Tensor
        y, kept = plan.forward(x.contiguous(), weight, bias, table, by)
        ctx.rows, ctx.by, ctx.table, ctx.updates = rows, by, table, updates
        # the version that autograd counts, as `save_for_backward` would refuse any later change
        ctx.versions = [*map(_VERSION, factors)]
        # scales are saved for autograd's check that nobody has changed them in place since
        ctx.save_for_backward(x, weight, kept, *updates[2])
        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x, weight, kept, *_), needs = ctx.saved_tensors, ctx.needs_input_grad
        downs, ups, scales, gains = ctx.updates
        few = needs[6:]  # behind x, weight, bias, rows, table and updates
        dbias = dy.flatten(0, -2).sum(0) if needs[2] else None
        if torch.is_grad_enabled() or is_batched(dy) or in_plain_operations(True, dy):
            # only here: what was cast has no graph, so the factors themselves are read
            factors = (*downs, *ups)
            if [*map(_VERSION, factors)] != ctx.versions:
                raise RuntimeError(
                    "a gradient of a gradient reads factors that changed after the forward. Call "
                    "backward before the optimizer's step"
                )
            again, inputs = _joining(ctx.rows, scales, gains), (x, weight, *factors)
            dx, dweight, *others = differentiable(again, inputs, (*needs[:2], *few), dy)
            return dx, dweight, dbias, None, None, None, *others
        from paramlora.cuda.routed import plan

        count = len(downs)
        wanted = (needs[0], True in few[:count], True in few[count:])
        dy, own = dy.contiguous(), x.contiguous()
        dx, das, dbs = plan.backward(dy, own, weight, kept, ctx.table, ctx.by, wanted)
        dweight = dy.flatten(0, -2).t() @ own.flatten(0, -2) if needs[1] else None
        gradients = (*_wanted(das, downs, few[:count]), *_wanted(dbs, ups, few[count:]))
        return dx, dweight, dbias, None, None, None, *gradients


def _wanted(
    found: Optional[Sequence[Tensor]], factors: Sequence[Tensor], wanted: Sequence[bool]
) -> Sequence[_Maybe]:
    """The gradients of all A's or B's that are wanted, of their type."""
    if found is None:
        return (None,) * len(factors)
    return found if False not in wanted else [p if w else None for p, w in zip(found, wanted)]


def _joining(rows: Choice, scales: Sequence[Tensor], gains: Sequence[Tensor]) -> Any:
    """A function of x, the weight and all factors that computes `in_place` in torch's
    operations."""

    def again(x: Tensor, weight: Tensor, *factors: Tensor) -> Tensor:
        downs, ups = factors[: len(scales)], factors[len(scales) :]
        # in float32: of a 16-bit B, what is scaled would be rounded before it is multiplied
        scaled = [narrow.of_factor(b) * (s * g) for b, s, g in zip(ups, scales, gains)]
        down, up = joined(downs, rows.ranks, 0), joined(scaled, rows.ranks, 1).t()
        thin = grouped(_positions(x), rows, down, up)
        return F.linear(x, weight) + thin.view(*x.shape[:-1], up.shape[-1])

    return again


def _of_few(x: Tensor, weight: Tensor, bias: _Maybe, table: Any, rows: Choice) -> Tensor:
    """`in_place` without gradients, of so few rows that to read all factors once is what takes the
    time, as in decoding: none is joined, cast or scaled before."""
    from paramlora.cuda.decoding import plan

    flat = x.reshape(-1, x.shape[-1]).contiguous()
    positions = len(flat) // len(rows.index)
    y: Tensor = plan.product(flat, weight, bias, rows.taken, rows.held, table, positions)
    return y.view(*x.shape[:-1], y.shape[1])


def _positions_of(x: Tensor, rows: Choice) -> int:
    """How many positions each row of ``[N, ..., side]`` has."""
    return x.numel() // (len(rows.index) * x.shape[-1])


def _by_kernels(
    x: Tensor, w: Tensor, bias: _Maybe, down: Tensor, up: Tensor, rows: Choice
) -> tuple[Tensor, Tensor]:
    """``x w + x A_iᵀ B_iᵀ + bias`` in one accumulator, and the thin product."""
    from paramlora.cuda.routed import plan

    x, by = x.contiguous(), rows.sorted_by(_positions_of(x, rows))
    u = plan.thin(x, cast(down, x.dtype), by)
    return plan.product(x, w, u, cast(up, x.dtype), by, bias), u


def _kernels_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    u: Tensor,
    rows: Choice,
    needs: Sequence[bool],
) -> tuple[_Maybe, _Maybe, _Maybe]:
    """The gradients of x and of both factors that are wanted."""
    from paramlora.cuda.routed import plan

    x, dy, by = x.contiguous(), dy.contiguous(), rows.sorted_by(_positions_of(x, rows))
    dx = v = None
    if needs[0] or needs[3]:
        v = plan.thin(dy, cast(up, dy.dtype), by)
        if needs[0]:
            dx = plan.product(dy, weight, v, cast(down, dy.dtype), by)
    if not (needs[3] or needs[4]):
        return dx, None, None
    ddown, dup = plan.sums(x, v, dy, u, by, len(down), (needs[3], needs[4]))
    ddown = None if ddown is None else cast(ddown, down.dtype)
    return dx, ddown, None if dup is None else cast(dup, up.dtype)


class _Onto(torch.autograd.Function):
    """``x @ weightᵀ + thin + bias`` as `_onto` computes it, with each operand's own gradient."""

    @staticmethod
    def forward(ctx: Any, thin: Tensor, x: Tensor, weight: Tensor, bias: _Maybe) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, weight)
        return _onto(thin, x, weight.t(), bias)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x, weight), needs = ctx.saved_tensors, ctx.needs_input_grad
        dx = dy @ weight if needs[1] else None
        dweight = dy.t() @ x if needs[2] else None
        return dy, dx, dweight, dy.sum(0) if needs[3] else None


def embedding(
    tokens: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    rows: Choice,
    padding_idx: Optional[int] = None,
) -> Tensor:
    """``(W + (B_i A_i)ᵀ)[tokens]`` where ``i`` is each row's.

    Args:
        tokens: indices ``[N, ...]``.
        weight: ``[num, dim]``.
        down: ``[ranks, num]``, the ``A`` of all adapters, see `joined`.
        up: ``[ranks, dim]``, their ``Bᵀ`` with their scales.
        rows: which each row takes.
        padding_idx: the row of the table that gets no gradient, from the end where negative.
    """
    device = autocast_of(weight)
    if device is not None:  # which leaves a look-up in the table's own type
        with torch.autocast(device, enabled=False):
            return embedding(tokens, weight, down, up, rows, padding_idx)
    base = narrow.wide(F.embedding(tokens, weight, padding_idx))
    flat = tokens.reshape(len(tokens), tokens.shape[1:].numel())
    # [N, positions, r]: a column of the row's own factor for each token
    thin = [cast(down[some[:, None], flat[..., None]], base.dtype) for some in rows.picks]
    blocks = [_blocks(one, rows) for one in thin]
    picks = blocks[0][1]
    update = _in_rows(_spread([one for one, _ in blocks], up, picks), rows, flat.shape[1])
    update = update.view(base.shape)
    if padding_idx is not None:
        padded = (tokens == padding_idx % len(weight))[..., None]
        # neither B nor the scale learns from where padding stands
        update = without_gradient(update, padded)
    return cast(base + update, weight.dtype)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: _Maybe,
    down: Tensor,
    up: Tensor,
    rows: Choice,
    window: Window,
    dropped: _Maybe = None,
) -> Tensor:
    """``conv(x, W + B_i A_i) + bias`` where ``i`` is each row's.

    In 16 bits both terms are computed in float32, in TF32 where cuDNN may, and rounded once: of
    what torch has no convolution adds onto an output, and one whose update is rounded apart loses
    half of a small one. But for what is compiled.

    Args:
        x: ``[N, C_in, ...]``, padded but for what `window` says.
        weight: ``[C_out, C_in / groups, *kernel]``.
        bias: ``[C_out]`` or None.
        down, up, rows: as of `convolved`.
        window: stride, padding, dilation and groups.
        dropped: what the updates get instead of x.
    """
    device = autocast_of(x)
    if device is not None:
        x, weight, bias, dropped = cast_for_autocast(device, x, weight, bias, dropped)
        with torch.autocast(device, enabled=False):
            return convolution(x, weight, bias, down, up, rows, window, dropped)
    own = x if dropped is None else dropped
    # a compiler sees no autograd function, which alone can hold both terms in float32
    if x.dtype.itemsize == 2 and not untold():
        more = None if dropped is None else own
        return applied(_Convolution, x, weight, bias, down, up, more, rows, window)
    y = narrow.Stage(*window)(x, weight)
    y = y if bias is None else y + bias.reshape(-1, *[1] * (y.dim() - 2))
    return y + convolved(own, weight.shape, down, up, rows, *window)


class _Convolution(torch.autograd.Function):
    """`convolution` in 16 bits. Keeps its inputs by reference, and computes the updates' part again
    for the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: _Maybe,
        down: Tensor,
        up: Tensor,
        dropped: _Maybe,
        rows: Choice,
        window: Window,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, down, up, dropped)
        ctx.rows, ctx.window = rows, window
        wide, own = x.float(), None if dropped is None else dropped.float()
        y = narrow.Stage(*window)(wide, weight.float())
        # in float32 and in place: the only rounding is the last line
        y += convolved(wide if own is None else own, weight.shape, down, up, rows, *window)
        if bias is not None:
            y += bias.reshape(-1, *[1] * (y.dim() - 2))
        return y.to(x.dtype)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x, weight, down, up, dropped), needs = ctx.saved_tensors, ctx.needs_input_grad
        # apart: the updates' input is not x, and gets a gradient of its own
        rows, window, shape, apart = ctx.rows, ctx.window, weight.shape, dropped is not None

        def update(own: Tensor, down: Tensor, up: Tensor) -> Tensor:
            return convolved(own, shape, down, up, rows, *window)

        def base(x: Tensor, weight: Tensor) -> Tensor:
            return narrow.Stage(*window)(x, weight)

        wide, wanted = dy.float(), (needs[5] if apart else needs[0], *needs[3:5])
        given = (dropped if apart else x).float()
        down_x, *others = differentiable(update, (given, down, up), wanted, wide)
        dx, dweight = differentiable(base, (x.float(), weight.float()), needs[:2], wide)
        if not apart and dx is not None and down_x is not None:
            dx, down_x = dx + down_x, None
        dbias = dy.sum([0, *range(2, dy.dim())]) if needs[2] else None
        narrowed = (None if t is None else t.to(x.dtype) for t in (dx, dweight))
        down_x = None if down_x is None else down_x.to(x.dtype)
        return *narrowed, dbias, *others, down_x, None, None


def convolved(
    x: Tensor,
    shape: Sequence[int],
    down: Tensor,
    up: Tensor,
    rows: Choice,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """The updates' part of a convolution: one of as many groups as there are rows.

    Args:
        x: ``[N, C_in, ...]``.
        shape: of the weight, ``[C_out, C_in / groups, *kernel]``.
        down: ``[ranks, C_in / groups · prod(kernel)]``, the ``A`` of all adapters, see `joined`.
        up: ``[ranks, C_out]``, their ``Bᵀ`` with their scales.
        rows: which each row takes.
        stride, padding, dilation, groups: of the layer.
    """
    device = autocast_of(x)
    if device is not None:
        (x,) = cast_for_autocast(device, x)
        with torch.autocast(device, enabled=False):
            return convolved(x, shape, down, up, rows, stride, padding, dilation, groups)
    if x.dtype == torch.float16:
        y = convolved(x.float(), shape, down, up, rows, stride, padding, dilation, groups)
        return y.to(x.dtype)
    values = x, shape, down, up, stride, padding, dilation, groups
    return reduce(torch.add, (_convolved(*values, some) for some in rows.picks))


def _convolved(
    x: Tensor,
    shape: Sequence[int],
    down: Tensor,
    up: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    picks: Tensor,
) -> Tensor:
    """The updates' part of a convolution by one of the `steps` of the ranks, `picks`."""
    n, count, kernel = len(x), len(shape) - 2, shape[2:]
    first = picked(down, picks, x.dtype)  # [N, r, in]
    # [N·groups·r, C_in/groups, *kernel]: a convolution's outputs are counted group by group
    first = first[:, None].expand(-1, groups, -1, -1).reshape(-1, shape[1], *kernel)
    second = picked(up, picks, x.dtype).mT  # [N, out, r]
    second = second.reshape(-1, second.shape[-1], *[1] * count)
    # [1, (N channels), ...]: a row's channels meet its own kernels alone
    # a batch of 1 with N times the channels: torch has no convolution of a kernel for each image
    y = narrow.Stage(stride, padding, dilation, n * groups)(x.reshape(1, -1, *x.shape[2:]), first)
    y = narrow.Stage((1,) * count, (0,) * count, (1,) * count, n * groups)(y, second)
    return y.reshape(n, -1, *y.shape[2:])
