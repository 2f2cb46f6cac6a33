"""The commands on adapter files of any tool: `convert`, `inspect`."""

from typing import Annotated, Optional

import typer

from paramlora.cli.app import app, report, warnings_told, wrote
from paramlora.cli.options import (
    Alpha,
    Checkpoint,
    Component,
    Dry,
    File,
    FoldScale,
    Force,
    Json,
    Key,
    Loose,
    Model,
    Out,
    PrefixOf,
    Quiet,
    Writing,
    counts,
    how,
    known,
    reading,
    refuse,
)
from paramlora.files import adapters as interchange
from paramlora.files.inspect import inspect as inspected
from paramlora.formats import Options

Rank = Annotated[
    Optional[int],
    typer.Option(min=1, help="Nearest rank for LoHa, LoKr and other dense updates."),
]


@app.command(
    cls=Writing,
    epilog="Example: paramlora convert style.safetensors -o style-peft --to peft --model my:unet",
)
def convert(
    file: File,
    out: Out,
    to: Annotated[str, typer.Option("--to")],
    model: Model = None,
    base: Checkpoint = None,
    key: Key = None,
    alpha: Alpha = None,
    rank: Rank = None,
    component: Component = None,
    prefix: PrefixOf = None,
    fold_scale: FoldScale = False,
    loose: Loose = False,
    force: Force = False,
    dry_run: Dry = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write an adapter in another tool's format."""
    with warnings_told():
        writer, names = how(to, prefix, fold_scale), known(model, base, key)
        options = reading(loose, alpha, component, rank)
        found = interchange.convert(
            file, out, to, names, options, force=force, dry_run=dry_run, **writer
        )
    count = len(found.updates) + len(found.others)
    text = f"{counts(count, len(found.whole))} into {out}, as {to}"
    if dry_run or json:
        content = {"out": str(out), "format": to, "updates": count}
        content |= {"whole": len(found.whole)} if found.whole else {}
        content["dry_run"] = dry_run
        report(content, json, f"would convert {text}")
    else:
        wrote("convert", text, quiet)


@app.command(epilog="Example: paramlora inspect style.safetensors --json")
def inspect(
    file: File,
    model: Model = None,
    base: Checkpoint = None,
    key: Key = None,
    alpha: Alpha = None,
    component: Component = None,
    loose: Loose = False,
    json: Json = False,
) -> None:
    """Show an adapter's format, metadata and updates; name those that are damaged or idle."""
    refuse({"--loose is what inspect always is: it names what belongs to nothing": loose})
    names = known(model, base, key)
    options = Options(strict=False, alpha=alpha, component=component)
    found = inspected(file, options, names)
    if json:
        report(found.to_dict(), json, "")
    else:
        print(found)  # a table, which must not be wrapped
