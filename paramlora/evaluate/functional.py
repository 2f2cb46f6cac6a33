"""Low-rank linear and embedding.

``W + scale·B·A`` (Hu et al. 2021, arXiv:2106.09685, equation 3) applied to an input, without the
gradient of the dense weight. Tensors only.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from paramlora.cuda import operators
from paramlora.cuda.operands import (
    Operands,
    Wanted,
    factors_fit,
    fits,
    has_kernel,
    padded,
    served,
    switched_on,
)
from paramlora.cuda.operators import gradient_of_second, scaled_down
from paramlora.evaluate import choose
from paramlora.evaluate.choose import Asked, Way
from paramlora.update import narrow
from paramlora.update.compat import (
    applied,
    is_batched,
    recorded,
    reshaped,
    traced,
    transformed,
)
from paramlora.update.contexts import autocast_of, without_autocast
from paramlora.update.geometry import PLAIN

_Maybe = Optional[Tensor]
# `in_cpp`, where that was built; see `start_cpp`
_native: Any = None
_started = False


def linear(
    x: Tensor,
    weight: Tensor,
    bias: _Maybe,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Tensor,
    strength: float = 1.0,
) -> Tensor:
    """``x (W + strength · scale · B A)ᵀ + bias``.

    Args:
        x: ``[..., in]``, of the weight's type, or of any under autocast.
        weight: ``[out, in]``, any strides.
        bias: ``[out]`` or None.
        lora_A: ``[r, in]``; cast down to the input's type, whose gradient is in its own.
        lora_B: ``[out, r]``, likewise.
        scale: ``[]``.
        strength: a number on top of it.

    Returns:
        ``[..., out]``. In 16 bits the two products are added before their only rounding, but
        for what is compiled where `operands.has_kernel` is not.

    Example:
        >>> x, W, A, B = (torch.randn(*s).double() for s in ((5, 4), (3, 4), (2, 4), (3, 2)))
        >>> y = linear(x, W, None, A, B, torch.tensor(0.5).double())
        >>> assert torch.allclose(y, x @ (W + 0.5 * B @ A).T)
    """
    compiling = is_compiling()  # once: a small layer feels each call of Python
    y = None if compiling else in_cpp(x, weight, bias, lora_A, lora_B, scale, strength)
    if y is not None:
        return y
    device = autocast_of(x)
    if device is not None:
        x, weight, bias = cast_for_autocast(device, x, weight, bias)
        # which autocast has no part in: leaving it costs Python time
        if not has_kernel(x, weight):
            with torch.autocast(device, enabled=False):
                return _linear(x, weight, bias, lora_A, lora_B, scale, strength, compiling)
    return _linear(x, weight, bias, lora_A, lora_B, scale, strength, compiling)


def in_cpp(
    x: Tensor,
    weight: Tensor,
    bias: _Maybe,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Tensor,
    strength: float,
    window: Optional[tuple[Any, ...]] = None,
    magnitude: _Maybe = None,
) -> _Maybe:
    """What `linear` gives, or a `convolution` of a stride, padding, dilation and groups, or
    `rescaled.linear` by a magnitude; None of operands that C++ does not serve. Not to be asked
    under a compiler, which does not see into it."""
    if _native is None:
        return None
    values = (x, weight, bias, lora_A, lora_B, scale, strength, window, magnitude)
    return _native(*values)  # type: ignore[no-any-return]


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: _Maybe,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    strength: float,
    compiling: bool,
) -> Tensor:
    way = way_of(x, weight, bias, a, b, scale, compiling)
    if way is Way.OPERATOR:
        # the operator takes matrices: a schema has no "..."
        flat = x.reshape(-1, x.shape[-1])
        y, _ = torch.ops.paramlora.linear(flat, weight, bias, a, b, scale * strength)
        return y.reshape(*x.shape[:-1], weight.shape[0])  # type: ignore[no-any-return]
    if way is Way.SUM:
        # B's side is scaled, so that the sum is one `addmm` of the size of W
        up = scaled_down(b, scale, strength, x.dtype)
        return F.linear(x, summed(weight, up, cast(a, x.dtype)), bias)
    if way is Way.PLAIN and not compiling:
        # `addmm` onto the output, where autograd saves the thin product and no sum
        up, thin = scaled_down(b, scale, strength, x.dtype), F.linear(x, cast(a, x.dtype))
        return _added(F.linear(x, weight, bias), thin, up.t())
    if way is Way.PLAIN:
        return linear_by_definition(x, weight, bias, a, b, scale * strength)
    return applied(_Linear, x, weight, bias, a, b, scale, strength, False, way)


def way_of(
    x: Tensor, weight: Tensor, bias: _Maybe, a: Tensor, b: Tensor, scale: Tensor, compiling: bool
) -> Way:
    """The way of `linear`, of operands in the types in which it computes."""
    # eagerly the kernels look at their operands themselves and fall back, see `_Linear.forward`
    ours = served(x)
    # an operator cannot fall back once it is in the graph: ask all of it here
    if compiling and ours:
        ours = has_kernel(x, weight) and fits(Operands(x, weight, bias, a, b, scale))
    about = (choose.thresholds_of(x), x.dtype, x.numel(), weight.shape, a.shape[0])
    return choose.way(Asked("linear", *about, Way.KERNELS if ours else None, compiling))


def pointwise(
    x: Tensor, weight: Tensor, bias: _Maybe, lora_A: Tensor, lora_B: Tensor, scale: Tensor
) -> Tensor:
    """`linear` of every position, where `operands.has_kernel`; in x's memory format, no copies.

    Args:
        x: ``[N, in, ...]``.
        weight: ``[out, in]``.
        bias, lora_A, lora_B, scale: as of `linear`.
    """
    rows = positions(x)
    y = applied(_Linear, rows, weight, bias, lora_A, lora_B, scale, 1.0, True, Way.KERNELS)
    return image_of(y, x.shape)


def positions(image: Tensor) -> Tensor:
    """``[N, positions, channels]`` of an image: a view, of which the kernels take any strides."""
    # not `flatten`, which torch's batches of gradients do not know
    return image.reshape(*image.shape[:2], math.prod(image.shape[2:])).transpose(1, 2)


def image_of(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """The image again, of the positions of one of `shape`."""
    return rows.transpose(1, 2).reshape(rows.shape[0], rows.shape[2], *shape[2:])


def linear_by_definition(
    x: Tensor, weight: Tensor, bias: _Maybe, lora_A: Tensor, lora_B: Tensor, scale: Tensor
) -> Tensor:
    """`linear` in plain operations: for compilers, and for gradients of gradients."""
    y, up = F.linear(x, weight, bias), narrow.of_factor(lora_B) * scale
    return y + in_a_row(x, lora_A, up, narrow.LINEAR, narrow.LINEAR)


def thin_pair(x: Tensor, first: Tensor, second: Tensor, one: Any, two: Any) -> Tensor:
    """``two(one(x, first), second)`` of two thin kernels, in x's type, or autocast's.

    Args:
        x: the input of the first.
        first, second: kernels in the factors' types, with what scales them.
        one, two: `narrow.LINEAR`, or a `narrow.Stage`.
    """
    device = autocast_of(x)
    if device is not None:
        (x,) = cast_for_autocast(device, x)
        with torch.autocast(device, enabled=False):
            return thin_pair(x, first, second, one, two)
    # only float16 needs powers of two, and those an autograd function
    if x.dtype != torch.float16 or untold():
        return in_a_row(x, first, second, one, two)
    # its gradient is aten.convolution_backward's, which takes no image without a batch
    if one is not narrow.LINEAR and x.dim() < first.dim():  # an image without its batch
        return thin_pair(x[None], first, second, one, two)[0]

    # `narrow`, in update/, may not import this module, so it is handed what it calls
    def again(inputs: Sequence[Tensor], needs: Sequence[bool], dy: Tensor) -> list[_Maybe]:
        return differentiable(lambda x, f, s: in_a_row(x, f, s, one, two), inputs, needs, dy)

    return applied(narrow.Pair, x, first, second, one, two, again)


def in_a_row(x: Tensor, first: Tensor, second: Tensor, one: Any, two: Any) -> Tensor:
    """`thin_pair` in plain operations; float16, whose range they do not heed, in float32."""
    if x.dtype == torch.float16:
        y: Tensor = two(one(x.float(), first.float()), second.float())
        return y.to(x.dtype)
    return two(one(x, cast(first, x.dtype)), cast(second, x.dtype))  # type: ignore[no-any-return]


def one_kernel(x: Tensor, kernel: Tensor, stage: narrow.Stage) -> Tensor:
    """``stage(x, kernel)`` of a kernel in the factors' type."""
    if x.dtype != torch.float16 or untold():
        return stage(x, kernel.to(x.dtype))

    def again(inputs: Sequence[Tensor], needs: Sequence[bool], dy: Tensor) -> list[_Maybe]:
        return differentiable(lambda x, k: stage(x, k.to(x.dtype)), inputs, needs, dy)

    return applied(narrow.Single, x, kernel, stage, again)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, which takes as long as a launch even where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def cast_for_autocast(device: str, *tensors: _Maybe) -> list[Any]:
    dtype = torch.get_autocast_dtype(device)
    # autocast leaves float64, and what is no float, as it is
    return [
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    ]


