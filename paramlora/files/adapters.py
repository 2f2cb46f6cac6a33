"""Adapter files of any tool on disk: opened, loaded onto a model, converted."""

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Optional, Union

import torch
from torch import Tensor

from paramlora import formats
from paramlora.checkpoint.keys import weights_at
from paramlora.checkpoint.recipes import Contents
from paramlora.config.reading import (
    LARGE,
    MOST_TEXT,
    SMALL_TEXT,
    head_of,
    is_pickled,
    parse_json,
    read_text,
)
from paramlora.errors import AdapterError, FileError, kind_of, listed, spelled
from paramlora.files import checkpoint, torch_save
from paramlora.files.atomic import PathLike, check_new, new_file, new_folder
from paramlora.files.checkpoint import PICKLED, SAFE, entries_of
from paramlora.files.mistaken import check_tensors
from paramlora.files.safetensors import SafeFile, spec_of, write_safetensors
from paramlora.formats import Base, Content, Format, Options, base_of, base_of_shapes
from paramlora.formats.base import are_sides_untold, check_holders, part_of, sides_untold
from paramlora.formats.content import DEFAULTS, report
from paramlora.formats.factors import within, within_rescaled
from paramlora.formats.pipeline import PARTS
from paramlora.model.attach import uncollected, updates
from paramlora.model.classes import Model
from paramlora.model.targets import tensor_paths
from paramlora.model.values import attach_adapter, check_fits, check_swap, swap_adapter
from paramlora.update.contexts import own_context
from paramlora.update.memory import pieces_of
from paramlora.update.outline import Pieces, looked
from paramlora.update.value import Adapter

AdapterLike = Union[Adapter, PathLike]
_MOST_PLACES, _MOST_LEVELS = 1_000_000, 32  # of values in a file's nested containers
_MOST_SHARED = 8  # bytes of tensors for each of the file


@own_context()
def load_adapter(
    model: Model,
    path: PathLike,
    adapter: Optional[str] = None,
    *,
    strict: bool = True,
    alpha: Optional[float] = None,
    rank: Optional[int] = None,
    component: Optional[str] = None,
    split: int = 1,
    enable: Optional[tuple[bool, ...]] = None,
    into: Optional[str] = None,
    max_rank: Optional[int] = None,
) -> Model:
    """Attach the adapter in a file of paramlora or of another tool; all or nothing.

    The format is told by the content: PEFT, diffusers, kohya and LyCORIS, the original wrapper,
    loralib, litgpt, torchtune, cloneofsimo (see docs/checkpoints.md).

    Args:
        model: the model that it was trained for, or one with the same layers.
        path: the file, or a folder such as PEFT's.
        adapter: a name of your own instead of the file's.
        strict: tensors of the file that belong to nothing in the model are errors, not warnings.
        alpha, rank, component, split, enable: what some formats do not tell (see `Options`).
        into: an attached adapter of the same layers that gets the file's values in place, filled up
            with zeros where their rank is smaller; nothing compiles again.
        max_rank: the rank to which the new factors are filled up, for later files of larger ones.

    Raises:
        FileError: the file is missing, damaged, of no known format, or does not fit the model, or
            the adapter that it is to be loaded into.
        TargetError: a rank or kind of update that does not fit there.
        AdapterError: an adapter of that name is attached already.
    """
    if into is not None and (adapter is not None or max_rank is not None):
        raise AdapterError(
            f'into="{into}" loads into an adapter that has its name and its room. Leave out '
            "adapter and max_rank."
        )
    options = Options(strict, rank, alpha, component, split, enable)

    def base(form: Format) -> Optional[Base]:
        # the layers that a swap needs are those of the attached adapter, which it asks itself
        needless = into is not None and form.complete and strict and component is None
        return None if needless else base_of(model)

    def fits(found: Adapter) -> None:
        if into is None:
            check_fits(model, found)
        else:
            check_swap(model, found, into)

    # a collection of garbage would go through all the new tensors several times
    with uncollected():
        # of one that is attached: no other asks every module of the model
        held = () if into is None else (u for *_, u in updates(model) if u.adapter == into)
        locked = any(t.is_cuda for u in islice(held, 1) for t in u.parameters())
        # one memory is read, checked and copied to a device at once; attaching drops it
        found = _read(path, base, options, together=True, locked=locked, fits=fits)
        if not strict:
            found = without_strangers(found, tensor_paths(model), Path(path).name)
        if into is not None:
            return swap_adapter(model, _within(found), into)
        return attach_adapter(model, _within(found), adapter, max_rank)


