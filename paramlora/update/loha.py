"""LoHa: the product, element by element, of two low-rank matrices."""

from collections.abc import Sequence
from typing import Any, Optional

import torch
from einops import einsum
from torch import Tensor

from paramlora.config import TargetConfig
from paramlora.update.added import Added, Parts
from paramlora.update.attached import Moved, in_rows, put_in_place, sized
from paramlora.update.geometry import Layout, matrix_shape
from paramlora.update.kinds import register

# LyCORIS's; what is not named starts at zero
_STARTS = {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_b": 1.0, "hada_t1": 0.1, "hada_t2": 0.1}
_OUTER = ("hada_w1_a", "hada_w2_a")  # along the outputs


@register
class Loha(Added):
    r"""Low-rank Hadamard product, Yeh et al. 2023 (arXiv:2309.14859), section 3.1; Hyeon-Woo et
    al. 2021 (FedPara, arXiv:2108.06098), equation 2.

    .. math:: W' = W + scale · (w_{1a} w_{1b}) ∘ (w_{2a} w_{2b})

    It can be of rank ``r²``. With ``"tucker"`` on a convolution each side is
    :math:`t ×_1 w_a ×_2 w_b` (FedPara's proposition 3). LyCORIS's names, shapes and first values:
    ``hada_w2_a`` zero, the rest normal.

    Shapes: ``hada_w1_a``, ``hada_w2_a`` ``[out, r]`` and ``hada_w1_b``, ``hada_w2_b`` ``[r, in]``;
    with Tucker ``[r, out]``, ``[r, in]`` and ``hada_t1``, ``hada_t2`` ``[r, r, *kernel]``.
    """

    method = "loha"
    parts = {
        **dict.fromkeys(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), "own"),
        **dict.fromkeys(("hada_t1", "hada_t2"), "own"),
        "lora_scale": "number",
    }

    @classmethod
    def sizes(
        cls, entry: TargetConfig, shape: tuple[int, ...], layout: Layout
    ) -> dict[str, tuple[int, ...]]:
        """The shapes that LyCORIS gives its tensors."""
        r, kernel = entry.r, shape[2:]
        if dict(entry.options).get("tucker") and layout == "matrix" and set(kernel) - {1}:
            # [r, side], as the middle has both ranks in front
            sides = {"a": (r, shape[0]), "b": (r, shape[1])}
            middle = {"hada_t1": (r, r, *kernel), "hada_t2": (r, r, *kernel)}
        else:
            _, out, fan_in = matrix_shape(shape, layout)
            sides, middle = {"a": (out, r), "b": (r, fan_in)}, {}
        return {**{f"hada_w{n}_{s}": sides[s] for n in (1, 2) for s in "ab"}, **middle}

    @classmethod
    def start(cls, name: str, own: Tensor) -> None:
        """Normal, and one factor zero."""
        own.normal_(std=_STARTS[name]) if name in _STARTS else own.zero_()

    @torch.no_grad()
    def resize(self, base: Tensor) -> None:
        """Take the size of its resized base; of what is new one side is zero, as at the start."""
        if getattr(self, "hada_t1", None) is not None:
            super().resize(base)
        _, out, fan_in = matrix_shape(base.shape, self.layout)
        for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"):
            own, (dim, size) = getattr(self, name), (0, out) if name[-1] == "a" else (1, fan_in)
            fresh, kept = sized(own, dim, size), min(own.shape[dim], size)
            # not both zero: neither would ever get a gradient
            if name[:7] == "hada_w1":
                fresh.narrow(dim, kept, size - kept).normal_(std=_STARTS[name])
            put_in_place(own, fresh)

    @staticmethod
    def change(parts: Parts) -> Tensor:
        """The product of both sides."""
        return _side(parts, 1) * _side(parts, 2)

    @classmethod
    def of_rows(cls, held: Parts, rows: Moved, out: int) -> Optional[Parts]:
        """Those rows of both sides, without ranks that do nothing in them."""
        if "hada_t1" in held:
            return None
        own = {**held, **{name: in_rows(held[name], rows, out) for name in _OUTER}}
        # both sides keep one rank, of what does something in either; and there is none of rank 0
        used = torch.cat([own[name] for name in _OUTER]).count_nonzero(0) > 0
        if used.all() or not used.any():
            return own
        return {name: t[:, used] if name in _OUTER else t[used] for name, t in own.items()}

    @classmethod
    def beside_each_other(cls, several: Sequence[Parts]) -> Parts:
        """Ranks side by side: in a row, all but its own are zero on both sides."""
        dims = {name: 1 if name in _OUTER else 0 for name in several[0]}
        return {name: torch.cat([one[name] for one in several], dim) for name, dim in dims.items()}

    @classmethod
    def factors_of(cls, held: Parts) -> Optional[tuple[Tensor, Tensor]]:
        """The products of each pair of ranks, which is the rank squared; of Tucker's form none."""
        if "hada_t1" in held:
            return None
        # (ab) ∘ (cd) sums a[:, i] c[:, j] · b[i] d[j] over i and j
        a, b, c, d = (held[name].double() for name in sorted(held))
        return (b[:, None] * d).flatten(0, 1), (a[..., None] * c[:, None]).flatten(1)

    @classmethod
    def rank_of(cls, held: Any) -> int:
        """The rank of each of the two matrices."""
        return int(held["hada_w1_b"].shape[0])

    @classmethod
    def options_of(cls, held: Parts) -> tuple[tuple[str, Any], ...]:
        """Whether it is of Tucker's form."""
        return (("tucker", True),) if "hada_t1" in held else ()


def _side(parts: Parts, number: int) -> Tensor:
    a, b = parts[f"hada_w{number}_a"], parts[f"hada_w{number}_b"]
    middle = parts.get(f"hada_t{number}")
    if middle is None:
        return torch.matmul(a, b)
    return einsum(middle, a, b, "i j ..., i out, j fan_in -> out fan_in ...")