class _Linear(torch.autograd.Function):
    """A linear layer with its update as one node of autograd.

    Keeps x by reference and ``x·Aᵀ``; where the kernels computed it, also both factors in x's type;
    where the dense sum is formed, x alone.
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
        strength: float,
        image: bool,
        way: Way,
    ) -> Tensor:
        ctx.strength, ctx.image, ctx.dense = strength, image, way is Way.DENSE
        result = None
        # make_fx records torch's operations, and would miss a launch
        if way is Way.KERNELS and not recorded():
            of = Operands(x, weight, bias, a, b, scale)
            result = operators.forward(of, strength, image)
        ctx.kernel = result is not None
        if result is not None:
            start_cpp()  # after the first success, so that C++ is asked only where kernels serve
            ctx.save_for_backward(kept_input(ctx, x), weight, a, b, scale, result[1])
            return result[0]
        flat = as_rows(x)
        down, up, ctx.power = narrowed(flat, a, b, scale, strength)
        if ctx.dense:
            y, u = F.linear(flat, summed(weight, up, down), bias), None
        else:
            u = flat @ down.t()
            y = both(flat, weight.t(), u, up.t(), bias)
        # only for the gradients of A, B and the scale: of a frozen layer x and u are freed at once
        held = kept_input(ctx, x)
        ctx.save_for_backward(held, weight, a, b, scale, None if held is None else u)
        return y if x.dim() == y.dim() else unflattened(y, x)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        held, weight, a, b, scale, u = ctx.saved_tensors
        needs, x = ctx.needs_input_grad, input_of(ctx, held, weight)
        dbias = as_rows(dy).sum(0) if needs[2] else None
        # a graph is made of the gradient, or dy has no memory of its own: torch's operations alone
        # serve
        if torch.is_grad_enabled() or in_plain_operations(ctx.kernel, dy):

            def again(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
                return linear_by_definition(x, weight, None, a, b, scale * ctx.strength)

            inputs, wanted = (x, weight, a, b, scale), (*needs[:2], *needs[3:6])
            dx, dweight, *others = differentiable(again, inputs, wanted, dy)
            return dx, dweight, dbias, *others, None, None, None
        of = Operands(x, weight, None, a, b, scale)
        if ctx.kernel:
            asked = Wanted(*needs[:6])
            grads = operators.backward(dy, of, ctx.strength, u, asked, ctx.image)
        else:
            grads = gradients(ctx, dy, of, u)
        dx, da, db, dscale = grads
        # of a weight trained beside its update; rare, so the kernels do not compute it
        dweight = as_rows(dy).t() @ as_rows(x) if needs[1] else None
        return dx, dweight, dbias, da, db, dscale, None, None, None


def start_cpp() -> None:
    """Take what was built in C++, the first time that the kernels computed a layer."""
    global _native, _started
    if _started:
        return
    from paramlora.cuda.native import steps
    from paramlora.evaluate import convolution, rescaled  # which import this module

    def way(of: Operands, window: Any, magnitude: _Maybe) -> str:
        if magnitude is not None:
            return "RESCALED" if rescaled.is_in_kernels(of, magnitude) else "PLAIN"
        return "LINEAR" if window is None else convolution.way_of(of, window, False).name

    _native, _started = steps.start(_gradients_of_native, way), True


class Kept(NamedTuple):
    """Stands in for the context that a backward in Python reads, where the forward was in C++."""

    saved_tensors: tuple[_Maybe, ...]
    needs_input_grad: tuple[bool, ...]
    strength: float = 1.0
    kernel: bool = True
    image: bool = False
    dense: bool = False
    window: tuple[Any, ...] = ()


def _gradients_of_native(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    kept: Tensor,
    strength: float,
    needs: tuple[bool, ...],
    numbers: tuple[int, ...],
    *more: Tensor,
) -> tuple[_Maybe, ...]:
    """The gradients of x, A and B, and of a magnitude, after a forward in C++, where C++ does not
    find them.

    Args:
        numbers: of the window of a convolution, see `steps.window_of`.
        more: the magnitude, its norm, and the output from before they rescaled it.
    """
    from paramlora.cuda.native.steps import window_of
    from paramlora.evaluate import convolution, rescaled

    wanted, window = (needs[0], False, False, *needs[1:3], False), window_of(numbers)
    if more:
        of = Operands(x, weight, None, a, b, scale)
        return rescaled.gradients_of_native(dy, of, kept, (*wanted, needs[3]), *more)
    if window is None:
        ctx = Kept((x, weight, a, b, scale, kept), wanted, strength)
        dx, _, _, da, db, *_ = _Linear.backward(ctx, dy)
        return dx, da, db
    of = Operands(x, weight, None, a, b, scale)
    return convolution.gradients_of_native(dy, of, kept, wanted, window)


def gradients_of_positions(
    dy: Tensor, of: Operands, kept: Tensor, wanted: tuple[bool, ...]
) -> tuple[_Maybe, _Maybe, _Maybe]:
    """The gradients of x, A and B after `pointwise` in C++."""
    x, weight, _, a, b, scale = of
    saved = (positions(x), weight.flatten(1), a, b, scale, kept)
    dx, _, _, da, db, *_ = _Linear.backward(Kept(saved, wanted, image=True), positions(dy))
    return dx if dx is None else image_of(dx, x.shape), da, db


def in_plain_operations(kernel: bool, dy: Tensor) -> bool:
    """Whether a backward, whose forward the kernels computed or not, must be torch's own: they were
    switched off since then, or dy is many gradients, which have no range of their own either."""
    if kernel and not switched_on():
        return True
    # of float16 each gradient would need its own power of two, found from its own numbers
    return (kernel or dy.dtype == torch.float16) and is_batched(dy)


def narrowed(
    x: Tensor, a: Tensor, b: Tensor, scale: Tensor, strength: float
) -> tuple[Tensor, Tensor, _Maybe]:
    """A, and B with its scale, in x's type; in float16 with a power of two, see `narrow`.

    Args:
        x: ``[..., in]``, what A is multiplied by.
        a: ``[*stack, r, in]``.
        b: ``[*stack, out, r]``.
        scale: ``[]``, and `strength` on top of it.
    """
    if x.dtype != torch.float16:
        return cast(a, x.dtype), scaled_down(b, scale, strength, x.dtype), None
    # in float32 before the power of two is found: the scaled B may be beyond the range
    b = b.float() * (scale.float() * strength)
    down, up, g = narrow.in_range(x, a, b, x.shape[-1])
    return down.half(), up.half(), g


def kept_input(ctx: Any, x: Tensor) -> _Maybe:
    """What a function of an input, a weight, a bias, both factors and the scale keeps of its input:
    nothing where only the input's own gradient is wanted, as of a frozen layer."""
    needs = ctx.needs_input_grad
    if needs[1] or needs[3] or needs[4] or needs[5]:
        return x
    # shape and strides alone: `input_of` makes an empty tensor of these
    ctx.sizes = x.shape, x.stride()
    return None