@own_context()
def read_adapter(
    path: PathLike,
    base: Optional[Base] = None,
    options: Options = DEFAULTS,
    fits: Callable[[Adapter], object] = lambda adapter: None,
) -> Adapter:
    """The adapter in a file of paramlora or of another tool.

    Args:
        path: the file, or a folder such as PEFT's.
        base: the names and shapes of the model, from `base_of` or `base_of_file`.
        options: what some formats do not tell.
        fits: refuses, by its names, shapes and types, the adapter in a large file before all of it
            is read; it is given one whose tensors have no values.

    Raises:
        FileError: the file is missing, damaged, of no known format, or does not fit `base`.
    """
    return _read(path, lambda form: base, options, fits=fits)


def _read(
    path: PathLike,
    base: Callable[[Format], Optional[Base]],
    options: Options,
    together: bool = False,
    locked: bool = False,
    fits: Callable[[Adapter], object] = lambda adapter: None,
) -> Adapter:
    """The adapter in a file, fitted to a base that its format wants.

    Args:
        together, locked: as of `checked`.
        fits: as of `read_adapter`.
    """

    def look(outline: Content) -> None:
        form = formats.form_of(outline)
        # noted by itself: an alpha that only this look has used still counts as unused
        fits(formats.read(outline, base(form), formats.noting(options), form.name))

    content = checked(path, together, locked, look, finite=True)
    options, form = formats.noting(options), formats.form_of(content)
    adapter = formats.read(content, base(form), options, form.name)
    # without a model or its checkpoint, by which others are told
    untold = [name for name, value in adapter.values().items() if are_sides_untold(value)]
    if untold:
        raise sides_untold(untold, content.source)
    if not adapter.values():  # reading loosely left all of it out
        raise FileError(
            f"{content.source}: nothing in it belongs to the model. Give an adapter of it."
        )
    formats.check_alpha(content.source, options)
    return adapter


def format_of(path: PathLike) -> str:
    """The name of the format of an adapter's file, told by its content.

    Raises:
        FileError: it cannot be read, or is of no known format.
    """
    return formats.detect(outlined(path))


@own_context()
def base_of_file(path: PathLike, key: Optional[str] = None) -> Base:
    """The names and shapes of a checkpoint's weights, without reading them; of a pipeline's folder
    those of all its models, each with its component's name in front.

    Raises:
        FileError: it cannot be read.
    """
    with checkpoint.opened(path, key) as stored:
        return base_of_shapes(Contents(stored.specs).shapes())


@own_context()
def convert(
    path: PathLike,
    out: PathLike,
    to: str,
    base: Optional[Base] = None,
    options: Options = DEFAULTS,
    *,
    metadata: Optional[Mapping[str, str]] = None,
    force: bool = False,
    dry_run: bool = False,
    **how: Any,
) -> Adapter:
    """Write the adapter in a file as another tool's, and return it.

    What the file says beside the tensors (training settings, trigger words, PEFT's ``task_type``)
    is kept where the new one has a place for it, and else named in a warning.

    Args:
        path: the file, or a folder such as PEFT's.
        out: the new file; a folder where the format is the weights and a configuration.
        to: the name of a format that can be written.
        base: the names and shapes of the model, where a format needs them.
        options: what some formats do not tell.
        metadata: more to say, or to say instead; ``task_type`` and ``base_model_name_or_path`` go
            to PEFT's configuration, which its ``AutoPeftModel`` classes ask for.
        force: replace what is at `out`.
        dry_run: only check.
        how: as for `formats.write`.

    Raises:
        FileError: a file that cannot be read or written, or a layer that `to` cannot hold.
    """
    # what costs least is asked first: the place, the names, then the tensors
    check_place(out, to, force=force)
    check_named(path, format_of(path), to, base)
    adapter = read_adapter(path, base, options)
    adapter = replace(adapter, metadata={**adapter.metadata, **(metadata or {})})
    write_adapter(adapter, out, to, base, force=force, dry_run=dry_run, **how)
    return adapter


