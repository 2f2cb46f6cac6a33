"""Low-rank updates of stacks of expert matrices: grouped products, and never a dense sum.

``y_e = x_e W_eᵀ + s·(x_e A_eᵀ) B_eᵀ`` (Hu et al. 2021, arXiv:2106.09685, equation 3, for each
expert) of rows that lie sorted by expert, without the gradient of the dense weights. Tensors only.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor
from torch.compiler import is_compiling

from paramlora.cuda.operands import Drop, served
from paramlora.cuda.operators import Gradients, gradient_of_second
from paramlora.evaluate import choose
from paramlora.evaluate.choose import ALIGNED, EXPERTS, EXPERTS_RANK, Asked, Way, grouped_serves
from paramlora.evaluate.dropout import Drops, masked, ranks_of
from paramlora.evaluate.functional import (
    cast,
    cast_for_autocast,
    differentiable,
    in_a_row,
    input_of,
    kept_input,
    narrowed,
)
from paramlora.evaluate.sources import Again, Chosen, Source, put_together, taken_apart
from paramlora.update import narrow
from paramlora.update.compat import applied, grouped_product, is_batched, recorded, transformed
from paramlora.update.contexts import autocast_of, without_autocast

_Maybe = Optional[Tensor]


class _Stack(NamedTuple):
    """What a grouped product is computed from, see `grouped_linear`; `x`: the rows themselves."""

    x: Tensor
    weight: Tensor
    ends: Tensor
    a: Tensor
    b: Tensor
    scale: Tensor
    strength: float
    drops: Optional[Drops]

    @property
    def factors(self) -> tuple[Tensor, Tensor, Tensor, float]:
        """A, B, the scale and the strength."""
        return self.a, self.b, self.scale, self.strength


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Tensor,
    strength: float = 1.0,
    drops: Optional[Drops] = None,
    source: Optional[Source] = None,
    bias: _Maybe = None,
) -> Tensor:
    """``x_e (W_e + strength · scale · B_e A_e)ᵀ + bias_e`` of each expert's rows.

    Args:
        x: ``[rows, in]``, sorted by expert; or what `source` makes them of.
        weight: ``[experts, out, in]``, any strides.
        ends: ``[experts]``, where each expert's rows end; what lies behind the last is no
            expert's, and its output has no meaning. Where `serves_pairs` as many for each matrix
            as there are updates of it, the factors' first dimension too.
        lora_A: ``[experts, r, in]``; cast down to the input's type.
        lora_B: ``[experts, out, r]``, likewise.
        scale: ``[]``.
        strength: a number on top of it.
        drops: the masks of dropout on the input of the low-rank products, if any.
        source: how the rows are made of x, which alone is kept.
        bias: ``[experts, out]``, of the weight's type; it gets no gradient.

    Returns:
        ``[rows, out]``. In 16 bits the two products are added before their only rounding.

    Example:
        >>> x, W = torch.randn(5, 4).double(), torch.randn(2, 3, 4).double()
        >>> A, B, s = torch.randn(2, 2, 4).double(), torch.randn(2, 3, 2).double(), torch.ones(())
        >>> y = grouped_linear(x, W, torch.tensor([2, 5]), A, B, s / 2)
        >>> assert torch.allclose(y[2:], x[2:] @ (W + 0.5 * B @ A)[1].T)
    """
    device = autocast_of(x)
    # a custom operator's schema holds no callable, as `Computed` has; and under autocast its rows
    # must be computed in the caller's context, before that is left below
    untold = is_compiling() or recorded()
    if source is not None and not isinstance(source, Chosen) and (device is not None or untold):
        x, source = source.rows(x), None
    if device is not None:
        x, weight = cast_for_autocast(device, x, weight)
        with torch.autocast(device, enabled=False):
            factors = (lora_A, lora_B, scale, strength)
            return grouped_linear(x, weight, ends, *factors, drops, source, bias)
    x = cast(x, weight.dtype)  # which the plain product does too
    # an operator's schema takes lists, and no NamedTuple
    masks = ([], [], None) if drops is None else ([*drops.rates], [*drops.ranks], drops.seed)
    if untold:
        op: Any = torch.ops.paramlora.grouped_linear
        # no seed: nothing is dropped; no order: the last two are read by nobody, but are no
        # optionals
        order, back, rest = taken_apart(source)
        values = (x, weight, ends, lora_A, lora_B, scale * strength)
        y, _ = op(*values, *masks, bias, order, back, *(rest or (1, False)))
        return y  # type: ignore[no-any-return]
    # an autograd function without `setup_context` is refused by torch.func's transforms
    if transformed():
        x = x if source is None else cast(source.rows(x), weight.dtype)
        y = grouped_by_definition(x, weight, ends, lora_A, lora_B, scale * strength, drops)
        return y if bias is None else y + bias[owners(ends, len(y))]
    # apart, as `save_for_backward` and autograd see tensors only where they are inputs of their own
    parts = (*masks, bias, *taken_apart(source))
    return applied(_Grouped, x, weight, ends, lora_A, lora_B, scale, strength, *parts)


def plain_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """``x_e W_eᵀ`` alone."""
    one = torch.ones((), dtype=weight.dtype, device=weight.device)
    return grouped_linear(x, weight, ends, weight[:, :0], weight[:, :, :0], one)


def owners(ends: Tensor, rows: int) -> Tensor:
    """The expert of each row; of one that is nobody's the last."""
    every = torch.arange(rows, device=ends.device, dtype=ends.dtype)
    # `searchsorted` gives len(ends) behind the last end, where a bias has no row
    return torch.searchsorted(ends, every, right=True).clamp_(max=len(ends) - 1)


