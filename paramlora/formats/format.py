"""A format as one value, and the list of those that are known."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

from paramlora.errors import FileError
from paramlora.formats.base import Base
from paramlora.formats.content import Content, Options
from paramlora.update.value import Adapter

Reader = Callable[[Content, Optional[Base], Options], Adapter]
Writer = Callable[..., Content]


@dataclass(frozen=True)
class Mark:
    """Something in a file that tells its format.

    Args:
        rank: marks of all formats are asked from the lowest rank up, and the first that fits tells
            the format. What only one tool writes comes early; what others write too comes late.
        fits: of a file; its tensors may have no values (they may lie on the meta device).
    """

    rank: int
    fits: Callable[[Content], bool]


@dataclass(frozen=True)
class Prefix:
    """What ``convert --prefix`` means to a format.

    Args:
        keyword: the argument of `Format.write`.
        about: what it is, for the command line's help.
    """

    keyword: str
    about: str


def _accepts(content: Content) -> None:
    """Nothing is wrong with any file before its tensors are read."""


def _takes_all(content: Content, base: Base) -> list[str]:
    """Nothing is passed over by a tool that reads keys in its own order, or refuses what is odd."""
    return []


@dataclass(frozen=True)
class Format:
    """All that the package knows of one tool's adapter files; see `register`.

    Args:
        name: as ``convert --to`` and `detect` give it.
        marks: what tells it from the others; none of a format that `like` another tells.
        read: ``(content, base, options)`` to an adapter, under the file's own names of layers.
        write: ``(adapter, base, **how)`` to what a file holds; None where it is only read.
        weights: the names of the file of tensors in a folder, the best first.
        weights_rank: a folder that holds several formats' weights means those of the lowest.
        config: the name of the JSON or flat YAML beside the weights; a format that has one is
            written as a folder of the two.
        pickled: written by ``torch.save``, else as safetensors.
        wrap: the key of a dictionary that `write`'s tensors are put into, and read out of.
        names_layers: whether layers have names in the file, so that it can be converted without
            its model.
        prefix: what ``convert --prefix`` gives to `write`, for formats with a use for it.
        complete: the file holds all of an `Adapter`, ties and whole tensors included, under the
            model's own paths: nothing in it is interpreted, or fitted to the model.
        kinds: the kinds of update that `write` knows (see `paramlora.update.kinds`).
        whole: whether `write` knows whole tensors beside the updates.
        check: refuses a file by its names and shapes, before any tensor is read.
        like: the format that its files are told to be and read as: of a format that is only
            written, since it is another tool's choice of the same names.
        passed_over: of a file to be written and the model's layers, the keys that the tool's loader
            would match to nothing, by its own rule of names (see `paramlora.formats.loaders`).
        servers: the programs that take its tensors from memory, by the names that `tensors_for`
            knows, and how a message calls each.
        unserved: of an adapter and a server's name, what that does not load of it, a sentence for
            each kind of part; None where `write` refuses all that is not loaded.
        beside: the libraries whose ``from_pretrained`` reads such a file beside a base, each with
            what is said to `write` for that.
    """

    name: str
    marks: tuple[Mark, ...]
    read: Reader
    write: Optional[Writer] = None
    weights: tuple[str, ...] = ()
    weights_rank: int = 100
    config: str = ""
    pickled: bool = False
    wrap: str = ""
    names_layers: bool = True
    prefix: Optional[Prefix] = None
    complete: bool = False
    kinds: tuple[str, ...] = ("lora", "soft")
    whole: bool = False
    check: Callable[[Content], None] = _accepts
    like: str = ""
    passed_over: Callable[[Content, Base], list[str]] = _takes_all
    servers: Mapping[str, str] = field(default_factory=dict)
    unserved: Optional[Callable[[Adapter, str], Iterable[str]]] = None
    beside: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.marks and not self.like:
            raise FileError(
                f'the format "{self.name}" has no marks, so no file is told to be one. Give it one.'
            )
        if self.config and not (self.weights and self.config.endswith((".json", ".yaml"))):
            raise FileError(
                f'the format "{self.name}": beside its weights ({", ".join(self.weights) or "none"}'
                f') is "{self.config}". Name both, the second as .json or .yaml.'
            )


def any_key(pattern: str) -> Callable[[Content], bool]:
    """Whether a file has a key that `pattern` matches from end to end."""
    compiled = re.compile(
        pattern, re.DOTALL
    )  # names hold any character (see `paramlora.checkpoint.keys`)
    return lambda content: any(compiled.fullmatch(key) for key in content.state)


FORMATS: dict[str, Format] = {}


def register(form: Format) -> None:
    """Make a format known: it is then told by its marks, read, written and listed.

    The package's own are the `FORMAT` of each file in ``paramlora/formats``.

    Raises:
        FileError: there is one of this name.

    Example:
        >>> read = lambda content, base, options: Adapter({})
        >>> register(Format("mine", (Mark(5, any_key(r".+\\.mine")),), read))
        >>> unregister("mine").name
        'mine'
    """
    if form.name in FORMATS:
        raise FileError(f'a format "{form.name}" is known already. Unregister it first.')
    FORMATS[form.name] = form


def unregister(name: str) -> Format:
    """Forget a format, which is returned.

    Raises:
        FileError: none of this name.
    """
    if name not in FORMATS:
        raise FileError(f'no format "{name}" is known. Known: {", ".join(sorted(FORMATS))}.')
    return FORMATS.pop(name)


def writable(name: str) -> Format:
    """The format of this name, which can be written.

    Raises:
        FileError: there is none, or it is only read.
    """
    form = FORMATS.get(name)
    if form is None or form.write is None:
        known = sorted(form.name for form in FORMATS.values() if form.write is not None)
        raise FileError(f'"{name}" cannot be written. Known: {", ".join(known)}.')
    return form


class _Tools(Mapping[str, Format]):
    """The formats of other tools, as they are registered now, of which something holds."""

    def __init__(self, holds: Callable[[Format], bool]) -> None:
        self._holds = holds

    def __getitem__(self, name: str) -> Format:
        return self._known()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known())

    def __len__(self) -> int:
        return len(self._known())

    def _known(self) -> dict[str, Format]:
        tools = {name: form for name, form in FORMATS.items() if not form.complete}
        return {name: form for name, form in tools.items() if self._holds(form)}


READERS = _Tools(lambda form: True)
WRITERS = _Tools(lambda form: form.write is not None)
