"""A scale as the alpha of other tools, so that ``alpha / r`` gives it back to the last bit."""

import json
from collections.abc import Mapping
from typing import Any, Optional

from paramlora.errors import FileError, spelled
from paramlora.formats.content import Content, number, parsed

KEY = "paramlora_scales"


class Noted(float):
    """An alpha that knows whether any scale was made of it.

    Example:
        >>> alpha = Noted(8.0)
        >>> alpha.used, alpha / 4, alpha.used
        (False, 2.0, True)
    """

    used = False

    def __float__(self) -> float:
        self.used = True
        return super().__float__()

    def __truediv__(self, other: float) -> float:
        return float(self) / other


def alpha_of(scale: float, r: int) -> float:
    """The alpha whose ``alpha / r`` is `scale`, or the nearest: for one double in twelve there is
    none, since products round.

    Example:
        >>> alpha_of(0.7, 8) / 8, alpha_of(0.7, 3) / 3
        (0.7, 0.6999999999999998)
    """
    return scale * r


def unreachable(scales: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    """Of ``{path: (scale, rank in the file)}`` the scales that no alpha gives exactly."""
    return {path: scale for path, (scale, r) in scales.items() if alpha_of(scale, r) / r != scale}


def scales_metadata(scales: Mapping[str, tuple[float, int]]) -> dict[str, str]:
    """`unreachable` as an entry of a safetensors header, empty where there is none."""
    found = unreachable(scales)
    return {KEY: json.dumps(found)} if found else {}


def recorded(content: Content) -> Mapping[str, Any]:
    """The scales that `unreachable` stored in a file."""
    if KEY in content.metadata:
        return parsed(content.metadata[KEY], content.source)
    found = content.config.get(KEY, {})
    if not isinstance(found, Mapping):
        raise FileError(f"{content.source}: {KEY} is {spelled(found)}, not an object.")
    return found


def scale_of(alpha: float, r: int, exact: Optional[Any] = None, where: str = "") -> float:
    """``alpha / r``; `exact` instead, if nobody has changed the alpha since it was stored."""
    if exact is not None:
        value = number(exact, where)
        if alpha_of(value, r) == alpha:
            return value
    return alpha / r
