"""Result files as Markdown tables and plots.

``python -m benchmarks.report FOLDER... --out benchmarks/RESULTS.md`` reads every JSON file of the
folders (those of ``benchmarks.*`` and pytest-benchmark's) and writes their tables into a Markdown
file, in place of those that it holds of the same folder and kind, with plots beside it: R by shape,
the share of the update kept, memory, and loss curves.

``--into docs/kinds.md`` puts the figures of ``kinds.json`` between that page's marks instead, and
its picture beside the page.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.results import commit_of, load, markdown

Content = dict[str, Any]
ORDER = (
    "layers",
    "models",
    "quantised",
    "experts",
    "dropout",
    "alone",
    "kinds",
    "routed",
    "update_kept",
    "finetune_bf16",
    "stable_diffusion",
    "stable_diffusion_fsdp",
    "llama",
    "sharded_llama",
    "many",
    "merge_live",
    "pytest",
)
TITLES = {
    "layers": "One layer",
    "models": "Whole models",
    "quantised": "Quantised bases, against peft's QLoRA",
    "experts": "Layers of experts",
    "dropout": "Layers under dropout of 0.1, in bfloat16",
    "alone": "Each piece of the kernels alone, as a share of a whole model's step",
    "kinds": "Kinds of update",
    "routed": "Many adapters on one base",
    "update_kept": "Share of the update kept in bfloat16",
    "finetune_bf16": "Fine-tuning in bfloat16",
    "stable_diffusion": "The original's table: Stable Diffusion v1-4",
    "stable_diffusion_fsdp": "Stable Diffusion v1-4 under FSDP2",
    "llama": "A whole Llama 3 8B in training",
    "sharded_llama": "Llama 3 8B's blocks under FSDP2",
    "many": "A thousand layers, and the import",
    "merge_live": "Merging eight blocks of Llama 3 8B on the device",
    "pytest": "pytest-benchmark",
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/RESULTS.md"))
    parser.add_argument("--into", type=Path, help="a page with marks for the kinds' figures")
    parser.add_argument("--note", default="", help="a sentence to stand with them")
    options = parser.parse_args(arguments)
    files = [path for folder in options.folders for path in sorted(folder.glob("*.json"))]
    contents = [(path, _known(load(path))) for path in files]
    if options.into is not None:
        for path, content in contents:
            if content["kind"] == "kinds":
                put_into(options.into, path, content, options.note)
        return 0
    options.out.parent.mkdir(parents=True, exist_ok=True)
    kept = options.out.read_text(encoding="utf-8") if options.out.exists() else ""
    options.out.write_text(report(contents, options.out.parent, kept), encoding="utf-8")
    print(f"{options.out}: {len(contents)} result files")
    return 0


def report(contents: list[tuple[Path, Content]], folder: Path, kept: str = "") -> str:
    """The whole Markdown; plots go into `folder`. The other tables of an earlier one are kept."""
    parts = [f"# Results\n\n{__doc__.split(chr(10) * 2)[1]}\n\nWritten by `benchmarks/report.py`."]
    sections = {name: text.strip() for name, text in _sections(kept)}
    known = [(path, content) for path, content in contents if content["kind"] in ORDER]
    sections |= {_name(path): _section(path, content, folder) for path, content in known}
    place = {kind: at for at, kind in enumerate(ORDER)}
    # sorted keeps the order within a kind
    names = sorted(sections, key=lambda name: place[name.rpartition("/")[2].removesuffix(".json")])
    return "\n\n".join([*parts, *(sections[name] for name in names)]) + "\n"


def _sections(text: str) -> Iterator[tuple[str, str]]:
    """Each table of a report with what stands around it, by the file that it is of."""
    for section in re.split(r"^(?=## )", text, flags=re.MULTILINE)[1:]:
        of = re.search(r"^`([^`]+/\w+\.json)`", section, flags=re.MULTILINE)
        if of:
            yield of[1], section


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _section(path: Path, content: Content, folder: Path) -> str:
    kind = content["kind"]
    parts = [f"## {TITLES[kind]}", _where(path, content), TABLES[kind](content)]
    for name, draw in PLOTS.get(kind, {}).items():
        figure = draw(content)
        if figure is not None:
            image = folder / f"{path.parent.name}-{name}.png"
            figure.savefig(image, dpi=120, bbox_inches="tight")
            parts.append(f"![{name}]({image.name})")
    return "\n\n".join(parts)


START, END = "<!-- figures: benchmarks.kinds -->", "<!-- end of figures -->"


def put_into(page: Path, path: Path, content: Content, note: str) -> None:
    """The table of the kinds of update, and their picture, in the place of the page's."""
    text = page.read_text(encoding="utf-8")
    before, after = text.partition(START)[0], text.partition(END)[2]
    assert after, f"{page} has no {START} and {END}"
    image = page.with_name("kinds.png")
    kinds_plot(content).savefig(image, dpi=110, bbox_inches="tight")
    parts = [START, f"{_where(path, content)} {note}".rstrip(), results.kinds_summary(content)]
    parts += [f"![R of each kind of update by shape]({image.name})", END]
    page.write_text(before + "\n\n".join(parts) + after, encoding="utf-8")
    print(f"{page}, {image}")


