"""LoKr: the Kronecker product of a small matrix and a larger one, which may be of low rank."""

import math
from typing import Any, Optional

import torch
from einops import einsum
from torch import Tensor

from paramlora.config import TargetConfig
from paramlora.update.added import Added, Parts
from paramlora.update.attached import Moved, in_rows
from paramlora.update.geometry import Layout, matrix_shape
from paramlora.update.kinds import register

_Pair = tuple[int, int]
_Factors = tuple[Tensor, Tensor]


@register
class Lokr(Added):
    r"""Low-rank Kronecker product, Yeh et al. 2023 (arXiv:2309.14859), section 3.2.

    .. math:: W' = W + scale · w_1 ⊗ w_2, \quad w_2 = w_{2a} w_{2b}

    LyCORIS's definition, names and first values. ``"factor"`` is the most that the outputs and
    inputs of ``w_1`` are, each the divisor nearest to the root of the weight's where none is given;
    with ``"full_matrix"``, or where `r` is half of ``w_2`` or more, ``w_2`` is whole; with
    ``"decompose_both"`` ``w_1`` is of rank `r` too; with ``"tucker"`` on a convolution
    :math:`w_2 = t_2 ×_1 w_{2a} ×_2 w_{2b}`. ``"sizes"`` gives ``[[a, c], [b, d]]`` itself.

    Shapes: ``lokr_w1`` ``[a, b]`` (or ``lokr_w1_a`` ``[a, r]`` and ``lokr_w1_b`` ``[r, b]``) and
    ``lokr_w2`` ``[c, d, *kernel]`` (or ``lokr_w2_a`` ``[c, r]`` and ``lokr_w2_b``
    ``[r, d·kernel]``; with Tucker ``[r, c]``, ``[r, d]`` and ``lokr_t2`` ``[r, r, *kernel]``),
    where ``a · c`` are the outputs and ``b · d`` the inputs.
    """

    method = "lokr"
    parts = {
        **dict.fromkeys(("lokr_w1", "lokr_w1_a", "lokr_w1_b"), "own"),
        **dict.fromkeys(("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"), "own"),
        "lora_scale": "number",
    }

    @classmethod
    def sizes(
        cls, entry: TargetConfig, shape: tuple[int, ...], layout: Layout
    ) -> dict[str, tuple[int, ...]]:
        """The shapes that LyCORIS gives its tensors."""
        options, r = dict(entry.options), entry.r
        _, out, fan_in = matrix_shape(shape, layout)
        kernel = shape[2:] if layout == "matrix" else ()
        # a convolution's channels alone: the kernel is w_2's
        inner = shape[1] if kernel else fan_in
        told: Any = options.get("sizes")
        if told and inner != fan_in == math.prod(told[1]):  # the kernel is among the inputs
            kernel = ()
        factor = options.get("factor", -1)
        (a, c), (b, d) = told or (split(out, factor), split(inner, factor))
        full, both = options.get("full_matrix", False), options.get("decompose_both", False)
        # r of half of the smaller matrix saves nothing, as LyCORIS decides
        whole_1 = not both or (told is None and (full or r >= max(a, b) / 2))
        whole_2 = full or (told is None and r >= max(c, d) / 2)
        first: dict[str, tuple[int, ...]] = {"lokr_w1_a": (a, r), "lokr_w1_b": (r, b)}
        first = {"lokr_w1": (a, b)} if whole_1 else first
        if whole_2:
            return {**first, "lokr_w2": (c, d, *kernel)}
        # a kernel of ones has no middle to decompose
        if options.get("tucker") and set(kernel) - {1}:
            middle = {"lokr_t2": (r, r, *kernel)}
            return {**first, "lokr_w2_a": (r, c), "lokr_w2_b": (r, d), **middle}
        return {**first, "lokr_w2_a": (c, r), "lokr_w2_b": (r, d * math.prod(kernel))}

    @classmethod
    def check_site(cls, entry: TargetConfig, shape: tuple[int, ...], layout: Layout) -> str:
        """Why it cannot update a tensor of that shape."""
        sizes: Any = dict(entry.options).get("sizes")
        if sizes and layout != "stack":
            _, out, fan_in = matrix_shape(shape, layout)
            inner = shape[1] if len(shape) > 2 and layout == "matrix" else fan_in
            products = [math.prod(pair) for pair in sizes]
            if products not in ([out, inner], [out, fan_in]):
                return f'which has {out} outputs and {inner} inputs, and "sizes" give {products}.'
        return super().check_site(entry, shape, layout)

    @classmethod
    def start(cls, name: str, own: Tensor) -> None:
        """Uniform as torch's own Linear, and one factor of ``w_2`` zero."""
        # w_2's last factor at zero: the change starts at zero, and its gradient does not
        if name in ("lokr_w2", "lokr_w2_b"):
            own.zero_()
        else:
            # as nn.Linear's default: the square root of what a row sums
            bound = 1 / math.sqrt(own[0].numel())
            own.uniform_(-bound, bound)

    @staticmethod
    def change(parts: Parts) -> Tensor:
        """``w_1 ⊗ w_2``."""
        first, second = factors(parts)
        if second.dim() > 2:  # of a kernel, which the first has not
            product = einsum(first, second, "a b, c d ... -> a c b d ...")
            return product.flatten(0, 1).flatten(1, 2)
        return kron(first, second)

    @classmethod
    def of_rows(cls, held: Parts, rows: Moved, out: int) -> Optional[Parts]:
        """Those rows of ``w_1``, each of which is as many as ``w_2`` has; or one row of ``w_1`` and
        some of ``w_2``. Other runs are no Kronecker product of these."""
        size = factors({name: one.to("meta") for name, one in held.items()})[1].shape[0]
        first = "lokr_w1" if "lokr_w1" in held else "lokr_w1_a"
        if all(not n % size for run in rows for side in run for n in (side.start, side.stop, out)):
            whole = [(_divided(here, size), _divided(there, size)) for here, there in rows]
            return {**held, first: in_rows(held[first], whole, out // size)}
        row = rows[0][0].start // size
        if any(side // size != row for here, _ in rows for side in (here.start, here.stop - 1)):
            return None
        inside = [(slice(h.start - row * size, h.stop - row * size), there) for h, there in rows]
        second, dim = ("lokr_w2", 0) if "lokr_w2" in held else ("lokr_w2_a", int("lokr_t2" in held))
        own = in_rows(held[second], inside, out, dim)
        return {**held, first: held[first][row : row + 1], second: own}

    @classmethod
    def factors_of(cls, held: Parts) -> Optional[_Factors]:
        """The Kronecker products of the factors' factors; of a kernel none."""
        second = held.get("lokr_w2")
        if "lokr_t2" in held or (second is not None and second.dim() > 2):
            return None
        return low_rank({name: one.double() for name, one in held.items()})

    @classmethod
    def rank_of(cls, held: Any) -> int:
        """The rank of the factor that has a low one; 1, which is any number, where none has."""
        thin = (held[name].shape[0] for name in ("lokr_w2_b", "lokr_w1_b") if name in held)
        return next(thin, 1)

    @classmethod
    def completed(cls, options: tuple[tuple[str, Any], ...], held: Parts) -> Any:
        """Its keys, with ``"full_matrix"`` where both factors are full: then no tensor tells the
        rank, which had decided that."""
        full = "lokr_w1" in held and "lokr_w2" in held
        return tuple(sorted({**dict(options), "full_matrix": True}.items())) if full else options

    @classmethod
    def options_of(cls, held: Parts) -> tuple[tuple[str, Any], ...]:
        """What makes tensors of these very sizes."""
        # shapes alone are wanted, and the meta device computes them
        first, second = factors({name: one.to("meta") for name, one in held.items()})
        kernel = held["lokr_t2"].shape[2:] if "lokr_t2" in held else ()
        sizes = tuple(zip(first.shape[:2], second.shape[:2]))
        told: dict[str, Any] = {
            # what is false is the default, and is left out so that options compare
            "decompose_both": "lokr_w1_a" in held,
            "full_matrix": "lokr_w2" in held,
            "tucker": bool(kernel),
        }
        return tuple(sorted({"sizes": sizes, **{k: v for k, v in told.items() if v}}.items()))


def _divided(run: slice, size: int) -> slice:
    return slice(run.start // size, run.stop // size)


def factors(parts: Parts) -> tuple[Tensor, Tensor]:
    """``w_1`` and ``w_2``, whole."""
    first, second = parts.get("lokr_w1"), parts.get("lokr_w2")
    if first is None:
        first = parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    if second is None:
        a, b, middle = parts["lokr_w2_a"], parts["lokr_w2_b"], parts.get("lokr_t2")
        if middle is None:
            second = a @ b
        else:
            second = einsum(middle, a, b, "i j ..., i c, j d -> c d ...")
    return first, second


def low_rank(parts: Parts) -> _Factors:
    """``A`` and ``B`` whose product is ``w_1 ⊗ w_2``, of the product of both ranks: ``(l_1 r_1) ⊗
    (l_2 r_2)`` is ``(l_1 ⊗ l_2)(r_1 ⊗ r_2)``. One that is whole is an identity and itself.

    Example:
        >>> parts = {"lokr_w1": torch.randn(2, 3), "lokr_w2": torch.randn(5, 4)}
        >>> a, b = low_rank(parts)
        >>> assert torch.allclose(b @ a, torch.kron(*parts.values()), atol=1e-6)
    """
    (left_1, right_1), (left_2, right_2) = _halves(parts, 1), _halves(parts, 2)
    return kron(right_1, right_2), kron(left_1, left_2)


def rank_of_product(parts: Parts) -> int:
    """The rank of `low_rank`."""
    return math.prod(_rank(parts, n) for n in (1, 2))


def _rank(parts: Parts, number: int) -> int:
    full = parts.get(f"lokr_w{number}")
    return len(parts[f"lokr_w{number}_b"]) if full is None else min(full.shape)


def _halves(parts: Parts, number: int) -> _Factors:
    full = parts.get(f"lokr_w{number}")
    if full is None:
        return parts[f"lokr_w{number}_a"], parts[f"lokr_w{number}_b"]
    # the identity on the smaller side: a whole matrix is of no higher rank
    eye = torch.eye(min(full.shape), dtype=full.dtype, device=full.device)
    return (eye, full) if len(full) == len(eye) else (full, eye)


def kron(first: Tensor, second: Tensor) -> Tensor:
    """The Kronecker product; not torch.kron, in which autograd does not see that a factor was
    changed."""
    product = first[:, None, :, None] * second[None, :, None, :]
    return product.flatten(0, 1).flatten(1, 2)


def split(size: int, factor: int) -> _Pair:
    """Two numbers whose product is `size`, the smaller first (LyCORIS's ``factorization``).

    Args:
        size: of one side.
        factor: the smaller one where it divides `size`, else the most that it may be; -1 for the
            divisor nearest to the root.

    Example:
        >>> split(128, -1), split(128, 4), split(250, 16), split(127, 8)
        ((8, 16), (4, 32), (10, 25), (1, 127))
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    # LyCORIS takes the largest divisor up to the bound
    most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    small = max(n for n in range(1, most + 1) if size % n == 0)
    return small, size // small
