"""The application that the commands are added to: how it reports, fails and exits."""

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn, Optional

import rich
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

import paramlora
from paramlora.files import Progress as Told

DONE, FAULT, WRONG, STOPPED = 0, 1, 2, 130
_EXITS = "Exit codes: 0 done, 1 a fault of paramlora, 2 wrong input, 130 stopped."

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(
    help="LoRA fine-tuning for any torch.nn.Module, as a weight parametrization.", epilog=_EXITS
)
def _about(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error arose.")] = False,
) -> None:
    return None  # `main` looks for --debug, because it also serves where nothing was parsed


def fail(message: str) -> NoReturn:
    """Say what is wrong with the input, and exit."""
    _tell(message)
    raise typer.Exit(WRONG)


def report(content: dict[str, Any], as_json: bool, text: str) -> None:
    """Print an answer that was asked for, for machines or for people."""
    if as_json:
        print(json.dumps(content))
    else:
        rich.print(escape(text))


@contextmanager
def bar(title: str) -> Iterator[Told]:
    """A progress bar of bytes on stderr, only where that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as shown:
        task = shown.add_task(title, total=None)

        def told(count: int, total: int) -> None:
            shown.update(task, advance=count, total=total)

        yield told


def main(arguments: Optional[list[str]] = None) -> None:
    """Run the command line and exit: 0, 1 for a fault of ours, 2 for wrong input, 130 stopped."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        code = app(given, standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in given:
            traceback.print_exception(error)
        code = _exit_code(error)
    if code == STOPPED:
        print("stopped", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else DONE)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        return STOPPED
    if isinstance(error, paramlora.ParamloraError):
        _tell(str(error))
        return WRONG
    if hasattr(error, "show"):  # wrong use, as click reports it
        error.show()
        return WRONG
    _tell(f"{type(error).__name__}: {error}. This is a fault of paramlora: --debug shows where.")
    return FAULT


def _tell(message: str) -> None:
    rich.print(f"[red]error:[/] {escape(message)}", file=sys.stderr)
