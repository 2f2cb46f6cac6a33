"""Arithmetic on adapters and checkpoints in files (see `paramlora.arithmetic`)."""

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Optional, Union

from torch import Tensor, nn

from paramlora import arithmetic, formats
from paramlora.arithmetic import Approximation
from paramlora.arithmetic.combine import How
from paramlora.arithmetic.difference import Side, Told, between
from paramlora.arithmetic.products import check_all_add
from paramlora.arithmetic.resize import Ranks
from paramlora.checkpoint.keys import Key
from paramlora.config.reading import head_of, is_pickled
from paramlora.errors import FileError, spelled
from paramlora.files.adapters import AdapterLike, format_of, read_adapter
from paramlora.files.atomic import PathLike
from paramlora.files.checkpoint import Stored
from paramlora.formats import Base, Options, base_of
from paramlora.formats.content import DEFAULTS
from paramlora.update.contexts import own_context
from paramlora.update.value import Adapter
from paramlora.update.weighted import check_adapter, pairs_of

CheckpointLike = Union[PathLike, Mapping[str, Any], nn.Module]


def combine(
    adapters: Sequence[Union[AdapterLike, tuple[AdapterLike, float]]],
    how: How = "exact",
    rank: Optional[int] = None,
    *,
    density: Optional[float] = None,
    seed: int = 0,
    strict: bool = False,
    base: Optional[Base] = None,
    options: Options = DEFAULTS,
) -> Adapter:
    r"""The adapter whose updates are the weighted sums of others', ``Σ wᵢ·sᵢ·Bᵢ·Aᵢ``.

    The base is not needed. See docs/arithmetic.md for what each way means and costs.

    Args:
        adapters: each an adapter or its file, of any tool, or a pair of that and its weight; any
            number may be negative.
        how: ``"exact"`` joins the ranks; ``"svd"`` is the nearest of `rank` to that, by QR of the
            factors; ``"ties"`` (Yadav et al. 2023, arXiv:2306.01708) and ``"dare"`` (Yu et al.
            2024, arXiv:2311.03099) choose entries, at `density`; ``"linear"`` is what peft means
            by it, which is not the sum.
        rank: of the result, for ``"svd"``, ``"ties"`` and ``"dare"``.
        density: the share of entries kept, for ``"ties"`` and ``"dare"``.
        seed: of ``"dare"``'s random numbers.
        strict: a layer that only some of the adapters update is an error, not a warning.
        base: the names and shapes of the model, where files of several formats spell layers
            differently (see `formats.base_of`).
        options: what some formats do not tell.

    Raises:
        AdapterError: other shapes, kinds that do not add, numbers that are not finite, or ranks
            above what there is.
        FileError: a file cannot be read.

    Example:
        >>> import torch
        >>> from paramlora import Update
        >>> one = Adapter({"q": Update(torch.ones(1, 3), torch.ones(2, 1))})
        >>> two = combine([one, (one, 0.5)]).updates["q"]
        >>> assert torch.equal(two.delta(), torch.full((2, 3), 1.5))
    """
    return combined(
        adapters, how, rank, density=density, seed=seed, strict=strict, base=base, options=options
    ).adapter


@own_context()
def combined(
    adapters: Sequence[Union[AdapterLike, tuple[AdapterLike, float]]],
    how: How = "exact",
    rank: Optional[int] = None,
    *,
    density: Optional[float] = None,
    seed: int = 0,
    strict: bool = False,
    base: Optional[Base] = None,
    options: Options = DEFAULTS,
) -> Approximation:
    """`combine`, and the error of each layer where the result is only near to the sum."""
    pairs = pairs_of(adapters, files=True)
    if base is None:
        _check_names([one for one, _ in pairs])
    read = [(_adapter(one, base, options), weight) for one, weight in pairs]
    return arithmetic.combine(read, how, rank, density=density, seed=seed, strict=strict)


@own_context()
def resize(
    adapter: AdapterLike,
    rank: Optional[Ranks] = None,
    *,
    energy: Optional[float] = None,
    base: Optional[Base] = None,
    options: Options = DEFAULTS,
) -> Approximation:
    """The nearest adapter of lower ranks (Eckart and Young 1936), and the error of each layer.

    The base is not needed, and the dense matrix is never formed.

    Args:
        adapter: an adapter or its file, of any tool.
        rank: of each layer; or ``{name: rank}`` of some, by names as a configuration has them.
        energy: instead, the share of ``‖scale·B·A‖²`` that each layer keeps at least.
        base, options: as in `combine`.

    Returns:
        ``.adapter``, ``.errors`` by path (``‖Δ - Δ'‖ / ‖Δ‖``), and the largest, ``.error``.

    Raises:
        AdapterError: a rank above what there is, or a name of no layer.
        FileError: the file cannot be read.
    """
    return arithmetic.resize(_adapter(adapter, base, options), rank, energy=energy)