def input_of(ctx: Any, held: _Maybe, weight: Tensor) -> Tensor:
    """The input, or where `kept_input` kept nothing any tensor of its sizes."""
    # nobody reads its numbers: they only say of what sizes a gradient is
    return weight.new_empty_strided(*ctx.sizes) if held is None else held


def gradients(ctx: Any, dy: Tensor, of: Operands, u: _Maybe) -> operators.Gradients:
    """The gradients of x, A, B and the scale that are wanted, in torch's operations."""
    x, weight, _, a, b, scale = of
    if x.dtype == torch.float16:
        return _gradients_in_range(ctx, dy, of, u)
    needs, flat = ctx.needs_input_grad, as_rows(x)
    dy, down, up = as_rows(dy), cast(a, x.dtype), scaled_down(b, scale, ctx.strength, x.dtype)
    dx = da = db = dscale = None
    v = dy @ up if needs[0] or needs[3] else None  # [N, r]
    if needs[0]:
        # formed again: keeping it would cost a dense matrix for each layer
        total = summed(weight, up, down) if ctx.dense else None
        dx = dy @ total if total is not None else both(dy, weight, v, down)
        dx = dx if x.dim() == dx.dim() else dx.view(x.shape)
    if needs[3]:
        da = cast(v.t() @ flat, a.dtype)  # type: ignore[union-attr]
    if needs[4] or needs[5]:
        # the dense way kept x alone
        u = flat @ down.t() if u is None else u
        db, dscale = gradient_of_second((u.t() @ dy).t(), b, scale, ctx.strength, needs[5])
    return dx, da, db, dscale


