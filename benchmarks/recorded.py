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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.results import load

Content = dict[str, Any]
PLACE = Path(__file__).parent / "recorded"
_WHERE = re.compile(
    r"`(?P<folder>[^/`]+)/(?P<kind>\w+)\.json`(?P<tiny> \(tiny models\))?: (?P<rest>.*)"
)


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


def read_back(text: str) -> list[Content]:
    """The content of every table of a report that can be compared with a later run."""
    contents = []
    for section in text.split("\n## ")[1:]:
        where = next(filter(None, map(_WHERE.match, section.splitlines())), None)
        if where and where["kind"] in _READERS:
            rows = _READERS[where["kind"]](section)
            content = {"folder": where["folder"], "kind": where["kind"], **rows}
            commit = re.search(r"(?:Measured at |; )commit (\w+)", section)
            device, _, rest = where["rest"].partition("; ")
            machine = {"device": device.split(",")[0]}
            machine |= {"processor": rest.split(",")[0]} if rest else {}
            machine |= {"commit": commit[1]} if commit else {}
            contents.append({**content, "machine": machine, "tiny": bool(where["tiny"])})
    return contents


def _tables(section: str) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Each table below the last line of text before it: its lines by column."""
    title = ""
    for part in section.split("\n\n"):
        if not part.startswith("|"):
            title = part.strip() or title
            continue
        header, _, *lines = ([c.strip() for c in x.strip("| ").split(" | ")] for x in _rows(part))
        yield title, [dict(zip(header, line)) for line in lines]


def _rows(part: str) -> list[str]:
    return [line.replace("|  |", "| - |").replace("|  |", "| - |") for line in part.splitlines()]


def _grid(rows: dict[Any, Content], table: list[dict[str, str]], key: str, **same: Any) -> None:
    """A table of one value, a column for each way, into the rows."""
    for line in table:
        for way, cell in list(line.items())[1:]:
            at = (line["case"], *same.values(), way)
            row = rows.setdefault(at, {"case": line["case"], **same, "way": way})
            if cell in ("refused", "wrong"):
                row["refused"] = "refused" if cell == "refused" else "AssertionError"
            elif cell not in ("", "-"):
                row[key] = _number(cell)


def _number(cell: str) -> Any:
    plain = cell.replace(",", "")
    return int(plain) if re.fullmatch(r"-?\d+", plain) else float(plain)


def _layers(section: str) -> Content:
    rows: dict[Any, Content] = {}
    launches, kind = [], ""
    for title, table in _tables(section):
        timed = re.match(r"R, (\S+), (training|inference), (device|eager) time", title)
        if timed:
            kind = timed[1]
            same = {"dtype": kind, "inference": timed[2] == "inference"}
            _grid(rows, table, f"{timed[3]}_R", **same)
        elif title.startswith("Bytes kept"):
            _grid(rows, table, "saved_bytes", dtype=kind, inference=False)
        elif title.startswith("Python per layer"):
            for line in table:
                numbers = {"forward_us": line["forward"], "step_us": line["forward and backward"]}
                one = {"way": line["way"], "dtype": line["dtype"]}
                launches.append(one | {k: _number(v) for k, v in numbers.items()})
    return {"rows": list(rows.values()), "launches": launches}


def _models(section: str) -> Content:
    names = {"device ms": "device_ms", "R device": "device_R", "eager ms": "eager_ms"}
    names |= {"R eager": "eager_R", "peak MiB": "peak_mib", "trainable": "trainable"}
    ((_, table),) = _tables(section)
    rows = []
    for line in table:
        row: Content = {"case": line["model"], "dtype": line["dtype"], "way": line["way"]}
        cells = {key: line[name] for name, key in names.items()}
        rows.append(row | {key: _number(c) for key, c in cells.items() if c not in ("", "-")})
    return {"rows": rows}


def _kept(section: str) -> Content:
    ((_, table),) = _tables(section)
    rows = []
    for line in table:
        for way, cell in list(line.items())[2:]:
            output, gradient = (round(float(c) / 100, 3) for c in cell.split(" / "))
            row = {"case": line["case"], "size": float(line["‖Δ‖/‖W‖"]), "way": way}
            rows.append(row | {"output": output, "input_gradient": gradient})
    return {"rows": rows}


def _quantised(section: str) -> Content:
    ((title, table),) = _tables(section)
    rows = []
    for line in table:
        row: Content = {"case": title.split(": a training step")[0], "way": line["way"]}
        row["checkpointing"] = line["checkpointing"] == "yes"
        numbers = {"trainable": "trainable", "stored MiB": "stored_mib", "peak MiB": "peak_mib"}
        numbers |= {"eager ms": "eager_ms", "output error": "output_error"}
        numbers |= {"gradient error": "gradient_error"}
        rows.append(row | {key: _number(line[name]) for name, key in numbers.items()})
    return {"rows": rows}


def _merged(section: str) -> Content:
    ((_, table),) = _tables(section)
    names = {"seconds": "seconds", "MiB beside the model": "beside_mib"}
    names |= {"units in the last place": "units"}
    rows = []
    for line in table:
        row: Content = {"way": line["way"], "tf32": line["TF32 allowed"] == "yes"}
        rows.append(row | {key: _number(line[name]) for name, key in names.items()})
    return {"rows": rows}


_READERS = {
    "layers": _layers,
    "models": _models,
    "update_kept": _kept,
    "quantised": _quantised,
    "merge_live": _merged,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
