"""What pyproject.toml cannot say: the README as a package index shows it."""

import re
from pathlib import Path

# Where the repository's files are, such as "https://forge.example/us/paramlora/blob/main/", and
# its pictures; a package index knows neither, so without them what would be linked is named.
FILES = PICTURES = ""


def for_an_index(text: str, files: str = FILES, pictures: str = PICTURES) -> str:
    """The README with links that work away from the repository, or with none."""

    def shown(match: "re.Match[str]") -> str:
        picture, words, target = match.groups()
        address = (pictures if picture else files) + target
        if "://" in address:
            return f"{picture}[{words}]({address})"
        if picture:
            return f"*{words}* (`{target}`)"
        told = target.startswith("#") or words.strip("`/") in target
        return words if told else f"{words} (`{target}`)"

    return re.sub(r"(!?)\[([^\]]+)\]\(([^)\s]+)\)", shown, text)


if __name__ == "__main__":
    from setuptools import setup

    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    setup(long_description=for_an_index(text), long_description_content_type="text/markdown")
