"""A scale as the alpha of other tools, so that ``alpha / r`` gives it back to the last bit."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Optional

from paramlora.errors import FileError, spelled
from paramlora.formats.content import Content, number, parsed, report
from paramlora.formats.pipeline import PARTS

KEY = "paramlora_scales"
_MOST_HEADED = 64  # alphas of a header, each of which is looked for in all names
_HEADED = re.compile(r"(?:(?P<component>\w+)\.)?(?:lora_alpha|alpha|ss_network_alpha)")
_RANK = ("None", "0", "0.0")  # sd-scripts' networks/lora.py takes these for the rank
_EACH = "Dynamic"  # sd-scripts' word for one in each layer


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
    """The scales that no alpha gives exactly, of ``{path: (scale, rank in the file)}``."""
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
        raise FileError(
            f"{content.source}: {KEY} is {spelled(found)}, not an object. Save it again."
        )
    return found


def scale_of(alpha: float, r: int, exact: Optional[Any] = None, where: str = "") -> float:
    """``alpha / r``; `exact` instead, if nobody has changed the alpha since it was stored."""
    if exact is not None:
        value = number(exact, where)
        if alpha_of(value, r) == alpha:
            return value
    return alpha / r


def tells_alpha(content: Content) -> bool:
    """Whether a file's header has an alpha (see `headed`)."""
    return any(_HEADED.fullmatch(key) for key in content.metadata)


def headed(
    content: Content,
    paths: Iterable[str],
    belongs: Callable[[str, str], bool],
    given: Optional[float] = None,
) -> dict[str, float]:
    """``{path: alpha}`` of an alpha that stands in the header alone: ``lora_alpha``, ``alpha`` (as
    diffusers' loaders/lora_pipeline.py reads it) and sd-scripts' ``ss_network_alpha``, all of them
    perhaps with a component's name in front.

    Nothing where tensors tell alphas; a warning tells what is said of no layer, or not enough.

    Args:
        content: of the file.
        paths: of its layers.
        belongs: whether a path is of a component.
        given: an alpha that the caller has given for all.

    Raises:
        FileError: an alpha that is no number.
    """
    keys = {key: match for key in content.metadata if (match := _HEADED.fullmatch(key))}
    if given is not None or not keys or any(key.endswith(".alpha") for key in content.state):
        return {}
    if len(keys) > _MOST_HEADED:
        raise FileError(f"{content.source}: its header tells {len(keys)} alphas. Save it again.")
    known, found, lost = list(paths), dict[str, float](), []
    alone = len({match["component"] for match in keys.values()}) == 1
    # an alpha for all comes first, so that a component's own one wins
    for key, match in sorted(keys.items(), key=lambda item: item[1]["component"] or ""):
        text, component = content.metadata[key], match["component"]
        own = [path for path in known if component is None or belongs(path, component)]
        if not own and alone and not any(belongs(one, part) for one in known for part in PARTS):
            own = known  # no path tells its component
        if text == _EACH or not own:
            lost.append(f"{key}={text}")
        elif not (match[0].endswith("ss_network_alpha") and text in _RANK):
            found |= dict.fromkeys(own, number(text, f"{content.source}: {key}"))
    what = "its header tells an alpha of no layer in it, and its tensors none, so the scale is 1"
    unheard = lost if len(found) < len(known) else []
    report(content.source, what, unheard, False, "Give alpha (--alpha) for another.")
    return found
