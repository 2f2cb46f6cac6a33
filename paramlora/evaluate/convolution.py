"""Low-rank convolution: a dense kernel that is not kept, both kernels joined, or a branch."""

from collections.abc import Callable
from math import prod
from typing import Any, Optional, Sequence

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor
from torch.compiler import is_compiling

from paramlora.cuda.operands import Drop, Operands, Wanted, has_kernel, is_depthwise
from paramlora.cuda.operators import (
    Gradients,
    convolved,
    convolved_backward,
    depthwise,
    depthwise_backward,
    gradient_of_second,
    scaled_down,
)
from paramlora.evaluate import choose
from paramlora.evaluate.choose import Asked, Way
from paramlora.evaluate.dropout import Drops, dropped_pointwise, masked, ranks_of
from paramlora.evaluate.functional import (
    Kept,
    cast,
    cast_for_autocast,
    differentiable,
    gradients_of_positions,
    in_cpp,
    in_plain_operations,
    in_torch_alone,
    input_of,
    kept_input,
    one_kernel,
    pointwise,
    start_cpp,
    thin_pair,
)
from paramlora.update import narrow
from paramlora.update.compat import applied, is_batched, recorded
from paramlora.update.contexts import autocast_of, in_own_types, without_autocast
from paramlora.update.geometry import in_format_of
from paramlora.update.narrow import CONVOLUTIONS as CONVOLUTIONS

_Maybe = Optional[Tensor]


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: _Maybe,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    strength: float = 1.0,
) -> Tensor:
    """``conv(x, W + strength · scale · B A) + bias`` in 1, 2 or 3 dimensions.

    In 16 bits both products go into one accumulator, so that a small update is not rounded away:
    a kernel of 1 is a linear layer of every position (on CUDA), other kernels are joined, and those
    of single channels summed in float32 (on CUDA); but no other groups, and nothing under a
    compiler. Elsewhere the dense kernel is formed, or where positions are few (`denser`), a
    low-rank branch of two convolutions is added. In other groups, where a branch repeats its first
    kernel for each, the update is a kernel of its own.

    Args:
        x: ``[N, C_in, ...]``.
        weight: ``[C_out, C_in / groups, *kernel]``.
        bias: ``[C_out]`` or None.
        lora_A: ``[r, C_in / groups · prod(kernel)]``.
        lora_B: ``[C_out, r]``.
        scale: ``[]``.
        stride, padding, dilation, groups: as for `torch.nn.functional.conv2d`; zeros padding.
        strength: a number on top of `scale`.

    Example:
        >>> x, W = torch.randn(2, 4, 6, 6).double(), torch.randn(8, 4, 3, 3).double()
        >>> A, B = torch.randn(2, 36).double(), torch.randn(8, 2).double()
        >>> window = ((1, 1), (0, 0), (1, 1), 1)
        >>> y = convolution(x, W, None, A, B, torch.tensor(0.5).double(), *window)
        >>> assert torch.allclose(y, F.conv2d(x, W + 0.5 * (B @ A).reshape(W.shape)))
    """
    # stride 1 there: channels last, or a kernel of one position; `in_format_of` tells them apart
    if weight.stride(1) == 1:
        x = in_format_of(x, weight)
    if strength != 1:
        scale = scale * strength
    window, compiling = (stride, padding, dilation, groups), is_compiling()
    y = None if compiling else in_cpp(x, weight, bias, lora_A, lora_B, scale, 1.0, window)
    if y is not None:
        return y
    device = autocast_of(x)
    if device is not None:
        x, weight, bias = cast_for_autocast(device, x, weight, bias)
    values, shape = Operands(x, weight, bias, lora_A, lora_B, scale), weight.shape
    way, conv = way_of(values, window, compiling), CONVOLUTIONS[len(shape) - 3]
    if way is Way.SUM:
        up, down = scaled_down(lora_B, scale, 1.0, x.dtype), cast(lora_A, x.dtype)
        return conv(x, _kernel(weight, up, down), bias, *window)
    if way is Way.POINTWISE:
        return pointwise(x, weight.flatten(1), bias, lora_A, lora_B, scale)
    if way is Way.JOINED:
        return applied(_Joined, *values, *window[:3])
    if way is Way.DEPTHWISE:
        return applied(_Depthwise, *values, *window[:3])
    if way is Way.DENSE:
        return applied(_Convolution, *values, *window)
    y = conv(x, weight, bias, *window)
    if way is Way.OWN_KERNEL:  # which keeps as much of the update as a branch
        delta = _update(lora_A, lora_B, scale).reshape(shape)
        return y + one_kernel(x, delta, narrow.Stage(*window))
    return y + branch(x, shape, lora_A, narrow.of_factor(lora_B) * scale, *window)


