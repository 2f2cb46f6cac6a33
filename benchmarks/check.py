"""A fresh run against the recorded table of the same card.

``python -m benchmarks.check FOLDER...`` reads the JSON that the benchmarks wrote there, prints what
is slower, larger, or loses more than noise allows, and exits 1 if anything is. Both are compared
as ratios to the frozen layer or model of the same run wherever there is one, so that another
clock or driver moves neither. ``python -m benchmarks.recorded FOLDER`` records a new table.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from benchmarks.recorded import Content, card_of, cards, recorded
from benchmarks.results import commit_of, load, markdown


@dataclass(frozen=True)
class Quantity:
    """How far a figure may move for the worse: by a share of itself, and by an amount."""

    share: float
    amount: float = 0.0
    falls: bool = False  # whether less is worse

    def allowed(self, value: float, noise: float = 0.0) -> float:
        """The worst value that still counts as `value`; `noise` widens it as much again."""
        away = value * self.share + self.amount + noise
        return value - away if self.falls else value + away


# Repeated runs of one commit on one H200: device R 1.07 to 1.11 for one layer, eager R 1.35 to
# 1.46 for the U-Net and 1.02 to 1.05 for the Llama blocks, Python per layer by a tenth; memory
# is counted, and moves with the allocator's rounding alone. The amounts are half of the last digit.
QUANTITIES = {
    "device R": Quantity(0.04, 0.005),
    "eager R": Quantity(0.10, 0.005),
    "Python R": Quantity(0.15),
    "bytes kept": Quantity(0.0, 16),  # a compiled layer's stride or two
    "peak MiB": Quantity(0.01, 0.5),
    "peak / frozen": Quantity(0.01, 0.001),
    "seconds": Quantity(0.15, 0.0005),
    "MiB beside": Quantity(0.02, 0.5),
    "units in the last place": Quantity(0.02, 0.005),
    "tokens a second": Quantity(0.05, falls=True),
    "output kept": Quantity(0.0, 0.01, falls=True),
    "gradient kept": Quantity(0.0, 0.01, falls=True),
}


@dataclass(frozen=True)
class Figure:
    """One number of one of our ways; `noise` is what the run itself says of its uncertainty."""

    what: str
    quantity: str
    value: float
    noise: float = 0.0


def figures(content: Content) -> Iterator[Figure]:
    """The figures of ours in a result file, without those that nothing bounds."""
    read = _READERS.get(content["kind"])
    if read is not None and not content.get("tiny"):
        yield from read(content)


def _ours(rows: list[Content]) -> list[Content]:
    return [row for row in rows if "paramlora" in row["way"] and "refused" not in row]


def _layers(content: Content) -> Iterator[Figure]:
    for row in _ours(content["rows"]):
        use = "inference" if row.get("inference") else "training"
        what = f"{row['case']}, {row['dtype']}, {use}, {row['way']}"
        for mode in ("device", "eager"):
            if f"{mode}_R" in row:
                yield Figure(what, f"{mode} R", row[f"{mode}_R"])
        if "saved_bytes" in row:
            yield Figure(what, "bytes kept", row["saved_bytes"])
    frozen = {r["dtype"]: r for r in content.get("launches", ()) if r["way"] == "frozen"}
    for row in _ours(content.get("launches", [])):
        what = f"a small layer, {row['dtype']}, {row['way']}"
        yield Figure(what, "Python R", row["step_us"] / frozen[row["dtype"]]["step_us"])


def _models(content: Content) -> Iterator[Figure]:
    frozen = {(r["case"], r["dtype"]): r for r in content["rows"] if r["way"] == "frozen"}
    for row in _ours(content["rows"]):
        what = f"{row['case']}, {row['dtype']}, {row['way']}"
        for mode in ("device", "eager"):
            if f"{mode}_R" in row:
                yield Figure(what, f"{mode} R", row[f"{mode}_R"])
        base = frozen[row["case"], row["dtype"]]
        if "peak_mib" in row:
            yield Figure(what, "peak / frozen", row["peak_mib"] / base["peak_mib"])


def _kept(content: Content) -> Iterator[Figure]:
    noise = {(r["case"], r["size"]): r for r in content["rows"] if r["way"] == "frozen"}
    for row in _ours(content["rows"]):
        what = f"{row['case']}, an update of {row['size']:.0e}, {row['way']}"
        for key, name in (("output", "output kept"), ("input_gradient", "gradient kept")):
            spread = abs(noise[row["case"], row["size"]][key])
            yield Figure(what, name, row[key], spread)


def _quantised(content: Content) -> Iterator[Figure]:
    for row in _ours(content["rows"]):
        saved = "with" if row["checkpointing"] else "without"
        what = f"{row['case']}, {row['way']}, {saved} checkpointing"
        yield Figure(what, "peak MiB", row["peak_mib"])
        yield Figure(what, "seconds", row["eager_ms"] / 1e3)


def _merged(content: Content) -> Iterator[Figure]:
    for row in _ours(content["rows"]):
        what = f"merging, TF32 {'allowed' if row['tf32'] else 'not allowed'}, {row['way']}"
        yield Figure(what, "seconds", row["seconds"])
        yield Figure(what, "MiB beside", row["beside_mib"])
        yield Figure(what, "units in the last place", row["units"])


def _experts(content: Content) -> Iterator[Figure]:
    quantities = {"device_R": "device R", "eager_R": "eager R", "beside_mib": "MiB beside"}
    for row in _ours(content["rows"]):
        what = f"experts, {row['case']}, {row['way']}"
        for key, name in (quantities | {"kept": "output kept"}).items():
            if key in row:
                yield Figure(what, name, row[key])


def _kinds(content: Content) -> Iterator[Figure]:
    quantities = {"device_R": "device R", "eager_R": "eager R", "saved_bytes": "bytes kept"}
    for row in (r for r in content["rows"] if "refused" not in r):  # all of them are ours
        for key, name in quantities.items():
            if key in row:
                yield Figure(f"kinds, {row['case']}, {row['way']}", name, row[key])


def _tokens(content: Content) -> Iterator[Figure]:
    for row in (r for r in _ours(content["rows"]) if "tokens_per_second" in r):
        what = f"{content['kind']}, {_sizes(content)}, {row['way']}"
        yield Figure(what, "tokens a second", row["tokens_per_second"])
        yield Figure(what, "peak MiB", row["peak_mib"])


def _sizes(content: Content) -> str:
    """What runs of one script must share to be compared."""
    told = ("layers", "batch", "tokens", "dropout", "compile")
    options = content["options"]
    return ", ".join(f"{name} {options[name]}" for name in told if name in options)


_READERS = {
    "layers": _layers,
    "models": _models,
    "update_kept": _kept,
    "quantised": _quantised,
    "merge_live": _merged,
    "experts": _experts,
    "kinds": _kinds,
    "llama": _tokens,
    "sharded_llama": _tokens,
}


@dataclass(frozen=True)
class Worse:
    """A figure that is worse than the worst of those recorded, and by more than noise."""

    fresh: Figure
    was: float
    limit: float


def worse(fresh: Figure, past: list[Figure]) -> Optional[Worse]:
    """Against the worst that was recorded: several tables may hold one figure."""
    quantity = QUANTITIES[fresh.quantity]
    sign = -1 if quantity.falls else 1
    last = max(past, key=lambda figure: sign * figure.value)
    limit = quantity.allowed(last.value, 2 * max(fresh.noise, last.noise))
    if sign * fresh.value <= sign * limit:
        return None
    return Worse(fresh, last.value, limit)


def compared(run: list[Content], past: list[Content]) -> tuple[list[Worse], int, list[Figure]]:
    """What is worse, how many figures were compared, and those that nothing is recorded of."""
    known: dict[tuple[str, str], list[Figure]] = {}
    for figure in (f for content in past for f in figures(content)):
        known.setdefault((figure.what, figure.quantity), []).append(figure)
    found: list[Worse] = []
    new: list[Figure] = []
    count = 0
    for figure in (f for content in run for f in figures(content)):
        last = known.get((figure.what, figure.quantity))
        if last is None:
            new.append(figure)
            continue
        count += 1
        bad = worse(figure, last)
        found += [bad] if bad else []
    return found, count, new


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="of a fresh run's JSON")
    options = parser.parse_args(arguments)
    run = [load(path) for folder in options.folders for path in sorted(folder.glob("*.json"))]
    run = [content for content in run if content.get("kind") in _READERS]
    if not run:
        folders = ", ".join(map(str, options.folders))
        print(f"{folders}: no result file to compare; run python -m benchmarks.layers --out first")
        return 2
    made_on = sorted({card_of(content) for content in run})
    return max(checked(card, [c for c in run if card_of(c) == card]) for card in made_on)


def checked(card: str, run: list[Content]) -> int:
    """Print the comparison of one card; 1 where something is worse, 2 where nothing is known."""
    past = recorded(card)
    if not past:
        print(
            f"nothing is recorded of {card}, only of {', '.join(cards())}; record the unchanged "
            "code's run first with python -m benchmarks.recorded FOLDER"
        )
        return 2
    found, count, new = compared(run, past)
    if found:
        print(_table(found))
    told = f"; {len(new)} are not recorded" if new else ""
    print(f"{card}: {len(found)} of {count} figures worse than noise allows{told}")
    print(f"recorded at {_commits(past)}; this run at {_commits(run)}")
    return int(bool(found)) if count else 2


def _commits(contents: list[Content]) -> str:
    """Of the measured code, in the order of the tables."""
    found = dict.fromkeys(commit_of(content) for content in contents)
    return ", ".join(f"commit {one}" if one else "a commit that was not kept" for one in found)


def _table(found: list[Worse]) -> str:
    lines = [
        [w.fresh.what, w.fresh.quantity, *(f"{v:,.4g}" for v in (w.was, w.limit, w.fresh.value))]
        for w in sorted(found, key=lambda w: (w.fresh.quantity, w.fresh.what))
    ]
    return markdown(["what", "figure", "recorded", "allowed", "now"], lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
