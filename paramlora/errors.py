"""The exception tree.

ParamloraError
├── ConfigError    the configuration itself is wrong (also a ValueError)
├── TargetError    the configuration does not fit the model (also a ValueError)
├── AdapterError   an adapter that is missing, doubled, or cannot be merged (also a ValueError)
└── FileError      a file that cannot be read or does not fit (also a ValueError)

ParamloraWarning   one entry of several found nothing to adapt, a tied weight is split, ...
"""

from collections.abc import Iterable
from difflib import get_close_matches


class ParamloraError(ValueError):
    """Base of every error raised on purpose by paramlora."""


class ConfigError(ParamloraError):
    """A configuration that says something it cannot mean."""


class TargetError(ParamloraError):
    """A configuration that does not fit the model it is attached to."""


class AdapterError(ParamloraError):
    """An adapter that is missing, already there, or cannot be merged."""


class FileError(ParamloraError):
    """An adapter file that cannot be read or does not fit the model."""


class ParamloraWarning(UserWarning):
    """Something was left undone that the caller probably wanted."""


def closest(word: str, known: Iterable[str], n: int = 1) -> list[str]:
    """The names in `known` most like `word`, best first."""
    return get_close_matches(word, list(known), n=n, cutoff=0.6)
