"""The options that commands share, and what is made of them."""

import math
import os
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from typer.core import TyperCommand, TyperOption

from paramlora.cli.app import fail
from paramlora.cli.training import build
from paramlora.errors import counted
from paramlora.files import adapters as interchange
from paramlora.formats import FORMATS, OWN, Base, Options, Prefix, base_of


def unweighted(given: Optional[Path]) -> Optional[Path]:
    """A path as it is; one that ends in a weight, where none is taken, says so."""
    file, _, weight = str(given or "").rpartition(":")
    if file and not os.path.lexists(str(given)) and os.path.lexists(file):
        fail(
            f'{given}: there is no such file, and a weight (":{weight}") is only for the adapters '
            f"of merge and combine. Give {file}."
        )
    return given


# typer's own look at whether a file can be read has no way out
Out = Annotated[Path, typer.Option("--out", "-o", readable=False, help="Where to write.")]
Key = Annotated[
    Optional[str],
    typer.Option(help="Where the state dict is in a file of torch.save, such as model.ema."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Dry = Annotated[bool, typer.Option("--dry-run", help="Check and report; write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Report in JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Do not say what was written.")]
File = Annotated[
    Path,
    typer.Argument(
        readable=False, callback=unweighted, help="An adapter's file or folder, of any tool."
    ),
]
Model = Annotated[
    Optional[str], typer.Option(help="module:factory, to tell names and kinds of layers.")
]
Checkpoint = Annotated[
    Optional[Path],
    typer.Option(
        "--base",
        readable=False,
        callback=unweighted,
        help="The model's checkpoint, to tell names and shapes.",
    ),
]
Alpha = Annotated[
    Optional[float],
    typer.Option(help="For formats that do not store it: scale = alpha / r."),
]
Component = Annotated[
    Optional[str], typer.Option(help="The part of a pipeline's file to read, such as unet.")
]
Loose = Annotated[
    bool, typer.Option("--loose", help="Leave out, with a warning, what belongs to nothing.")
]
To = Annotated[Optional[str], typer.Option("--to")]
PrefixOf = Annotated[Optional[str], typer.Option("--prefix")]
FoldScale = Annotated[
    bool,
    typer.Option(
        "--fold-scale", help="Multiply scales into lora_B, for formats without a place for them."
    ),
]


class Writing(TyperCommand):
    """A command with the help that the formats give, of those that are known when it is run."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        names = sorted(form.name for form in FORMATS.values() if form.write is not None)
        told = {
            "to": f"One of {', '.join(names)}.",
            "prefix": f"Of {', or of '.join(p.about for p in prefixes().values())}.",
        }
        for param in self.params:
            if isinstance(param, TyperOption):
                param.help = told.get(str(param.name), param.help)


def known(model: Optional[str], base: Optional[Path], key: Optional[str] = None) -> Optional[Base]:
    """The names of layers that ``--model`` or ``--base`` tells."""
    if model is not None and base is not None:
        fail("--model and --base both tell the names of layers. Give one.")
    if key is not None and base is None:
        fail("--key is for --base, where that is a file of torch.save. Leave it out.")
    if model is not None:
        return base_of(build(model))
    return None if base is None else interchange.base_of_file(base, key)


def reading(
    loose: bool, alpha: Optional[float], component: Optional[str], rank: Optional[int] = None
) -> Options:
    """The options of reading an adapter's file."""
    return Options(not loose, rank, alpha, component)


def refuse(given: dict[str, object]) -> None:
    """Refuse options that were given where they say nothing: ``{"--alpha, which ...": value}``."""
    for told, value in given.items():
        if value not in (None, False):
            fail(f"{told}. Leave it out.")


def how(to: str, prefix: Optional[str], fold_scale: bool) -> dict[str, Any]:
    """What ``--prefix`` and ``--fold-scale`` say to a format's writer."""
    chosen: dict[str, Any] = {"fold_scale": True} if fold_scale else {}
    having = prefixes()
    if prefix is not None and to not in having:
        fail(f"--prefix is for {' and '.join(having)}, not for {to}. Leave it out.")
    if prefix is not None:
        chosen[having[to].keyword] = prefix
    return chosen


def prefixes() -> dict[str, Prefix]:
    """What ``--prefix`` means, by the formats with a use for it, in the order of their ranks; those
    without marks come last."""
    last = 1 + max(mark.rank for form in FORMATS.values() for mark in form.marks)
    forms = sorted(
        FORMATS.values(), key=lambda form: min((mark.rank for mark in form.marks), default=last)
    )
    return {form.name: form.prefix for form in forms if form.prefix is not None}


def target(to: Optional[str], file: Path, names: Optional[Base]) -> str:
    """The format to write: the one asked for, else the file's own where that can be written."""
    own = interchange.format_of(file)
    chosen = to or (own if FORMATS[own].write is not None else OWN)
    interchange.check_named(file, own, chosen, names)
    return chosen


def counts(updates: int, whole: int) -> str:
    """How many updates there are, and whole tensors where there are any."""
    told = [counted(updates, "update"), *([counted(whole, "whole tensor")] if whole else [])]
    return ", ".join(told)


def weighted(text: str) -> tuple[Path, float]:
    """``PATH:0.7`` as its two parts; a file of that whole name comes first."""
    path, _, number = text.rpartition(":")
    if path and not os.path.lexists(text):
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if math.isfinite(weight):
            return Path(path), weight
        if os.path.lexists(path):
            fail(f'{text}: "{number}" is no weight. Give a finite number, as in {path}:0.7.')
    return Path(text), 1.0
