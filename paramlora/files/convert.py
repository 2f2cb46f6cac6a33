"""The three conversions on files, streamed: `embed`, `extract`, `merge`."""

import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Optional, Union

from paramlora.checkpoint import apply, extracted
from paramlora.checkpoint.recipes import Contents, Plan, Recipe, embed_plan, merge_plan
from paramlora.errors import FileError, ParamloraWarning, listed
from paramlora.files import torch_save
from paramlora.files.adapters import format_of, read_adapter
from paramlora.files.atomic import PathLike, check_new, new_file, new_folder
from paramlora.files.checkpoint import PICKLED, SAFE, Stored
from paramlora.files.native import read_native, write_native
from paramlora.files.safetensors import Count, Spec, spec_of, write_safetensors
from paramlora.files.torch_save import PickledFile
from paramlora.formats import base_of_shapes
from paramlora.formats.native import NATIVE
from paramlora.update.memory import pieces_of
from paramlora.update.rounding import KeptReport, Rounding
from paramlora.update.sum import Fold
from paramlora.update.value import Adapter

Progress = Callable[[int, int], None]  # the bytes since its last call, and of all tensors
AdapterLike = Union[Adapter, PathLike]
_ENDINGS = ", ".join((*SAFE, *PICKLED))


@dataclass(frozen=True)
class Report:
    """What a conversion wrote, or would write.

    Args:
        out: the place.
        tensors: how many it holds.
        changed: how many of them differ from the input's, new ones included.
        bytes: of all tensors together.
    """

    out: Path
    tensors: int
    changed: int
    bytes: int


def embed(
    base: PathLike,
    adapter: AdapterLike,
    out: PathLike,
    *,
    key: Optional[str] = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Optional[Progress] = None,
) -> Report:
    """Write the checkpoint of `base` with `adapter` attached (see `paramlora.checkpoint.embed`).

    Args:
        base: a safetensors file, a file of ``torch.save``, or a folder of shards with its index.
        adapter: an adapter, or its file, of paramlora or of another tool (see `read_adapter`).
        out: the new file, of the kind that its ending tells, or a folder for a folder.
        key: where the state dict is in a file of ``torch.save``, such as ``"model.ema"``.
        force: replace what is at `out`.
        dry_run: only check and report.
        progress: called with the bytes written since its last call, and those of all tensors.

    Raises:
        FileError: a file cannot be read or written, or does not fit.
    """
    check_new(out, force or dry_run)
    with Stored(base, key) as stored:
        plan = embed_plan(Contents(stored.specs), _adapter(adapter, stored))
        return _write(stored, plan, Path(out), dry_run, progress)


def extract(
    embedded: PathLike,
    out: PathLike,
    *,
    key: Optional[str] = None,
    force: bool = False,
    dry_run: bool = False,
) -> Report:
    """Write the adapter inside an attached model's checkpoint as the native file.

    Args:
        embedded: as `base` of `embed`.
        out, key, force, dry_run: as for `embed`.

    Raises:
        FileError: a file cannot be read or written.
        AdapterError: nothing is inside, or more than one update on one tensor.
    """
    check_new(out, force or dry_run)
    with Stored(embedded, key) as stored:
        adapter = extracted(Contents(stored.specs), stored.read)
    if not dry_run:
        write_native(adapter, out)
    factors = [t for u in adapter.updates.values() for t in (u.lora_A, u.lora_B)]
    held = [*factors, *adapter.whole.values()]
    return Report(Path(out), len(held), len(held), sum(tensor.nbytes for tensor in held))


