"""A fresh run against the recorded table of the same card.

``python -m benchmarks.check FOLDER...`` reads the JSON that the benchmarks wrote there, prints what
is slower, larger, or loses more than noise allows, and exits 1 if anything is. Both are compared
as ratios to the frozen layer or model of the same run wherever there is one, so that another
clock or driver moves neither. ``python -m benchmarks.recorded FOLDER`` records a new table.
"""

import argparse
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
    """One number of one of our ways; `noise` is what the run itself says of its uncertainty.

    A way that was refused or failed has one figure, REFUSED, and its reason as `outcome`.
    """

    what: str
    quantity: str
    value: float
    noise: float = 0.0
    outcome: str = ""


REFUSED = "refused"
_KEYS = {
    **{"device_R": "device R", "eager_R": "eager R", "saved_bytes": "bytes kept"},
    **{"beside_mib": "MiB beside", "kept": "output kept", "peak_mib": "peak MiB"},
    **{"seconds": "seconds", "tokens_per_second": "tokens a second"},
}


def figures(content: Content) -> Iterator[Figure]:
    """The figures of ours in a result file, without those that nothing bounds."""
    read = _READERS.get(content["kind"])
    if read is not None and not content.get("tiny"):
        yield from read(content)


def _ours(rows: list[Content]) -> list[Content]:
    return [row for row in rows if "paramlora" in row["way"]]


def _row(what: str, row: Content, keys: dict[str, str]) -> Iterator[Figure]:
    """By what keys name them, or that there are none because of the way's outcome."""
    outcome = str(row.get("refused") or row.get("outcome") or "")
    if outcome:
        yield Figure(what, REFUSED, math.nan, outcome=outcome)
        return
    for key, name in keys.items():
        if key in row:
            yield Figure(what, name, row[key])


def _layers(content: Content) -> Iterator[Figure]:
    for row in _ours(content["rows"]):
        use = "inference" if row.get("inference") else "training"
        yield from _row(f"{row['case']}, {row['dtype']}, {use}, {row['way']}", row, _KEYS)
    frozen = {r["dtype"]: r for r in content.get("launches", ()) if r["way"] == "frozen"}
    for row in _ours(content.get("launches", [])):
        what, base = f"a small layer, {row['dtype']}, {row['way']}", frozen.get(row["dtype"])
        if base is not None:
            yield Figure(what, "Python R", row["step_us"] / base["step_us"])


def _models(content: Content) -> Iterator[Figure]:
    frozen = {(r["case"], r["dtype"]): r for r in content["rows"] if r["way"] == "frozen"}
    for row in _ours(content["rows"]):
        what = f"{row['case']}, {row['dtype']}, {row['way']}"
        yield from _row(what, row, {k: v for k, v in _KEYS.items() if k != "peak_mib"})
        base = frozen.get((row["case"], row["dtype"]), {})
        if "peak_mib" in row and "peak_mib" in base:
            yield Figure(what, "peak / frozen", row["peak_mib"] / base["peak_mib"])


def _kept(content: Content) -> Iterator[Figure]:
    noise = {(r["case"], r["size"]): r for r in content["rows"] if r["way"] == "frozen"}
    keys = {"output": "output kept", "input_gradient": "gradient kept"}
    for row in _ours(content["rows"]):
        base = noise.get((row["case"], row["size"]), {})
        what = f"{row['case']}, an update of {row['size']:.0e}, {row['way']}"
        for key, figure in zip(keys, _row(what, row, keys)):
            yield replace(figure, noise=abs(base.get(key, 0.0)))


def _quantised(content: Content) -> Iterator[Figure]:
    for row in _ours(content["rows"]):
        saved = "with" if row["checkpointing"] else "without"
        what = f"{row['case']}, {row['way']}, {saved} checkpointing"
        yield from _row(what, row, {"peak_mib": "peak MiB"})
        if "eager_ms" in row:
            yield Figure(what, "seconds", row["eager_ms"] / 1e3)


def _merged(content: Content) -> Iterator[Figure]:
    for row in _ours(content["rows"]):
        what = f"merging, TF32 {'allowed' if row['tf32'] else 'not allowed'}, {row['way']}"
        yield from _row(what, row, _KEYS | {"units": "units in the last place"})