@own_context()
def write_adapter(
    adapter: Adapter,
    out: PathLike,
    to: str = formats.OWN,
    base: Optional[Base] = None,
    *,
    force: bool = False,
    dry_run: bool = False,
    **how: Any,
) -> None:
    """Write an adapter as a tool's file, and read it back before it takes its place.

    Args:
        adapter: the value.
        out, to, base, force, dry_run, how: as in `convert`.

    Raises:
        FileError: the file cannot be written, a layer that `to` cannot hold, or one that would
            match nothing where the file is loaded; nothing is left at `out`.
    """
    check_place(out, to, force=force)
    form = formats.writable(to)
    # the native format keeps ties as they are; others need to know each layer's kind
    if not form.complete:
        check_holders(adapter, base)
    written = formats.write(adapter, to, base, **how)
    # the file has the names of the base, so it is compared with the adapter under those
    kept = adapter if base is None or form.complete else formats.fit(adapter, base, DEFAULTS, to)

    def check(content: Content) -> None:
        formats.check_loads(replace(content, source=str(out)), kept, to, base)

    if dry_run:
        check(written)
    else:
        _save(written, Path(out), form, check)


@own_context()
def together(
    parts: Mapping[str, Union[Adapter, PathLike]],
    options: Options = DEFAULTS,
    base: Optional[Base] = None,
) -> Adapter:
    """The adapter of a whole pipeline out of those of its models.

    Args:
        parts: adapters or their files, by the names of the pipeline's models, such as ``"unet"``.
        options: what some formats do not tell.
        base: the names and shapes of the whole pipeline (`base_of_file` of its folder).

    Raises:
        FileError: a name that no pipeline has, or that `base` lacks, a file that cannot be read, or
            one whose names of layers only its model tells.

    Example:
        >>> from paramlora.update.value import Update
        >>> one = Adapter({"q": Update(torch.ones(1, 3), torch.ones(2, 1))})
        >>> list(together({"unet": one, "text_encoder": one}).updates)
        ['unet.q', 'text_encoder.q']
    """
    found = Adapter({})
    for name, given in parts.items():
        if name not in PARTS:
            raise FileError(f'"{name}" is no part of a pipeline. Parts: {", ".join(PARTS)}.')
        own = None if base is None else _inside_of(base, name)
        if not isinstance(given, Adapter):
            if own is None:
                _check_names_itself(given)
            given = read_adapter(given, own, options)
        # a file of a whole pipeline gives the part of that name
        if any(path.startswith(f"{name}.") for path in given.values()):
            given = part_of(given, name, name)
        found = _beside_each_other(found, given, f"{name}.")
    return found


def _inside_of(base: Base, name: str) -> Base:
    """One model of a pipeline, under its own names."""
    start = f"{name}."
    own = {path[len(start) :]: slot for path, slot in base.items() if path.startswith(start)}
    if not own:
        there = listed(dict.fromkeys(path.partition(".")[0] for path in base))
        raise FileError(
            f"{name}: a part of which the base has no weight; its names begin with {there}. Give "
            "the folder of a pipeline that has it (--base)."
        )
    return own


def _beside_each_other(found: Adapter, given: Adapter, start: str) -> Adapter:
    def moved(values: Mapping[str, Any]) -> dict[str, Any]:
        return {f"{start}{path}": value for path, value in values.items()}

    return Adapter(
        {**found.updates, **moved(given.updates)},
        given.name,
        {**found.metadata, **given.metadata},
        {**found.whole, **moved(given.whole)},
        {**found.base, **moved(given.base)},
        {**found.holders, **moved(given.holders)},
        {**found.others, **moved(given.others)},
        {**found.apart, **moved(given.apart)},
    )


