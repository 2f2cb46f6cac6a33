"""Files: checkpoints and adapters, read and written within bounds; conversions, streamed."""

from paramlora.files.convert import Report, embed, extract, kept, merge

__all__ = ["Report", "embed", "extract", "kept", "merge"]
