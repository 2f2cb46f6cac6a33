"""The commands that compute with adapters: `combine`, `resize`, `difference`."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from paramlora.arithmetic import HOWS, Approximation
from paramlora.cli.app import app, bar, fail, report, warnings_told, wrote
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
    To,
    Writing,
    counts,
    how,
    known,
    reading,
    target,
    unweighted,
    weighted,
)
from paramlora.errors import counted
from paramlora.files import arithmetic
from paramlora.files.adapters import check_place, write_adapter
from paramlora.formats import OWN

Energy = Annotated[
    Optional[float],
    typer.Option(help="Instead: the share of each layer's squared norm to keep, such as 0.95."),
]


@app.command(
    cls=Writing,
    epilog="Example: paramlora combine a.safetensors:0.7 b.safetensors -o both.safetensors",
)
def combine(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER[:WEIGHT]...",
            help="Files of adapters, each with its weight (1 if not said).",
        ),
    ],
    out: Out,
    method: Annotated[str, typer.Option("--how", help=f"One of {', '.join(HOWS)}.")] = "exact",
    rank: Annotated[Optional[int], typer.Option(help="Of svd, ties and dare.")] = None,
    density: Annotated[
        Optional[float], typer.Option(help="The share of entries that ties and dare keep.")
    ] = None,
    seed: Annotated[Optional[int], typer.Option(help="Of dare's random numbers (0).")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="A layer of only some of the adapters is an error.")
    ] = False,
    to: To = None,
    prefix: PrefixOf = None,
    fold_scale: FoldScale = False,
    model: Model = None,
    base: Checkpoint = None,
    key: Key = None,
    alpha: Alpha = None,
    component: Component = None,
    loose: Loose = False,
    force: Force = False,
    dry_run: Dry = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the weighted sum of adapters as one adapter; the base is not needed."""
    if seed is not None and method != "dare":
        fail(f'--seed is for "dare", and "{method}" has no random numbers. Leave it out.')
    pairs = [weighted(text) for text in adapters]
    with warnings_told():
        names = known(model, base, key)
        form = target(to, pairs[0][0], names)
        writer = how(form, prefix, fold_scale)
        # before minutes of computing, not after
        check_place(out, form, force=force)
        done = arithmetic.combined(
            pairs,
            method,  # type: ignore[arg-type]  # which it checks
            rank,
            density=density,
            seed=seed or 0,
            strict=strict,
            base=names,
            options=reading(loose, alpha, component),
        )
        write_adapter(done.adapter, out, form, names, force=force, dry_run=dry_run, **writer)
    _report("combine", counted(len(pairs), "adapter"), done, out, form, dry_run, json, quiet)


@app.command(
    cls=Writing, epilog="Example: paramlora resize style.safetensors -o small.safetensors --rank 8"
)
def resize(
    file: File,
    out: Out,
    rank: Annotated[
        Optional[list[str]],
        typer.Option(help="Of every layer; or NAME=RANK of some, as often as needed."),
    ] = None,
    energy: Energy = None,
    to: To = None,
    prefix: PrefixOf = None,
    fold_scale: FoldScale = False,
    model: Model = None,
    base: Checkpoint = None,
    key: Key = None,
    alpha: Alpha = None,
    component: Component = None,
    loose: Loose = False,
    force: Force = False,
    dry_run: Dry = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the nearest adapter of lower ranks, and say how near each layer is."""
    with warnings_told():
        names = known(model, base, key)
        form = target(to, file, names)
        writer = how(form, prefix, fold_scale)
        check_place(out, form, force=force)
        options = reading(loose, alpha, component)
        done = arithmetic.resize(file, _ranks(rank), energy=energy, base=names, options=options)
        write_adapter(done.adapter, out, form, names, force=force, dry_run=dry_run, **writer)
    _report("resize", counted(len(done.errors), "update"), done, out, form, dry_run, json, quiet)


@app.command(
    cls=Writing,
    epilog="Example: paramlora difference base/ tuned/ -o tuned-lora.safetensors --rank 16",
)
def difference(
    base: Annotated[
        Path,
        typer.Argument(
            readable=False,
            callback=unweighted,
            help="A .safetensors file, a file of torch.save, or a folder.",
        ),
    ],
    tuned: Annotated[
        Path,
        typer.Argument(
            readable=False, callback=unweighted, help="The same model's, after training."
        ),
    ],
    out: Out,
    rank: Annotated[Optional[int], typer.Option(min=1, help="Of each update.")] = None,
    energy: Energy = None,
    exclude: Annotated[
        Optional[list[str]], typer.Option(help="A tensor or layer to leave out; may be repeated.")
    ] = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="Keep biases, norms and other vectors as they are.")
    ] = False,
    to: Annotated[str, typer.Option("--to")] = OWN,
    prefix: PrefixOf = None,
    fold_scale: FoldScale = False,
    model: Model = None,
    key: Key = None,
    force: Force = False,
    dry_run: Dry = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the adapter that leads from one checkpoint to another, a tensor at a time."""
    with warnings_told(), bar("difference") as told:
        writer, names = how(to, prefix, fold_scale), known(model, None)
        check_place(out, to, force=force)
        done = arithmetic.difference(
            base,
            tuned,
            rank,
            energy=energy,
            exclude=exclude or (),
            whole=whole,
            known=names,
            key=key,
            progress=told,
        )
        write_adapter(done.adapter, out, to, names, force=force, dry_run=dry_run, **writer)
    _report("subtract", "two checkpoints", done, out, to, dry_run, json, quiet)


def _ranks(given: Optional[list[str]]) -> "int | dict[str, int] | None":
    """``8``, or ``to_q=4`` and others."""
    if not given:
        return None
    named: dict[str, int] = {}
    for text in given:
        name, equals, number = text.rpartition("=")
        if not number.isdecimal() or (not equals and len(given) > 1):
            fail(f'--rank {text}: no rank. Give a whole number, or as in "to_q=8" for some layers.')
        if not equals:
            return int(number)
        if name in named:
            fail(f"--rank {text}: {name} has two ranks. Give it one.")
        named[name] = int(number)
    return named


def _report(
    verb: str,
    what: str,
    done: Approximation,
    out: Path,
    form: str,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    adapter, errors = done.adapter, done.errors
    count = len(adapter.updates) + len(adapter.others)
    near = f", largest error {done.error:.2g} of its norm" if done.error else ""
    text = f"{what} into {out}: {counts(count, len(adapter.whole))} as {form}{near}"
    if dry_run or as_json:
        content = {"out": str(out), "format": form, "updates": count}
        content |= {"whole": len(adapter.whole)} if adapter.whole else {}
        content |= {"ranks": {path: update.r for path, update in adapter.updates.items()}}
        content |= {"errors": dict(errors), "dry_run": dry_run}
        report(content, as_json, f"would {verb} {text}")
    else:
        wrote(verb, text, quiet)