def merge(
    base: PathLike,
    adapters: Sequence[Union[AdapterLike, tuple[AdapterLike, float]]],
    out: PathLike,
    *,
    key: Optional[str] = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Optional[Progress] = None,
) -> Report:
    """Write `base` with the adapters folded in (see `paramlora.checkpoint.merge`).

    From safetensors to safetensors some megabytes are in memory at a time, whatever the size.

    Args:
        base: as for `embed`; what is inside an attached model's checkpoint is merged where
            `adapters` is empty.
        adapters: each an adapter or its file, or a pair of that and a strength.
        out, key, force, dry_run, progress: as for `embed`.

    Raises:
        FileError: a file cannot be read or written, or does not fit.
        AdapterError: an adapter that cannot be merged.
    """
    check_new(out, force or dry_run)
    pairs = [one if isinstance(one, tuple) else (one, 1.0) for one in adapters]
    with Stored(base, key) as stored:
        loaded = [(_adapter(one, stored), strength) for one, strength in pairs]
        plan = merge_plan(Contents(stored.specs), loaded, stored.read)
        return _write(stored, plan, Path(out), dry_run, progress)


def kept(
    base: PathLike,
    adapters: Sequence[Union[AdapterLike, tuple[AdapterLike, float]]],
    *,
    key: Optional[str] = None,
) -> KeptReport:
    """How much of the adapters `merge` keeps in each tensor's type; nothing is written.

    Args:
        base, adapters, key: as for `merge`.

    Raises:
        FileError, AdapterError: as there.
    """
    pairs = [one if isinstance(one, tuple) else (one, 1.0) for one in adapters]
    rounding = Rounding()
    with Stored(base, key) as stored:
        loaded = [(_adapter(one, stored), strength) for one, strength in pairs]
        for name, recipe in merge_plan(Contents(stored.specs), loaded, stored.read).items():
            if recipe.changes:
                rounding.path, spec = name, stored.specs[recipe.source]
                terms = recipe.terms(spec.dtype)
                for run, summed in Fold(spec.shape, spec.dtype, terms, rounding=rounding).blocks():
                    summed(stored.run(recipe.source, run))
    return rounding.report()


def _adapter(adapter: AdapterLike, stored: Stored) -> Adapter:
    """An adapter of any tool, its names and shapes those of the checkpoint."""
    if isinstance(adapter, Adapter):
        return adapter
    if format_of(adapter) == NATIVE:
        return read_native(adapter)
    shapes = {key: spec.shape for key, spec in stored.specs.items()}
    return read_adapter(adapter, base_of_shapes(shapes))


def _write(
    stored: Stored, plan: Plan, out: Path, dry_run: bool, progress: Optional[Progress]
) -> Report:
    specs = {k: _spec(stored, recipe) for k, recipe in plan.items()}
    size = sum(spec.nbytes for spec in specs.values())
    changed = sum(1 for r in plan.values() if r.changes or r.value is not None)
    _check_kind(stored, out)
    if not dry_run:
        beside = _beside(stored.folder) if _is_folder(out) else []
        _check_space(out, size)
        _check_space(out, size + sum(path.stat().st_size for path in beside))

        def told(count: int) -> None:
            if progress is not None:
                progress(count, size)

        if _is_folder(out):
            _write_folder(stored, plan, specs, beside, out, told)
        else:
            with new_file(out) as file:
                _fill(stored, plan, specs, list(stored.parts), out.suffix, file, told)
    return Report(out, len(plan), changed, size)


def _spec(stored: Stored, recipe: Recipe) -> Spec:
    return stored.specs[recipe.source] if recipe.value is None else spec_of(recipe.value)


def _is_folder(out: Path) -> bool:
    return out.suffix not in (*SAFE, *PICKLED)


def _check_kind(stored: Stored, out: Path) -> None:
    """Refuse an output that cannot hold the input."""
    if stored.index is None and _is_folder(out):
        raise FileError(f"{out}: its ending tells no kind of file. Give one of {_ENDINGS}.")
    if out.suffix in SAFE:
        for part in stored.parts.values():
            rest = part.beside() if isinstance(part, PickledFile) else []
            if rest:
                raise FileError(
                    f"{out}: a safetensors file holds tensors only, and {part.path.name} also has "
                    f"{', '.join(rest[:5])}. Give an output ending in {part.path.suffix}."
                )


def _check_space(out: Path, size: int) -> None:
    try:
        free = shutil.disk_usage(out.parent).free
    except OSError as error:
        raise FileError(
            f"{out}: cannot be written: {error.strerror}. Nothing was written."
        ) from error
    if size > free:
        raise FileError(f"{out}: needs {size:,} bytes, and {free:,} are free. Nothing was written.")