def _known(content: Content) -> Content:
    """Ours as it is; pytest-benchmark's under our names."""
    if "benchmarks" not in content:
        return content
    return {"kind": "pytest", "machine": content["machine_info"], "rows": content["benchmarks"]}


def _where(path: Path, content: Content) -> str:
    made_on = content["machine"]
    packages = ", ".join(f"{k} {v}" for k, v in made_on["packages"].items() if v != "absent")
    size = " (tiny models)" if content.get("tiny") else ""
    commit = commit_of(content)
    told = f"; commit {commit}" if commit else "; measured before files said their commit"
    told += ", with `paramlora build`" if made_on.get("library") else ""
    return (
        f"`{_name(path)}`{size}: {made_on['device']}; {made_on['processor']}, "
        f"{made_on['cores']} cores, {made_on['threads']} threads; Python {made_on['python']}; "
        f"{packages}{told}."
    )


def pytest_table(content: Content) -> str:
    """Median milliseconds by group, and the interleaved R where the file recorded it."""
    lines = []
    for row in content["rows"]:
        way = row["params"].get("way", row["name"]) if row["params"] else row["name"]
        ratio = row["extra_info"].get("eager_R")
        median = f"{1e3 * row['stats']['median']:.3f}"
        lines.append([row["group"] or "", way, median, f"{ratio:.2f}" if ratio else ""])
    return markdown(["group", "way", "median ms", "R, interleaved"], lines)


def _axes(title: str, ylabel: str, wide: float = 10) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(wide, 4.5))
    axes.set_title(title)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", alpha=0.3)
    return figure, axes


def _bars(axes: Any, cases: list[str], series: dict[str, list[float]]) -> None:
    """Grouped bars, a group for each case."""
    width = 0.85 / len(series)
    for index, (name, values) in enumerate(series.items()):
        at = [i + (index - (len(series) - 1) / 2) * width for i in range(len(cases))]
        ours = name.startswith("paramlora")
        hatch = "//" if "compiled" in name else None
        colour = f"C{index % 10}"
        if ours:
            colour = "black" if name == "paramlora" or hatch else "dimgrey"
        axes.bar(at, values, width, label=name, color=colour, hatch=hatch)
    axes.set_xticks(range(len(cases)), [_broken(c) for c in cases], fontsize=8)
    axes.legend(fontsize=8, ncols=4)


def _broken(case: str) -> str:
    return case.replace(" ", "\n").replace("×", "×\n")


def _series(rows: list[Content], value: str, skip: tuple[str, ...] = ()) -> Any:
    """(cases, way → values), missing ones as 0, so that no bar shows."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    ways = [w for w in dict.fromkeys(row["way"] for row in rows if value in row) if w not in skip]
    at = {(row["case"], row["way"]): row.get(value, 0.0) for row in rows}
    return cases, {way: [at.get((case, way), 0.0) for case in cases] for way in ways}


def ratio_plot(content: Content) -> Any:
    """R by shape: the device's time where it was measured, else wall time."""
    rows = [row for row in content["rows"] if not row.get("inference")]
    mode = "device_R" if any("device_R" in row for row in rows) else "eager_R"
    kinds = list(dict.fromkeys(row["dtype"] for row in rows))
    rows = [r for r in rows if r["dtype"] == kinds[0] and r["case"].startswith("linear")]
    cases, series = _series(rows, mode, skip=("frozen",))
    if not series:
        return None
    figure, axes = _axes(
        f"Forward + backward against the frozen layer, {kinds[0]}", f"R ({mode[:-2]} time)", 14
    )
    _bars(axes, cases, series)
    axes.axhline(1, color="grey", linewidth=1)
    return figure


