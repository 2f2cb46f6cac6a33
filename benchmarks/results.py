"""Result files: one JSON for each benchmark, and its Markdown."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.machine import commit, machine


def save(folder: "str | Path", kind: str, content: dict[str, Any]) -> Path:
    """Write ``<kind>.json`` with the machine beside the numbers, whole or not at all."""
    path = Path(folder) / f"{kind}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"kind": kind, "machine": machine(), **content}
    if commit() == "unknown":
        print(f"{path} cannot say its commit: set PARAMLORA_COMMIT where there is no git")
    new = path.with_suffix(".new")
    new.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(new, path)
    return path


def load(path: "str | Path") -> dict[str, Any]:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def commit_of(content: dict[str, Any]) -> str:
    """The measured code's, if the file says it: for each row, or for all of it."""
    rows = dict.fromkeys(row["commit"] for row in content.get("rows", ()) if "commit" in row)
    return ", ".join(rows) or content["machine"].get("commit", "")


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def grid(rows: list[dict[str, Any]], value: str, form: str = "{:.2f}") -> str:
    """A table of one value: a row for each case, a column for each way."""
    ways = list(dict.fromkeys(row["way"] for row in rows if value in row))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    at = {(row["case"], row["way"]): row for row in rows}
    body = [[c] + [_cell(at.get((c, w)), value, form) for w in ways] for c in cases]
    return markdown(["case", *ways], body)


def layers_table(content: dict[str, Any]) -> str:
    """R by case and way, device time where there is a device, then eager; and Python per layer."""
    parts = []
    for inference in (False, True):
        for kind in dict.fromkeys(row["dtype"] for row in content["rows"]):
            rows = [
                row
                for row in content["rows"]
                if row["dtype"] == kind and row.get("inference", False) == inference
            ]
            for mode in ("device", "eager"):
                if any(f"{mode}_R" in row for row in rows):
                    what = "inference" if inference else "training"
                    parts += [f"R, {kind}, {what}, {mode} time", grid(rows, f"{mode}_R")]
    trained = [row for row in content["rows"] if "saved_bytes" in row]
    if trained:
        kinds = {row["dtype"] for row in trained}
        parts.append("Bytes kept for backward beyond the input and the parameters")
        parts += [grid([r for r in trained if r["dtype"] == k], "saved_bytes", "{}") for k in kinds]
    if content.get("launches"):
        lines = [
            [row["way"], row["dtype"], f"{row['forward_us']:.0f}", f"{row['step_us']:.0f}"]
            for row in content["launches"]
        ]
        parts.append("Python per layer, microseconds")
        parts.append(markdown(["way", "dtype", "forward", "forward and backward"], lines))
    return "\n\n".join(parts + switches_told(content))


def switches_told(content: dict[str, Any]) -> list[str]:
    """What chose between an opponent's own ways to compute."""
    told = [f"{way}: {how}" for way, how in content.get("switches", {}).items()]
    return ["; ".join(told) + "."] if told else []


def models_table(content: dict[str, Any]) -> str:
    """One line for each model and way: times, R, peak memory against the frozen model's."""
    lines = []
    refused = any("refused" in row for row in content["rows"])
    frozen: dict[str, Any] = {}
    for row in content["rows"]:
        frozen = row if row["way"] == "frozen" else frozen
        share = row.get("peak_mib", 0) / frozen["peak_mib"] if "peak_mib" in row else None
        values = [row.get(k) for k in ("device_ms", "device_R", "eager_ms", "eager_R", "peak_mib")]
        numbers = [
            "" if v is None else f"{v:.{p}f}" for v, p in zip([*values, share], (1, 3, 1, 3, 0, 3))
        ]
        trainable = f"{row['trainable']:,}" if "trainable" in row else ""
        outcome = [row.get("refused", "")] if refused else []
        lines.append([row["case"], row["dtype"], row["way"], trainable, *numbers, *outcome])
    header = ["model", "dtype", "way", "trainable", "device ms", "R device", "eager ms", "R eager"]
    header += ["peak MiB", "peak / frozen", *["outcome"] * refused]
    return "\n\n".join([markdown(header, lines), *switches_told(content)])