def _write_folder(
    stored: Stored,
    plan: Plan,
    specs: dict[str, Spec],
    beside: list[Path],
    out: Path,
    progress: Count,
) -> None:
    names = [*stored.parts, stored.index_name, *(p.name for p in beside)]
    with new_folder(out, names) as folder:
        for name in stored.parts:
            with open(folder / name, "wb") as file:
                _fill(stored, plan, specs, [name], Path(name).suffix, file, progress)
        for path in beside:
            shutil.copyfile(path, folder / path.name)
        text = json.dumps(_index(stored, plan, specs), indent=2) + "\n"
        (folder / stored.index_name).write_text(text, encoding="utf-8")


def _beside(folder: Path) -> list[Path]:
    """The files to copy: those of the folder itself, without the weights."""
    there = [path for path in sorted(folder.iterdir()) if path.is_file() and not _is_weights(path)]
    away = [path.name for path in there if not _is_inside(path, folder.resolve())]
    if away:
        text = f"{folder}: not copied, since they are links to elsewhere: {listed(away)}."
        warnings.warn(f"{text} Copy those that you trust.", ParamloraWarning, stacklevel=5)
    return [path for path in there if path.name not in away]


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a file, or what it is a link to, belongs to its folder."""
    real = path.resolve()
    # the Hugging Face cache keeps the files of a snapshot in a folder of its own
    blobs = folder.parents[1] / "blobs" if folder.parent.name == "snapshots" else folder
    return real.parent in (folder, blobs)


def _is_weights(path: Path) -> bool:
    """Whether a file holds weights, which would be other ones than those written."""
    return path.suffix in (*SAFE, *PICKLED) or path.name.endswith(".index.json")


def _index(stored: Stored, plan: Plan, specs: dict[str, Spec]) -> dict[str, Any]:
    index = dict(stored.index or {})
    totals = {
        "total_size": sum(spec.nbytes for spec in specs.values()),
        "total_parameters": sum(spec.elements for spec in specs.values()),
    }
    told = index.get("metadata", {})
    index["metadata"] = {**told, **{k: v for k, v in totals.items() if k in told}}
    index["weight_map"] = {key: stored.where[recipe.source] for key, recipe in plan.items()}
    return index


def _fill(
    stored: Stored,
    plan: Plan,
    specs: dict[str, Spec],
    parts: list[str],
    suffix: str,
    file: BinaryIO,
    progress: Count,
) -> None:
    """Write what stands in some of the input's files as one file."""
    mine = {key: recipe for key, recipe in plan.items() if stored.where[recipe.source] in parts}
    if suffix in SAFE:
        metadata = stored.parts[parts[0]].metadata

        def pieces(key: str) -> Iterable[memoryview]:
            return _pieces(stored, mine[key])

        write_safetensors(file, {k: specs[k] for k in mine}, metadata, pieces, progress)
    else:
        _fill_pickled(stored, mine, parts, file, progress)


def _pieces(stored: Stored, recipe: Recipe) -> Iterator[memoryview]:
    """The bytes of one tensor; of a merged one never more than a block is in memory."""
    if recipe.value is not None:
        yield from pieces_of(recipe.value)
    elif not recipe.changes:
        yield from stored.raw(recipe.source)
    else:
        spec = stored.specs[recipe.source]
        for elements, summed in Fold(spec.shape, spec.dtype, recipe.terms(spec.dtype)).blocks():
            before = stored.run(recipe.source, elements)
            after = summed(before)
            recipe.check(before, after, summed)
            yield from pieces_of(after)


def _fill_pickled(
    stored: Stored, plan: Plan, parts: list[str], file: BinaryIO, progress: Count
) -> None:
    part = stored.parts[parts[0]]
    if isinstance(part, PickledFile) and len(parts) == 1:
        state = apply(plan, part.state)
        for key in part.state.keys() - part.specs.keys():
            state[key] = part.state[key]
        whole = part.around(state)
    else:
        whole = {key: recipe.make(stored.read) for key, recipe in plan.items()}
    torch_save.save(whole, file, progress)