def way_of(of: Operands, window: tuple[Any, ...], compiling: bool) -> Way:
    """The way of `convolution`, of operands in the types in which it computes."""
    x, shape, (stride, *_, groups) = of.x, of.weight.shape, window
    # float32 has no kernels of ours, and a compiler no operator for these
    ours = _kernels_way(of, window) if x.dtype.itemsize == 2 and not compiling else None
    about = (choose.thresholds_of(x), x.dtype, x.numel(), shape, of.a.shape[0])
    asked = Asked("convolution", *about, ours, compiling, stride=stride, groups=groups)
    return choose.way(asked)


def gradients_of_native(
    dy: Tensor, of: Operands, kept: Tensor, wanted: tuple[bool, ...], window: tuple[Any, ...]
) -> tuple[_Maybe, _Maybe, _Maybe]:
    """The gradients of x, A and B after a forward in C++, where C++ does not find them."""
    x, weight, _, a, b, scale = of
    if _has_one_position(weight, window):
        return gradients_of_positions(dy, of, kept, wanted)
    single = window[3] > 1
    saved = (x, weight, a, b, scale, kept) if single else (x, weight, a, b, scale, kept, None)
    ctx, kind = Kept(saved, wanted, window=window[:3]), _Depthwise if single else _Joined
    dx, _, _, da, db, *_ = kind.backward(ctx, dy)
    return dx, da, db


def _kernels_way(of: Operands, window: tuple[Any, ...]) -> Optional[Way]:
    """The way in which our kernels serve a 16-bit convolution, or None: joined kernels are asked of
    later."""
    if _is_pointwise(of.x, of.weight, window):
        return Way.POINTWISE
    if window[3] > 1 and not recorded():
        if is_depthwise(of, window[:3], window[3]):
            return Way.DEPTHWISE
    return None


def dropped_convolution(
    x: Tensor,
    pad: Callable[[Tensor], Tensor],
    weight: Tensor,
    bias: _Maybe,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Tensor,
    window: tuple[Any, ...],
    drops: Drops,
) -> Tensor:
    """`convolution` with dropout on the branch's input, before it is padded.

    Args:
        x: not padded yet.
        pad: gives it the padding that `window` does not say.
        weight, bias, lora_A, lora_B, scale: as of `convolution`; `scale` and B hold what makes up
            for what is dropped.
        window: stride, padding, dilation and groups.
        drops: the masks.
    """
    # as torch lays it for the plain layer, whose output's format follows it
    x, device = in_format_of(x, weight), autocast_of(x)
    if device is not None:
        x, weight, bias = cast_for_autocast(device, x, weight, bias)
        with torch.autocast(device, enabled=False):
            values = (x, pad, weight, bias, lora_A, lora_B, scale)
            return dropped_convolution(*values, window, drops)
    about = (x.dtype, x.numel(), weight.shape, len(lora_A))
    asked = Asked(
        # whatever knows no autograd function takes the plain operations, a compiler's way
        "convolution", choose.thresholds_of(x), *about, compiling=in_torch_alone(x),
        dropout=True, stride=window[0], groups=window[3],
    )  # fmt: skip
    if choose.way(asked) is Way.PLAIN:
        y = CONVOLUTIONS[weight.dim() - 3](pad(x), weight, bias, *window)
        up = narrow.of_factor(lora_B) * scale
        return y + _dropped_branches(x, lora_A, up, pad, weight.shape, window, drops)
    if _is_pointwise(x, weight, window) and pad(x) is x:
        one_position = (x, weight.flatten(1), bias, lora_A, lora_B, scale, drops)
        result = dropped_pointwise(*one_position)
        if result is not None:
            return result
    rest = (pad, window, drops.rates, drops.ranks, drops.seed)
    return applied(_DroppedConvolution, x, weight, bias, lora_A, lora_B, scale, *rest)