def check_named(path: PathLike, source: str, to: str, base: Optional[Base]) -> None:
    """Refuse to write in one format names that only another one can read.

    Raises:
        FileError: says what tells the names.
    """
    if base is None and not formats.FORMATS[source].names_layers and source != to:
        raise FileError(
            f"{Path(path).name}: {source}'s names of layers cannot be read back without the "
            "model. Give it (--model), or its checkpoint (--base)."
        )


def _check_names_itself(path: PathLike) -> None:
    """Refuse a part of a pipeline whose names only its own model tells."""
    source = format_of(path)
    if not formats.FORMATS[source].names_layers:
        raise FileError(
            f"{Path(path).name}: {source}'s names of layers cannot be read back without the "
            "model, and here are several. Give the pipeline's folder (--base), or convert it "
            f"alone to {formats.OWN} first, with its model (--model), and give that file."
        )


def check_place(out: PathLike, to: str, *, force: bool) -> None:
    """Refuse, before anything is computed, a place that could not be written.

    Raises:
        FileError: it is taken, is missing, or has a name of another kind of file.
    """
    check_new(out, force)
    _check_ending(Path(out), formats.writable(to))


def opened(path: PathLike) -> Content:
    """The tensors, metadata and configuration of an adapter's file or folder.

    Raises:
        FileError: it cannot be read, or needs more than tensors and plain containers.
    """
    weights = weights_in(path)
    if is_pickled(head_of(weights)):
        content = torch_save.load(weights)
        return _content(weights, _inside(content, _flat(weights, content)), {})
    file = SafeFile(weights)
    try:
        return _content(weights, file.every(), file.metadata)
    finally:
        file.close()


def checked(
    path: PathLike,
    together: bool = False,
    locked: bool = False,
    look: Callable[[Content], object] = lambda outline: None,
    finite: bool = False,
) -> Content:
    """What `opened` gives, once the format has found its outline sound: before any tensor is read.

    Args:
        path: the file, or a folder such as PEFT's.
        together, locked: its tensors in one memory, for who drops them all soon, and which (see
            `SafeFile.every`).
        look: refuses a large file by its outline, all of whose tensors would be read in vain.
        finite: show `look` which tensors are not finite; a large file is then read twice, the
            first time piece by piece.

    Raises:
        FileError: as there, or by the format, or by `look`.
    """

    def see(
        content: Content, read: Callable[[str], Tensor], pieces: Optional[Pieces] = None
    ) -> None:
        formats.form_of(content).check(content)
        looked(content.state, read, lambda state: look(replace(content, state=state)), pieces)

    weights = weights_in(path)
    if is_pickled(head_of(weights)):
        content = opened(weights)
        see(content, content.state.__getitem__)
        return content
    file = SafeFile(weights)
    try:
        see(_outline(weights, file), file.read, file.raw if finite else None)
        return _content(weights, file.every(together, locked), file.metadata)
    finally:
        file.close()


def outlined(path: PathLike) -> Content:
    """What `opened` gives, but the tensors of a safetensors file have no content: it was not read.

    Raises:
        FileError: as there.
    """
    weights = weights_in(path)
    if is_pickled(head_of(weights)):
        return opened(weights)
    file = SafeFile(weights)
    file.close()
    return _outline(weights, file)


def _outline(weights: Path, file: SafeFile) -> Content:
    state = {
        key: torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        for key, spec in file.specs.items()
    }
    return _content(weights, state, file.metadata)


