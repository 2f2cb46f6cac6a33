"""Which classes of `benchmarks.architectures` the tests take: a cover of what all of them reach.

``python -m benchmarks.arch_cover --out FOLDER`` examines every class that FOLDER's
``architectures.jsonl`` has as checked, and every variant, one line for each in ``arch_cover.jsonl``
(it goes on where it stopped), and prints the names to put into ``tests/test_architectures.py``:
step by step the class that reaches most that is new for the seconds it takes, until nothing is new.

What a class reaches is each line of the package that runs for it, and each way that its kinds of
layers go (see `ways`).
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import re
import sys
import time
from pathlib import Path
from typing import Any

import paramlora
from benchmarks import architectures
from benchmarks.arch_variants import VARIANTS
from benchmarks.architectures import Row

PACKAGE = str(Path(paramlora.__file__).parent)


class Lines:
    """The lines of the package that run inside of the block."""

    def __init__(self) -> None:
        self.found: set[tuple[str, int]] = set()

    def __enter__(self) -> "Lines":
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: Any, event: str, _: object) -> Any:
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame: Any, event: str, _: object) -> Any:
        self.found.add((frame.f_code.co_filename[len(PACKAGE) + 1 :], frame.f_lineno))
        return self._line


def ways(row: Row) -> set[str]:
    """Each kind of layer of either library with each check that is exact or refused; what the plain
    model or peft cannot do reaches nothing of ours."""
    found = {f"{row['library']}, {row['dtype']}"}
    for check, told in row["checks"].items():
        refused = str(told).startswith("FileError:")
        if isinstance(told, float) or refused:
            outcome = "refused" if refused else "exact"
            found |= {f"{row['library']}: {kind}: {check}: {outcome}" for kind in row["layers"]}
    return found


def reached(name: str) -> Row:
    """What one class reaches, and its seconds without the counting."""
    architectures.quiet()
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        started = time.process_time()
        row = architectures.examined(name, cost=False)
        seconds = time.process_time() - started
        with Lines() as lines:
            architectures.examined(name, cost=False)
    if not row.get("reached"):  # none of its updates trains with these inputs
        return {"class": name, "seconds": seconds, "reached": []}
    places = [f"{file}:{number}" for file, number in sorted(lines.found)]
    return {"class": name, "seconds": round(seconds, 3), "reached": [*places, *sorted(ways(row))]}


def chosen(rows: list[Row]) -> list[Row]:
    """A greedy cover, without those that all later ones made needless."""
    left = {place for row in rows for place in row["reached"]}
    taken: list[Row] = []
    while left:
        best = max(rows, key=lambda row: len(left & set(row["reached"])) / row["seconds"])
        left -= set(best["reached"])
        taken.append(best)
    for row in sorted(taken, key=lambda row: -row["seconds"]):
        others = {place for one in taken if one is not row for place in one["reached"]}
        if others >= set(row["reached"]):
            taken.remove(row)
    return taken


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.arch_cover", description=__doc__)
    parser.add_argument("pattern", nargs="?", default="")
    parser.add_argument("--out", default="benchmarks/recorded")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--slowest", type=float, default=3.0, help="seconds, beyond which none is")
    options = parser.parse_args(arguments)
    recorded = architectures.done(Path(options.out, "architectures.jsonl")).values()
    names = [row["class"] for row in recorded if "checks" in row]
    names = [n for n in dict.fromkeys([*names, *VARIANTS]) if re.search(options.pattern, n)]
    quick = {row["class"] for row in recorded if row.get("seconds", 0) <= options.slowest}
    path = Path(options.out, "arch_cover.jsonl")
    architectures.quiet()
    before = architectures.done(path)
    context = multiprocessing.get_context("fork")
    left = [n for n in names if n not in before and (n in quick or n in VARIANTS)]
    with context.Pool(options.workers, maxtasksperchild=20) as pool, path.open("a") as out:
        for row in pool.imap_unordered(reached, left):
            out.write(json.dumps(row) + "\n")
            out.flush()
    rows = [row for name, row in architectures.done(path).items() if name in names]
    found = chosen(rows)
    print("\n".join(sorted(row["class"] for row in found)))
    print(f"{len(found)} of {len(rows)}, {sum(row['seconds'] for row in found):.0f} s of computing")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