def quantised_table(content: dict[str, Any]) -> str:
    """One line for each way, without and with checkpointing."""
    kinds = {"stored_mib": 1, "peak_mib": 1, "eager_ms": 1}
    lines = []
    for row in content["rows"]:
        numbers = ["" if k not in row else f"{row[k]:.{p}f}" for k, p in kinds.items()]
        errors = [f"{row[k]:.1e}" for k in ("output_error", "gradient_error")]
        saved = "yes" if row["checkpointing"] else "no"
        lines.append([row["way"], saved, f"{row['trainable']:,}", *numbers, *errors])
    header = ["way", "checkpointing", "trainable", "stored MiB", "peak MiB", "eager ms"]
    title = f"{content['rows'][0]['case']}: a training step; errors against float32"
    return f"{title}\n\n" + markdown([*header, "output error", "gradient error"], lines)


def experts_table(content: dict[str, Any]) -> str:
    """One line for each way of each layer of experts."""
    kinds = {"device_ms": 2, "device_R": 2, "eager_ms": 2, "eager_R": 2, "tokens_per_second": 0}
    kinds |= {"beside_mib": 0, "beside_R": 2, "kept": 3}
    lines = []
    for row in content["rows"]:
        numbers = ["" if k not in row else f"{row[k]:.{p}f}" for k, p in kinds.items()]
        errors = [f"{row[k]:.1e}" if k in row else "" for k in ("output_error", "gradient_error")]
        lines.append([row["case"], row["way"], *numbers, *errors, row.get("refused", "")])
    header = ["layer", "way", "device ms", "R device", "eager ms", "R eager", "tokens a second"]
    header += ["MiB a step", "of frozen's", "kept", "output error", "gradient error", "outcome"]
    return "\n\n".join([markdown(header, lines), *switches_told(content)])


def dropout_table(content: dict[str, Any]) -> str:
    """One line for each way of each layer under dropout."""
    kinds = {"device_ms": 3, "device_R": 2, "eager_ms": 3, "eager_R": 2, "kept": 3}
    lines = []
    for row in content["rows"]:
        numbers = [f"{row[k]:.{p}f}" if k in row else "" for k, p in kinds.items()]
        lines.append([row["case"], row["way"], *numbers])
    header = ["tokens × in × out × r", "way", "device ms", "R device", "eager ms", "R eager"]
    return markdown([*header, "kept"], lines)


def alone_table(content: dict[str, Any]) -> str:
    """One line for each model without one piece of the kernels."""
    lines = []
    for row in content["rows"]:
        cells = [row["case"], row["part"], row["way"]]
        for mode in ("eager", "device"):
            there = f"{mode}_ms" in row
            cells += (
                [f"{row[f'{mode}_ms']:.2f}", f"{row[f'{mode}_more']:+.2%}"] if there else ["", ""]
            )
        launched = ", ".join(f"{n} {name}" for name, n in row.get("launches", {}).items())
        lines.append([*cells, f"{row['distance']:.1e}" if "distance" in row else "", launched])
    header = [
        "model",
        "part",
        "way",
        "eager ms",
        "more",
        "device ms",
        "more",
        "distance",
        "launches",
    ]
    return markdown(header, lines)


def kinds_table(content: dict[str, Any]) -> str:
    """One line for each kind of update at each shape."""
    lines = []
    for row in content["rows"]:
        ratios = [f"{row[k]:.2f}" if k in row else "" for k in ("device_R", "eager_R")]
        sizes = [
            f"{row[k]:,}" if k in row else "" for k in ("trainable", "file_bytes", "saved_bytes")
        ]
        lines.append([row["case"], row["way"], *ratios, *sizes, row.get("refused", "")])
    header = ["layer", "way", "R device", "R eager", "trained", "file bytes"]
    return markdown([*header, "bytes kept for backward", "outcome"], lines)


