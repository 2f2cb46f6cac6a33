"""The two factors of an update, out of the shapes in which tools store them, and back."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Optional

import torch
from einops import rearrange
from torch import Tensor

from paramlora.errors import FileError
from paramlora.formats.content import check_factors
from paramlora.formats.fused import fused_linear
from paramlora.update.kinds import KINDS
from paramlora.update.value import Adapter, KindUpdate, Update

MOST_DENSE = 2**29  # elements of a difference that is formed out of factors


def check_size(shape: Sequence[int], where: str, most: int = MOST_DENSE) -> None:
    """Refuse factors of a few bytes that would fill the memory.

    Args:
        shape: of the difference that they make.
        where: the file and layer, for messages.
        most: the elements that it may have.
    """
    if math.prod(shape) > most:
        layer = "any layer" if most == MOST_DENSE else "the model's layer"
        raise FileError(
            f"{where}: a dense weight of {list(shape)} is more than {layer} has. Not "
            "formed; give the model that it was made for."
        )


def pair(down: Tensor, up: Tensor, scale: float, where: str) -> Update:
    """An update of a Linear or a convolution out of two layers in a row.

    Args:
        down: ``[r, in]``, or ``[r, in, *kernel]``.
        up: ``[out, r]``, or ``[out, r/groups, 1, ...]``.
        scale: the factor itself.
        where: the file and layer, for messages.

    Raises:
        FileError: the two do not fit each other, or no weight of one layer equals them.
    """
    check_factors(where, down, up)
    kernel = tuple(down.shape[2:])
    if any(k != 1 for k in up.shape[2:]):
        raise FileError(
            f"{where}: factors of {list(down.shape)} and {list(up.shape)} are not [r, in, ...] "
            "and [out, r, 1, ...]. Save it again."
        )
    # a grouped second layer has ranks / groups inputs
    if up.flatten(1).shape[1] != down.shape[0]:
        return ungrouped(down, up.flatten(1), scale, where)
    kind = "convolution" if kernel else "linear"
    shape = (up.shape[0], *down.shape[1:])
    return Update(down.flatten(1), up.flatten(1), scale, shape, kind=kind)


def ungrouped(down: Tensor, up: Tensor, scale: float, where: str) -> Update:
    """An update out of a whole first and a grouped second convolution, as PEFT has them.

    Group ``j`` of the output reads rows ``j`` of `down` ``[r, in, *kernel]``. A grouped weight has
    no place for what they read of other groups' inputs: that must be zero.
    """
    groups = down.shape[0] // up.shape[1]
    whole_groups = groups > 0 and not down.shape[1] % groups and not up.shape[0] % groups
    if down.dim() < 3 or down.shape[0] % up.shape[1] or not whole_groups:
        raise FileError(
            f"{where}: factors of {list(down.shape)} and {list(up.shape)} do not fit each other. "
            "Save it again."
        )
    kernel = tuple(down.shape[2:])
    # [group of ranks, group of inputs, r, in]: a grouped weight has place for the diagonal alone
    blocks = rearrange(down.flatten(2), "(g r) (h i) k -> g h r (i k)", g=groups, h=groups)
    own = torch.stack([blocks[j, j] for j in range(groups)])  # g r (i k)
    if blocks.count_nonzero() != own.count_nonzero():
        raise FileError(
            f"{where}: the first factor of this grouped convolution reads all inputs for each "
            f"group, and the weight of {groups} groups has no place for that: it cannot be merged "
            'or attached here. Train it again with groups of its own ("hard": 1).'
        )
    a = rearrange(own, "g r i -> (g r) i")
    # a group of outputs reads ranks of its own, as a part of a fused projection does
    rows = [up.shape[0] // groups] * groups
    update = fused_linear(a, up, scale, rows, [True] * groups, where)
    shape = (up.shape[0], down.shape[1] // groups, *kernel)
    return replace(update, shape=shape, kind="convolution", groups=groups)


def grouped(update: Update) -> tuple[Tensor, Tensor]:
    """The reverse of `ungrouped`: ``down`` of rank ``groups · r``, ``up`` ``[out, r, 1, ...]``."""
    assert update.shape is not None
    g, kernel = update.groups, update.shape[2:]
    a = rearrange(update.lora_A, "r (i k) -> r i k", k=math.prod(kernel))
    down = a.new_zeros(g, update.r, g, *a.shape[1:])
    for j in range(g):
        down[j, :, j] = a
    down = rearrange(down, "g r h i k -> (g r) (h i) k")
    return down.reshape(*down.shape[:2], *kernel), ones(update.lora_B, len(kernel))


def kernels(update: Update) -> tuple[Tensor, Tensor]:
    """``[r, in, *kernel]`` and ``[out, r, 1, ...]``; the matrices themselves of a Linear."""
    assert update.shape is not None
    kernel = update.shape[2:]
    if update.layout == "transposed" or not kernel:
        return update.lora_A, update.lora_B
    down = update.lora_A.reshape(update.r, *update.shape[1:])
    return down, ones(update.lora_B, len(kernel))


def rescaled(update: Update, magnitude: Tensor, where: str) -> KindUpdate:
    """A DoRA out of its low-rank update and its magnitude.

    Args:
        update: with its weight's shape.
        magnitude: ``[out]``; or with the weight's dimensions, 1 in those that the norm is over
            (LyCORIS's ``dora_scale``, of both its conventions).
        where: the file and layer, for messages.

    Raises:
        FileError: the magnitude is another layer's.
    """
    shape, outer = update.shape or (), 1 if update.layout == "transposed" else 0
    own, dims = magnitude, len(shape)
    # a vector, as peft's, or the weight's dimensions, of which the last may be left out
    if magnitude.dim() == 1 and dims >= 2:
        own = magnitude.reshape(*[1] * outer, -1, *[1] * (dims - outer - 1))
    elif magnitude.dim() < dims:
        own = ones(magnitude, dims - magnitude.dim())
    held = {"lora_A": update.lora_A, "lora_B": update.lora_B, "lora_magnitude": own}
    if update.layout == "stack" or not KINDS["dora"].fits(held, shape, update.layout):
        raise FileError(
            f"{where}: a magnitude of {list(magnitude.shape)} does not fit a weight of "
            f"{list(shape)}. Was it made for another model?"
        )
    return KindUpdate(
        *("dora", held, update.scale, shape, update.layout), kind=update.kind, groups=update.groups
    )


def product_of(
    held: Mapping[str, Tensor], scale: float, where: str, shape: tuple[int, ...] = ()
) -> KindUpdate:
    """LoHa or LoKr as what it is, by LyCORIS's names of its tensors.

    Args:
        held: its tensors.
        scale: the factor itself.
        where: the file and layer, for messages.
        shape: of its change, where that is known.

    Raises:
        FileError: tensors that are not of one of the two, or do not fit each other.
    """
    method = "loha" if "hada_w1_a" in held else "lokr"
    strange = held.keys() - KINDS[method].parts.keys()
    if strange:
        raise FileError(
            f"{where}: {', '.join(sorted(strange))}: no form that can be read. Merge it with the "
            "tool that trained it."
        )
    try:
        options = KINDS[method].options_of(held)
        KINDS[method].rank_of(held)
    except (KeyError, RuntimeError) as error:
        raise FileError(
            f"{where}: {', '.join(sorted(held))} are not whole. Save it again."
        ) from error
    # of two dimensions it may be a Linear or a flattened convolution: the base decides
    kind = "convolution" if len(shape) > 2 else None
    return KindUpdate(method, held, scale, shape if kind else None, options=options, kind=kind)


def difference_of(value: Tensor, where: str) -> KindUpdate:
    """A dense change of a tensor, as LyCORIS and ComfyUI store those of biases and norms.

    Raises:
        FileError: no numbers that can be added to any.
    """
    if not value.is_floating_point() or not value.numel() or not value.dim():
        kind = str(value.dtype).removeprefix("torch.")
        raise FileError(
            f"{where}: no change of a tensor: {list(value.shape)} {kind}. Save it again."
        )
    layer = "convolution" if value.dim() > 2 else None
    shape = tuple(value.shape)
    return KindUpdate("difference", {"lora_diff": value}, 1.0, shape, kind=layer)


def factored(value: KindUpdate) -> Optional[Update]:
    """A difference as two factors, one of them an identity; None where it is of no one matrix."""
    own = value.held["lora_diff"]
    if own.dim() < 2 or value.layout == "stack":
        return None
    # an earlier file's does not tell the sides of an embedding
    layout = "transposed" if value.kind == "embedding" else value.layout
    update = replace(from_dense(own, None, value.scale), groups=value.groups).turned(layout)
    return update if value.kind is None else replace(update, kind=value.kind)


def apart_from(adapter: Adapter, *methods: str) -> tuple[Adapter, dict[str, KindUpdate]]:
    """An adapter without its updates of these kinds, and those by path."""
    found = {path: value for path, value in adapter.others.items() if value.method in methods}
    rest = {path: value for path, value in adapter.others.items() if path not in found}
    return replace(adapter, others=rest), found


def without_differences(adapter: Adapter) -> Adapter:
    """An adapter with two factors for dense changes of matrices."""
    rest, found = apart_from(adapter, "difference")
    # once for each value: tied tensors go on sharing theirs
    once = {id(value): factored(value) for value in found.values()}
    made = {path: once[id(value)] for path, value in found.items()}
    plain = {path: update for path, update in made.items() if update is not None}
    left = {path: value for path, value in found.items() if path not in plain}
    updates, others = {**rest.updates, **plain}, {**rest.others, **left}
    return replace(rest, updates=updates, others=others)


def without_magnitude(value: KindUpdate) -> tuple[Update, Tensor]:
    """The low-rank update inside of a DoRA, and its magnitude."""
    a, b = value.held["lora_A"], value.held["lora_B"]
    update = Update(
        *(a, b, value.scale, value.shape, value.layout), kind=value.kind, groups=value.groups
    )
    return update, value.held["lora_magnitude"]


def with_low_ranks(adapter: Adapter) -> tuple[Adapter, dict[str, Tensor]]:
    """An adapter with the low-rank updates inside of its DoRAs beside the others, and the
    magnitudes by path."""
    apart = {path: without_magnitude(value) for path, value in adapter.others.items()}
    updates = {**adapter.updates, **{path: update for path, (update, _) in apart.items()}}
    return (
        replace(adapter, updates=updates, others={}),
        {path: magnitude for path, (_, magnitude) in apart.items()},
    )


def check_told(path: str, update: Update, tool: str) -> None:
    """Refuse what no file of named layers can hold, and what is not known well enough."""
    if not path:
        raise FileError(
            f"(model): {tool} names layers inside a model, and has none for itself. Keep the "
            "native format."
        )
    if update.up_kernel == "same":
        raise FileError(
            f'{path}: "up_kernel": "same" is two convolutions in a row, which only the '
            "native format holds. Keep that."
        )
    if update.shape is None or (update.kind is None and update.layout == "transposed"):
        raise FileError(
            f"{path}: the shape or kind of its layer is unknown. Give the model (--model)."
        )


def with_scale_in_B(update: Update) -> Update:
    """An update with its scale multiplied into ``lora_B``, in a type that holds the product."""
    b = held(update.lora_B.double() * update.scale, update.lora_B.dtype)
    # A goes along: an update's factors are of one type
    return replace(update, lora_A=update.lora_A.to(b.dtype), lora_B=b, scale=1.0)


def with_scale_in(value: KindUpdate, name: str) -> KindUpdate:
    """An update with its scale multiplied into one of its tensors; all of them are then in a type
    that holds the product."""
    if value.scale == 1:
        return value
    own = held(value.held[name].double() * value.scale, value.held[name].dtype)
    parts = {**{n: one.to(own.dtype) for n, one in value.held.items()}, name: own}
    return replace(value, held=parts, scale=1.0)


def held(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of doubles in `dtype`, or in a wider type where that would lose more than a
    rounding to float32 does.

    Example:
        >>> numbers = torch.tensor([0.5, 0.1, 1e-60], dtype=torch.float64)
        >>> [held(number, torch.float16).dtype for number in numbers]
        [torch.float16, torch.float32, torch.float64]
    """
    # 16 bits only where they lose nothing at all: what they round a scale would have kept
    if dtype.itemsize <= 2 and torch.equal(value.to(dtype).double(), value):
        return value.to(dtype)
    wide = dtype if dtype.itemsize > 2 else torch.float32
    # tiny is the least normal number: below it float32 loses digits
    sizes, limits = value[value != 0].abs(), torch.finfo(wide)
    within = sizes.numel() == 0 or bool(sizes.min() >= limits.tiny and sizes.max() <= limits.max)
    return value.to(wide if within else torch.float64)


def wide(tensor: Tensor) -> Tensor:
    """A factor in at least 32 bits, in which products lose nothing that 16 bits tell apart."""
    return tensor.float() if tensor.dtype.itemsize <= 2 else tensor


def ones(matrix: Tensor, count: int) -> Tensor:
    """`matrix` with `count` sizes of 1 behind, as the weight of a 1×1 convolution."""
    return matrix.reshape(*matrix.shape, *[1] * count)


def from_dense(delta: Tensor, rank: Optional[int], scale: float = 1.0) -> Update:
    """A dense change of a weight ``[out, in, *kernel]`` as an update.

    Without a `rank` it is kept to the last bit: the smaller side's identity is one factor. With
    one it is the nearest of that rank in the Frobenius norm (Eckart and Young 1936).

    Example:
        >>> delta = torch.randn(3, 4)
        >>> assert torch.equal(from_dense(delta, None).delta(), delta)
    """
    matrix = delta.flatten(1)
    out, fan_in = matrix.shape
    if rank is not None and rank < min(out, fan_in):
        u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        # the root of each singular value goes into either factor, so that both are of one size
        root = s[:rank].sqrt()
        a, b = held(root[:, None] * v[:rank], delta.dtype), held(u[:, :rank] * root, delta.dtype)
        # `held` may have widened one of the two, and an update has one type
        both = torch.promote_types(a.dtype, b.dtype)
        a, b = a.to(both), b.to(both)
    elif out <= fan_in:
        a, b = matrix, torch.eye(out, dtype=delta.dtype)
    else:
        a, b = torch.eye(fan_in, dtype=delta.dtype), matrix
    kind = "convolution" if delta.dim() > 2 else "linear"
    return Update(a.contiguous(), b.contiguous(), scale, tuple(delta.shape), kind=kind)


def within(update: Update) -> Update:
    """An update of no higher rank than its matrix holds: other tools allow more.

    The two factors of such a one are multiplied out in double precision (see `held`).
    """
    out, fan_in = update.lora_B.shape[-2], update.lora_A.shape[-1]
    if update.up_kernel != 1 or update.r <= min(out, fan_in):
        return update
    product = held(update.lora_B.double() @ update.lora_A.double(), update.lora_A.dtype)
    # the product itself, times an identity on its smaller side: the highest rank that it can have
    eye = torch.eye(min(out, fan_in), dtype=product.dtype).expand(*product.shape[:-2], -1, -1)
    a, b = (product, eye) if out <= fan_in else (eye, product)
    return replace(update, lora_A=a.contiguous(), lora_B=b.contiguous())


def within_rescaled(value: KindUpdate) -> KindUpdate:
    """A DoRA whose factors are of no higher rank than its matrix holds; other kinds as they are.

    Only their product tells in a DoRA, as in a low-rank update (see `within`).
    """
    if value.method != "dora":
        return value
    update, _ = without_magnitude(value)
    low = within(update)
    return value if low is update else replace(value, held={**value.held, **low.tensors()})
