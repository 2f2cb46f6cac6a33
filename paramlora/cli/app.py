"""The application that the commands are added to: how it reports, fails and exits."""

import io
import json
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn, Optional

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

import paramlora
from paramlora.cli.stops import STOPPED
from paramlora.errors import is_stop, shown
from paramlora.files.conversions import Progress as Told

DONE, FAULT, WRONG = 0, 1, 2
_PAST = {
    "combine": "combined",
    "convert": "converted",
    "embed": "embedded",
    "extract": "extracted",
    "merge": "merged",
    "resize": "resized",
    "subtract": "subtracted",
}
_EXITS = "Exit codes: 0 done, 1 a fault of paramlora, 2 wrong input, 128 + N stopped by signal N."

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        print(f"paramlora {paramlora.__version__}")
        raise typer.Exit(DONE)


@app.callback(
    help="LoRA fine-tuning for any torch.nn.Module, as a weight parametrization.", epilog=_EXITS
)
def _about(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print it.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error arose.")] = False,
) -> None:
    return None  # `run` looks for --debug, because it also serves where nothing was parsed


def fail(message: str) -> NoReturn:
    """Say what is wrong with the input, and exit."""
    _tell("error", "red", message)
    raise typer.Exit(WRONG)


def report(content: dict[str, Any], as_json: bool, text: str) -> None:
    """Print an answer that was asked for, for machines or for people."""
    if as_json:
        print(json.dumps(content))
    else:
        print(shown(text))  # not by rich, which reads paths as markup and emoji


def wrote(verb: str, text: str, quiet: bool) -> None:
    """Say on stderr, in one line, what was done: ``merged 128 of 686 tensors into ...``."""
    if not quiet:
        print(f"{_PAST[verb]} {shown(text)}", file=sys.stderr)


@contextmanager
def warnings_told() -> Iterator[None]:
    """Say on stderr what was left undone, in one line each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", paramlora.ParamloraWarning)
        try:
            yield
        finally:  # before the error, where one follows
            for warning in caught:
                _tell("warning", "yellow", str(warning.message))


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


def run(arguments: Optional[list[str]] = None) -> NoReturn:
    """Run a command and exit, as `paramlora.cli.main` says."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        # a test or a notebook may have put something else there
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a name may be any text
        # else click itself prints, and exits with codes of its own
        code = app(given, standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in given:
            traceback.print_exception(error)
        code = _exit_code(error, given)
    if code == STOPPED:
        print("stopped", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else DONE)


def _exit_code(error: BaseException, given: list[str]) -> int:
    if is_stop(error) or type(error).__name__ == "Abort":
        return STOPPED
    if isinstance(error, paramlora.ParamloraError):
        _tell("error", "red", str(error))
        return WRONG
    if hasattr(error, "show") and hasattr(error, "format_message"):  # wrong use, as click tells it
        text = error.format_message()
        if not text:  # the help, which was asked for by saying nothing
            return WRONG
        error.show() if "\n" in text else _tell("error", "red", _misuse(error, text, given))
        return WRONG
    if isinstance(error, OSError) and error.filename is None:  # of a stream, not of a file
        _tell("error", "red", f"cannot be written: {error.strerror or error}.")
        return WRONG
    fault = f"{type(error).__name__}: {error}. This is a fault of paramlora: --debug shows where."
    _tell("error", "red", fault)
    return FAULT


def _misuse(error: Any, text: str, given: list[str]) -> str:
    """What click says of wrong use, with the value that it leaves out, and where to read more."""
    options = getattr(getattr(error, "param", None), "opts", [])
    # --rank=x and --rank x
    pairs = [one.partition("=")[::2] for one in given]
    pairs += [(one, after) for one, after in zip(given, given[1:]) if "=" not in one]
    value = next((value for name, value in pairs if name in options and value), None)
    got = "" if value is None or value in text else f", got {value!r}"
    command = getattr(error, "ctx", None)
    name = command.info_name if command is not None and command.parent is not None else ""
    said = f"{shown(text).rstrip('.')}{shown(got)}"
    end = "" if said.endswith("?") else "."
    return f"{said}{end} See {f'paramlora {name}'.strip()} --help."


def _tell(kind: str, style: str, message: str) -> None:
    text = Text.assemble((f"{kind}:", style), f" {message}")  # read neither as markup nor emoji
    Console(stderr=True, soft_wrap=True, highlight=False).print(text)