def kinds_summary(content: dict[str, Any]) -> str:
    """One line for each kind: R at each shape, then what the first shape costs beside time."""
    rows = content["rows"]
    mode = "device_R" if any("device_R" in row for row in rows) else "eager_R"
    cases = list(dict.fromkeys(row["case"] for row in rows))
    at = {(row["case"], row["way"]): row for row in rows}
    lines = []
    for way in dict.fromkeys(row["way"] for row in rows if row["way"] != "frozen"):
        first = at.get((cases[0], way), {})
        ratios = [_cell(at.get((case, way)), mode, "{:.2f}") for case in cases]
        held = first.get("saved_bytes")
        sizes = [f"{first[k]:,}" if k in first else "" for k in ("trainable", "file_bytes")]
        lines.append([way, *ratios, *sizes, "" if held is None else f"{held / 2**20:.1f}"])
    told = "device time" if mode == "device_R" else "wall time"
    title = f"R in {told}; trained numbers, bytes of a file and MiB kept for backward of the first"
    header = ["", *cases, "trained", "file bytes", "MiB kept"]
    return f"{title} shape.\n\n" + markdown(header, lines)


def routed_table(content: dict[str, Any]) -> str:
    """One line for each way of each part: R, tokens a second, the peak, seconds."""
    kinds = {"device_R": 2, "eager_R": 2, "tokens_per_second": 0, "peak_mib": 0, "seconds": 3}
    lines = []
    for row in content["rows"]:
        numbers = [f"{row[k]:,.{p}f}" if k in row else "" for k, p in kinds.items()]
        lines.append([row["case"], row["way"], *numbers, row.get("refused", "")])
    header = ["case", "way", "R device", "R eager", "tokens a second", "peak MiB", "seconds"]
    return markdown([*header, "outcome"], lines)


def kept_table(content: dict[str, Any]) -> str:
    """Shares that reach the output and the input gradient, in percent, by size of the update."""
    ways = list(dict.fromkeys(row["way"] for row in content["rows"]))
    groups: dict[tuple[str, float], dict[str, str]] = {}
    for row in content["rows"]:
        both = f"{100 * row['output']:.1f} / {100 * row['input_gradient']:.1f}"
        groups.setdefault((row["case"], row["size"]), {})[row["way"]] = both
    lines = [[c, f"{size:.0e}", *(g[w] for w in ways)] for (c, size), g in groups.items()]
    title = "Percent of the update in the output / the input gradient; frozen shows the noise"
    table = markdown(["case", "‖Δ‖/‖W‖", *ways], lines)
    return "\n\n".join([title, table, *switches_told(content)])


def many_table(content: dict[str, Any]) -> str:
    """Seconds of each act on many layers; ``attach each`` names every layer by itself."""
    told = ("attach", "attach each", "save", "load", "swap", "merge", "import")
    acts = [act for act in told if all(act in row for row in content["rows"])]
    lines = [
        [row["way"], str(row["layers"]), *(f"{row[act]:.3f}" for act in acts)]
        for row in content["rows"]
    ]
    return "Seconds\n\n" + markdown(["way", "layers", *acts], lines)


def merge_table(content: dict[str, Any]) -> str:
    """Seconds, memory and accuracy of merging on the device."""
    lines = [
        [row["way"], "yes" if row["tf32"] else "no", f"{row['seconds']:.4f}"]
        + [f"{row['beside_mib']:.0f}", f"{row['units']:.2f}"]
        for row in content["rows"]
    ]
    header = ["way", "TF32 allowed", "seconds", "MiB beside the model", "units in the last place"]
    return markdown(header, lines)


def finetune_table(content: dict[str, Any]) -> str:
    """The final losses relative to the start: as computed, and as learned (each seed's)."""
    lines = []
    for curve in content["curves"]:
        seeds = [", ".join(f"{v:.4f}" for v in curve["final"][k]) for k in ("computed", "learned")]
        lines.append([curve["way"], *seeds])
    title = f"Loss at the end / at the start; the update is {content['options']['size']:.0e} of W"
    return f"{title}\n\n" + markdown(["way", "as computed, each seed", "as learned"], lines)


