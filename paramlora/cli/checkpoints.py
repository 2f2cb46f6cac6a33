"""The commands on checkpoint files: `embed`, `extract`, `merge`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from paramlora import files
from paramlora.cli.app import app, bar, report, warnings_told, wrote
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
    how,
    known,
    reading,
    refuse,
    unweighted,
    weighted,
)
from paramlora.errors import counted
from paramlora.formats import OWN

Base = Annotated[
    Path,
    typer.Argument(
        readable=False,
        callback=unweighted,
        help="A .safetensors file, a file of torch.save, or a folder of shards.",
    ),
]
Embedded = Annotated[
    Path,
    typer.Argument(
        readable=False,
        callback=unweighted,
        help="A checkpoint of a model with an adapter attached.",
    ),
]
_HERE = "--base tells the names of layers where no checkpoint is given; here BASE does"
_SCALES = "--alpha is for files without scales, and an attached model's checkpoint has them"


@app.command(epilog="Example: paramlora embed model/ style.safetensors -o embedded/")
def embed(
    base: Base,
    adapter: File,
    out: Out,
    key: Key = None,
    model: Model = None,
    names: Checkpoint = None,
    alpha: Alpha = None,
    component: Component = None,
    loose: Loose = False,
    force: Force = False,
    dry_run: Dry = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint that loads into the model with the adapter attached."""
    refuse({_HERE: names})
    with warnings_told(), bar("embed") as told:
        done = files.embed(
            base,
            adapter,
            out,
            key=key,
            options=reading(loose, alpha, component),
            known=known(model, None),
            force=force,
            dry_run=dry_run,
            progress=told,
        )
    text = f"{counted(done.updates or 0, 'update')} into {out}, {_size(done)}"
    _report("embed", text, done, dry_run, json, quiet)


@app.command(cls=Writing, epilog="Example: paramlora extract embedded/ -o style.safetensors")
def extract(
    embedded: Embedded,
    out: Out,
    to: Annotated[str, typer.Option("--to")] = OWN,
    prefix: PrefixOf = None,
    fold_scale: FoldScale = False,
    key: Key = None,
    model: Model = None,
    base: Checkpoint = None,
    alpha: Alpha = None,
    component: Component = None,
    loose: Loose = False,
    force: Force = False,
    dry_run: Dry = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the small adapter file from a checkpoint of a model with it attached."""
    told = "--loose is for an adapter that does not fit, and what is inside a checkpoint fits"
    refuse({_SCALES: alpha, told: loose})
    with warnings_told():
        done = files.extract(
            embedded,
            out,
            to,
            key=key,
            known=known(model, base),
            component=component,
            force=force,
            dry_run=dry_run,
            **how(to, prefix, fold_scale),
        )
    text = f"{counted(done.updates or 0, 'update')} into {out}, as {to}"
    _report("extract", text, done, dry_run, json, quiet)


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
    model: Model = None,
    names: Checkpoint = None,
    alpha: Alpha = None,
    component: Component = None,
    loose: Loose = False,
    kept: Annotated[
        bool, typer.Option("--report", help="Show how much of the update each tensor's type keeps.")
    ] = False,
    seed: Annotated[
        Optional[int],
        typer.Option(
            min=0,
            max=2**63 - 1,
            help="Round types of 8 and 16 bits up or down at random, by this seed, so that of a "
            "small update its mean is kept.",
        ),
    ] = None,
    force: Force = False,
    dry_run: Dry = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a plain checkpoint with adapters folded into the weights."""
    refuse({_HERE: names})
    if not adapters:
        idle = "is for an adapter's file, and none is given"
        given = {"--model": model, "--alpha": alpha, "--component": component, "--loose": loose}
        refuse({f"{name} {idle}": value for name, value in given.items()})
    chosen = [weighted(text) for text in adapters or []]
    options, layers = reading(loose, alpha, component), known(model, None)
    with warnings_told(), bar("merge") as told:
        # before the base may be replaced
        found = None
        if kept:
            found = files.kept(base, chosen, key=key, options=options, known=layers, seed=seed)
        done = files.merge(
            base,
            chosen,
            out,
            key=key,
            options=options,
            known=layers,
            force=force,
            dry_run=dry_run,
            progress=told,
            seed=seed,
        )
    change = "" if done.largest is None else f", largest change {done.largest:.2g} of its norm"
    if done.kept is not None:
        change += f"; 8 bits keep at least {done.kept:.2g} of each update"
    text = f"{done.changed:,} of {counted(done.tensors, 'tensor')} into {out}{change}"
    more = {} if found is None else {"report": asdict(found)}
    _report("merge", text, done, dry_run, json, quiet, more)
    if found is not None and not json:
        print(found)  # a table, which must not be wrapped


def _size(done: files.Report) -> str:
    return f"{counted(done.tensors, 'tensor')} of {counted(done.bytes, 'byte')}"


def _report(
    verb: str,
    text: str,
    done: files.Report,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    more: Optional[dict[str, Any]] = None,
) -> None:
    if dry_run or as_json:
        told = {key: value for key, value in asdict(done).items() if value is not None}
        content = {**told, "out": str(done.out), "dry_run": dry_run, **(more or {})}
        report(content, as_json, f"would {verb} {text}")
    else:
        wrote(verb, text, quiet)
