"""The recorded figures of each card, as result files.

``python -m benchmarks.recorded FOLDER...`` writes ``benchmarks/recorded/CARD.json`` for every
card in the folders' result files, in place of what it held of the same folder and kind.
``--results benchmarks/RESULTS.md`` reads the tables there back instead, to the digits they show;
`benchmarks.report` renders the same tables from what it gives.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.read_back import read_back
from benchmarks.results import load

Content = dict[str, Any]
PLACE = Path(__file__).parent / "recorded"


def file_of(card: str) -> Path:
    """The file of a card, by the name that torch gives it."""
    return PLACE / f"{re.sub(r'[^A-Za-z0-9]+', '-', card).strip('-')}.json"


def card_of(content: Content) -> str:
    """The device; a processor's own name where that is only called ``cpu``."""
    made_on = content["machine"]
    device: str = made_on["device"]
    return f"cpu {made_on['processor']}" if device == "cpu" else device


def recorded(card: str) -> list[Content]:
    """The recorded result files of a card; none where it was never measured."""
    path = file_of(card)
    return load(path)["contents"] if path.exists() else []


def cards() -> list[str]:
    return sorted(load(path)["card"] for path in PLACE.glob("*.json"))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recorded", description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--results", type=Path, help="read this report's tables back")
    options = parser.parse_args(arguments)
    contents = [{"folder": f.name, **load(p)} for f in options.folders for p in f.glob("*.json")]
    if options.results:
        contents += read_back(options.results.read_text(encoding="utf-8"))
    for card in sorted({card_of(c) for c in contents}):
        print(store(card, [c for c in contents if card_of(c) == card]))
    return 0


def store(card: str, contents: list[Content]) -> Path:
    """Replace what is recorded of the same folder and kind; keep the rest."""
    new = {(c["folder"], c["kind"]): c for c in recorded(card)}
    new |= {(c["folder"], c["kind"]): c for c in contents}
    path = file_of(card)
    path.parent.mkdir(exist_ok=True)
    text = ",\n".join(_lines(content) for content in new.values())
    whole = f'{{"card": {json.dumps(card)}, "contents": [\n{text}\n]}}\n'
    path.write_text(whole, encoding="utf-8")
    return path


def _lines(content: Content) -> str:
    """One line for what the rows share, and one for each row, so that a change shows."""
    lists = {key: value for key, value in content.items() if isinstance(value, list)}
    rest = {key: value for key, value in content.items() if key not in lists}
    head = json.dumps(rest, ensure_ascii=False)[1:-1]
    parts = [
        f"{json.dumps(key)}: [\n"
        + ",\n".join(json.dumps(v, ensure_ascii=False) for v in rows)
        + "]"
        for key, rows in lists.items()
    ]
    return "{" + ", ".join([head, *parts]) + "}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