def diffusion_table(content: dict[str, Any]) -> str:
    """A line for each size and batch, a cell for each way: speed and peak memory, or OOM."""
    ways = list(dict.fromkeys(row["way"] for row in content["rows"]))
    marks, legend = _origins(content["rows"])
    cells: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in content["rows"]:
        key = (row["image"], row["batch"], row["checkpointing"])
        told = row.get("outcome") or f"{row['per_second']:.2f} it/s, {row['peak_mib']:.0f} MiB"
        cells.setdefault(key, {})[row["way"]] = told + marks(row)
    count = content["processes"]
    lines = [
        [f"{image} & {batch}" + (f"×{count}" if count > 1 else ""), "yes" if saved else "no"]
        + [cell.get(way, "") for way in ways]
        for (image, batch, saved), cell in cells.items()
    ]
    kinds = ("trainable", "checkpoint_bytes", "reduced_bytes")
    sizes = [
        [way, *(f"{values[kind]:,}" if kind in values else "" for kind in kinds)]
        for way, values in content["ways"].items()
    ]
    header = ["way", "trainable parameters", "checkpoint bytes", "bytes reduced a step"]
    table = markdown(["image size & batch", "checkpointing", *ways], lines)
    return "\n\n".join([table, *legend, markdown(header, sizes)])


def _tokens_table(title: str, peak: str, content: dict[str, Any]) -> str:
    marks, legend = _origins(content["rows"])
    lines = []
    for row in content["rows"]:
        numbers = ["", "", "", ""]
        if "tokens_per_second" in row:
            numbers = [f"{row['tokens_per_second']:,.0f}", f"{row['peak_mib'] / 1024:.1f}"]
            numbers += [str(row["steps"]), f"{row['trainable']:,}"]
        lines.append([row["way"] + marks(row), *numbers, row.get("outcome", "")])
    header = ["way", "tokens a second", peak, "steps", "trainable", "outcome"]
    return "\n\n".join([title, markdown(header, lines), *legend])


def llama_table(content: dict[str, Any]) -> str:
    """Tokens a second and the peak, by way."""
    options = content["options"]
    title = f"{options['layers']} layers, {options['batch']} × {options['tokens']} tokens a step, "
    title += f"r {options['r']}, dropout {options['dropout']}, the loss in {options['chunks']} "
    title += "chunks, " + ("blocks compiled" if options["compile"] else "eager")
    return _tokens_table(title, "peak GiB", content)


def sharded_table(content: dict[str, Any]) -> str:
    """Tokens a second over all devices and the peak of one, by way."""
    options, count = content["options"], content["processes"]
    title = f"{options['layers']} layers over {count} processes, {options['batch']} × "
    title += f"{options['tokens']} tokens in each"
    return _tokens_table(title, "peak GiB a device", content)


def _origins(rows: list[dict[str, Any]]) -> tuple[Callable[[dict[str, Any]], str], list[str]]:
    """A mark for each measured row where several commits or devices made them, and its meaning."""
    found = dict.fromkeys((r["commit"], r["device"]) for r in rows if "commit" in r)
    if not found:
        return lambda row: "", []
    if len(found) == 1:
        ((made, device),) = found
        return lambda row: "", [f"Measured at commit {made} on {device}."]
    letters = {origin: chr(ord("a") + i) for i, origin in enumerate(found)}
    told = "; ".join(f"({x}) commit {made} on {device}" for (made, device), x in letters.items())

    def marks(row: dict[str, Any]) -> str:
        return f" ({letters[row['commit'], row['device']]})" if "commit" in row else ""

    return marks, [f"Measured at {told}."]


def _cell(row: "dict[str, Any] | None", value: str, form: str) -> str:
    if row is None:
        return ""
    if "refused" in row:
        return "wrong" if row["refused"].startswith("AssertionError") else "refused"
    return form.format(row[value]) if value in row else ""
