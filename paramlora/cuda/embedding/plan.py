"""Forward and backward of a 16-bit embedding on CUDA, in the kernels; imported only there."""

from typing import Any, Optional

import torch
from torch import Tensor

from paramlora.cuda.device import card
from paramlora.cuda.embedding import kernels
from paramlora.cuda.launch import Launch, on_its_device, planned
from paramlora.cuda.launches import WIDEST
from paramlora.cuda.operands import DEEP, Operands, padded

_Maybe = Optional[Tensor]


class _Forward:
    """The plan of a forward: one launch."""

    def __init__(self, of: Operands) -> None:
        rows, weight, _, a, b, _ = of
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
        self, of: Operands, addresses: tuple[int, ...], strength: float, padding: int
    ) -> tuple[Tensor, Tensor]:
        rows, weight, _, a, b, scale = of
        y = weight.new_empty_strided(self.shape, self.stride)
        kept = weight.new_empty_strided((self.size,), (1,))
        self.launch(
            (rows, weight, a, b, scale, y, kept),
            (*addresses, y.data_ptr(), kept.data_ptr()),
            (float(strength), padding),
        )
        return y, kept


_FORWARDS: dict[Any, Any] = {}
_BACKWARDS: dict[Any, Any] = {}


@on_its_device
def forward(of: Operands, padding: int, strength: float) -> tuple[Tensor, Tensor]:
    """``(W + strength · scale · (B A)ᵀ)[rows]`` with one rounding, and what `backward` takes, of
    operands that `operands.looks_up`.

    Args:
        of: in place of x int64 or int32 indices of any shape, one at least; of a 16-bit table.
        padding: the row that gets no gradient, -1 for none.
        strength: a number on top of the scale.

    Returns:
        ``[*rows, dim]`` and `kept`, see `kernels.look_up`.
    """
    if not of.x.is_contiguous():
        of = of._replace(x=of.x.contiguous())
    tensors = of.x, of.weight, of.a, of.b, of.scale
    plan, addresses = planned(_FORWARDS, tensors, (), lambda _: _Forward(of))
    return plan(of, addresses, strength, padding)  # type: ignore[no-any-return]


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


@on_its_device
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
    dy = dy if dy.is_contiguous() else dy.contiguous()
    pk = kept.data_ptr()
    if pk & 15:  # a hook on saved tensors may have laid it anywhere
        kept = kept.clone()
        pk = kept.data_ptr()
    rest = (r, scaled, v_too, b_too)
    plan, (py,) = planned(_BACKWARDS, (dy,), rest, lambda _: _Backward(dy, r, scaled, rest[2:]))
    return plan(dy, kept, (py, pk))  # type: ignore[no-any-return]
