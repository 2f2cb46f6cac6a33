"""The three conversions on files, streamed: `embed`, `extract`, `merge`."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Optional, Union

from torch import Tensor

from paramlora.checkpoint import apply, extracted
from paramlora.checkpoint.keys import weights_at
from paramlora.checkpoint.recipes import Contents, Recipe, Recipes, embed_recipes, merge_recipes
from paramlora.errors import FileError, ParamloraError, listed, unwritten, warn
from paramlora.files import torch_save
from paramlora.files.adapters import (
    AdapterLike,
    check_place,
    format_of,
    read_adapter,
    without_strangers,
    write_adapter,
)
from paramlora.files.atomic import PathLike, check_lost, check_new, new_file, new_folder
from paramlora.files.checkpoint import PICKLED, SAFE, Pipeline, Stored, entries_of, opened
from paramlora.files.safetensors import Spec, spec_of, write_safetensors
from paramlora.files.torch_save import PickledFile
from paramlora.formats import OWN, Base, Options, base_of_shapes, fit
from paramlora.formats.base import part_of
from paramlora.formats.content import DEFAULTS
from paramlora.model.digest import digits_of, middle, others
from paramlora.model.values import warn_other
from paramlora.update.contexts import own_context
from paramlora.update.geometry import NARROW, factor_dtype
from paramlora.update.memory import pieces_of
from paramlora.update.rounding import KeptReport, Rounding
from paramlora.update.value import Adapter
from paramlora.update.weighted import pairs_of

Progress = Callable[[int, int], None]  # the bytes since its last call, and of all tensors
Checkpoint = Union[Stored, Pipeline]
_ENDINGS = ", ".join((*SAFE, *PICKLED))


@dataclass(frozen=True)
class Report:
    """What a conversion wrote, or would write.

    Args:
        out: the place.
        tensors: how many it holds.
        changed: how many of them differ from the input's, new ones included.
        bytes: of all tensors together.
        updates: of the adapter that was put in or taken out, whole tensors included.
        kept: of a merge into 8-bit floats, the least share of a tensor's update that survives the
            rounding, ``<Δ, Δ'> / ‖Δ‖²`` of what was added (Δ) and what is there (Δ').
        largest: of a merge, the largest ``‖W' - W‖ / ‖W‖`` of a tensor; None where it was only
            planned.
    """

    out: Path
    tensors: int
    changed: int
    bytes: int
    updates: Optional[int] = None
    largest: Optional[float] = None
    kept: Optional[float] = None


@own_context()
def embed(
    base: PathLike,
    adapter: AdapterLike,
    out: PathLike,
    *,
    key: Optional[str] = None,
    options: Options = DEFAULTS,
    known: Optional[Base] = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Optional[Progress] = None,
) -> Report:
    """Write the checkpoint of `base` with `adapter` attached (see `paramlora.checkpoint.embed`).

    Args:
        base: a safetensors file, a file of ``torch.save``, a folder of shards with its index, or
            a folder of models, as diffusers saves a pipeline, each of which gets its part.
        adapter: an adapter, or its file, of paramlora or of another tool (see `read_adapter`).
        out: the new file, of the kind that its ending tells, or a folder for a folder.
        key: where the state dict is in a file of ``torch.save``, such as ``"model.ema"``.
        options: what some formats of adapters do not tell (see `formats.Options`).
        known: the model's layers (see `formats.base_of`), where `base` does not tell them all.
        force: replace what is at `out`.
        dry_run: only check and report.
        progress: called with the bytes written since its last call, and those of all tensors.

    Raises:
        FileError: a file cannot be read or written, or does not fit.
    """
    check_new(out, force)
    with opened(base, key) as stored:
        found, contents = _adapter(adapter, stored, options, known), Contents(stored.specs)
        with _said_of(base):
            recipes = embed_recipes(contents, found)
        _warn_inside(contents, base)
        done = _write(stored, recipes, Path(out), dry_run, progress)
    # embedding changes no tensor of the base
    return replace(done, updates=len(found.values()), largest=None)


@own_context()
def extract(
    embedded: PathLike,
    out: PathLike,
    to: str = OWN,
    *,
    key: Optional[str] = None,
    known: Optional[Base] = None,
    component: Optional[str] = None,
    force: bool = False,
    dry_run: bool = False,
    **how: Any,
) -> Report:
    """Write the adapter inside an attached model's checkpoint as a file of its own.

    Args:
        embedded: as `base` of `embed`.
        to: the format; how: as for `convert`.
        component: the part of a pipeline whose updates are meant, such as ``"unet"``; its name is
            left out of theirs. All parts of a pipeline's folder without it.
        out, key, known, force, dry_run: as for `embed`.

    Raises:
        FileError: a file cannot be read or written.
        AdapterError: nothing is inside, or more than one update on one tensor.
    """
    check_place(out, to, force=force)
    with opened(embedded, key) as stored:
        with _said_of(embedded):
            adapter = extracted(Contents(stored.specs), stored.read)
        if component is not None:
            adapter = part_of(adapter, component, str(embedded))
        if known is not None:
            adapter = fit(adapter, known, DEFAULTS, str(embedded))
        # while the input is open: its tensors may be mapped from there
        write_adapter(adapter, out, to, known, force=force, dry_run=dry_run, **how)
    values = adapter.values()
    held = [tensor for value in values.values() for tensor in value.tensors().values()]
    count, size = len(values), sum(one.nbytes for one in held)
    return Report(Path(out), len(held), len(held), size, count)


@own_context()
def merge(
    base: PathLike,
    adapters: Sequence[Union[AdapterLike, tuple[AdapterLike, float]]],
    out: PathLike,
    *,
    key: Optional[str] = None,
    options: Options = DEFAULTS,
    known: Optional[Base] = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Optional[Progress] = None,
    seed: Optional[int] = None,
) -> Report:
    """Write `base` with the adapters folded in (see `paramlora.checkpoint.merge`).

    From safetensors to safetensors some megabytes are in memory at a time, whatever the size.
    Weights that are not those that an adapter was trained on, as after merging it once already,
    are told of in a warning.

    Args:
        base: as for `embed`; what is inside an attached model's checkpoint is merged where
            `adapters` is empty.
        adapters: each an adapter or its file, or a pair of that and a strength.
        out, key, options, known, force, dry_run, progress: as for `embed`.
        seed: round sums up or down at random instead of to the nearest number of a type of 8 or 16
            bits, so that of a small update its mean is kept. One seed gives one file.

    Raises:
        FileError: a file cannot be read or written, or does not fit.
        AdapterError: an adapter that cannot be merged.
    """
    check_new(out, force)
    pairs = pairs_of(adapters, files=True)
    with opened(base, key) as stored:
        loaded = [(_adapter(one, stored, options, known), strength) for one, strength in pairs]
        contents = Contents(stored.specs)
        with _said_of(base):
            recipes = merge_recipes(contents, loaded, stored.read)
        if seed is not None:
            recipes = {
                # random numbers by the tensor's name: no order of writing changes the file
                name: replace(recipe, rounding=Rounding(seed, name, counts=False))
                for name, recipe in recipes.items()
            }
        # before anything is written, so that whoever reads it can still stop
        for adapter, _ in loaded:
            _warn_other(adapter, contents, stored)
        return _write(stored, recipes, Path(out), dry_run, progress)


@own_context()
def kept(
    base: PathLike,
    adapters: Sequence[Union[AdapterLike, tuple[AdapterLike, float]]],
    *,
    key: Optional[str] = None,
    options: Options = DEFAULTS,
    known: Optional[Base] = None,
    seed: Optional[int] = None,
) -> KeptReport:
    """How much of the adapters `merge` keeps in each tensor's type; nothing is written.

    Args:
        base, adapters, key, options, known, seed: as for `merge`.

    Raises:
        FileError, AdapterError: as there.
    """
    pairs = pairs_of(adapters, files=True)
    rounding = Rounding(seed)
    with opened(base, key) as stored:
        loaded = [(_adapter(one, stored, options, known), strength) for one, strength in pairs]
        with _said_of(base):
            recipes = merge_recipes(Contents(stored.specs), loaded, stored.read)
        for name, recipe in recipes.items():
            if recipe.changes:
                rounding.start(name)
                spec = stored.specs[recipe.source]
                counted = replace(recipe, rounding=rounding)
                for run, summed in counted.fold(spec.shape, spec.dtype).blocks():
                    # the sum itself is not wanted: `rounding` counts what it loses
                    summed(stored.run(recipe.source, run))
    return rounding.report()


@contextmanager
def _said_of(file: PathLike) -> Iterator[None]:
    """Name the file in errors of its state dict, which knows no files."""
    try:
        yield
    except ParamloraError as error:
        # one from deeper down may name it already
        if str(file) in str(error):
            raise
        raise type(error)(f"{file}: {error}") from error


def _adapter(
    adapter: AdapterLike, stored: Checkpoint, options: Options, known: Optional[Base]
) -> Adapter:
    """An adapter of any tool, its names and shapes those of the checkpoint."""
    if isinstance(adapter, Adapter):
        return adapter
    shapes = Contents(stored.specs).shapes()
    # a checkpoint tells names and shapes; kinds of layers only a model
    base = base_of_shapes(shapes) if known is None else known
    fits = _fitting(adapter, stored)
    own = format_of(adapter) == OWN
    if own and options == DEFAULTS:  # nothing in it is to be interpreted, or left out
        found = read_adapter(adapter, fits=fits)
    else:
        found = read_adapter(adapter, base, options)
    # of other formats `read_adapter` has left them out, by the base
    if own and not options.strict:
        found = without_strangers(found, shapes, str(adapter))
    fits(found)
    return found


def _fitting(file: PathLike, stored: Checkpoint) -> Callable[[Adapter], None]:
    """What refuses the adapter of a file by its names and shapes, and names both files."""
    contents = Contents(stored.specs)

    def fits(found: Adapter) -> None:
        try:
            contents.found(found, narrow=True)
        except ParamloraError as error:
            raise type(error)(f"{file} does not fit {stored.path}: {error}") from error

    return fits


def _warn_inside(contents: Contents, base: PathLike) -> None:
    """Tell that what two adapters have inside of one file is not to be told apart again."""
    if any(key.of_update for key in contents.keys.values()):
        warn(
            f"{base}: an adapter is inside already. The new file loads with both attached, and "
            "extract cannot take them apart again: keep their own files."
        )


def _warn_other(adapter: Adapter, contents: Contents, stored: Checkpoint) -> None:
    """Tell of weights that an adapter was not trained on; sixteen numbers of each are read."""
    found: dict[str, Optional[str]] = {}
    for path in adapter.base:
        weight = next((w for w in weights_at(path) if contents.stored.get(w) == w), None)
        if weight is not None and stored.specs[weight].elements:
            spec = stored.specs[weight]
            found[path] = digits_of(stored.run(weight, middle(spec.elements)))
    warn_other(others(adapter.base, found), len(found))


def _write(
    stored: Checkpoint, recipes: Recipes, out: Path, dry_run: bool, progress: Optional[Progress]
) -> Report:
    specs = {k: _spec(stored, recipe) for k, recipe in recipes.items()}
    size = sum(spec.nbytes for spec in specs.values())
    changed = sum(1 for r in recipes.values() if r.changes or r.value is not None)
    _check_kind(stored, out)
    watch = _Watch(progress, size)
    if isinstance(stored, Pipeline):
        if not dry_run:
            _check_space(out, size)
            _write_pipeline(stored, recipes, specs, out, watch)
    elif not dry_run:
        # configurations and tokenizers go along, or the new folder would not load
        beside = _beside(stored.folder) if _is_folder(out) else []
        _check_space(out, size + sum(path.stat().st_size for path in beside))
        if _is_folder(out):
            _write_folder(stored, recipes, specs, beside, out, watch)
        else:
            with new_file(out) as file:
                _fill(stored, recipes, specs, list(stored.parts), out.suffix, file, watch)
    return Report(out, len(recipes), changed, size, largest=watch.largest, kept=watch.kept)


class _Watch:
    """Tells what is written, and remembers the largest change of a tensor."""

    def __init__(self, progress: Optional[Progress], size: int) -> None:
        self._progress, self._size = progress, size
        self.largest: Optional[float] = None
        self.kept: Optional[float] = None

    def wrote(self, count: int) -> None:
        """Pass on how many bytes were written."""
        if self._progress is not None:
            self._progress(count, self._size)

    def rounded(self, runs: Sequence[tuple[float, float]]) -> None:
        """Remember how much of one tensor's update its type has kept (see `_rounding`)."""
        had, kept = (sum(sums) for sums in zip(*runs)) if runs else (0.0, 0.0)
        if had:
            self.kept = kept / had if self.kept is None else min(self.kept, kept / had)

    def saw(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        """Pass on the new values of one tensor's runs, out of pairs of the old and the new."""
        moved = there = 0.0
        for before, after in pairs:
            if before.is_floating_point():
                # float32 at least: in float16 the squares of a norm overflow
                old = before.to(factor_dtype(before.dtype)).reshape(-1)
                new = after.to(old.dtype).reshape(-1) - old
                moved, there = moved + float(new.dot(new)), there + float(old.dot(old))
            yield after
        if there:
            self.largest = max(self.largest or 0.0, math.sqrt(moved / there))


def _spec(stored: Checkpoint, recipe: Recipe) -> Spec:
    return stored.specs[recipe.source] if recipe.value is None else spec_of(recipe.value)


def _is_folder(out: Path) -> bool:
    return out.suffix not in (*SAFE, *PICKLED)


def _check_kind(stored: Checkpoint, out: Path) -> None:
    """Refuse an output that cannot hold the input."""
    if isinstance(stored, Pipeline):
        if not _is_folder(out):
            raise FileError(f"{out}: a pipeline is a folder of models. Give a name of a folder.")
        return
    # a folder may well become one file, but never the other way round
    if not stored.is_folder and _is_folder(out):
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
        raise unwritten(out, error) from error
    if size > free:
        raise FileError(
            f"{out}: needs {size:,} bytes, and {free:,} are free. Make room there, or give a place "
            "on another disk. Nothing was written."
        )


def _write_folder(
    stored: Stored,
    recipes: Recipes,
    specs: dict[str, Spec],
    beside: list[Path],
    out: Path,
    watch: _Watch,
) -> None:
    index = [stored.index_name] if stored.index is not None else []
    with new_folder(out, [*stored.parts, *index, *(p.name for p in beside)]) as folder:
        _fill_folder(stored, recipes, specs, beside, folder, watch)


def _write_pipeline(
    stored: Pipeline, recipes: Recipes, specs: dict[str, Spec], out: Path, watch: _Watch
) -> None:
    """Write each model in its folder, and copy what stands beside them."""
    beside = {Path("."): _beside(stored.folder)}
    beside |= {Path(folder.name): _every(folder) for folder in stored.others}
    for name, component in stored.components.items():
        beside[Path(name)] = _beside(component.folder)
    # `new_folder` asks this of the folder itself, and knows nothing of those inside
    _check_lost_inside(stored, beside, out)
    top = [*stored.components, *(f.name for f in stored.others), *(p.name for p in beside[Path()])]
    with new_folder(out, top) as folder:
        for place, files in beside.items():
            (folder / place).mkdir(exist_ok=True)
            # `_fill_folder` copies those of a component
            if str(place) not in stored.components:
                for path in files:
                    shutil.copyfile(path, folder / place / path.name)
        for name, component in stored.components.items():
            own, types = _part_of_recipes(recipes, specs, name)
            _fill_folder(component, own, types, beside[Path(name)], folder / name, watch)


def _part_of_recipes(
    recipes: Recipes, specs: dict[str, Spec], component: str
) -> tuple[Recipes, dict[str, Spec]]:
    """What is to be written of one model, under its own names."""
    start = len(component) + 1
    keys = [key for key in recipes if key.startswith(f"{component}.")]
    own = {key[start:]: replace(recipes[key], source=recipes[key].source[start:]) for key in keys}
    return own, {key[start:]: specs[key] for key in keys}


def _check_lost_inside(stored: Pipeline, beside: Mapping[Path, list[Path]], out: Path) -> None:
    """Refuse to replace a pipeline of which a folder has more than the new one."""
    for place, files in beside.items():
        component = stored.components.get(str(place))
        names = [path.name for path in files]
        if component is not None:
            names += [*component.parts, *([component.index_name] if component.index else [])]
        if place != Path() and os.path.isdir(out / place):
            check_lost(out / place, out / place, names)


def _fill_folder(
    stored: Stored,
    recipes: Recipes,
    specs: dict[str, Spec],
    beside: list[Path],
    folder: Path,
    watch: _Watch,
) -> None:
    for name in stored.parts:
        # plain files: `new_folder` flushes all of them, and puts the folder in its place whole
        with open(folder / name, "wb") as file:
            _fill(stored, recipes, specs, [name], Path(name).suffix, file, watch)
    for path in beside:
        shutil.copyfile(path, folder / path.name)
    if stored.index is not None:
        text = json.dumps(_index(stored, recipes, specs), indent=2) + "\n"
        (folder / stored.index_name).write_text(text, encoding="utf-8")


def _beside(folder: Path) -> list[Path]:
    """The files to copy: those of the folder itself, without the weights."""
    return _every(folder, lambda path: not _is_weights(path))


def _every(folder: Path, chosen: Callable[[Path], bool] = os.path.isfile) -> list[Path]:
    """The files of a folder itself, without links to elsewhere."""
    there = [path for path in entries_of(folder) if os.path.isfile(path) and chosen(path)]
    away = [path.name for path in there if not _is_inside(path, folder.resolve())]
    if away:
        text = f"{folder}: not copied, since they are links to elsewhere: {listed(away)}."
        warn(f"{text} Copy those that you trust.")
    return [path for path in there if path.name not in away]


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a file, or what it is a link to, belongs to its folder."""
    real = path.resolve()
    # the Hugging Face cache keeps the files of a snapshot in a folder of its own
    snapshots = next((one for one in folder.parents if one.name == "snapshots"), None)
    return real.parent in (folder, *([snapshots.parent / "blobs"] if snapshots else []))


def _is_weights(path: Path) -> bool:
    """Whether a file holds weights, which would be other ones than those written."""
    return path.suffix in (*SAFE, *PICKLED) or path.name.endswith(".index.json")


def _index(stored: Stored, recipes: Recipes, specs: dict[str, Spec]) -> dict[str, Any]:
    index = dict(stored.index or {})
    totals = {
        "total_size": sum(spec.nbytes for spec in specs.values()),
        "total_parameters": sum(spec.elements for spec in specs.values()),
    }
    told = index.get("metadata", {})
    # only what was told before: older indexes know no total_parameters
    index["metadata"] = {**told, **{k: v for k, v in totals.items() if k in told}}
    index["weight_map"] = {key: stored.file_of[recipe.source] for key, recipe in recipes.items()}
    return index


def _fill(
    stored: Stored,
    recipes: Recipes,
    specs: dict[str, Spec],
    parts: list[str],
    suffix: str,
    file: BinaryIO,
    watch: _Watch,
) -> None:
    """Write what stands in some of the input's files as one file."""
    # a tensor goes where its base lies, so the index names the same files
    mine = {
        key: recipe for key, recipe in recipes.items() if stored.file_of[recipe.source] in parts
    }
    if suffix in SAFE:
        # of several shards that of the first: one file has room for one
        metadata = stored.parts[parts[0]].metadata

        def pieces(key: str) -> Iterable[memoryview]:
            return _pieces(stored, mine[key], watch)

        write_safetensors(file, {k: specs[k] for k in mine}, metadata, pieces, watch.wrote)
    else:
        _fill_pickled(stored, mine, parts, file, watch)


def _pieces(stored: Stored, recipe: Recipe, watch: _Watch) -> Iterator[memoryview]:
    """The bytes of one tensor; of a merged one never more than a block is in memory."""
    if recipe.value is not None:
        yield from pieces_of(recipe.value)
    elif not recipe.changes:
        yield from stored.raw(recipe.source)
    else:
        rounded: list[tuple[float, float]] = []
        for after in watch.saw(_merged_runs(stored, recipe, rounded)):
            yield from pieces_of(after)
        watch.rounded(rounded)


def _merged_runs(
    stored: Stored, recipe: Recipe, rounded: list[tuple[float, float]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The runs of a tensor before and after."""
    spec = stored.specs[recipe.source]
    for elements, summed in recipe.fold(spec.shape, spec.dtype).blocks():
        before = stored.run(recipe.source, elements)
        after = summed(before)
        recipe.check(before, after, summed)
        if spec.dtype in NARROW:
            rounded.append(_rounding(before, after, summed))
        yield before, after


def _rounding(
    before: Tensor, after: Tensor, summed: Callable[[Tensor], Tensor]
) -> tuple[float, float]:
    """``<Δ, Δ>`` and ``<Δ, Δ'>`` of a run in 8 bits: what was to be added, and what was."""
    # the same sum once more, of a weight in float32: not rounded to 8 bits
    wide = before.float()
    meant, added = summed(wide) - wide, after.float() - wide
    return float(meant.dot(meant)), float(meant.dot(added))


def _fill_pickled(
    stored: Stored, recipes: Recipes, parts: list[str], file: BinaryIO, watch: _Watch
) -> None:
    part = stored.parts[parts[0]]
    # what stands around the state dict (an optimizer, a step) is written again as it was
    if isinstance(part, PickledFile) and len(parts) == 1:
        state = apply(recipes, part.state)
        _watch_made(stored, recipes, state, watch)
        # in the file's own order: that of a set is another in every process
        state.update((k, value) for k, value in part.state.items() if k not in part.specs)
        content = part.around(state)
    else:
        # shards or safetensors as one file of torch.save, which wants all of it in memory
        content = {key: recipe.make(stored.read) for key, recipe in recipes.items()}
        _watch_made(stored, recipes, content, watch)
    torch_save.save(content, file, watch.wrote)


def _watch_made(stored: Stored, recipes: Recipes, state: Mapping[str, Any], watch: _Watch) -> None:
    """What tensors that were merged all at once were changed by."""
    for key, recipe in recipes.items():
        if recipe.changes:
            for _ in watch.saw([(stored.read(recipe.source).detach(), state[key].detach())]):
                pass
