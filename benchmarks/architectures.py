"""Every model class of the installed transformers and diffusers, built tiny and adapted whole.

``python -m benchmarks.architectures [PATTERN] --out FOLDER`` goes on with FOLDER's
``architectures.jsonl``, one line for each class, and prints the counts. PATTERN is a regular
expression for the class's name. Each is compared with a dense reference of the script's own
(`benchmarks.dense`): outputs and gradients in evaluation and training, saved and loaded, merged
through the library's files, detached, checkpointed, and written for peft and read there. With
``--one`` it takes one class for each configuration; ``--out benchmarks/recorded --count 0`` prints
what is recorded there.
"""

import argparse
import contextlib
import functools
import gc
import io
import itertools
import json
import multiprocessing
import re
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, Optional

import torch
from torch import nn

from benchmarks import arch_checks, dense, tiny, tiny_inputs
from benchmarks.arch_variants import VARIANTS
from benchmarks.machine import commit
from benchmarks.results import markdown

Row = dict[str, Any]
LONGEST = 30  # seconds of computing for one class
SEARCHED = 6  # seconds of them at most until it is built and called
TRIED = 60  # inputs for one model
RESIZED = 5  # how often inputs take other sizes by what errors say


def transformers_classes(pattern: str = "") -> dict[str, type[nn.Module]]:
    """By name, those with a configuration of their own; abstract ones left out."""
    import transformers

    found = {}
    transformers.logging.set_verbosity(50)
    for name in sorted(n for n in transformers._class_to_module if re.search(pattern, n)):
        cls = getattr(transformers, name)
        if (
            isinstance(cls, type)
            and issubclass(cls, transformers.PreTrainedModel)
            and not name.endswith("PreTrainedModel")
            and cls.config_class is not None
        ):
            found[name] = cls
    return found


def diffusers_classes(pattern: str = "") -> dict[str, type[nn.Module]]:
    import diffusers

    found = {}
    for name in sorted(n for n in dir(diffusers) if re.search(pattern, n)):
        cls = getattr(diffusers, name, None)
        if isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin):
            found[name] = cls
    found.pop("ModelMixin", None)
    return found


def classes(pattern: str = "") -> dict[str, type[nn.Module]]:
    return {**transformers_classes(pattern), **diffusers_classes(pattern)}


def ordered(found: dict[str, type[nn.Module]]) -> tuple[list[str], list[str]]:
    """One class of each configuration, the one with the most on top of it; and the others."""
    heads = ("ForConditionalGeneration", "ForCausalLM", "ForMaskedLM", "LMHead", "Classification")

    def rank(name: str) -> int:
        return next((i for i, head in enumerate(heads) if head in name), len(heads))

    groups: dict[Any, list[str]] = {}
    for name, cls in found.items():
        groups.setdefault(getattr(cls, "config_class", None) or cls, []).append(name)
    sorted_groups = [sorted(names, key=rank) for names in groups.values()]
    return [n[0] for n in sorted_groups], [x for n in sorted_groups for x in n[1:]]


def able(name: str) -> "tuple[str, nn.Module, dict[str, Any]]":
    """The first way in which the model can be built and called, in double precision if it can."""
    cls, own, started = class_of(name), VARIANTS.get(name, {}), time.process_time()
    reasons: list[str] = []
    for way in tiny.WAYS:
        for dtype in (torch.float64, torch.float32):
            try:
                model = tiny.built(cls, way, dtype, own)
            except Exception as error:
                reasons.append(f"{way}: {arch_checks.told(error)}")
                break
            inputs = callable_with(model, dtype, way, reasons)
            if inputs is not None:
                return way, model, inputs
            if time.process_time() - started > SEARCHED:
                why = (reasons or ["no inputs"])[-1]
                raise NotBuilt(f"not called within {SEARCHED} s: {why}")
    raise NotBuilt(" ... ".join(dict.fromkeys((reasons or ["no inputs"])[:1] + reasons[-1:])))