def _dropped_branches(
    x: Tensor,
    a: Tensor,
    up: Tensor,
    pad: Callable[[Tensor], Tensor],
    shape: Sequence[int],
    window: tuple[Any, ...],
    drops: Drops,
) -> Tensor:
    parts = [
        branch(pad(masked(x, drops, which)), shape, a[ranks], up[:, ranks], *window)
        for which, ranks in ranks_of(drops)
    ]
    # `sum` of 16 bits adds in float32 and rounds once, where `+` would round each time
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


class _DroppedConvolution(torch.autograd.Function):
    """A convolution with dropout on its branch. Keeps x by reference, and the seed of the masks.

    In bfloat16 and one group base and branch share one accumulator, as in `_Joined`; else, and for
    gradients, a CPU adds both in float32 before their only rounding.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: _Maybe,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        pad: Callable[[Tensor], Tensor],
        window: tuple[Any, ...],
        rates: tuple[float, ...],
        ranks: tuple[int, ...],
        seed: Tensor,
    ) -> Tensor:
        ctx.rest, drops = (pad, window, rates, ranks), Drops(rates, ranks, seed)
        kept, ctx.kernel = (x, weight, a, b, scale, seed), False
        conv, padded = CONVOLUTIONS[weight.dim() - 3], pad(x)
        # float16 would need powers of two here, as `_Joined` has them
        if x.dtype == torch.bfloat16 and window[3] == 1:
            if len(rates) == 1 and padded is x:
                of = Operands(x, weight, bias, a, b, scale)
                result = convolved(of, window[:3], Drop(rates, seed))
                if result is not None:
                    ctx.kernel = True
                    ctx.save_for_backward(*kept, *result[1:])
                    return result[0]
            both, down, _ = _kernels(weight, a, b, scale)
            last = len(drops.ranks) - 1  # whose kernel also has the zeros that pad the rank
            parts = [
                # each update has a mask of its own, so the first kernels cannot be one convolution
                conv(
                    pad(masked(x, drops, i)),
                    down[own.start : own.stop if i < last else None],
                    None,
                    *window,
                )
                for i, own in ranks_of(drops)
            ]
            t = parts[0] if last == 0 else torch.cat(parts, 1)
            more = _at_the_middle(t, padded, weight.shape[2:], *window[:3])
            if more is not None:
                ctx.save_for_backward(*kept, t, None)
                return conv(torch.cat([padded, in_format_of(more, padded)], 1), both, bias, *window)
        ctx.save_for_backward(*kept, None, None)
        values = _wide_on_cpu(x, weight, bias)
        y, up = conv(pad(values[0]), *values[1:], *window), narrow.of_factor(b) * scale
        y.add_(_dropped_branches(values[0], a, up, pad, weight.shape, window, drops))
        return _rounded(y, x)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, a, b, scale, seed, t, down = ctx.saved_tensors
        (pad, window, rates, ranks), needs = ctx.rest, ctx.needs_input_grad
        drops, shape, given = Drops(rates, ranks, seed), weight.shape, x
        x, weight, dy = _wide_on_cpu(x, weight, dy)
        dbias = _bias_gradient(dy) if needs[2] else None
        # torch's convolution_backward gives x's gradient, not that of what was padded into x
        again = torch.is_grad_enabled() or pad(x) is not x
        if ctx.kernel and not (again or in_plain_operations(True, dy)):
            of, drop = Operands(x, weight, None, a, b, scale), Drop(rates, seed)
            wanted = Wanted(*needs[:6])
            dx, *others = convolved_backward(dy, of, t, wanted, window[:3], drop, down)
            asked = (False, True, False)
            dweight = _backward(dy, x, weight, window, asked)[1] if needs[1] else None
            return dx, dweight, dbias, *others, *(None,) * 5
        # float16 needs the powers of two of `branch`, and groups repeat its first kernel
        if again or is_batched(dy) or x.dtype == torch.float16 or window[3] > 1:

            def update(x: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
                up = narrow.of_factor(b) * scale
                return _dropped_branches(x, a, up, pad, shape, window, drops)

            first, *others = differentiable(update, (x, a, b, scale), (needs[0], *needs[3:6]), dy)
        else:
            up, needed = narrow.of_factor(b) * scale, (needs[0], needs[3], needs[4] or needs[5])
            t = None if ctx.kernel else t  # the kernels' has another shape
            first, da, dup = _gradients_of_branches(dy, x, a, up, t, shape, window, drops, needed)
            second: tuple[_Maybe, _Maybe] = (None, None)
            if dup is not None:
                second = gradient_of_second(dup, b, scale, 1.0, needs[5])
            others = [da, *second]
        if again:

            def base(x: Tensor, weight: Tensor) -> Tensor:
                return CONVOLUTIONS[weight.dim() - 3](pad(x), weight, None, *window)

            dx, dweight = differentiable(base, (x, weight), needs[:2], dy)
        else:
            dx, dweight, _ = _backward(dy, x, weight, window, (*needs[:2], False))
        dx = None if dx is None or first is None else _rounded(dx + first, given)
        dweight = None if dweight is None else dweight.to(given.dtype)
        return dx, dweight, dbias, *others, *(None,) * 5


def _gradients_of_branches(
    dy: Tensor,
    x: Tensor,
    a: Tensor,
    up: Tensor,
    t: _Maybe,
    shape: Sequence[int],
    window: tuple[Any, ...],
    drops: Drops,
    wanted: tuple[bool, bool, bool],
) -> list[_Maybe]:
    """The gradients of x, A and B with its scale that are wanted, of `_dropped_branches` of one
    group; `t`: what the first kernels gave, if it was kept."""
    one, two, (x_too, a_too, up_too) = (
        narrow.Stage(*window),
        pointwise_of(len(shape) - 2, 1),
        wanted,
    )
    found: list[list[Tensor]] = [[], [], []]
    for which, ranks in ranks_of(drops):
        factors = cast(a[ranks], x.dtype), cast(up[:, ranks], x.dtype)
        (first, second), own = kernels_of(*factors, shape[2:], 1), masked(x, drops, which)
        u = own if not up_too else one(own, first) if t is None else cast(t[:, ranks], x.dtype)
        v, dsecond = two.gradients(dy, u, second, (x_too or a_too, up_too))
        if dsecond is not None:
            found[2].append(dsecond.reshape(factors[1].shape))
        if v is None:
            continue
        dx, dfirst = one.gradients(v, own, first, (x_too, a_too))
        if dx is not None:
            found[0].append(masked(dx, drops, which))
        if dfirst is not None:
            found[1].append(dfirst.reshape(factors[0].shape))
    dxs, das, dups = found
    # `sum` of 16 bits adds in float32 and rounds once, as in the forward
    dx = None if not dxs else dxs[0] if len(dxs) == 1 else torch.stack(dxs).sum(0)
    da, dup = torch.cat(das) if das else None, torch.cat(dups, 1) if dups else None
    return [
        dx,
        None if da is None else cast(da, a.dtype),
        None if dup is None else cast(dup, up.dtype),
    ]


def _wide_on_cpu(x: Tensor, *others: Any) -> tuple[Any, ...]:
    """The tensors in float32 where x is of 16 bits on a CPU, whose products gain nothing by 16; on
    a device as they are."""
    if not x.is_cpu or x.dtype.itemsize > 2:
        return x, *others
    return tuple(None if t is None else t.float() for t in (x, *others))


def _rounded(t: Tensor, x: Tensor) -> Tensor:
    """A result of what `_wide_on_cpu` gave, in x's type and in x's memory format."""
    if t.dtype == x.dtype or is_batched(t):  # many gradients at once lie by no format
        return t.to(x.dtype)
    return in_format_of(t.to(x.dtype), x)


def _update(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """``scale · B A`` in the factors' type, also under autocast, which would cast them."""
    with in_own_types(b):
        return (narrow.of_factor(b) * scale) @ narrow.of_factor(a)


