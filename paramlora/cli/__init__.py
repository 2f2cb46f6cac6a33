"""The command line: the only place that prints or exits. A file holds a group of commands."""

try:
    import rich  # noqa: F401
    import typer  # noqa: F401
except ImportError as error:
    raise SystemExit(
        f"the paramlora command needs {error.name}: pip install 'paramlora[cli]'"
    ) from None

from paramlora.cli import adapters, arithmetic, checkpoints, training
from paramlora.cli.app import main

__all__ = ["adapters", "arithmetic", "checkpoints", "main", "training"]
