"""For mkdocs: a line ``README: Speed`` of a page becomes that section of the README.

So the README is whole where it stands alone, and nothing is written twice.
"""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
PAGES = {"configuration": "configuration.md", "speed": "speed.md", "limits": "limits.md"}


def on_page_markdown(markdown, **_):
    """mkdocs calls this for each page."""
    return re.sub(r"^README: (.+)$", lambda m: section(m[1]), markdown, flags=re.M)


def section(title):
    """The text under a heading of the README (or its opening), with links that work in the site."""
    text = README.read_text(encoding="utf-8")
    parts = re.split(r"^## (.+)\n", text, flags=re.M)
    named = {"opening": parts[0].split("\n", 1)[1], **dict(zip(parts[1::2], parts[2::2]))}
    if title not in named:
        raise KeyError(f'README.md has no section "{title}": {", ".join(named)}')
    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", _link, named[title].strip())


def _link(match):
    """A page of the site is linked; another file of the repository is only named."""
    text, target = match.groups()
    if target.startswith("docs/"):
        return f"[{text}]({target.removeprefix('docs/')})"
    if target.startswith("#"):
        return f"[{text}]({PAGES[target[1:]]})"
    return text if ":" not in target else match[0]
