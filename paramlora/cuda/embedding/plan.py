"""Forward and backward of a 16-bit embedding on CUDA, in the kernels; imported only there."""

from typing import Any, Optional

import torch
from torch import Tensor

from paramlora.cuda.device import card
from paramlora.cuda.embedding import kernels
from paramlora.cuda.launch import Launch, bound
from paramlora.cuda.launches import WIDEST
from paramlora.cuda.operands import DEEP, padded
from paramlora.update.compat import cuda_device

_Maybe = Optional[Tensor]


class _Forward:
    """The plan of a forward: one launch."""

    def __init__(self, rows: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> None:
        M, (num, dim), r = rows.numel(), weight.shape, len(a)
        processors = card(weight.get_device()).processors
        R = padded(r)
        self.shape = (*rows.shape, dim)
        self.stride = torch.empty(self.shape, device="meta").stride()
        self.size = R * (dim + M) + 2 * (-(-dim // DEEP) + 1)  # see `kernels.look_up`
        # few rows are divided further, and by columns; blocks leave registers for other programs
        BM, BD = 64 if M >= 32 * processors else 16, 64 if R <= 128 else 32
        stages = 3 if R <= WIDEST else 2
        strips, blocks = -(-M // BM), -(-dim // BD)
        each = -(-blocks // min(blocks, -(-4 * processors // strips))) * BD
        grid, numbers = strips * -(-dim // each), (M, num, dim, r, each, *weight.stride())
        self.launch = Launch(
            kernels.look_up, weight.get_device(), grid, (*numbers, *a.stride(), *b.stride()),
            (stages, R, BM, BD), stages, 8, checked=True,
        )  # fmt: skip

    def __call__(
        self,
        tensors: tuple[Tensor, ...],
        addresses: tuple[int, ...],
        strength: float,
        padding: int,
    ) -> tuple[Tensor, Tensor]:
        weight = tensors[1]
        y = weight.new_empty_strided(self.shape, self.stride)
        kept = weight.new_empty_strided((self.size,), (1,))
        self.launch(
            (*tensors, y, kept),
            (*addresses, y.data_ptr(), kept.data_ptr()),
            (float(strength), padding),
        )
        return y, kept


_FORWARDS: dict[Any, Any] = {}
_BACKWARDS: dict[Any, Any] = {}


def forward(
    rows: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    padding: int,
    strength: float,
) -> tuple[Tensor, Tensor]:
    """``(W + strength · scale · (B A)ᵀ)[rows]`` with one rounding, and what `backward` takes, of
    operands that `operands.looks_up`.

    Args:
        rows: int64 or int32 indices of any shape, one at least.
        weight: ``[num, dim]``, 16-bit.
        a: ``[r, num]``.
        b: ``[dim, r]``.
        scale: ``[]``.
        padding: the row that gets no gradient, -1 for none.
        strength: a number on top of `scale`.

    Returns:
        ``[*rows, dim]`` and `kept`, see `kernels.look_up`.
    """
    device = weight.get_device()
    if device != cuda_device():
        with torch.cuda.device(device):
            return forward(rows, weight, a, b, scale, padding, strength)
    rows = rows if rows.is_contiguous() else rows.contiguous()
    tensors = rows, weight, a, b, scale
    addresses = (
        rows.data_ptr(), weight.data_ptr(), a.data_ptr(), b.data_ptr(), scale.data_ptr()
    )  # fmt: skip
    odd = (addresses[0] | addresses[1] | addresses[2] | addresses[3] | addresses[4]) & 15
    key = (
        rows.shape, rows.dtype, weight.shape, weight.stride(), weight.dtype, a.shape, a.stride(),
        a.dtype, b.stride(), b.dtype, scale.dtype, device, odd and tuple(p & 15 for p in addresses),
    )  # fmt: skip
    plan = _FORWARDS.get(key)
    if plan is None:
        bound(_FORWARDS)
        plan = _FORWARDS[key] = _Forward(rows, weight, a, b)
    return plan(tensors, addresses, strength, padding)


class _Backward:
    """The plan of a backward: one launch, or up to two products of cuBLAS."""

    def __init__(self, dy: Tensor, r: int, scaled: bool, wanted: tuple[bool, bool]) -> None:
        dim, R = dy.shape[-1], padded(r)
        M = dy.numel() // dim
        self.sizes, self.scaled, self.wanted = (M, dim, r, R), scaled, wanted
        BM, BD, GM = 64, 64, 64  # small enough for the shared memory of every device
        blocks = -(-dim // DEEP)
        groups = min(-(-M // (4 * GM)), -(-card(dy.get_device()).processors // blocks))
        each = -(-M // groups // GM) * GM
        groups = -(-M // each)
        strips, programs = -(-M // BM) if wanted[0] else 0, blocks * groups if wanted[1] else 0
        self.part = groups * dim * R if groups > 1 and programs else 0
        numbers, constants = (strips, M, dim, r, groups, each), (scaled, dim % BD == 0, R)
        self.launch = Launch(
            kernels.look_up_backward, dy.get_device(), strips + programs, numbers,
            (*constants, BM, BD, GM), 3, 8,
        )  # fmt: skip

    def __call__(
        self, dy: Tensor, kept: Tensor, addresses: tuple[int, int]
    ) -> tuple[_Maybe, _Maybe]:
        (M, dim, r, R), wide = self.sizes, torch.float32
        if R > WIDEST:
            return self._separately(dy.view(M, dim), kept)
        v = dy.new_empty_strided((M, r), (r, 1), dtype=wide) if self.wanted[0] else None
        db = dy.new_empty_strided((dim, r), (r, 1), dtype=wide) if self.wanted[1] else None
        part = dy.new_empty_strided((self.part,), (1,), dtype=wide) if self.part else None
        some: Any = db if v is None else v  # in place of what is not written
        more = [some if t is None else t for t in (v, part, db)]
        self.launch((dy, kept, *more), (*addresses, *(t.data_ptr() for t in more)))
        return v, db

    def _separately(self, dy: Tensor, kept: Tensor) -> tuple[_Maybe, _Maybe]:
        (M, dim, r, R), v, db, wide = self.sizes, None, None, torch.float32
        if self.wanted[0]:
            v = torch.mm(dy, kept[: r * dim].view(r, dim).t(), out_dtype=wide)
        if self.wanted[1]:
            thin = kept[R * dim : R * (dim + M)].view(M, R)
            db = torch.mm(dy.t(), thin[:, :r], out_dtype=wide)
            db = db.mul_(kept[-2:].view(wide)) if self.scaled else db
        return v, db


def backward(
    dy: Tensor, kept: Tensor, r: int, scaled: bool, v_too: bool, b_too: bool
) -> tuple[_Maybe, _Maybe]:
    """What is wanted of ``v[M, r] = strength · scale · dy @ B``, whose rows' sums are the gradient
    of A, and of the gradient of B ``(dy.T @ A[:, rows].T)[dim, r]``, times the scale where
    `scaled`; in float32.

    Args:
        dy: ``[..., dim]``.
        kept: of the forward.
        r: the rank.
        scaled, v_too, b_too: what is wanted, one at least.
    """
    device = kept.get_device()
    if device != cuda_device():
        with torch.cuda.device(device):
            return backward(dy, kept, r, scaled, v_too, b_too)
    dy = dy if dy.is_contiguous() else dy.contiguous()
    py, pk = dy.data_ptr(), kept.data_ptr()
    if pk & 15:  # a hook on saved tensors may have laid it anywhere
        kept = kept.clone()
        pk = kept.data_ptr()
    key = (dy.shape, dy.dtype, r, scaled, v_too, b_too, device, py & 15)
    plan = _BACKWARDS.get(key)
    if plan is None:
        bound(_BACKWARDS)
        plan = _BACKWARDS[key] = _Backward(dy, r, scaled, (v_too, b_too))
    return plan(dy, kept, (py, pk))