def _content(weights: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Content:
    beside = _beside(weights.parent)
    known = any(weights.name in form.weights for form in formats.FORMATS.values())
    # where every tool's folder has the same name inside, the folder tells which one is meant
    source = str(Path(weights.parent.name, weights.name)) if known else weights.name
    return formats.unwrapped(Content(state, metadata, beside, source, str(weights)))


def weights_in(path: PathLike) -> Path:
    """The file of tensors that a path means: itself, or the one in a folder."""
    folder = Path(path)
    if not os.path.isdir(folder):  # a path that nobody may look at is left to its reader
        check_tensors(folder)
        return folder
    names = [name for form in _by_weights() for name in form.weights]
    for name in names:  # a pointer or a page under such a name is better told than passed over
        check_tensors(folder / name)
    # by content, whatever it is called: a folder may hold one file of any name
    found = [file for file in entries_of(folder) if os.path.isfile(file) and _is_weights(file)]
    known = [folder / name for name in names if folder / name in found]
    if known or len(found) == 1:
        return (known or found)[0]
    several = ", ".join(file.name for file in found[:5]) or "none"
    raise FileError(
        f"{folder}: a folder needs one file of tensors, and has {several}. Name the file."
    )


def _by_weights() -> list[Format]:
    """The formats, the one first whose weights a folder of several means."""
    return sorted(formats.FORMATS.values(), key=lambda form: form.weights_rank)


def _is_weights(path: Path) -> bool:
    try:
        head = head_of(path)
    except FileError:
        return False
    # safetensors: 8 bytes of a length, then JSON
    return is_pickled(head) or head[8:] == b"{"


def _flat(path: Path, content: Any) -> dict[str, Tensor]:
    """The tensors in nested containers, their keys joined by dots.

    One container may stand in many places, and so may what is inside it: both the places and the
    bytes that they stand for are counted, and no real file has so many.
    """
    out: dict[str, Tensor] = {}
    # a stack of its own: a hostile file may nest deeper than Python calls
    levels = [iter([("", content)])]
    places = characters = size = 0
    while levels:
        for key, value in levels[-1]:
            places, characters = places + 1, characters + len(key)
            if places > _MOST_PLACES or characters > MOST_TEXT or len(levels) > _MOST_LEVELS:
                raise FileError(
                    f"{path}: its containers hold more, or deeper, than any real file. Save its "
                    "tensors alone."
                )
            if isinstance(value, Tensor):
                torch_save.checked_spec(path, key, value)
                out[key], size = value.detach(), size + value.nbytes
            elif isinstance(value, (Mapping, list, tuple)):
                # the level around it goes on where it stopped once this one is done
                levels.append(_items(key, value))
                break
        else:
            levels.pop()
    _check_shared(path, size)
    return out


def _inside(content: Any, flat: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a dictionary that a format puts around them, by their own names.

    A module of that name is no dictionary: its layers keep it.
    """
    for name in {form.wrap for form in formats.FORMATS.values() if form.wrap}:
        inner = content.get(name) if isinstance(content, Mapping) else None
        if isinstance(inner, Mapping) and flat and all(key.startswith(f"{name}.") for key in flat):
            return {key.removeprefix(f"{name}."): tensor for key, tensor in flat.items()}
    return flat


def _items(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    start = f"{key}." if key else ""
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
    return ((f"{start}{name if isinstance(name, str) else spelled(name)}", v) for name, v in pairs)


def _check_shared(path: Path, size: int) -> None:
    """Refuse many tensors of the same few bytes: each of them would be worked on, and written."""
    there = path.stat().st_size
    if size > max(_MOST_SHARED * there, LARGE):
        raise FileError(
            f"{path}: its tensors take {size:,} bytes, and share the {there:,} of the file. Save "
            "each with bytes of its own."
        )


def _beside(folder: Path) -> dict[str, Any]:
    """The configurations beside a file as one; those of the format asked first win."""
    config: dict[str, Any] = {}
    for name in dict.fromkeys(form.config for form in reversed(_by_weights()) if form.config):
        # of a line of YAML a value is made each, and real ones take a thousand bytes
        is_yaml = name.endswith(".yaml")
        read, most = (_flat_yaml, SMALL_TEXT) if is_yaml else (parse_json, MOST_TEXT)
        if os.path.lexists(folder / name):
            try:
                found = read(read_text(folder / name, most))
            except FileError:
                raise
            except ValueError as error:
                raise FileError(
                    f"{folder / name}: cannot be read: {error}. Copy or save it again."
                ) from error
            if not isinstance(found, dict):
                raise FileError(
                    f"{folder / name}: {kind_of(found)}, not an object. Copy or save it again."
                )
            # the format asked first comes last in this loop, so that its values stay
            config |= found
    return config


def _flat_yaml(text: str) -> dict[str, Any]:
    """The top level's plain values of a YAML file."""
    config: dict[str, Any] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        # a line that is indented belongs to a nested block, none of which any format asks for
        if colon and name == name.strip() and value.strip():
            try:
                config[name] = parse_json(value.split(" #")[0])
            except ValueError:
                config[name] = value.strip()
    return config


def without_strangers(adapter: Adapter, there: Collection[str], source: str) -> Adapter:
    """An adapter without whole tensors that the model lacks; of updates `read_adapter` left none.

    Args:
        there: what the model has, tensors by their names and paths.
    """
    known = set(there)
    lost = {path for path in adapter.whole if not known & {path, *weights_at(path)}}
    report(source, "tensors of what the model does not have", lost, False, "They were left out.")
    if not (adapter.updates or adapter.others) and lost == adapter.whole.keys():
        raise FileError(f"{source}: nothing in it belongs to the model. Give an adapter of it.")
    return replace(adapter, whole={p: t for p, t in adapter.whole.items() if p not in lost})


def _within(adapter: Adapter) -> Adapter:
    # tied tensors share one update, and must still share one afterwards
    low = {id(update): within(update) for update in adapter.updates.values()}
    rescaled = {id(value): within_rescaled(value) for value in adapter.others.values()}
    return replace(
        adapter,
        updates={path: low[id(update)] for path, update in adapter.updates.items()},
        others={path: rescaled[id(value)] for path, value in adapter.others.items()},
    )


def _check_ending(out: Path, form: Format) -> None:
    """Refuse a name that says another kind of file than the one written."""
    pickled = form.pickled
    if form.config and out.suffix in (*SAFE, *PICKLED):
        raise FileError(
            f"{out}: {form.name} is a folder of two files, under a name of one. Give a name "
            f"without {out.suffix}, or another format (--to)."
        )
    if not form.config and out.suffix in (SAFE if pickled else PICKLED):
        kinds = "torch.save's", "safetensors"
        own, other = kinds if pickled else kinds[::-1]
        right = ".pt" if pickled else ".safetensors"
        raise FileError(
            f"{out}: {form.name}'s file would be {own}, under a name of {other}. Give a name that "
            f"ends in {right}."
        )


def _save(content: Content, out: Path, form: Format, check: Callable[[Content], None]) -> None:
    """Write a file or folder that takes its place once `check` has passed what is read from it."""
    if not form.config:
        with new_file(out) as file:
            _fill(content, form, file)
            file.flush()
            # what is read back from the disk, while the older file is still in its place
            check(opened(file.name))
        return
    weights, config = form.weights[0], form.config
    with new_folder(out, [weights, config]) as folder:
        (folder / config).write_text(_text(content.config, config), encoding="utf-8")
        with open(folder / weights, "wb") as file:
            _fill(content, form, file)
        check(opened(folder / weights))


def _fill(content: Content, form: Format, file: BinaryIO) -> None:
    if form.pickled:
        state: Any = _apart(content.state)
        wrapped = {form.wrap: state} if form.wrap else state
        torch_save.save(wrapped, file, lambda count: None)
    else:
        specs = {key: spec_of(tensor) for key, tensor in content.state.items()}
        # not the library, which writes metadata in another order each time
        write_safetensors(file, specs, content.metadata, lambda k: pieces_of(content.state[k]))


def _text(config: Mapping[str, Any], name: str) -> str:
    if name.endswith(".json"):
        return json.dumps(config, indent=2) + "\n"
    # a value of JSON is one of YAML
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in config.items())


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor in memory of its own, whole: files hold no views and no shared ones."""
    return {key: tensor.detach().clone().contiguous() for key, tensor in state.items()}
