"""The commands on adapter files of any tool: `convert`, `inspect`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from paramlora.cli.app import app, fail, report, warnings_told, wrote
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
    unweighted,
)
from paramlora.files import adapters as interchange
from paramlora.files.inspection import inspect as inspected
from paramlora.files.served import servers, unserved_in
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
    out: Out,
    to: Annotated[str, typer.Option("--to")],
    file: Annotated[
        Optional[Path],
        typer.Argument(
            readable=False, callback=unweighted, help="An adapter's file or folder, of any tool."
        ),
    ] = None,
    model: Model = None,
    base: Checkpoint = None,
    key: Key = None,
    alpha: Alpha = None,
    rank: Rank = None,
    component: Annotated[
        Optional[list[str]],
        typer.Option(
            help="The part of a pipeline's file to read, such as unet; or PART=FILE, as often as "
            "there are parts, to write one file of all."
        ),
    ] = None,
    prefix: PrefixOf = None,
    fold_scale: FoldScale = False,
    loose: Loose = False,
    task_type: Annotated[
        Optional[str], typer.Option(help="For PEFT's AutoPeftModel, such as CAUSAL_LM.")
    ] = None,
    base_name: Annotated[
        Optional[str], typer.Option(help="The base's name or folder, for the same.")
    ] = None,
    force: Force = False,
    dry_run: Dry = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write an adapter in another tool's format."""
    said = {"task_type": task_type, "base_model_name_or_path": base_name}
    more = {name: text for name, text in said.items() if text is not None}
    with warnings_told():
        writer, names = how(to, prefix, fold_scale), known(model, base, key)
        part, files = _parts(file, component)
        options = reading(loose, alpha, part, rank)
        place: dict[str, Any] = {"force": force, "dry_run": dry_run}
        if file is not None:
            found = interchange.convert(
                file, out, to, names, options, metadata=more, **place, **writer
            )
        else:
            refuse({"--model tells the names of one model, and PART=FILE is of several": model})
            interchange.check_place(out, to, force=force)
            found = interchange.together(files, options, names)
            found = replace(found, metadata={**found.metadata, **more})
            interchange.write_adapter(found, out, to, names, **place, **writer)
    count = len(found.updates) + len(found.others)
    text = f"{counts(count, len(found.whole))} into {out}, as {to}"
    if dry_run or json:
        content = {"out": str(out), "format": to, "updates": count}
        content |= {"whole": len(found.whole)} if found.whole else {}
        content["dry_run"] = dry_run
        report(content, json, f"would convert {text}")
    else:
        wrote("convert", text, quiet)


def _parts(
    file: Optional[Path], component: Optional[list[str]]
) -> tuple[Optional[str], dict[str, Path]]:
    """The part of one file that is meant, or the files of all parts."""
    given = component or []
    files = {name: Path(path) for name, _, path in (one.partition("=") for one in given)}
    if file is not None:
        if len(given) > 1 or any("=" in one for one in given):
            fail("--component PART=FILE gives each part its file. Leave out the other file.")
        return (given[0] if given else None), {}
    if not given or not all(one.partition("=")[2] for one in given):
        fail("no file to convert. Give one, or --component PART=FILE for each part of a pipeline.")
    if len(files) < len(given):
        names = [one.partition("=")[0] for one in given]
        twice = next(name for name in names if names.count(name) > 1)
        fail(f"--component {twice}=...: that part has two files. Give each part once.")
    for path in files.values():
        unweighted(path)
    return None, files


@app.command(epilog="Example: paramlora inspect style.safetensors --json")
def inspect(
    file: File,
    server: Annotated[
        Optional[str],
        typer.Option("--for", help=f"Say what {' or '.join(servers())} does not load of it."),
    ] = None,
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
    lost = None if server is None else unserved_in(file, server)
    found = inspected(file, options, names)
    if json:
        told = {} if lost is None else {"server": server, "unserved": lost}
        report(found.to_dict() | told, json, "")
        return
    print(found)  # a table, which must not be wrapped
    if server is not None:
        name = servers()[server]
        print("\n".join(f"{name}: {text}" for text in lost or ["loads all of it"]))