# of scripts whose other ways are ours, with what makes them so in their names
_OTHERS = re.compile("frozen|peft.*|unfused|unsloth|definition")


def _named(content: Content) -> Iterator[Figure]:
    """Of a script whose rows name their figures."""
    for row in content["rows"]:
        if not _OTHERS.fullmatch(row["way"]):
            yield from _row(f"{content['kind']}, {row['case']}, {row['way']}", row, _KEYS)


def _tokens(content: Content) -> Iterator[Figure]:
    for row in _ours(content["rows"]):
        yield from _row(f"{content['kind']}, {_sizes(content)}, {row['way']}", row, _KEYS)


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
    **dict.fromkeys(("experts", "dropout", "kinds", "routed"), _named),
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


@dataclass
class Comparison:
    """What is worse, what is not any more though it was, how many figures were compared, how many
    have nothing recorded, and the recorded ones of the same scripts that the run lacks."""

    worse: list[Worse]
    refused: list[Figure]
    count: int
    new: int
    missing: list[Figure]


def compared(run: list[Content], past: list[Content]) -> Comparison:
    known: dict[tuple[str, str], list[Figure]] = {}
    kinds = {content["kind"] for content in run}
    for figure in (f for content in past for f in figures(content)):
        known.setdefault((figure.what, figure.quantity), []).append(figure)
    measured = {what for what, quantity in known if quantity != REFUSED}
    fresh = [figure for content in run for figure in figures(content)]
    refused = [f for f in fresh if f.quantity == REFUSED and f.what in measured]
    numbers = [f for f in fresh if f.quantity != REFUSED]
    both = [f for f in numbers if (f.what, f.quantity) in known]
    told = {(f.what, f.quantity) for f in fresh}
    failed = {f.what for f in fresh if f.quantity == REFUSED}
    ours = (f for content in past if content["kind"] in kinds for f in figures(content))
    lacked = (f for f in ours if f.quantity != REFUSED and f.what not in failed)
    missing = [f for f in lacked if (f.what, f.quantity) not in told]
    found = [worse(figure, known[figure.what, figure.quantity]) for figure in both]
    bad = [one for one in found if one]
    return Comparison(bad, refused, len(both), len(numbers) - len(both), missing)


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
    found = compared(run, past)
    if found.worse or found.refused:
        print(_table(found))
    told = f"; {found.new} are not recorded" if found.new else ""
    told += f"; {len(found.refused)} refused that were not" if found.refused else ""
    print(f"{card}: {len(found.worse)} of {found.count} figures worse than noise allows{told}")
    if found.missing:
        cases = _lacked(found.missing, run)
        print(f"not in this run: {'; '.join(cases[:SHOWN])}{_more(len(cases) - SHOWN)}")
    print(f"recorded at {_commits(past)}; this run at {_commits(run)}")
    if found.worse or found.refused:
        return 1
    if not found.count:
        tiny = all(content.get("tiny") for content in run)
        why = "tiny models are not compared" if tiny else "no figure of the run is recorded"
        print(f"{card}: nothing was compared: {why}")
    return 0 if found.count else 2


def _lacked(missing: list[Figure], run: list[Content]) -> list[str]:
    """Each case once; of one that the run has otherwise, the figure too."""
    there = {figure.what for content in run for figure in figures(content)}
    named = (f"{f.what} ({f.quantity})" if f.what in there else f.what for f in missing)
    return list(dict.fromkeys(named))


SHOWN = 4  # of what a run lacks, which may have been asked for a part alone


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


def _commits(contents: list[Content]) -> str:
    """Of the measured code, in the order of the tables."""
    found = dict.fromkeys(commit_of(content) for content in contents)
    return ", ".join(f"commit {one}" if one else "a commit that was not kept" for one in found)


def _table(found: Comparison) -> str:
    lines = [
        [w.fresh.what, w.fresh.quantity, *(f"{v:,.4g}" for v in (w.was, w.limit, w.fresh.value))]
        for w in sorted(found.worse, key=lambda w: (w.fresh.quantity, w.fresh.what))
    ]
    lines += [[f.what, f.quantity, "", "", f.outcome] for f in found.refused]
    return markdown(["what", "figure", "recorded", "allowed", "now"], lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