def _gradients_in_range(ctx: Any, dy: Tensor, of: Operands, u: _Maybe) -> operators.Gradients:
    """`gradients` of float16, whose forward had A times the power of two `ctx.power`."""
    x, weight, _, a, b, scale = of
    needs, flat, dy = ctx.needs_input_grad, as_rows(x), as_rows(dy)
    dx = da = db = dscale = None
    if needs[0] or needs[3]:
        # the loss's scale is in dy: its range is another than x's, so the power is found anew
        scaled = b.float() * (scale.float() * ctx.strength)
        up, down, h = narrow.in_range(dy, scaled, a, dy.shape[1])
        v = dy @ up.half()
        if needs[0]:
            # float16 is never dense, see `choose.denser`
            dx = both(dy, weight, v, down.half())
            dx = dx if x.dim() == dx.dim() else dx.view(x.shape)
        # sums over all rows leave the range: `outer` gives float32
        da = (narrow.outer(v, flat) / h).to(a.dtype) if needs[3] else None
    if u is not None and (needs[4] or needs[5]):
        product = narrow.outer(u, dy).t() / ctx.power
        db, dscale = gradient_of_second(product, b, scale, ctx.strength, needs[5])
    return dx, da, db, dscale


def unflattened(y: Tensor, x: Tensor) -> Tensor:
    """``[rows, out]`` in an input's dimensions; no view, which nobody could change in place."""
    # a custom function's output that is a view raises where it is changed in place
    return reshaped(y, (*x.shape[:-1], y.shape[-1]))