def kinds_plot(content: Content) -> Any:
    """R of each kind of update by shape: device time where it was measured, else wall time."""
    rows = [row for row in content["rows"] if "eager_R" in row]
    mode = "device_R" if any("device_R" in row for row in rows) else "eager_R"
    cases, series = _series(rows, mode, skip=("frozen",))
    dtype = rows[0]["dtype"]
    figure, axes = _axes(f"Kinds of update against the frozen layer, {dtype}", mode[:-2], 14)
    _bars(axes, cases, {way.removeprefix("paramlora "): of for way, of in series.items()})
    axes.set_ylabel(f"R ({mode[:-2]} time)")
    axes.set_yscale("log")  # few rows make some ways tens of times slower, and all lie above 1
    axes.set_yticks(told := [1, 2, 3, 5, 10, 20, 40], list(map(str, told)))
    axes.set_ylim(bottom=0.9)
    axes.axhline(1, color="grey", linewidth=1)
    return figure


def memory_plot(content: Content) -> Any:
    """Peak of a training step against the frozen model's."""
    rows = [row for row in content["rows"] if "peak_mib" in row]
    if not rows:
        return None
    cases, series = _series(rows, "peak_mib")
    figure, axes = _axes("Peak memory of a training step", "MiB")
    _bars(axes, cases, series)
    axes.set_ylim(top=1.2 * axes.get_ylim()[1])  # room for the legend
    return figure


def saved_plot(content: Content) -> Any:
    """Bytes that one layer keeps for backward beyond its input."""
    rows = [row for row in content["rows"] if "saved_bytes" in row]
    kinds = list(dict.fromkeys(row["dtype"] for row in rows))
    rows = [r for r in rows if r["dtype"] == kinds[0] and r["case"].startswith("linear")]
    if not rows:
        return None
    cases, series = _series(rows, "saved_bytes", skip=("frozen",))
    series = {way: [value / 2**20 for value in values] for way, values in series.items()}
    figure, axes = _axes(f"Kept for backward beyond the input, {kinds[0]}", "MiB", 14)
    _bars(axes, cases, series)
    axes.set_yscale("symlog", linthresh=0.1)
    return figure


def kept_plot(content: Content) -> Any:
    """Share of the update in the output by its size, the first shape."""
    first = content["rows"][0]["case"]
    rows = [row for row in content["rows"] if row["case"] == first]
    figure, axes = _axes(f"Share of the update that reaches the output, bf16 {first}", "share", 8)
    ways = dict.fromkeys(row["way"] for row in rows)
    for way in ways:
        points = [(row["size"], row["output"]) for row in rows if row["way"] == way]
        # several ways lose the same share, so that their lines coincide: thinner ones on top
        ours = dict(color="black", linewidth=3)
        style = ours if way == "paramlora" else dict(linewidth=9 - list(ways).index(way))
        axes.plot(*zip(*points), marker="o", alpha=0.8, label=way, **style)
    axes.set_xscale("log")
    axes.set_xlabel("‖Δ‖ / ‖W‖")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def loss_plot(content: Content) -> Any:
    """Losses during fine-tuning, the mean over the seeds: as computed, and as learned."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(13, 4.5), sharey=True)
    titles = {"computed": "the output as computed", "learned": "the learned factors, in float64"}
    for axes, (key, title) in zip(panels, titles.items()):
        for curve in content["curves"]:
            style = "--" if curve["way"] == "float32" else "-"
            colour = {"paramlora bf16": "black", "float32": "grey"}.get(curve["way"])
            axes.plot(curve["steps"], curve[key], style, color=colour, label=curve["way"])
        axes.set(xlabel="step", yscale="log", title=title)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("loss / loss at the start")
    panels[0].legend(fontsize=8)
    size, seeds = content["options"]["size"], content["options"]["seeds"]
    figure.suptitle(f"Learning an update of {size:.0e} of the weights, seeds: {seeds}")
    return figure


TABLES: dict[str, Callable[[Content], str]] = {
    "layers": results.layers_table,
    "models": results.models_table,
    "quantised": results.quantised_table,
    "experts": results.experts_table,
    "dropout": results.dropout_table,
    "alone": results.alone_table,
    "kinds": results.kinds_table,
    "routed": results.routed_table,
    "update_kept": results.kept_table,
    "finetune_bf16": results.finetune_table,
    "stable_diffusion": results.diffusion_table,
    "stable_diffusion_fsdp": results.diffusion_table,
    "llama": results.llama_table,
    "sharded_llama": results.sharded_table,
    "many": results.many_table,
    "merge_live": results.merge_table,
    "pytest": pytest_table,
}
PLOTS: dict[str, dict[str, Callable[[Content], Any]]] = {
    "layers": {"ratio": ratio_plot, "saved": saved_plot},
    "models": {"memory": memory_plot},
    "kinds": {"kinds": kinds_plot},
    "update_kept": {"kept": kept_plot},
    "finetune_bf16": {"loss": loss_plot},
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
