"""The kinds of update by the name that a configuration gives them; a new one is registered here."""

from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from paramlora.config import KINDS as CONFIGURED
from paramlora.errors import AdapterError

if TYPE_CHECKING:
    from paramlora.update.attached import AttachedUpdate

# what a tensor of an update runs along: the input or the output side of the weight's matrix (the
# other dimension is the rank), the weight's own dimensions (each of its size, or 1), nothing, or
# what only the kind itself knows
Part = Literal["input", "output", "weight", "number", "own"]
KINDS: dict[str, "type[AttachedUpdate]"] = {}
FOREIGN: "set[type[AttachedUpdate]]" = set()  # those that somebody else registered
_SAYS = ("method", "parts", "term_of")
_ONLY_ITS_OWN = ("forward", "attached_to", "term_of")  # of which nothing else follows


def register(kind: "type[AttachedUpdate]") -> "type[AttachedUpdate]":
    """Make a kind of update known by its `method`: to configurations, files, recipes and merges.

    Args:
        kind: a class with a `method`, and where it has a `forward` of its own, or another of what
            it `computes` its weight by, also with `parts` and `term_of`: what it inherits of those
            is said of another weight.

    Raises:
        AdapterError: there is one of this name, or with tensors of these names, or it does not
            say all of itself.
    """
    own = vars(kind)
    # without one of these it computes what it inherits, and so do parts and term
    needed = _SAYS[:1] if own.keys().isdisjoint(kind.computes) else _SAYS
    missing = [name for name in needed if name not in own]
    if missing:
        raise AdapterError(
            f"{kind.__name__} computes a weight of its own and does not say its "
            f'"{missing[0]}". Give the class one.'
        )
    unanswered = [name for name in _ONLY_ITS_OWN if _is_said_by_nobody(kind, name)]
    if unanswered:
        raise not_said(kind, unanswered[0])
    if KINDS.get(kind.method, kind) is not kind:
        raise AdapterError(
            f'a kind "{kind.method}" is registered already, as {KINDS[kind.method].__name__}. '
            "Give it another name."
        )
    alike = [one for one in KINDS.values() if one is not kind and _looks_like(one, kind)]
    if alike:
        raise AdapterError(
            f'{kind.__name__} has tensors of the same names as the kind "{alike[0].method}", so '
            "a state dict would not tell which it is. Give one of its tensors another name."
        )
    KINDS[kind.method] = kind
    if kind.method not in CONFIGURED and not kind.internal:
        FOREIGN.add(kind)
    if not kind.internal:
        # allowed in configurations from now on
        CONFIGURED.setdefault(kind.method, kind.keys())
    return kind


def not_said(kind: type, answer: str) -> AdapterError:
    """The error where a class does not give an answer that nothing else of it implies."""
    return AdapterError(f'{kind.__name__} does not say its "{answer}". Give the class one.')


def _is_said_by_nobody(kind: "type[AttachedUpdate]", name: str) -> bool:
    from paramlora.update.attached import AttachedUpdate

    # the base of all kinds, or nn.Module, which only raises
    return issubclass(AttachedUpdate, next(cls for cls in kind.__mro__ if name in vars(cls)))


def _looks_like(one: "type[AttachedUpdate]", other: "type[AttachedUpdate]") -> bool:
    return one.parts.keys() == other.parts.keys() and one.beside == other.beside


def unregister(name: str) -> "type[AttachedUpdate]":
    """Forget a kind that was registered; the package's own stay in configurations.

    Raises:
        AdapterError: there is none of this name.
    """
    if name not in KINDS:
        raise AdapterError(f'no kind "{name}" is registered. There are: {", ".join(KINDS)}.')
    CONFIGURED.pop(name, None)
    FOREIGN.discard(KINDS[name])
    return KINDS.pop(name)


def kind_of(entry: Any) -> "type[AttachedUpdate]":
    """The kind that an entry of a configuration asks for."""
    if entry.whole:
        return KINDS["whole"]
    return KINDS[entry.kind if entry.hard else "soft"]


def tensor_names() -> frozenset[str]:
    """What a tensor of an update of any kind can be called in a state dict."""
    return _names_of(tuple(KINDS.values()))


@cache
def _names_of(kinds: "tuple[type[AttachedUpdate], ...]") -> frozenset[str]:
    return frozenset(name for kind in kinds for name in (*kind.parts, *kind.hidden))


def kind_with(names: "set[str]", hard: bool) -> "type[AttachedUpdate]":
    """The kind that has tensors of these names, in a state dict that may lack some.

    Raises:
        ValueError: none has all of them.
    """
    fitting = [
        kind
        for kind in KINDS.values()
        if names <= {*kind.parts, *kind.hidden} and kind.beside is not hard
    ]
    # of several the one with the fewest tensors, as another would show more
    return min(fitting, key=lambda kind: len(kind.parts))