def _is_pointwise(x: Tensor, weight: Tensor, window: tuple[Any, ...]) -> bool:
    """Whether a convolution is a linear layer of every position, and our kernels serve that."""
    return _has_one_position(weight, window) and has_kernel(x, weight.flatten(1))


def _has_one_position(weight: Tensor, window: tuple[Any, ...]) -> bool:
    """Whether each output is of one position of the input, at the same place."""
    stride, padding, _, groups = window
    one = prod(weight.shape[2:]) == groups == 1
    return one and {*stride} == {1} and {*padding} == {0}


def branch(
    x: Tensor,
    shape: Sequence[int],
    down: Tensor,
    up: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """The update alone: ``down`` with the layer's kernel, repeated for each group, then 1×1 ``up``.

    Args:
        x: ``[N, C_in, ...]``.
        shape: of the weight, ``[C_out, C_in / groups, *kernel]``.
        down: ``[r, C_in / groups · prod(kernel)]``.
        up: ``[C_out, r]``.
        stride, padding, dilation, groups: of the layer.
    """
    n, (first, second) = len(shape) - 2, kernels_of(down, up, shape[2:], groups)
    one = narrow.Stage(stride, padding, dilation, groups)
    # `thin_pair` keeps float16 in range between both
    return thin_pair(x, first, second, one, pointwise_of(n, groups))


def pointwise_of(n: int, groups: int) -> narrow.Stage:
    """A convolution 1×1 in so many dimensions."""
    return narrow.Stage((1,) * n, (0,) * n, (1,) * n, groups)


def kernels_of(
    down: Tensor, up: Tensor, kernel: Sequence[int], groups: int
) -> tuple[Tensor, Tensor]:
    """The factors as kernels: ``[groups · r, C_in / groups, *kernel]`` and ``[C_out, r, 1...]``."""
    first = down.reshape(len(down), -1, *kernel)
    # [groups·r, ...], group by group as torch counts outputs
    return each_group(first, groups), up.reshape(*up.shape, *[1] * len(kernel))


def each_group(weight: Tensor, groups: int) -> Tensor:
    """A kernel repeated for each group."""
    return repeat(weight, "first ... -> (groups first) ...", groups=groups)


class _Joined(torch.autograd.Function):
    """One convolution of both kernels, whose one accumulator takes both products.

    ``A`` is a convolution of its own, whose output ``t`` joins the input as more channels, where
    ``B`` is the middle of the kernel; for the gradient of the input, ``dY`` and ``dY·B`` join in
    the same way. Where a kernel's middle meets the padding, the forward adds two rounded outputs.
    Keeps x by reference, and ``t``.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        of, window = Operands(*inputs[:6]), inputs[6:]
        x, weight, bias, a, b, scale = of
        # the inputs themselves: below a and b become copies, which nobody can differentiate
        ctx.window, g, kept = window, None, (kept_input(ctx, x), weight, a, b, scale)
        if x.dtype == torch.float16:
            # the reach of a convolution's output is a row of A
            a, b, g = narrow.in_range(x, a, b.float() * scale.float(), a.shape[1])
            scale = torch.ones_like(g)
            of = of._replace(a=a, b=b, scale=scale)
        # make_fx sees no launch
        result = None if recorded() else convolved(of, window)
        ctx.kernel = result is not None
        if result is not None:
            start_cpp()
            ctx.save_for_backward(*kept, result[1], g)
            return result[0]
        conv, (both, down, up) = CONVOLUTIONS[weight.dim() - 3], _kernels(weight, a, b, scale)
        t = conv(x, down, None, *window)
        ctx.save_for_backward(*kept, t, g)
        more = _at_the_middle(t, x, weight.shape[2:], *window)
        # the middle of some output's kernel lies in the padding, where x has no place for t
        if more is None:
            return conv(x, weight, bias, *window) + conv(t, up)
        return conv(torch.cat([x, more], 1), both, bias, *window)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        held, weight, a, b, scale, t, g = ctx.saved_tensors
        needs, window, x = ctx.needs_input_grad, (*ctx.window, 1), input_of(ctx, held, weight)
        none = (None,) * len(ctx.window)
        if torch.is_grad_enabled() or in_plain_operations(ctx.kernel, dy):

            def again(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
                y = CONVOLUTIONS[weight.dim() - 3](x, weight, None, *window)
                return y + branch(x, weight.shape, a, narrow.of_factor(b) * scale, *window)

            return (*_differentiable(again, (x, weight, a, b, scale), needs, dy), *none)
        of, wanted, dweight, dbias = (
            Operands(x, weight, None, a, b, scale),
            Wanted(*needs[:6]),
            None,
            None,
        )
        values = (ctx.kernel, dy, of, t, wanted, ctx.window)
        grads = _gradients(*values) if g is None else _gradients_in_range(g, *values)
        if needs[1] or needs[2]:
            _, dweight, dbias = _backward(dy, x, weight, window, (False, needs[1], needs[2]))
        return (grads[0], dweight, dbias, *grads[1:], *none)


def _gradients_in_range(
    g: Tensor,
    kernel: bool,
    dy: Tensor,
    of: Operands,
    t: Tensor,
    wanted: Wanted,
    window: tuple[Any, ...],
) -> Gradients:
    """The gradients of a float16 convolution, whose forward had A times the power of two g."""
    scaled, ones = of.b.float() * of.scale.float(), torch.ones_like(g)
    up, down, h = narrow.in_range(dy, scaled, of.a, len(of.b))
    # B's gradient with g in it must be undone before the scale's is found from it
    masks = wanted._replace(b=wanted.b or wanted.scale, scale=False)
    inside = of._replace(a=down, b=up, scale=ones)
    dx, da, db, dscale = _gradients(kernel, dy, inside, t, masks, window)
    if db is not None:
        db, dscale = gradient_of_second(db / g, of.b, of.scale, 1.0, wanted.scale)
    return dx, None if da is None else (da / h).to(of.a.dtype), db, dscale


def _gradients(
    kernel: bool, dy: Tensor, of: Operands, t: Tensor, wanted: Wanted, window: tuple[Any, ...]
) -> Gradients:
    """The gradients of x, A, B and the scale that are wanted, as the forward was computed."""
    if kernel:
        return convolved_backward(dy, of, t, wanted, window)
    x, weight, _, a, b, scale = of
    stride, padding, dilation = window
    one, two = narrow.Stage(stride, padding, dilation, 1), pointwise_of(weight.dim() - 2, 1)
    dx = da = db = dscale = None
    down, up, thin_too = _down(weight, a), _up(weight, b, scale), wanted.x or wanted.a
    # in float16 t has the forward's power and v another; the caller gives both back
    v, product = two.gradients(dy, t, up, (thin_too, wanted.b or wanted.scale))
    if wanted.x and v is not None:
        # dy with v as more channels, against W with A below: one accumulator for x's gradient
        tall = torch.cat([weight, down], 0)
        dx, _ = one.gradients(torch.cat([dy, v], 1), x, tall, (True, False))
    if wanted.a and v is not None:
        _, first = one.gradients(v, x, down, (False, True))
        da = None if first is None else first[: len(a)].reshape(a.shape).to(a.dtype)
    if product is not None:
        product = product.reshape(len(product), -1)[:, : len(a)]
        db, dscale = gradient_of_second(product, b, scale, 1.0, wanted.scale)
    return dx, da, db, dscale


def _at_the_middle(
    t: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> _Maybe:
    """``t`` at those positions of x that a kernel's middle meets for each output, zeros elsewhere;
    None where it meets the padding."""
    # where in x the kernel's middle lies for the first output, and below for the last
    firsts = [k // 2 * d - p for k, d, p in zip(kernel, dilation, padding)]
    lasts = [f + (size - 1) * s for f, size, s in zip(firsts, t.shape[2:], stride)]
    if min(firsts) < 0 or any(last >= size for last, size in zip(lasts, x.shape[2:])):
        return None
    if t.shape[2:] == x.shape[2:]:  # stride 1 and "same" padding: t is there already
        return t
    # between them zeros, which the joined kernel's middle adds
    more = in_format_of(t.new_zeros(*t.shape[:2], *x.shape[2:]), x)
    at: Any = (..., *(slice(f, last + 1, s) for f, last, s in zip(firsts, lasts, stride)))
    more[at] = t
    return more


def _kernels(weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The joined kernel ``[W, B]``, and A and B as kernels of their own, all in the weight's type;
    the rank padded with zeros to a multiple of the 8 channels that tensor cores take."""
    up = _up(weight, b, scale)
    # B at index k // 2 of each dimension; F.pad counts from the last one
    around = [size for k in reversed(weight.shape[2:]) for size in (k // 2, k - 1 - k // 2)]
    return torch.cat([weight, F.pad(up, around)], 1), _down(weight, a), up


def _up(weight: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    up = F.pad(scaled_down(b, scale, 1.0, weight.dtype), (0, -b.shape[1] % 8))
    return up.reshape(*up.shape, *[1] * (weight.dim() - 2))


def _down(weight: Tensor, a: Tensor) -> Tensor:
    down = F.pad(a.to(weight.dtype), (0, 0, 0, -len(a) % 8))
    return down.reshape(len(down), *weight.shape[1:])


class _Convolution(torch.autograd.Function):
    """A convolution by the dense kernel, which is formed for the forward and again for the
    gradients; keeps x alone."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        of, window = Operands(*inputs[:6]), inputs[6:]
        x, weight, bias, a, b, scale = of
        ctx.window = window
        ctx.save_for_backward(kept_input(ctx, x), weight, a, b, scale)
        conv = CONVOLUTIONS[weight.dim() - 3]
        up, down = scaled_down(b, scale, 1.0, x.dtype), cast(a, x.dtype)
        return conv(x, _kernel(weight, up, down), bias, *window)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        held, weight, a, b, scale = ctx.saved_tensors
        needs, window, x = ctx.needs_input_grad, ctx.window, input_of(ctx, held, weight)
        none = (None,) * len(window)
        if torch.is_grad_enabled():

            def again(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
                dense = _kernel(weight, scaled_down(b, scale, 1.0, x.dtype), cast(a, x.dtype))
                return CONVOLUTIONS[weight.dim() - 3](x, dense, None, *window)

            return (*_differentiable(again, (x, weight, a, b, scale), needs, dy), *none)
        up, down = scaled_down(b, scale, 1.0, x.dtype), cast(a, x.dtype)
        wanted = needs[3], needs[4] or needs[5]
        # both factors' gradients follow from the dense one, see `_from_kernel`
        dense_too = needs[1] or any(wanted) and choose.dense_gradient(x.is_cpu, window[3])
        dx = kernel = dbias = None
        if needs[0] or dense_too or needs[2]:
            # x's gradient is through the sum; without it any kernel of that size does
            dense = _kernel(weight, up, down) if needs[0] else weight
            dx, kernel, dbias = _backward(dy, x, dense, window, (needs[0], dense_too, needs[2]))
        if kernel is not None:
            da, product = _from_kernel(kernel.reshape(len(kernel), -1), down, up, wanted)
        else:
            da, product = _from_thin(dy, x, down, up, weight.shape, window, wanted)
        db = dscale = None
        if product is not None:
            db, dscale = gradient_of_second(product, b, scale, 1.0, needs[5])
        da = None if da is None else cast(da, a.dtype)
        return (dx, kernel if needs[1] else None, dbias, da, db, dscale, *none)


class _Depthwise(torch.autograd.Function):
    """A 16-bit convolution of single channels in our kernels (see `operators.depthwise`). Keeps x,
    and in float32 the sum of W and the update."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        of, window = Operands(*inputs[:6]), inputs[6:]
        x, weight, bias, a, b, scale = of
        ctx.window = window
        y, total = depthwise(of, window)
        start_cpp()
        # the kernels sum W and the update once, in float32: as small as a row for each channel
        ctx.save_for_backward(kept_input(ctx, x), weight, a, b, scale, total)
        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        held, weight, a, b, scale, total = ctx.saved_tensors
        needs, window = ctx.needs_input_grad, (*ctx.window, len(weight))
        x = input_of(ctx, held, weight)
        none = (None,) * len(ctx.window)
        if torch.is_grad_enabled() or in_plain_operations(True, dy):

            def again(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
                dense = weight + _update(a, b, scale).to(weight.dtype).view_as(weight)
                return CONVOLUTIONS[weight.dim() - 3](x, dense, None, *window)

            return (*_differentiable(again, (x, weight, a, b, scale), needs, dy), *none)
        of = Operands(x, weight, None, a, b, scale)
        grads = depthwise_backward(dy, of, total, Wanted(*needs[:6]), ctx.window)
        dbias = _bias_gradient(dy) if needs[2] else None
        return (*grads[:2], dbias, *grads[2:], *none)


def _differentiable(
    compute: Callable[..., Tensor], inputs: Sequence[Tensor], needs: Sequence[bool], dy: Tensor
) -> tuple[_Maybe, ...]:
    """The gradients that `differentiable` gives, with that of a bias in its place behind the
    weight's."""
    dbias = _bias_gradient(dy) if needs[2] else None
    dx, dweight, *others = differentiable(compute, inputs, (*needs[:2], *needs[3:6]), dy)
    return dx, dweight, dbias, *others


def _bias_gradient(dy: Tensor) -> Tensor:
    return dy.sum([0, *range(2, dy.dim())])


def _from_kernel(
    kernel: Tensor, down: Tensor, up: Tensor, wanted: tuple[bool, bool]
) -> tuple[_Maybe, _Maybe]:
    """The gradients of A and, before its scale, of B, from the dense kernel's: cheaper than four
    thin convolutions on a CPU, which runs them badly, and in groups."""
    return (
        up.t() @ kernel if wanted[0] else None,
        kernel @ down.t() if wanted[1] else None,
    )


def _from_thin(
    dy: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    shape: Sequence[int],
    window: tuple[Any, ...],
    wanted: tuple[bool, bool],
) -> tuple[_Maybe, _Maybe]:
    """The gradients of A and of B before its scale by thin convolutions, of a single group."""
    conv, n = CONVOLUTIONS[len(shape) - 3], len(shape) - 2
    da: _Maybe = None
    inner, outer = kernels_of(down, up, shape[2:], 1)
    if wanted[0]:
        # B as a 1×1 kernel, transposed: its own gradient of its input
        v = conv(dy, outer.transpose(0, 1))
        _, first, _ = _backward(v, x, inner, window, (False, True, False))
        da = None if first is None else first.reshape(down.shape)
    if not wanted[1]:
        return da, None
    one = ((1,) * n, (0,) * n, (1,) * n, 1)
    # the thin product was not kept: dense ways keep x alone
    _, second, _ = _backward(dy, conv(x, inner, None, *window), outer, one, (False, True, False))
    return da, None if second is None else second.reshape(up.shape)


def _kernel(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    # a view by sizes takes longer than by example
    return torch.addmm(weight.flatten(1), up, down).view_as(weight)


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, window: tuple[Any, ...], masks: Sequence[bool]
) -> tuple[_Maybe, _Maybe, _Maybe]:
    stride, padding, dilation, groups = window
    # `sizes` is the bias's; below False is for transposed, and `none` its output padding
    none, sizes = [0] * len(stride), [weight.shape[0]]
    return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
        dy, x, weight, sizes, stride, padding, dilation, False, none, groups, list(masks)
    )
