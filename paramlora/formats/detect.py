"""Which tool wrote a file, told by its keys and shapes, never by its name."""

from collections.abc import Iterator

from paramlora.errors import FileError, listed
from paramlora.formats import content as contents
from paramlora.formats.content import Content
from paramlora.formats.format import FORMATS, Mark, any_key

# files that are known, and no adapters that can be read
_REFUSED = (
    (
        Mark(40, any_key(r".*\bparametrizations\..+")),
        "a model with an adapter attached; use paramlora extract on it",
    ),
    (Mark(41, any_key(r".+_lora_A")), "a file of LoRA-Torch, which is not read"),
)


def detect(content: Content) -> str:
    """The name of the format.

    Raises:
        FileError: none that is known, with the first keys.
    """
    for mark, name, refusal in sorted(_marks(), key=lambda one: one[0].rank):
        if mark.fits(content):
            if refusal:
                raise FileError(f"{content.source}: {refusal}.")
            return name
    first = listed(list(content.state), 4) or "none"
    raise FileError(
        f"{content.source}: no adapter format that is known. Its first keys: {first}. Give the "
        "file that training wrote; of two checkpoints, paramlora difference makes an adapter."
    )


def _marks() -> Iterator[tuple[Mark, str, str]]:
    """Every mark with the name of its format, or why such a file is refused."""
    yield from ((mark, form.name, "") for form in FORMATS.values() for mark in form.marks)
    yield from ((mark, "", refusal) for mark, refusal in _REFUSED)


def unwrapped(content: Content) -> Content:
    """A content without a dictionary around its tensors; no complete file has one (`Format`)."""
    complete = (form for form in FORMATS.values() if form.complete)
    if any(mark.fits(content) for form in complete for mark in form.marks):
        return content
    return contents.unwrapped(content)
