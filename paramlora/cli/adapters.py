"""The commands on adapter files of any tool: `convert`, `inspect`."""

from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from typer.core import TyperCommand, TyperOption

from paramlora.cli.app import app, fail, report, warnings_told, wrote
from paramlora.cli.checkpoints import Dry, Force, Json, Key, Out, Quiet
from paramlora.cli.training import build
from paramlora.files import adapters as interchange
from paramlora.files import inspect as inspection
from paramlora.files.served import SERVERS, unserved_in
from paramlora.formats import FORMATS, Base, Options, Prefix, base_of

File = Annotated[Path, typer.Argument(help="An adapter's file or folder, of any tool.")]
Alpha = Annotated[
    Optional[float],
    typer.Option(help="For formats that do not store it: scale = alpha / r."),
]
Rank = Annotated[
    Optional[int],
    typer.Option(min=1, help="Nearest rank for LoHa, LoKr and other dense updates."),
]


class _Convert(TyperCommand):
    """The command with the help that the formats give, of those that are known when it is run."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        names = sorted(form.name for form in FORMATS.values() if form.write is not None)
        told = {
            "to": f"One of {', '.join(names)}.",
            "prefix": f"Of {', or of '.join(p.about for p in _prefixes().values())}.",
        }
        for param in self.params:
            if isinstance(param, TyperOption):
                param.help = told.get(str(param.name), param.help)


@app.command(
    cls=_Convert,
    epilog="Example: paramlora convert style.safetensors -o style-peft --to peft --model my:unet",
)
def convert(
    file: File,
    out: Out,
    to: Annotated[str, typer.Option()],
    model: Annotated[
        Optional[str], typer.Option(help="module:factory, to tell names and kinds of layers.")
    ] = None,
    base: Annotated[
        Optional[Path], typer.Option(help="The model's checkpoint, to tell names and shapes.")
    ] = None,
    key: Key = None,
    alpha: Alpha = None,
    rank: Rank = None,
    component: Annotated[
        Optional[str], typer.Option(help="The part of a pipeline's file to read, such as unet.")
    ] = None,
    prefix: Annotated[Optional[str], typer.Option()] = None,
    fold_scale: Annotated[
        bool,
        typer.Option(
            "--fold-scale",
            help="Multiply scales into lora_B, for formats without a place for them.",
        ),
    ] = False,
    loose: Annotated[
        bool, typer.Option("--loose", help="Leave out, with a warning, what belongs to nothing.")
    ] = False,
    force: Force = False,
    dry_run: Dry = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write an adapter in another tool's format."""
    options = Options(not loose, rank, alpha, component)
    known, how = _known(model, base, key), _how(to, prefix, fold_scale)
    with warnings_told():
        found = interchange.convert(
            file, out, to, known, options, force=force, dry_run=dry_run, **how
        )
    text = f"{out}: {_counts(len(found.updates), len(found.whole))} as {to}"
    if dry_run or json:
        content = {"out": str(out), "format": to, "updates": len(found.updates)}
        content |= {"whole": len(found.whole)} if found.whole else {}
        content["dry_run"] = dry_run
        report(content, json, f"would write {text}")
    else:
        wrote(text, quiet)


def _counts(updates: int, whole: int) -> str:
    return f"{updates} updates, {whole} whole tensors" if whole else f"{updates} updates"


@app.command(epilog="Example: paramlora inspect style.safetensors --json")
def inspect(
    file: File,
    alpha: Alpha = None,
    server: Annotated[
        Optional[str],
        typer.Option("--for", help=f"Say what {' or '.join(SERVERS)} does not load of it."),
    ] = None,
    json: Json = False,
) -> None:
    """Show an adapter's format, metadata and updates; name those that are damaged or idle."""
    lost = None if server is None else unserved_in(file, server)
    if lost and lost[0].startswith("its magnitudes"):
        fail(f"{file}: {lost[0]}")
    found = inspection.inspect(file, Options(strict=False, alpha=alpha))
    if json:
        told = {} if lost is None else {"server": server, "unserved": lost}
        report(found.to_dict() | told, json, "")
        return
    print(found)  # a table, which must not be wrapped
    if server is not None:
        name = SERVERS[server]
        print("\n".join(f"{name}: {text}" for text in lost or ["loads all of it"]))


def _known(model: Optional[str], base: Optional[Path], key: Optional[str]) -> Optional[Base]:
    if model is not None and base is not None:
        fail("--model and --base both tell the names of layers. Give one.")
    if model is not None:
        return base_of(build(model))
    return None if base is None else interchange.base_of_file(base, key)


def _how(to: str, prefix: Optional[str], fold_scale: bool) -> dict[str, Any]:
    how: dict[str, Any] = {"fold_scale": True} if fold_scale else {}
    known = _prefixes()
    if prefix is not None and to not in known:
        fail(f"--prefix is for {' and '.join(known)}, not for {to}. Leave it out.")
    if prefix is not None:
        how[known[to].keyword] = prefix
    return how


def _prefixes() -> dict[str, Prefix]:
    """What ``--prefix`` means, by the formats with a use for it, in the order of their ranks."""
    forms = sorted(FORMATS.values(), key=lambda form: min(mark.rank for mark in form.marks))
    return {form.name: form.prefix for form in forms if form.prefix is not None}
