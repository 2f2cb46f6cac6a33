"""For mkdocstrings: our docstrings as griffe reads Google's style."""

import re

import griffe

_SEVERAL = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +.*)*)", re.M)


class Docstrings(griffe.Extension):
    """An ``Example:`` is code, and one line may tell of several arguments."""

    def on_object(self, *, obj, **_):
        """griffe calls this for each class, function and module."""
        if obj.docstring and not obj.is_alias:
            text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M)
            obj.docstring.value = _SEVERAL.sub(_apart, text)


def _apart(match):
    indent, names, text = match.groups()
    return "\n".join(f"{indent}{name}: {text}" for name in names.split(", "))
