"""The commands around training: `build`, `demo`, `targets`."""

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import rich
import typer
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import nn

import paramlora
from paramlora import ParamloraError
from paramlora.cli.app import app, fail, warnings_told
from paramlora.cuda.native import library
from paramlora.errors import counted, shown
from paramlora.model.presets import PRESETS, grouped
from paramlora.update.kinds import kind_of

if TYPE_CHECKING:
    from paramlora.cli.demo import Result  # which needs what only the demo does

_SEEDS = 2**63 - 1  # of torch; adapting takes the next one
_SEED = "Seed; the same one gives the same files."


@app.command(epilog="Example: paramlora demo --out paramlora-demo")
def demo(
    out: Annotated[Path, typer.Option(readable=False, help="Folder for the files.")] = Path(
        "paramlora-demo"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Steps of adapting.")] = 600,
    seed: Annotated[int, typer.Option(min=-_SEEDS, max=_SEEDS - 1, help=_SEED)] = 0,
    pretrain_steps: Annotated[int, typer.Option(min=1, help="Steps of pre-training.")] = 1000,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the files of another run.")
    ] = False,
) -> None:
    """Teach a small diffusion U-Net the digits 0 to 4, adapt it to 5 to 9, merge, and compare."""
    try:
        from paramlora.cli import demo as job
    except ImportError as error:
        fail(f"the demo needs scikit-learn and matplotlib ({error}): pip install 'paramlora[demo]'")
    print(
        "A small diffusion U-Net learns to draw the digits 0 to 4, and then, by an adapter of a "
        f"twentieth of its size, 5 to 9: minutes on one core, into {shown(str(out))}."
    )
    _ask_to_replace(out, job.taken(out), force)
    with job.whole_folder(out) as folder, Progress() as bars:
        print(f"{shown(str(out / 'lora.json'))}\n{job.config_text()}")
        tasks = {"pre-train": bars.add_task("pre-train", total=pretrain_steps)}
        tasks["adapt"] = bars.add_task("adapt", total=steps)
        result = job.run(
            folder,
            steps,
            seed,
            lambda name, step, total: bars.update(tasks[name], completed=step),
            pretrain_steps,
        )
    rich.print(_measured(result))
    if max(result.difference, result.restored) > job.TOLERANCE:
        fail(
            f"merged and attached samples differ by {result.difference:.1e}, those of the base and "
            f"of strength 0 by {result.restored:.1e}. Report it, with the versions of torch."
        )
    print(f"Look at {shown(str(out / 'samples.png'))}, then try:\n")
    print("\n".join(f"  {line}" for line in job.commands(out)))


@app.command("build", epilog="Example: paramlora build")
def build_library() -> None:
    """Compile what spares eager training on CUDA most of its Python, once for each torch."""
    print(shown(str(library.build())))


def _ask_to_replace(out: Path, taken: list[str], force: bool) -> None:
    """Go on only where nothing is replaced, or with consent: by ``--force``, or on a terminal."""
    if force or not taken:
        return
    there = f"{out}: holds {', '.join(taken)}"
    if not sys.stdin.isatty():
        fail(f"{there}. Give another --out, or --force to replace them.")
    typer.confirm(f"{shown(there)}. Replace them?", abort=True, err=True)


def _measured(result: "Result") -> Table:
    """What came out, one figure a line."""
    table = Table(title="paramlora demo", show_header=False)
    share = 100 * result.trainable / result.total
    table.add_row("trainable parameters", f"{result.trainable:,} ({share:.1f} %)")
    table.add_row("parameters of the model", f"{result.total:,}")
    table.add_row("adapter.safetensors", f"{result.adapter_bytes / 1000:,.0f} kB")
    table.add_row("merged.pt", f"{result.merged_bytes / 1000:,.0f} kB")
    table.add_row("loss on new digits, before", f"{result.loss_before:.4f}")
    table.add_row("loss on new digits, after", f"{result.loss_after:.4f}")
    table.add_row("largest difference of strength 0 from the base", f"{result.restored:.1e}")
    table.add_row("largest difference after merging", f"{result.difference:.1e}")
    table.add_row("time", f"{result.seconds:.0f} s")
    return table


@app.command(epilog="Example: paramlora targets lora.json --model my_package.models:build")
def targets(
    config: Annotated[Path, typer.Argument(readable=False, help="A configuration in JSON.")],
    model: Annotated[str, typer.Option(help="module:factory, called without arguments.")],
    strict: Annotated[bool, typer.Option(help="Entries without a match are errors.")] = False,
) -> None:
    """Show what a configuration would adapt; nothing is changed."""
    with warnings_told():
        found = paramlora.targets(build(model), paramlora.LoRAConfig.from_file(config), strict)
    table = Table("tensor", "shape", "entry", "r", "kind", "parameters")
    for target in found:
        entry, shape = target.entry, "×".join(map(str, target.shape))
        told = (entry.name, str(entry.r or "-"), kind_of(entry).title())
        cells = (target.path or "(model)", shape, *told, f"{target.parameters:,}")
        table.add_row(*(Text(shown(cell)) for cell in cells))  # neither markup nor emoji
    rich.print(table)
    for name in dict.fromkeys(target.entry.name for target in found):
        if name in PRESETS or name.startswith("type:"):
            meant = grouped(target.path for target in found if target.entry.name == name)
            print(f'"{name}": {shown(meant)}')
    count = sum(target.parameters for target in found)
    size = counted(count, "parameter")
    print(f"{counted(len(found), 'tensor')}, {size} of updates and whole tensors")


def build(spec: str) -> nn.Module:
    """The model that ``module:factory`` makes, or an error that says why not."""
    name, _, factory = spec.partition(":")
    if not factory:
        fail(f"--model {spec}: names no factory. Give module:factory, such as my_package:build.")
    # as `python -m` does; a console script has its own folder there instead
    sys.path.insert(0, os.getcwd())
    try:
        make: Any = getattr(importlib.import_module(name), factory)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's own code runs here
        raise ParamloraError(
            f"--model {spec}: {_said(error)}. Give module:factory, such as my_package.models:build."
        ) from error
    try:
        built: Any = make()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ParamloraError(
            f"--model {spec}: {factory}() raised {_said(error)}. Mend the factory, which is called "
            "without arguments; --debug shows where."
        ) from error
    if not isinstance(built, nn.Module):
        kind = type(built).__name__
        fail(f"--model {spec}: gave {kind}, not a torch.nn.Module. Name a factory of a model.")
    return built


def _said(error: BaseException) -> str:
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # the user's own code, too
        lines = []
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