def grouped_by_definition(
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Tensor,
    drops: Optional[Drops] = None,
) -> Tensor:
    """`grouped_linear` in plain operations, for gradients of gradients: a loop over the experts."""
    weight = weight.repeat_interleave(len(ends) // len(weight), 0)  # of pairs, whose factors differ
    up, drops = narrow.of_factor(lora_B) * scale, drops or Drops((0.0,), (lora_A.shape[1],), ends)
    # something to concatenate where no expert has a row
    parts = [x.new_zeros(0, weight.shape[1])]
    for e, rows in runs(ends):
        y = x[rows] @ weight[e].t()
        for which, ranks in ranks_of(drops):
            seen, kernels = masked(x[rows], drops, which, rows.start), (lora_A[e], up[e])
            factors = kernels[0][ranks], kernels[1][:, ranks]
            y = y + in_a_row(seen, *factors, narrow.LINEAR, narrow.LINEAR)
        parts.append(y)
    y = torch.cat(parts)
    return torch.cat([y, y.new_zeros(len(x) - len(y), y.shape[1])])


def runs(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and these; none where tensors are shapes alone."""
    start = 0
    # `tolist` waits for a device, which its grouped product does not
    for e, end in enumerate([] if ends.is_meta else ends.tolist()):
        if end > start:
            yield e, slice(start, end)
            start = end


def serves_pairs(x: Tensor, weight: Tensor, groups: int, r: int) -> bool:
    """Whether our kernels compute `grouped_linear` of so many groups of rows, of which several may
    share a matrix: no operation of torch does that without a copy of it for each."""
    fits = 0 < r <= EXPERTS_RANK and groups <= EXPERTS and x.numel() and weight.numel()
    return bool(fits) and weight.dtype == x.dtype and weight.device == x.device and served(x)


def _way(of: _Stack) -> Way:
    """How a grouped product is computed: by our kernels where they serve it with one mask at most,
    and were found the faster, or are the only way, as for pairs."""
    x, weight, a, drops = of.x, of.weight, of.a, of.drops
    ours = (drops is None or len(drops.ranks) == 1) and serves_pairs(x, weight, len(a), a.shape[1])
    # torch has no operation for pairs but a copy of the matrix for each, so no measurement decides
    alone = len(a) > len(weight)
    best = Way.KERNELS if ours and (alone or choose.measured(x.get_device(), "experts")) else None
    about = (choose.thresholds_of(x), x.dtype, x.numel(), weight.shape, a.shape[1])
    return choose.way(Asked("experts", *about, best, dropout=drops is not None))


def _width(x: Tensor, r: int) -> int:
    """How many numbers a row of a thin product has: r, padded where a device's grouped product is
    what reads it."""
    return r + -r % ALIGNED if grouped_serves(x, x.shape[1]) else r


def _drop(drops: Optional[Drops]) -> Optional[Drop]:
    """The mask as the kernels take it, which know of one at most; None where nothing is dropped."""
    return None if drops is None or not drops.rates[0] else Drop(drops.rates, drops.seed)


def _padded(factor: Tensor) -> Tensor:
    """A thin stack ``[experts, r, n]`` with zeros up to the ranks that are taken at a time."""
    return torch.nn.functional.pad(factor, (0, 0, 0, -factor.shape[1] % ALIGNED))


def _thin(x: Tensor, first: Tensor, ends: Tensor, drops: Optional[Drops]) -> Tensor:
    """``(mask ∘ x_e) first_eᵀ``: ``[rows, in]`` and ``[experts, r, in]``; on a device of ranks
    that are padded with zeros."""
    if first.shape[1] == 0:  # of a stack without an update, beside one that has some
        return x.new_zeros(len(x), 0)
    if grouped_serves(x, x.shape[1]):
        if drops is None:
            return grouped_product(x, _padded(first).mT, offs=ends)  # type: ignore[no-any-return]
        parts = [
            # without the padding of each part: the ranks of all lie one after the other
            grouped_product(masked(x, drops, i), _padded(first[:, own]).mT, offs=ends)[:, :r]
            for (i, own), r in zip(ranks_of(drops), drops.ranks)
        ]
        return torch.nn.functional.pad(torch.cat(parts, 1), (0, -first.shape[1] % ALIGNED))
    u = x.new_zeros(len(x), first.shape[1])
    for e, rows in runs(ends):
        if drops is None:
            torch.mm(x[rows], first[e].t(), out=u[rows])
        else:
            for which, own in ranks_of(drops):
                u[rows, own] = masked(x[rows], drops, which, rows.start) @ first[e, own].t()
    return u


def _joined(x: Tensor, weight: Tensor, ends: Tensor, u: Tensor, second: Tensor) -> Tensor:
    """``x_e W_e + u_e second_e`` in one accumulator.

    Args:
        x: ``[rows, in]``.
        weight: ``[experts, in, out]``.
        u: ``[rows, r]``.
        second: ``[experts, r, out]``.
    """
    if grouped_serves(x, *weight.shape[1:]):
        if u.shape[1] > 0:
            # both as one product of longer rows: of two, torch's own would round one before adding
            x, weight = torch.cat([x, u], 1), _stacked(weight, _padded(second))
        return grouped_product(x, weight, offs=ends)  # type: ignore[no-any-return]
    y = x.new_zeros(len(x), weight.shape[2])
    # u of the kernels' forward or of a device is padded to `_width`, the factor is not
    second = second if u.shape[1] == second.shape[1] else _padded(second)
    for e, rows in runs(ends):
        _sum_of_products(x[rows], weight[e], u[rows], second[e], y[rows])
    return y


def _stacked(weight: Tensor, second: Tensor) -> Tensor:
    """``[experts, in + r, out]``, the weight with `second` below it, in the weight's memory order,
    so that it is copied as it lies."""
    if weight.stride(1) == 1:
        return torch.cat([weight.mT, second.mT], 2).mT
    return torch.cat([weight, second], 1)


def _spread(
    dy: Tensor, weight: Tensor, ends: Tensor, v: Tensor, down: Tensor, drops: Drops
) -> Tensor:
    """``dy_e W_e + mask ∘ (v_e down_e)``, on a CPU rounded once."""
    if grouped_serves(dy, *weight.shape[1:]):
        dx = _joined(dy, weight, ends, v[:, :0], down[:, :0])
        for which, own in ranks_of(drops):
            thin = torch.nn.functional.pad(v[:, own], (0, -drops.ranks[which] % ALIGNED))
            part = grouped_product(thin, _padded(down[:, own]), offs=ends)
            # a mask falls between the thin product and the sum, so that they cannot be joined in
            # one product
            dx = dx + masked(part, drops, which)
        return dx
    dx = dy.new_zeros(len(dy), weight.shape[2])
    for e, rows in runs(ends):
        for which, own in ranks_of(drops):
            # the small part first: `addmm_` then adds the large one in its float32 accumulator
            dx[rows] += masked(v[rows, own] @ down[e, own], drops, which, rows.start)
        dx[rows].addmm_(dy[rows], weight[e])
    return dx


def _sum_of_products(x: Tensor, w: Tensor, u: Tensor, v: Tensor, y: Tensor) -> None:
    """``y = x @ w + u @ v``; in 16 bits the smaller product comes first, as in `functional`."""
    if x.dtype.itemsize > 2:
        torch.mm(x, w, out=y).addmm_(u, v)
    elif choose.by_cublas(x):
        # `out_dtype` of torch.mm is CUDA's alone
        y.copy_(torch.mm(x, w, out_dtype=torch.float32).addmm_(u.float(), v.float()))
    else:
        torch.mm(u, v, out=y).addmm_(x, w)


def expert_sums(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """``left_eᵀ @ right_e`` over each expert's rows: ``[experts, left's, right's]``."""
    if left.shape[1] and right.shape[1] and grouped_serves(left, left.shape[1], right.shape[1]):
        product: Tensor = grouped_product(left.t(), right, offs=ends)
        return product
    total = left.new_zeros(len(ends), left.shape[1], right.shape[1])
    for e, rows in runs(ends):
        if left.dtype == torch.float16:  # sums of many products leave its range
            total = total.float()  # the first time only: it stays in float32 then
            total[e] = narrow.outer(left[rows], right[rows])
        else:
            torch.mm(left[rows].t(), right[rows], out=total[e])
    return total


def _narrowed_back(
    dy: Tensor, a: Tensor, b: Tensor, scale: Tensor, strength: float
) -> tuple[Tensor, Tensor, _Maybe]:
    """B with its scale, and A, in the type of dy, and in float16 the power of two between them:
    another than the forward's, as dy has another range than x."""
    if dy.dtype != torch.float16:
        down, up, h = narrowed(dy, a, b, scale, strength)
        return up, down, h
    # the gradient meets B first, so B has the part that A has in the forward
    scaled = b.float() * (scale if strength == 1 else scale * strength)
    one = torch.ones((), dtype=scaled.dtype, device=b.device)
    # reads as (first, second, power): both sides have changed places with those above
    return narrowed(dy, scaled, a, one, 1.0)


def _in_range_again(product: Tensor, of: _Stack) -> Tensor:
    """``dyᵀ u`` without the power of two that the thin product has in float16."""
    if of.x.dtype != torch.float16:
        return product
    up = of.b.float() * (of.scale.float() * of.strength)
    return product / narrow.balance(of.x, of.a, up, of.x.shape[1])


def _forward(of: _Stack, bias: _Maybe) -> tuple[Tensor, Tensor]:
    """``y`` and the thin product that `_backward` takes."""
    x, weight, ends, drops = of.x, of.weight, of.ends, of.drops
    down, up, _ = narrowed(x, *of.factors)
    if _way(of) is Way.KERNELS:
        from paramlora.cuda.experts import plan

        x, ends = x.contiguous(), ends.int()  # the kernels read ends of 32 bits
        u = plan.thin(x, down, ends, _width(x, of.a.shape[1]), _drop(drops))
        return plan.product(x, weight.mT, ends, u, up.mT, bias=bias), u
    u = _thin(x, down, ends, drops)
    y = _joined(x, weight.mT, ends, u, up.mT)
    return y if bias is None else y.add_(bias[owners(ends, len(y))]), u


_Wanted = Union[tuple[bool, ...], list[bool]]  # of x, A, B and the scale


def _backward(dy: Tensor, of: _Stack, u: Tensor, wanted: _Wanted) -> Gradients:
    """The gradients of x, A, B and the scale that are `wanted`."""
    dx = da = db = dscale = None
    dy, r = dy.contiguous(), of.a.shape[1]
    if _way(of) is Way.KERNELS and dy.dtype == of.x.dtype:
        return _backward_in_kernels(dy, of, u, wanted)
    if wanted[0] or wanted[1]:
        up, down, h = _narrowed_back(dy, *of.factors)
        v = _thin(dy, up.mT, of.ends, None)
        if wanted[0] and of.drops is None:
            dx = _joined(dy, of.weight, of.ends, v, down)
        elif wanted[0]:
            dx = _spread(dy, of.weight, of.ends, v, down, of.drops)  # type: ignore[arg-type]
        if wanted[1]:
            da = _factor_sums(v, of.x, of.ends, of.drops, r)
            da = cast(da if h is None else da / h, of.a.dtype)
    if wanted[2] or wanted[3]:
        db, dscale = _of_second(expert_sums(dy, u, of.ends)[..., :r], of, wanted)
    return dx, da, db, dscale


def _of_second(product: Tensor, of: _Stack, wanted: _Wanted) -> tuple[_Maybe, _Maybe]:
    """The gradients of B and the scale that are wanted, from ``dyᵀ u``."""
    product = _in_range_again(product, of)
    db, dscale = gradient_of_second(product, of.b, of.scale, of.strength, wanted[3])
    return db if wanted[2] else None, dscale


def _backward_in_kernels(dy: Tensor, of: _Stack, u: _Maybe, wanted: _Wanted) -> Gradients:
    """`_backward` in three launches of our kernels."""
    from paramlora.cuda.experts import plan

    x, ends, drop, r = of.x.contiguous(), of.ends.int(), _drop(of.drops), of.a.shape[1]
    dx = v = da = db = dscale = h = None
    if wanted[0] or wanted[1]:
        up, down, h = _narrowed_back(dy, *of.factors)
        v = plan.thin(dy, up.mT, ends, _width(x, r), None)
        dx = plan.product(dy, of.weight, ends, v, down, drop) if wanted[0] else None
    too = wanted[1], wanted[2] or wanted[3]
    product = None
    if any(too):
        da, product = plan.sums(x, v, dy, u, ends, r, drop, too)
    if da is not None:
        da = cast(da if h is None else da / h, of.a.dtype)
    if product is not None:
        db, dscale = _of_second(product, of, wanted)
    return dx, da, db, dscale


def _factor_sums(v: Tensor, x: Tensor, ends: Tensor, drops: Optional[Drops], r: int) -> Tensor:
    """``v_eᵀ (mask ∘ x_e)``: ``[experts, r, in]``."""
    if drops is None:
        return expert_sums(v, x, ends)[:, :r]
    parts = []
    for which, own in ranks_of(drops):
        some = torch.nn.functional.pad(v[:, own], (0, -drops.ranks[which] % ALIGNED))
        parts.append(expert_sums(some, masked(x, drops, which), ends)[:, : drops.ranks[which]])
    return torch.cat(parts, 1)


class _Grouped(torch.autograd.Function):
    """`grouped_linear` as one node of autograd. Keeps x, or what its rows are made of, by
    reference, and the thin product."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        ends: Tensor,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        strength: float,
        rates: list[float],
        ranks: list[int],
        seed: _Maybe,
        bias: _Maybe,
        order: _Maybe,
        back: _Maybe,
        rest: Any,
    ) -> Tensor:
        # `rest`: a `Computed`, or what a `Chosen` is but its two tensors
        ctx.strength, ctx.masks, ctx.rest = strength, (rates, ranks), rest
        rows = _rows(x, put_together(order, back, rest), weight)
        drops = _drops(rates, ranks, seed)
        y, u = _forward(_Stack(rows, weight, ends, a, b, scale, strength, drops), bias)
        # `kept_input` asks for a bias where the ends are: neither gets a gradient
        held = kept_input(ctx, x)
        thin = None if held is None else u
        # of a `Computed`, the only source without an order that has a rest
        held = x if order is None and rest is not None else held  # whose gradient reads it
        ctx.save_for_backward(held, weight, ends, a, b, scale, thin, seed, order, back)
        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        held, weight, ends, a, b, scale, u, seed, order, back = ctx.saved_tensors
        needs, x = ctx.needs_input_grad, input_of(ctx, held, weight)
        source, (rates, ranks) = put_together(order, back, ctx.rest), ctx.masks
        drops = _drops(rates, ranks, seed)
        wanted, none = (needs[0], *needs[3:6]), (None,) * 8
        if torch.is_grad_enabled() or is_batched(dy):

            def again(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
                factors = (_rows(x, source, weight), weight, ends, a, b, scale * ctx.strength)
                return grouped_by_definition(*factors, drops)

            # x itself, with what makes its rows inside of `again`: the gradient is then x's
            inputs = (x, weight, a, b, scale)
            dx, dweight, *others = differentiable(again, inputs, (*needs[:2], *needs[3:6]), dy)
            return dx, dweight, None, *others, *none
        rows, pulled = _again(x, source, held is not None, dy, weight, ends)
        of = _Stack(rows, weight, ends, a, b, scale, ctx.strength, drops)
        dx, *others = _backward(dy, of, u, wanted)
        dweight = _of_matrices(expert_sums(dy, rows, ends), weight) if needs[1] else None
        del rows, of  # before others of their size are made
        return None if dx is None else pulled(dx), dweight, None, *others, *none


def _of_matrices(sums: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the weight, from those of all groups."""
    # groups that share a matrix lie one after the other; 1, but for pairs
    each = len(sums) // len(weight)
    return sums.view(len(weight), each, *sums.shape[1:]).sum(1).to(weight.dtype)


def _rows(x: Tensor, source: Optional[Source], weight: Tensor) -> Tensor:
    return x if source is None else cast(source.rows(x), weight.dtype)


def _again(
    x: Tensor, source: Optional[Source], held: bool, dy: Tensor, weight: Tensor, ends: Tensor
) -> Again:
    """The rows for the gradients, which were not kept, and the gradient of x by theirs; where
    nobody reads them any tensor of their sizes."""
    if source is None:
        return x, lambda dx: dx
    if isinstance(source, Chosen) and not held:
        # only the factors' gradients would read the rows; what is left asks for their sizes
        return dy.new_empty(len(dy), weight.shape[2]), lambda dx: source.pulled(dx, ends)
    rows, pulled = source.again(x, ends)
    return cast(rows, weight.dtype), pulled


def _drops(rates: list[float], ranks: list[int], seed: _Maybe) -> Optional[Drops]:
    return None if seed is None else Drops((*rates,), (*ranks,), seed)


@torch.library.custom_op("paramlora::grouped_linear", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    rates: list[float],
    ranks: list[int],
    seed: Optional[Tensor],
    bias: Optional[Tensor],
    order: Optional[Tensor],
    back: Optional[Tensor],
    top: int,
    partial: bool,
) -> tuple[Tensor, Tensor]:
    rows = _rows(
        x, put_together(order, back, (top, partial) if order is not None else None), weight
    )
    of = _Stack(rows, weight, ends, a, b, scale, 1.0, _drops(rates, ranks, seed))
    return _forward(of, bias)


@_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    rates: list[float],
    ranks: list[int],
    seed: Optional[Tensor],
    bias: Optional[Tensor],
    order: Optional[Tensor],
    back: Optional[Tensor],
    top: int,
    partial: bool,
) -> tuple[Tensor, Tensor]:
    # as the real one: an operator's fake must give the sizes that the operator gives
    r = a.shape[1]
    padded = r + -r % ALIGNED if grouped_serves(x, x.shape[1]) else r
    rows = len(x) if order is None else len(order)
    return x.new_empty(rows, weight.shape[1]), x.new_empty(rows, padded)


# an operator of its own, so that a compiler sees one call in the backward too
@torch.library.custom_op("paramlora::grouped_linear_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    u: Tensor,
    rates: list[float],
    ranks: list[int],
    seed: Optional[Tensor],
    order: Optional[Tensor],
    back: Optional[Tensor],
    top: int,
    partial: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    drops = _drops(rates, ranks, seed)
    source = put_together(order, back, (top, partial) if order is not None else None)
    # rows are read for the weight, A, B or the scale; the second one wanted is x
    read = wanted[0] or any(wanted[2:])
    rows, pulled = _again(x, source, read, dy, weight, ends)
    of = _Stack(rows, weight, ends, a, b, scale, 1.0, drops)
    dx, *others = _backward(dy, of, u, wanted[1:])
    dense = _of_matrices(expert_sums(dy, rows, ends), weight) if wanted[0] else None
    grads = (None if dx is None else pulled(dx), *others)
    # a schema has no optional tensor among what it returns; empty ones stand for those not wanted
    found = [x.new_empty(0) if g is None else g.contiguous() for g in (dense, *grads)]
    return found[0], found[1], found[2], found[3], found[4]


@_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    u: Tensor,
    rates: list[float],
    ranks: list[int],
    seed: Optional[Tensor],
    order: Optional[Tensor],
    back: Optional[Tensor],
    top: int,
    partial: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = [
        t.new_empty(t.shape) if want else x.new_empty(0)
        for t, want in zip((weight, x, a, b, scale), wanted)
    ]
    return found[0], found[1], found[2], found[3], found[4]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, rates, ranks, seed, _, order, back, top, partial = inputs
    ctx.masks, ctx.rest = (rates, ranks), (top, partial)
    ctx.save_for_backward(*tensors, seed, order, back, output[1])


def _op_backward(ctx: Any, dy: Tensor, _: Any) -> Any:
    x, weight, ends, a, b, scale, seed, order, back, u = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = [needs[1], needs[0], *needs[3:6]]
    op: Any = torch.ops.paramlora.grouped_linear_backward
    chosen = (order, back, *ctx.rest)
    grads = op(dy, x, weight, ends, a, b, scale, u, *ctx.masks, seed, *chosen, wanted)
    dweight, dx, *others = (g if want else None for g, want in zip(grads, wanted))
    return dx, dweight, None, *others, *(None,) * 8


_op.register_autograd(_op_backward, setup_context=_keep)