def as_rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def both(x: Tensor, w: Tensor, u: Any, v: Tensor, bias: _Maybe = None) -> Tensor:
    """``x @ w + u @ v + bias``; in 16 bits the smaller product comes first, so that one float32
    accumulator takes both, and the bias last, so that a large one does not drown it."""
    # from 32 bits on no rounding matters: the large product first, with the bias inside
    if x.dtype.itemsize > 2:
        y = torch.mm(x, w) if bias is None else torch.addmm(bias, x, w)
        return y.addmm_(u, v)
    if choose.by_cublas(x):
        y = torch.mm(x, w, out_dtype=torch.float32)
        y = y.addmm_(u.float(), v.float())  # `addmm_` wants them in y's type
        return (y if bias is None else y.add_(bias)).to(x.dtype)
    y = torch.mm(u, v).addmm_(x, w)
    return y if bias is None else y.add_(bias)


def summed(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """``weight + up @ down``, in memory as the weight: by another layout some processors round a
    product otherwise than the layer's own forward does."""
    # a transposed one; [1, n] is both, and takes the plain way
    if weight.stride(0) == 1 and len(weight) > 1:
        return torch.addmm(weight.t(), down.t(), up.t()).t()
    return torch.addmm(weight, up, down)


def _added(base: Tensor, thin: Tensor, up: Tensor) -> Tensor:
    """``base + thin @ up``, where base and thin have any dimensions in front: one `addmm`."""
    if base.dim() == 2:
        return torch.addmm(base, thin, up)
    flat = torch.addmm(base.reshape(-1, base.shape[-1]), thin.reshape(-1, thin.shape[-1]), up)
    return flat.view(base.shape)


def differentiable(
    compute: Callable[..., Tensor], inputs: Sequence[Tensor], needs: Sequence[bool], dy: Tensor
) -> list[_Maybe]:
    """The gradients of ``compute(*inputs)`` that are wanted, by torch's operations alone; if they
    will be differentiated themselves, as a function of the inputs and dy.

    Of aliases: an input may itself come from a layer of the same factors, and what reaches them
    through it is added by whoever asked for the gradients.
    """
    # whether the caller asked for create_graph: then these gradients have a graph too
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [_alias(t) if need else t for t, need in zip(inputs, needs)]
        wanted = [t for t, need in zip(aliases, needs) if need]
        if not wanted:
            return [None for _ in needs]
        y = compute(*aliases)
    grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=again))
    return [next(grads) if need else None for need in needs]


