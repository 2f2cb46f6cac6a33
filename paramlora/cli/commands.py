"""All commands: importing a file of them adds them to the application."""

try:
    import rich  # noqa: F401
    import typer  # noqa: F401
except ImportError as error:
    raise SystemExit(
        f"the paramlora command needs {error.name}: pip install 'paramlora[cli]'"
    ) from None

from paramlora.cli import adapters, arithmetic, checkpoints, training
from paramlora.cli.app import app, run

__all__ = ["adapters", "app", "arithmetic", "checkpoints", "run", "training"]
