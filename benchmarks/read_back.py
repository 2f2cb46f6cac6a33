"""A report's tables as result files, to the digits that they show."""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

Content = dict[str, Any]
_WHERE = re.compile(
    r"`(?P<folder>[^/`]+)/(?P<kind>\w+)\.json`(?P<tiny> \(tiny models\))?: (?P<rest>.*)"
)


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


def _columns(section: str, names: dict[str, str]) -> Content:
    """Of one table, its columns by their names in rows; an empty cell is no value."""
    ((_, table),) = _tables(section)
    rows = []
    for line in table:
        told = {key: line.get(name, "") for name, key in names.items()}
        cells = {key: cell for key, cell in told.items() if cell not in ("", "-")}
        rows.append({k: c if k in _WORDS else _number(c) for k, c in cells.items()})
    return {"rows": rows}


def _tokens(section: str) -> Content:
    """Tokens a second and the peak by way, under the line that says the run's options."""
    (title, table), *_ = _tables(section)
    told = next(filter(None, (re.fullmatch(one, title) for one in _OPTIONS)))
    options = {name: _option(value) for name, value in told.groupdict().items()}
    origins = section.partition("Measured at ")[2]
    found = re.findall(r"(?:\((\w)\) )?commit (\w+) on ([^.;]+)", origins)
    made = {letter: (commit, device) for letter, commit, device in found}
    rows = []
    for line in table:
        way, mark = re.fullmatch(r"(.*?)(?: \((\w)\))?", line["way"]).groups("")  # type: ignore[union-attr]
        row: Content = {"way": way, "outcome": line["outcome"].strip("-")}
        if line["tokens a second"] != "-":
            peak = next(cell for name, cell in line.items() if name.startswith("peak GiB"))
            row |= {"tokens_per_second": _number(line["tokens a second"])}
            row |= {"peak_mib": 1024 * _number(peak), "steps": _number(line["steps"])}
            row |= {"trainable": _number(line["trainable"])}
            row["commit"], row["device"] = made[mark]
        rows.append(row)
    processes = {"processes": options.pop("processes")} if "processes" in options else {}
    return {"rows": rows, "options": options, **processes}


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


def _option(value: str) -> Any:
    return _number(value) if value[0].isdigit() else value == "blocks compiled"


_OPTIONS = (
    r"(?P<layers>\d+) layers, (?P<batch>\d+) × (?P<tokens>\d+) tokens a step, r (?P<r>\d+), "
    r"dropout (?P<dropout>[\d.]+), the loss in (?P<chunks>\d+) chunks, (?P<compile>[\w ]+)",
    r"(?P<layers>\d+) layers over (?P<processes>\d+) processes, (?P<batch>\d+) × "
    r"(?P<tokens>\d+) tokens in each",
)
_WORDS = ("case", "dtype", "way", "refused")
_TIMES = {"device ms": "device_ms", "R device": "device_R"}
_TIMES |= {"eager ms": "eager_ms", "R eager": "eager_R"}
_RATIOS = {"way": "way", "R device": "device_R", "R eager": "eager_R"}
_COLUMNS: dict[str, dict[str, str]] = {
    "models": {
        **{"model": "case", "dtype": "dtype", "way": "way", **_TIMES, "peak MiB": "peak_mib"},
        **{"trainable": "trainable", "outcome": "refused"},
    },
    "experts": {
        **{"layer": "case", "way": "way", **_TIMES, "tokens a second": "tokens_per_second"},
        **{"MiB a step": "beside_mib", "of frozen's": "beside_R", "kept": "kept"},
        **{"output error": "output_error", "gradient error": "gradient_error"},
        "outcome": "refused",
    },
    "dropout": {"tokens × in × out × r": "case", "way": "way", **_TIMES, "kept": "kept"},
    "kinds": {
        **{"layer": "case", **_RATIOS, "trained": "trainable", "file bytes": "file_bytes"},
        **{"bytes kept for backward": "saved_bytes", "outcome": "refused"},
    },
    "routed": {
        **{"case": "case", **_RATIOS, "tokens a second": "tokens_per_second"},
        **{"peak MiB": "peak_mib", "seconds": "seconds", "outcome": "refused"},
    },
}
_READERS: dict[str, Callable[[str], Content]] = {
    "layers": _layers,
    **{kind: functools.partial(_columns, names=names) for kind, names in _COLUMNS.items()},
    "update_kept": _kept,
    "quantised": _quantised,
    "merge_live": _merged,
    "llama": _tokens,
    "sharded_llama": _tokens,
}