@own_context()
def difference(
    base: CheckpointLike,
    tuned: CheckpointLike,
    rank: Optional[int] = None,
    *,
    energy: Optional[float] = None,
    exclude: Collection[str] = (),
    whole: bool = False,
    known: Optional[Base] = None,
    key: Optional[str] = None,
    progress: Told = lambda done, total: None,
) -> Approximation:
    """The adapter that leads from one checkpoint to another, each layer the nearest of a rank.

    By randomised singular values (Halko, Martinsson and Tropp 2011, arXiv:0909.4061), two tensors
    in memory at a time; the error is measured on the difference itself.

    Args:
        base, tuned: files or folders as `merge` takes, state dicts, or models.
        rank: of each update; a layer that holds less has less.
        energy: instead, the share of ``‖Δ‖²`` that each keeps at least.
        exclude: names of tensors and layers to leave out, as a configuration has them.
        whole: keep what is no matrix (biases, norms) as whole tensors, else a warning names it.
        known: the model's layers (see `formats.base_of`), which a checkpoint does not tell all of.
        key: where the state dict is in files of ``torch.save``; one of safetensors beside such a
            file needs none.
        progress: called with the bytes done since its last call, and those of all tensors.

    Returns:
        ``.adapter``, ``.errors`` by path (``‖Δ - B·A‖ / ‖Δ‖``), and the largest, ``.error``.

    Raises:
        FileError: a file cannot be read, or the two are of other keys or shapes.
        AdapterError: nothing differs, or a rank above what there is.

    Example:
        >>> import torch
        >>> base = {"q.weight": torch.eye(4)}
        >>> tuned = {"q.weight": torch.eye(4) + torch.ones(4, 4)}
        >>> found = difference(base, tuned, rank=1)
        >>> assert torch.allclose(found.adapter.updates["q"].delta(), torch.ones(4, 4), atol=1e-5)
    """
    _check_checkpoint(base, "base")
    _check_checkpoint(tuned, "tuned")
    # a model tells which tensors are embeddings or convolutions, where keys and shapes do not
    if known is None and isinstance(base, nn.Module):
        known = base_of(base)
    nested = [_has_levels(base), _has_levels(tuned)]
    # beside a file of torch.save, one of safetensors has no levels, and needs no key
    keys = [key if has or not any(nested) else None for has in nested]
    with ExitStack() as stack:
        one = _side(base, keys[0], stack, "base")
        other = _side(tuned, keys[1], stack, "tuned")
        return between(
            one,
            other,
            rank,
            energy=energy,
            exclude=exclude,
            whole=whole,
            known=known,
            progress=progress,
        )


def _check_checkpoint(given: object, name: str) -> None:
    """Refuse what is no checkpoint at all, and a mapping that is no state dict."""
    if not isinstance(given, (Mapping, nn.Module, str, os.PathLike)):
        raise FileError(
            f"{name}: expected a checkpoint, got {spelled(given)}. Give a file, a folder, a state "
            "dict or a model."
        )
    keys = given if isinstance(given, Mapping) else ()
    wrong = [key for key in keys if not isinstance(key, str)]
    if wrong:
        raise FileError(
            f"{name}: expected a state dict, whose keys are names, and one is {spelled(wrong[0])}. "
            "Give that of a model."
        )


def _has_levels(given: CheckpointLike) -> bool:
    if isinstance(given, (Mapping, nn.Module)):
        return False
    path = Path(given)
    return os.path.isdir(path) or (os.path.isfile(path) and is_pickled(head_of(path)))


def _side(given: CheckpointLike, key: Optional[str], stack: ExitStack, name: str) -> Side:
    if isinstance(given, nn.Module):
        given = given.state_dict()
    if isinstance(given, Mapping):
        # a state dict may hold more: a quantised layer's settings, a step
        tensors = {k: value for k, value in given.items() if isinstance(value, Tensor)}
        side = Side(tensors, tensors.__getitem__, name)
    else:
        stored = stack.enter_context(Stored(given, key))
        side = Side(stored.specs, stored.read, str(stored.path))
    if not side.there:
        raise FileError(f"{side.name}: it holds no tensors. Give a checkpoint that has some.")
    if any(Key.parse(key).of_update for key in side.there):
        raise FileError(
            f"{side.name}: a model with an adapter attached. Take the adapter out with "
            "paramlora extract, or fold it in with paramlora merge."
        )
    return side


def _adapter(given: AdapterLike, base: Optional[Base], options: Options) -> Adapter:
    check_adapter(given, files=True)
    if isinstance(given, Adapter):
        return given
    found = read_adapter(given, base, options)
    check_all_add(found, Path(given).name)  # here, where the file is known
    return found


def _check_names(adapters: Sequence[AdapterLike]) -> None:
    """Refuse files of which one names layers as no other does."""
    told = {Path(one): format_of(one) for one in adapters if not isinstance(one, Adapter)}
    spelled = {name for name in told.values() if not formats.FORMATS[name].names_layers}
    mixed = len(set(told.values())) > 1 or any(isinstance(one, Adapter) for one in adapters)
    if spelled and mixed:
        path = next(path for path, name in told.items() if name in spelled)
        raise FileError(
            f"{path.name}: {told[path]}'s names of layers cannot be compared with another format's "
            "without the model. Give it (--model), or its checkpoint (--base)."
        )
