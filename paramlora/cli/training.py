"""The commands around training: `demo`, `targets`."""

import importlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import rich
import typer
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import nn

import paramlora
from paramlora import ParamloraError
from paramlora.cli.app import app, fail, warnings_told
from paramlora.errors import shown
from paramlora.model.presets import PRESETS, grouped

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
) -> None:
    """Teach a small diffusion U-Net the digits 0 to 4, adapt it to 5 to 9, merge, and compare."""
    try:
        from paramlora.cli import demo as job

        job.digits()
    except ImportError as error:
        fail(f"the demo needs {error.name}: pip install 'paramlora[demo]'")
    try:
        config = job.write_config(out)
    except OSError as error:
        fail(f"--out {out}: cannot be written: {error.strerror}. Give a folder of your own.")
    print(f"{out / 'lora.json'}\n{config}")
    with Progress() as bars:
        tasks = {"pre-train": bars.add_task("pre-train", total=pretrain_steps)}
        tasks["adapt"] = bars.add_task("adapt", total=steps)
        result = job.run(
            out,
            steps,
            seed,
            lambda name, n, total: bars.update(tasks[name], completed=n),
            pretrain_steps,
        )
    table = Table(title="paramlora demo", show_header=False)
    share = 100 * result.trainable / result.total
    table.add_row("trainable parameters", f"{result.trainable:,} ({share:.1f} %)")
    table.add_row("parameters of the model", f"{result.total:,}")
    table.add_row("adapter.safetensors", f"{result.adapter_bytes / 1000:,.0f} kB")
    table.add_row("merged.pt", f"{result.merged_bytes / 1000:,.0f} kB")
    table.add_row("loss on new digits, before", f"{result.loss_before:.4f}")
    table.add_row("loss on new digits, after", f"{result.loss_after:.4f}")
    table.add_row("largest difference after merging", f"{result.difference:.1e}")
    table.add_row("time", f"{result.seconds:.0f} s")
    rich.print(table)
    print(f"Look at {out / 'samples.png'}.")
    if result.difference > job.TOLERANCE:
        fail(f"merged and attached samples differ by {result.difference:.1e}")


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
        r = "-" if entry.whole else str(entry.r)
        kind = "whole" if entry.whole else "hard" if entry.hard else "soft"
        cells = (target.path or "(model)", shape, entry.name, r, kind, f"{target.parameters:,}")
        table.add_row(*(Text(shown(cell)) for cell in cells))  # neither markup nor emoji
    rich.print(table)
    for name in dict.fromkeys(target.entry.name for target in found):
        if name in PRESETS or name.startswith("type:"):
            meant = grouped(target.path for target in found if target.entry.name == name)
            print(f'"{name}": {shown(meant)}')
    count = sum(target.parameters for target in found)
    print(f"{len(found)} tensors, {count:,} parameters of updates and whole tensors")


def build(spec: str) -> nn.Module:
    """The model that ``module:factory`` makes, or an error that says why not."""
    name, _, factory = spec.partition(":")
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
