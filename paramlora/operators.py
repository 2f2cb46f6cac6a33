"""16-bit CUDA: the way to the kernels, as custom operators that compilers and export see whole."""

from typing import Any, Optional

import torch
from torch import Tensor

_Maybe = Optional[Tensor]


_SIXTEEN = (torch.bfloat16, torch.float16)
_SERVED: dict[int, bool] = {}  # devices that the kernels run on, by index


def has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels serve this product: 16 bits, on a device of 8.0 or later, with Triton."""
    if not (x.is_cuda and x.dtype in _SIXTEEN and weight.dtype == x.dtype):
        return False
    return _serves(x.get_device()) and 1 in weight.stride()


def fits(x: Tensor, weight: Tensor, bias: _Maybe, a: Tensor, b: Tensor, scale: Tensor) -> bool:
    """Whether the operands are what they should be, on one device: the kernels get bare addresses.
    Others are left to torch, which says what is wrong with them."""
    (out, fan_in), device = weight.shape, x.get_device()
    if x.shape[-1] != fan_in or a.shape[1] != fan_in or b.shape != (out, a.shape[0]):
        return False
    if bias is not None and (bias.shape != (out,) or bias.get_device() != device):
        return False
    others = (weight.get_device(), a.get_device(), b.get_device(), scale.get_device())
    return others == (device, device, device, device)


def _serves(device: int) -> bool:
    if device not in _SERVED:
        _SERVED[device] = torch.cuda.get_device_capability(device) >= (8, 0) and _importable()
    return _SERVED[device]


# What torch.compiler.assume_constant_result sets, without the import of the compiler: a dictionary
# that is filled while it traces would have it compile everything a second time.
_serves._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _importable() -> bool:
    try:
        import paramlora.launch  # noqa: F401
    except ImportError:
        return False
    return True


def forward(
    flat: Tensor, weight: Tensor, bias: _Maybe, a: Tensor, b: Tensor, scale: Tensor, strength: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``y``, ``x·Aᵀ``, and the packed factors, which one `backward` can take."""
    from paramlora import launch

    if bias is not None:
        bias = bias.contiguous()
    tokens = flat.shape[:-1].numel()
    packed = launch.pack(a, b, scale, strength, flat.dtype, padded(len(a)), tokens)
    y, u = launch.product(_rows(flat), weight.t(), packed, bias)
    return y, u, packed.tensor


def backward(
    dy: Tensor,
    flat: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    strength: float,
    u: Tensor,
    packed: _Maybe,
    input_too: bool,
    factors_too: bool,
    scale_too: bool,
) -> tuple[_Maybe, _Maybe, _Maybe, _Maybe]:
    """The gradients of x, A, B and the scale, those that are wanted.

    `packed`: of `forward`, or None where another backward has taken it.
    """
    from paramlora import launch

    dy, flat, r = _rows(dy), _rows(flat), len(a)
    if packed is None:
        ready = launch.pack(a, b, scale, strength, flat.dtype, padded(r), len(u))
    else:
        ready = launch.Packed(packed, padded(r), a.shape[1], len(b))
    if not factors_too and not scale_too:
        dx = launch.product(dy, weight, ready, backward=True)[0] if input_too else None
        return dx, None, None, None
    inside = None if scale_too else scale
    dx, da, db = launch.gradients(dy, weight, ready, flat, u, r, inside, strength, input_too)
    dscale = None
    if scale_too:
        db, dscale = gradient_of_second(db, b, scale, strength, True)
    if a.dtype != da.dtype or b.dtype != db.dtype:
        da, db = da.to(a.dtype), db.to(b.dtype)
    return dx, da, db, dscale


def padded(r: int) -> int:
    """The rank that tensor cores take: a power of two of at least 16."""
    return max(16, 1 << (r - 1).bit_length())


def _rows(x: Tensor) -> Tensor:
    """As the kernels read it: ``[M, K]`` with contiguous rows, or ``[batch, P, K]`` of an image."""
    if x.dim() == 2:
        return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()
    batch, row, column = x.stride()
    if column == 1 and row >= x.shape[2] and (batch == row * x.shape[1] or len(x) == 1):
        return x.flatten(0, 1)
    return x if row == 1 or column == 1 else x.contiguous()


def scaled_down(b: Tensor, scale: Tensor, strength: float, dtype: torch.dtype) -> Tensor:
    b = b * (scale if strength == 1 else scale * strength)
    return b if b.dtype == dtype else b.to(dtype)  # which takes as long as a launch to do nothing


def gradient_of_second(
    product: Tensor, b: Tensor, scale: Tensor, strength: float, scale_too: bool
) -> tuple[Tensor, _Maybe]:
    """The gradients of B and of the scale, from ``dYᵀ·x·Aᵀ``."""
    product = product if product.dtype == b.dtype else product.to(b.dtype)
    dscale = ((product * b).sum() * strength).to(scale.dtype) if scale_too else None
    return scaled_down(product, scale, strength, b.dtype), dscale


def needed(needs: Any) -> tuple[bool, bool, bool]:
    return needs[0], needs[3] or needs[4], needs[5]


@torch.library.custom_op("paramlora::linear", mutates_args=(), device_types="cuda")
def _linear_op(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], a: Tensor, b: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    if not fits(x, weight, bias, a, b, scale):
        raise ValueError("paramlora::linear: the operands differ in size or device")
    y, u, _ = forward(x, weight, bias, a, b, scale, 1.0)
    return y, u


@_linear_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: _Maybe, a: Tensor, b: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], padded(len(a)))


@torch.library.custom_op("paramlora::linear_backward", mutates_args=(), device_types="cuda")
def _linear_backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    u: Tensor,
    input_too: bool,
    factors_too: bool,
    scale_too: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs = (input_too, factors_too, scale_too)
    grads = backward(dy, x, weight, a, b, scale, 1.0, u, None, *needs)
    dx, da, db, dscale = (x.new_empty(0) if g is None else g for g in grads)
    return dx, da, db, dscale


@_linear_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    u: Tensor,
    input_too: bool,
    factors_too: bool,
    scale_too: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    factors = factors_too or scale_too
    wanted = ((x, input_too), (a, factors), (b, factors), (scale, scale_too))
    # each its own, also those that are left out: none may be the other's alias
    dx, da, db, dscale = (t.new_empty(t.shape) if want else x.new_empty(0) for t, want in wanted)
    return dx, da, db, dscale


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, a, b, scale = inputs
    ctx.save_for_backward(x, weight, a, b, scale, output[1])


def _linear_op_backward(ctx: Any, dy: Tensor, _: Any) -> Any:
    x, weight, a, b, scale, u = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = needed(needs)
    grads = torch.ops.paramlora.linear_backward(dy, x, weight, a, b, scale, u, *wanted)
    dx, da, db, dscale = (
        g if need else None for g, need in zip(grads, (needs[0], needs[3], needs[4], needs[5]))
    )
    dweight = dy.t() @ x if needs[1] else None
    return dx, dweight, dy.sum(0) if needs[2] else None, da, db, dscale


_linear_op.register_autograd(_linear_op_backward, setup_context=_keep)