def callable_with(
    model: nn.Module, dtype: torch.dtype, way: str, reasons: list[str]
) -> Optional[dict[str, Any]]:
    """The first inputs for which the model gives outputs; else the reasons are added."""
    asked: list[list[str]] = []

    def failed(error: Exception, names: list[str]) -> None:
        reasons.append(f"{way}, {', '.join(names)}: {arch_checks.told(error)}")
        asked.extend(tiny_inputs.asked_for(model, error, names))

    for inputs in itertools.islice(tiny_inputs.tries(model, dtype, asked), TRIED):
        fitted = fit(model, inputs, failed)
        if fitted is not None:
            return fitted
    return None


def fit(
    model: nn.Module, inputs: dict[str, Any], failed: Callable[[Exception, list[str]], None]
) -> Optional[dict[str, Any]]:
    """The inputs, of other sizes where errors say so, for which the model gives outputs."""
    for _ in range(RESIZED):
        try:
            with torch.no_grad():
                return inputs if arch_checks.call(model, inputs) else None
        except Exception as error:
            failed(error, list(inputs))
            new = tiny_inputs.resized(error, inputs)
        if new is None:
            break
        inputs = new
    return None


class NotBuilt(Exception):
    """A class that this script cannot build and call."""


def steady(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether the plain model gives the same twice, and no infinite number."""
    with torch.no_grad():
        first, again = (arch_checks.call(model, inputs) for _ in range(2))
    return all(torch.equal(a, b) and a.isfinite().any() for a, b in zip(first, again))


def examined(name: str, cost: bool = True, files: bool = True) -> Row:
    """The row of one class; `cost`: also its time and memory; `files`: all checks."""
    library = class_of(name).__module__.split(".")[0]
    row: Row = {"class": name, "library": library}
    try:
        way, model, inputs = able(name)
        row |= {
            "built": way,
            "inputs": {k: list(getattr(v, "shape", ())) for k, v in inputs.items()},
        }
        row |= {"parameters": sum(p.numel() for p in model.parameters())}
        row |= {"dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}
        if not steady(model, inputs):
            raise NotBuilt("the plain model does not give the same twice")
        found = dense.places(model)
        row |= {"tensors": len(found), "kinds": dict(Counter(p.layer for p in found))}
        row |= {"layers": sorted({dense.described(model, place) for place in found})}
        if not found:
            raise NotBuilt("nothing to adapt")
    except NotBuilt as reason:
        return {**row, "not built": str(reason)}
    try:
        subject = arch_checks.subject(model, inputs)
    except Exception as error:
        return {**row, "attach": arch_checks.told(error)}
    if not arch_checks.shows(subject):
        return {**row, "not built": "no update shows in what the model gives for these inputs"}
    row["checks"] = arch_checks.checks(subject, files)
    grads = dense.gradients(subject.reference, found, subject.factors)
    row["reached"] = sum(bool(g.any()) for n, g in grads.items() if n.endswith("lora_B"))
    try:
        row |= arch_checks.cost(subject) if cost else {}
    except Exception as error:
        row["cost"] = arch_checks.told(error)
    return row


class TooLong(BaseException):
    """Not an `Exception`, so that no check takes it for its own."""


def _stop(number: int, frame: Any) -> None:
    raise TooLong


def work(name: str, longest: float = LONGEST, whole: Container[str] = ()) -> Row:
    """One class in a worker process; all of it where it is among the `whole` ones."""
    quiet()
    signal.signal(signal.SIGPROF, _stop)
    signal.setitimer(signal.ITIMER_PROF, longest)
    started = time.process_time()
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            row = examined(name, cost=name in whole, files=name in whole)
    except TooLong:
        row = {"class": name, "not built": f"takes over {longest:g} s"}
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        row = {"class": name, "failed": f"{arch_checks.told(error)} at {at.name}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        gc.collect()
    return {**row, "seconds": round(time.process_time() - started, 2), "commit": commit()}


def class_of(name: str) -> type[nn.Module]:
    """The class of a name, which a variant's begins with."""
    import diffusers
    import transformers

    name = name.split(",")[0]
    library = transformers if name in transformers._class_to_module else diffusers
    return getattr(library, name)


def quiet() -> None:
    """One thread, double precision by default, and no word of the other libraries; which are there
    before processes are forked, as importing them takes longer than a class."""
    import diffusers
    import peft  # noqa: F401
    import transformers

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(50)
    diffusers.logging.set_verbosity(50)
    transformers.logging.disable_progress_bar()


def done(path: Path) -> dict[str, Row]:
    """The rows of an earlier run, by class."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.strip()]
    return {row["class"]: row for row in rows}


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    quiet()
    path = Path(options.out, "architectures.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    before = done(path)
    if options.again:
        before = {
            n: row for n, row in before.items() if "checks" in row and options.again == "missing"
        }
    first, others = ordered(classes(options.pattern))
    variants = [name for name in VARIANTS if re.search(options.pattern, name)]
    names = [*first, *variants, *([] if options.one else others)]
    left = [n for n in names if n not in before][options.slice[0] :: options.slice[1]]
    one = functools.partial(work, longest=options.longest, whole={*first, *VARIANTS})
    fill(path, left[: options.count], one, options.workers, options.limit)
    rows = [row for name, row in done(path).items() if name in set(names)]
    print(counts(rows))
    print(f"{len(rows)} of {len(names)} classes, {path}")
    return 0


def fill(
    path: Path, names: list[str], one: Callable[[str], Row], workers: int, limit: float
) -> None:
    """Append a line for each class, until `limit` seconds have passed."""
    started = time.monotonic()
    context = multiprocessing.get_context("fork")
    with (
        context.Pool(workers, maxtasksperchild=50) as pool,
        path.open("a", encoding="utf-8") as out,
    ):
        for row in pool.imap_unordered(one, names):
            out.write(json.dumps(rounded(row), ensure_ascii=False) + "\n")
            out.flush()
            if time.monotonic() - started > limit:
                break
        pool.terminate()


def rounded(value: Any) -> Any:
    """With two digits of each error, which is all that it tells."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return float(f"{value:.1e}") if isinstance(value, float) and abs(value) < 0.1 else value


REASONS = ("own:", "FileError:")  # the plain model or peft cannot do it either; refused
CHECKS = {
    "eval": "outputs and gradients, evaluation",
    "train": "outputs and gradients, training",
    "off": "switched off, the base bit for bit",
    "file": "saved and loaded",
    "detached": "detached: bits, names, order, classes",
    "merged": "merged, save_pretrained, from_pretrained",
    "checkpointed": "checkpointed",
    "reentrant": "checkpointed, reentrant",
    "peft": "written for peft, read there",
}


def counts(rows: list[Row]) -> str:
    """A table: how many hold, which their library or peft cannot do, are refused, and fail."""
    checked = [row["checks"] for row in rows if "checks" in row]
    lines = []
    for key, title in CHECKS.items():
        values = [row[key] for row in checked if key in row]
        exact = sum(isinstance(v, float) for v in values)
        starts = [sum(str(v).startswith(word) for v in values) for word in REASONS]
        wrong = len(values) - exact - sum(starts)
        lines.append([title, *map(str, (exact, *starts, wrong))])
    refused = sum("attach" in row for row in rows)
    missing = sum("not built" in row for row in rows)
    failed = sum("failed" in row for row in rows)
    head = markdown(["check", "exact", "its library or peft cannot", "refused", "wrong"], lines)
    return (
        f"{head}\n\n{len(checked)} checked, {refused} refused, {missing} not built, {failed} failed"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.architectures", description=__doc__)
    parser.add_argument("pattern", nargs="?", default="")
    parser.add_argument("--out", default="benchmark-results")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=float, default=1e9, help="seconds, then it stops")
    parser.add_argument("--longest", type=float, default=LONGEST, help="seconds for one class")
    parser.add_argument("--count", type=int, default=None, help="classes at most")
    parser.add_argument("--slice", type=int, nargs=2, default=(0, 1), metavar=("K", "OF"))
    parser.add_argument("--one", action="store_true", help="one class for each configuration")
    parser.add_argument("--again", choices=("missing", "all"), help="also what has a line already")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
