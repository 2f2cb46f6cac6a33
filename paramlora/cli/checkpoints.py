"""The commands on checkpoint files: `embed`, `extract`, `merge`."""

import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from paramlora import files
from paramlora.cli.app import app, bar, fail, report, warnings_told, wrote

Base = Annotated[
    Path,
    typer.Argument(help="A .safetensors file, a file of torch.save, or a folder of shards."),
]
Embedded = Annotated[Path, typer.Argument(help="A checkpoint of a model with an adapter attached.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where to write.")]
Key = Annotated[
    Optional[str],
    typer.Option(help="Where the state dict is in a file of torch.save, such as model.ema."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Dry = Annotated[bool, typer.Option("--dry-run", help="Check and report; write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Report in JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Do not say what was written.")]


@app.command(epilog="Example: paramlora embed model/ style.safetensors -o embedded/")
def embed(
    base: Base,
    adapter: Annotated[Path, typer.Argument(help="The adapter's file.")],
    out: Out,
    key: Key = None,
    force: Force = False,
    dry_run: Dry = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint that loads into the model with the adapter attached."""
    with warnings_told(), bar("embed") as told:
        done = files.embed(base, adapter, out, key=key, force=force, dry_run=dry_run, progress=told)
    _report(done, dry_run, json, quiet)


@app.command(epilog="Example: paramlora extract embedded/ -o style.safetensors")
def extract(
    embedded: Embedded,
    out: Out,
    key: Key = None,
    force: Force = False,
    dry_run: Dry = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the small adapter file from a checkpoint of a model with it attached."""
    with warnings_told():
        done = files.extract(embedded, out, key=key, force=force, dry_run=dry_run)
    _report(done, dry_run, json, quiet)


@app.command(
    epilog="Example: paramlora merge model/ style.safetensors:0.7 subject.safetensors -o merged/"
)
def merge(
    base: Base,
    out: Out,
    adapters: Annotated[
        Optional[list[str]],
        typer.Argument(
            metavar="[ADAPTER[:WEIGHT]]...",
            help="Files of adapters, each with how strongly it acts (1 if not said). Without any, "
            "what is inside the checkpoint of a model with adapters attached is merged.",
        ),
    ] = None,
    key: Key = None,
    kept: Annotated[
        bool, typer.Option("--report", help="Show how much of the update each tensor's type keeps.")
    ] = False,
    force: Force = False,
    dry_run: Dry = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a plain checkpoint with adapters folded into the weights."""
    chosen = [weighted(text) for text in adapters or []]
    with warnings_told(), bar("merge") as told:
        found = files.kept(base, chosen, key=key) if kept else None  # before it may be replaced
        done = files.merge(base, chosen, out, key=key, force=force, dry_run=dry_run, progress=told)
    _report(done, dry_run, json, quiet, {} if found is None else {"kept": asdict(found)})
    if found is not None and not json:
        print(found)  # a table, which must not be wrapped


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


def _report(
    done: files.Report,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    more: Optional[dict[str, Any]] = None,
) -> None:
    counts = f"{done.tensors:,} tensors, {done.changed:,} changed, {done.bytes:,} bytes"
    text = f"{done.out}: {counts}"
    if dry_run or as_json:
        content = {**asdict(done), "out": str(done.out), "dry_run": dry_run, **(more or {})}
        report(content, as_json, f"would write {text}")
    else:
        wrote(text, quiet)