def _alias(t: Tensor) -> Tensor:
    # one that requires no gradient only stands for the sizes of an input, see `input_of`
    return t.view_as(t) if t.requires_grad else t.requires_grad_()


def embedding(
    rows: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Tensor,
    padding_idx: Optional[int] = None,
    strength: float = 1.0,
) -> Tensor:
    """``(W + strength · scale · (B A)ᵀ)[rows]``: two look-ups and one thin product.

    Args:
        rows: indices of any shape.
        weight: ``[num, dim]``.
        lora_A: ``[r, num]``.
        lora_B: ``[dim, r]``.
        scale: ``[]``.
        padding_idx: the row that gets no gradient, from the end where negative.
        strength: a number on top of `scale`.

    Returns:
        ``[*rows.shape, dim]``, of the weight's type, also under autocast. A row of the table is
        exact, so a sum that is rounded once keeps all of an update that its type can hold.

    Example:
        >>> W, A, B = (torch.randn(*s).double() for s in ((9, 4), (2, 9), (4, 2)))
        >>> rows, scale = torch.tensor([[0, 8], [3, 3]]), torch.tensor(0.5).double()
        >>> y = embedding(rows, W, A, B, scale)
        >>> assert torch.allclose(y, (W + 0.5 * (B @ A).T)[rows])
    """
    y = embedding_in_range(rows, weight, lora_A, lora_B, scale, padding_idx, strength)
    return cast(y, weight.dtype)


def embedding_in_range(
    rows: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Tensor,
    padding_idx: Optional[int],
    strength: float,
) -> Tensor:
    """`embedding`, that of a float16 table in float32."""
    device = autocast_of(weight)
    if device is not None:  # which leaves a look-up in the table's own type
        with torch.autocast(device, enabled=False):
            values = (rows, weight, lora_A, lora_B, scale, padding_idx, strength)
            return embedding_in_range(*values)
    # below it is compared with indices, which are not negative
    if padding_idx is not None and -len(weight) <= padding_idx < 0:
        padding_idx += len(weight)
    flat = rows.reshape(-1)  # so that one view is left for autograd, of the output
    if _way_of_embedding(flat, weight, lora_A, lora_B, scale) is Way.KERNELS:
        y = applied(_Embedding, flat, weight, lora_A, lora_B, scale, strength)
    else:
        base = narrow.wide(F.embedding(flat, weight, padding_idx))  # thin products need its range
        up = scaled_down(lora_B, scale, strength, base.dtype).t()
        y = torch.addmm(base, cast(_columns(lora_A, flat, padding_idx), base.dtype), up)
    y = y.view(*rows.shape, y.shape[-1])
    if padding_idx is not None:  # nor does that row give B or the scale a gradient
        y = without_gradient(y, (rows == padding_idx)[..., None])
    return y


