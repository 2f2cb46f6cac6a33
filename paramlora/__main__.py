"""``python -m paramlora``."""

from paramlora.cli import main

main()
