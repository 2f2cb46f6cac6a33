"""How the factors start: at random, or from the weight's own directions.

Every start leaves the model's function unchanged. The random ones have ``B`` zero. ``pissa`` and
``olora`` in their papers take ``scale·B₀·A₀`` out of the base. Here the base keeps its values and
the update carries the difference, ``scale·(B·A − B₀·A₀)``, which is the same sum up to rounding:
the base stays exact when the adapter is off or detached, and what is saved is a plain adapter of
rank ``2r`` for the unchanged base, ``[A; A₀]`` and ``[B, −B₀]``.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from paramlora.errors import TargetError
from paramlora.update.attached import says
from paramlora.update.geometry import matrix_shape
from paramlora.update.names import LOW_RANK

if TYPE_CHECKING:
    from paramlora.update.lowrank import LowRank


@torch.no_grad()
def initialise(lowrank: "LowRank", weight: Tensor, init: str) -> None:
    """Start the factors of `lowrank`, an update of `weight`, as `init` names.

    ``pissa`` and ``olora`` decompose the weight's matrix in float32 (float64 for a float64 one).

    Raises:
        TargetError: `weight` has no values yet (the meta device), or is not finite; or the kind of
            update does not take such a start out of its sum.
    """
    if init == "default":
        return
    _check_values(weight, init)
    if init in _RANDOM:
        _RANDOM[init](lowrank.lora_A)
    else:
        # as one matrix, in the factors' type: SVD takes no 16 bits
        matrix = _matrix(weight, lowrank).to(lowrank.lora_A.dtype)
        # with the scale: pissa shares it out, so that scale·B·A is the principal part
        b, a = _FROM_WEIGHT[init](matrix, lowrank.r, lowrank.lora_scale)
        lowrank.start_from(a.reshape(lowrank.lora_A.shape), b.reshape(lowrank.lora_B.shape))
        # a kind that computes another weight inherits the key, and may read its factors alone
        if not (says(type(lowrank), "heeds") or _is_taken_out(lowrank, weight)):
            raise TargetError(
                f'"init": "{init}" starts from the weight, which {type(lowrank).__name__} does not '
                "take out of its sum again: that is of its factors(), of twice the rank, in which "
                "no tensor of its own lies. Start it otherwise, or write the class so."
            )


@torch.no_grad()
def _is_taken_out(lowrank: "LowRank", weight: Tensor) -> bool:
    """Whether the function starts unchanged, and nothing lies in ranks that the start doubles."""
    rest = [part for name, part in lowrank.parts.items() if name not in LOW_RANK]
    if not {"weight", "number"}.issuperset(rest):
        return False
    # a start that stays would be the weight's largest part
    return bool((lowrank(weight) - weight).norm() <= 0.01 * weight.norm())


def kaiming(lora_a: Tensor) -> None:
    r"""``A`` uniform within :math:`±1/\sqrt{in}`, He et al. 2015 (arXiv:1502.01852).

    Their gain at the slope :math:`\sqrt 5`, as in torch's own Linear: what loralib and peft do.
    """
    bound = 1 / math.sqrt(lora_a.shape[-1])
    lora_a.uniform_(-bound, bound)


def orthogonal(lora_a: Tensor) -> None:
    """``A`` with orthonormal rows, Saxe et al. 2013 (arXiv:1312.6120): ``A Aᵀ = I``."""
    for one in lora_a.reshape(-1, *lora_a.shape[-2:]):
        torch.nn.init.orthogonal_(one)


def pissa(weight: Tensor, r: int, scale: Tensor) -> tuple[Tensor, Tensor]:
    r"""Principal singular directions, Meng et al. 2024 (arXiv:2404.02948), section 3.

    .. math:: scale · B A = U_{:r} S_{:r} V_{:r}^T

    Args:
        weight: ``[*, out, in]``.
        r: rank.
        scale: the update's factor, not zero; shared out so that it cancels.

    Returns:
        ``B`` ``[*, out, r]`` and ``A`` ``[*, r, in]``, each with half of the singular values.

    Example:
        >>> weight = torch.randn(6, 4, dtype=torch.float64)
        >>> b, a = pissa(weight, 2, torch.tensor(1.0))
        >>> s = torch.linalg.svdvals(weight)  # Eckart and Young: what is left starts at s[2]
        >>> assert torch.allclose(torch.linalg.matrix_norm(weight - b @ a, 2), s[2])
    """
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = (s[..., :r] / scale.abs()).sqrt()
    # the sign of a negative scale on one side
    return scale.sign() * u[..., :r] * root[..., None, :], root[..., None] * v[..., :r, :]


def olora(weight: Tensor, r: int, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal directions, Büyükakyüz 2024 (arXiv:2406.01775), algorithm 1.

    ``W = QR``; ``B`` is the first ``r`` columns of ``Q`` and ``A`` the first ``r`` rows of ``R``.
    The scale is not shared out, as in the paper.

    Returns:
        ``B`` ``[*, out, r]`` with ``BᵀB = I``, and ``A`` ``[*, r, in]``, upper triangular.
    """
    # the reduced decomposition: Q is [out, min]
    q, upper = torch.linalg.qr(weight)
    return q[..., :r], upper[..., :r, :]


_RANDOM: dict[str, Callable[[Tensor], None]] = {"kaiming": kaiming, "orthogonal": orthogonal}
_FROM_WEIGHT: dict[str, Callable[[Tensor, int, Tensor], tuple[Tensor, Tensor]]] = {
    "pissa": pissa,
    "olora": olora,
}


def _matrix(weight: Tensor, lowrank: "LowRank") -> Tensor:
    if lowrank.layout == "transposed":
        return rearrange(weight.reshape(len(weight), -1), "fan_in out -> out fan_in")
    stack, out, fan_in = matrix_shape(weight.shape, lowrank.layout)
    return (
        weight.reshape(stack, out, fan_in)
        if lowrank.layout == "stack"
        else weight.reshape(out, fan_in)
    )


def _check_values(weight: Tensor, init: str) -> None:
    if weight.is_meta:
        raise TargetError(
            f'"init": "{init}" of a weight on the meta device: it has no values yet, and what '
            'gives it memory starts the factors by "default". Load the model first.'
        )
    if init in _FROM_WEIGHT and not torch.isfinite(weight).all():
        raise TargetError(
            f'"init": "{init}" reads the weight, which is not finite. Load a sound model, or '
            "leave it out."
        )