def _way_of_embedding(
    ids: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: Tensor
) -> Way:
    """How an embedding is computed of one row of indices."""
    if not served(weight):
        return choose.embedding(False, 0)
    ours = weight.dtype == torch.bfloat16 and not in_torch_alone(weight)
    # the kernels get bare addresses; what does not fit, torch's operations tell
    ours = ours and all(type(t) in PLAIN for t in (ids, lora_A, lora_B))
    ours = ours and ids.get_device() == weight.get_device() and ids.numel() > 0 < len(lora_A)
    ours = ours and ids.dtype in (torch.int32, torch.int64)
    ours = ours and factors_fit(weight.t(), lora_A, lora_B, scale)
    # of a table that is trained beside its update torch finds the gradient as of any other
    trained = torch.is_grad_enabled() and weight.requires_grad
    return choose.embedding(ours and not trained, padded(len(lora_A)))


class _Embedding(torch.autograd.Function):
    """`embedding` of one row of indices, of a frozen table, by the kernels; keeps the indices and
    A's columns of them."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: Tensor, strength: float
    ) -> Tensor:
        from paramlora.cuda.embedding import plan

        y = F.embedding(ids, weight)  # which tells of an index that is not there
        u = plan.add(y, ids, a, b, scale, strength)
        ctx.strength = strength
        ctx.save_for_backward(ids, a, b, scale, u)
        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        ids, a, b, scale, u = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:5]
        if torch.is_grad_enabled() or in_plain_operations(True, dy):

            def again(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
                up = scaled_down(b, scale, ctx.strength, dy.dtype)
                return cast(_columns(a, ids, None), dy.dtype) @ up.t()

            return None, None, *differentiable(again, (a, b, scale), needs, dy), None
        dy = dy if dy.stride(1) == 1 else dy.contiguous()  # as of a sum, whose gradient is expanded
        da = db = dscale = None
        if needs[0]:
            from paramlora.cuda.embedding import plan

            da = plan.gradient(dy, ids, a, b, scale, ctx.strength)
        if needs[1] or needs[2]:
            product = torch.mm(dy.t(), u[:, : len(a)], out_dtype=torch.float32)
            db, dscale = gradient_of_second(product, b, scale, ctx.strength, needs[2])
        return None, None, da, db, dscale, None


def without_gradient(y: Tensor, there: Tensor) -> Tensor:
    """The numbers of `y`, of which nothing learns where `there` is true, not even of a gradient
    that is no number."""
    if untold() or recorded():
        return torch.where(there, y.detach(), y)
    # a device would have to be waited for
    if there.is_cpu and not there.any():
        return y
    return applied(_WithoutGradient, y, there)


class _WithoutGradient(torch.autograd.Function):
    """`without_gradient` in one pass over the gradient alone, where a choice of torch's takes one
    over the output and two over the gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, there: Tensor) -> Tensor:
        ctx.save_for_backward(there)
        # autograd refuses to write into a view that a function gave, as `embeddings *= scale` does
        return reshaped(y, y.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (there,) = ctx.saved_tensors
        return dy.masked_fill(there, 0), None


def _columns(lora_A: Tensor, rows: Tensor, padding_idx: Optional[int]) -> Tensor:
    """``[n, r]``: A's columns for n rows of an embedding's table."""
    if rows.is_cpu:  # which copies columns faster than strided rows; padding's gradient is zero
        return lora_A.index_select(1, rows).t()
    # as an embedding of Aᵀ, whose gradient adds up rows, and leaves out that of `padding_idx`
    return F.embedding(rows, lora_A.t(), padding_idx)


def in_torch_alone(x: Tensor) -> bool:
    """Whether torch's plain operations alone serve an input: of what is compiled, transformed,
    traced or recorded, and of a tensor class of somebody's, whose operations are its own."""
    return untold() or recorded() or type(x) not in PLAIN


def untold() -> bool:
    """Whether a compiler, a transform or a trace is at work, which knows no autograd function."""
    return is_compiling() or transformed() or traced()
