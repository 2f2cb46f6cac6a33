"""A fresh run against the recorded table of its card, without the card."""

import copy
import json
import re

import pytest

pytest.importorskip("peft")  # which the benchmarks import
from benchmarks import check, read_back, recorded, report
from benchmarks.recorded import PLACE

RESULTS = (PLACE.parent / "RESULTS.md").read_text(encoding="utf-8")
H200 = "NVIDIA H200"


def run_of(folder, change=lambda content: None, card=H200):
    """A run that gives the recorded numbers again, after a change."""
    for index, content in enumerate(copy.deepcopy(recorded.recorded(H200))):
        content["machine"]["device"] = card
        change(content)
        (folder / f"{index}.json").write_text(json.dumps(content), encoding="utf-8")
    return check.main([str(folder)])


def changed(kind, key, by, **where):
    """Multiplies one number of the rows that have these values."""

    def change(content):
        for row in content["rows"] if content["kind"] == kind else ():
            if key in row and all(row.get(k) == v for k, v in where.items()):
                row[key] *= by

    return change


@pytest.mark.parametrize("card", recorded.cards())
def test_what_is_recorded_is_what_the_results_show(card):
    contents = recorded.recorded(card)
    assert contents and all(recorded.card_of(content) == card for content in contents)
    for content in contents:
        assert report.TABLES[content["kind"]](content) in RESULTS, content["folder"]
        assert list(check.figures(content)), content["folder"]


def test_everything_that_a_run_is_compared_by_is_recorded():
    fresh = [c for c in read_back.read_back(RESULTS) if recorded.card_of(c) == H200]
    key = {(c["folder"], c["kind"]): c["rows"] for c in fresh}
    assert key == {(c["folder"], c["kind"]): c["rows"] for c in recorded.recorded(H200)}


def test_the_same_run_again_is_no_worse(tmp_path, capsys):
    assert run_of(tmp_path) == 0
    told = capsys.readouterr().out
    first, last = told.splitlines()
    assert re.fullmatch(r"NVIDIA H200: 0 of \d{3} figures worse than noise allows", first)
    assert re.fullmatch(r"recorded at .*commit \w+; this run at .*commit \w+", last)


SHOWN = {"paramlora": "paramlora", "peft": "peft", "peft, bf16 factors": "peft bf16"}
SHOWN |= {"dense sum": "dense", "RunLoRA's best order": "RunLoRA"}


@pytest.mark.parametrize("page", ("README.md", "docs/speed.md"))
def test_the_ratios_that_a_page_shows_are_recorded(page):
    at = {}
    for content in recorded.recorded(H200):
        for row in (
            content["rows"] if content["folder"] == "h200" and "layers" in content["kind"] else ()
        ):
            if row["dtype"] == "bf16" and "device_R" in row:
                at[row["case"], row["way"]] = f"{row['device_R']:.2f}"
    text = (PLACE.parents[1] / page).read_text(encoding="utf-8")
    table = re.search(r"(\| tokens × in × out, rank \| paramlora .*?)\n\n", text, re.DOTALL)[1]
    header, _, *lines = (
        [c.strip("* ") for c in line.strip("| ").split("|")] for line in table.splitlines()
    )
    seen = 0
    for name, *cells in lines:
        sizes = re.fullmatch(r"(\d+) × (\d+) × (\d+), (\d+)", name)
        for way, cell in zip(header[1:], cells) if sizes else ():
            case = "linear {}×{}×{} r{}".format(*sizes.groups())
            assert cell == at[case, SHOWN[way]], (case, way)
            seen += 1
    assert seen >= 10


@pytest.mark.parametrize(
    "kind, title",
    (("experts", "experts × hidden"), ("dropout", "tokens × in × out, rank | R without")),
)
def test_the_figures_of_experts_and_dropout_are_recorded(kind, title):
    (content,) = (c for c in recorded.recorded(H200) if (c["folder"], c["kind"]) == ("h200", kind))
    text = (PLACE.parents[1] / "docs/speed.md").read_text(encoding="utf-8")
    table = text[text.index(f"| {title}") :].partition("\n\n")[0].splitlines()[2:]
    assert len(table) >= 3
    at = {(row["case"], row["way"]): row for row in content["rows"]}
    for line in table:
        name, *cells = (cell.strip() for cell in line.strip("| ").split("|"))
        if kind == "experts":
            sizes, tokens, top = name.replace(" × ", "×").split(", ")
            row = at[f"{sizes}, {tokens} tokens, top {top}, grouped_mm", "paramlora"]
            want = [row["device_R"], row["beside_R"]]
        else:
            case = name.replace(" × ", "×").replace(", ", "×")
            ways = ("paramlora", "kernels dropout", "peft dropout")
            want = [at[case, way]["device_R"] for way in ways]
        assert cells[: len(want)] == [f"{value:.2f}" for value in want], name


OURS = {"way": "paramlora", "dtype": "bf16"}
LAYER = {"case": "linear 8192×4096×4096 r16", **OURS, "inference": False}
WORSE = {
    "slower on the device": (changed("layers", "device_R", 1.06, **LAYER), "device R"),
    "slower in eager mode": (changed("layers", "eager_R", 1.15, **LAYER), "eager R"),
    "more bytes kept": (changed("layers", "saved_bytes", 1.01, **LAYER), "bytes kept"),
    "a slower model": (changed("models", "device_R", 1.06, **OURS), "device R"),
    "a larger model": (changed("models", "peak_mib", 1.03, **OURS), "peak / frozen"),
    "a larger quantised one": (changed("quantised", "peak_mib", 1.03), "peak MiB"),
    "an update lost": (changed("update_kept", "output", 0.9, way="paramlora"), "output kept"),
    "a gradient lost": (
        changed("update_kept", "input_gradient", 0.9, way="paramlora"),
        "gradient kept",
    ),
    "a merge that rounds twice": (changed("merge_live", "units", 1.5), "units in the last place"),
    "slower experts": (changed("experts", "device_R", 1.1, way="paramlora"), "device R"),
    "larger experts": (changed("experts", "beside_mib", 1.1, way="paramlora"), "MiB beside"),
    "experts that lose": (changed("experts", "kept", 0.9, way="paramlora"), "output kept"),
    "slower dropout": (changed("dropout", "eager_R", 1.3, way="kernels dropout"), "eager R"),
    "a slower kind": (changed("kinds", "device_R", 1.1, way="paramlora dora"), "device R"),
    "a kind that keeps more": (
        changed("kinds", "saved_bytes", 2, way="paramlora lora"),
        "bytes kept",
    ),
    "slower rows that choose": (changed("routed", "device_R", 1.1, way="64 adapters"), "device R"),
    "a slower swap": (changed("routed", "seconds", 1.3, way="paramlora"), "seconds"),
    "fewer tokens": (changed("llama", "tokens_per_second", 0.9), "tokens a second"),
    "a larger Llama": (changed("llama", "peak_mib", 1.05), "peak MiB"),
}


@pytest.mark.parametrize("name", WORSE)
def test_what_is_worse_is_told(tmp_path, capsys, name):
    change, figure = WORSE[name]
    assert run_of(tmp_path, change) == 1
    *table, last, _ = capsys.readouterr().out.splitlines()
    assert table[0] == "| what | figure | recorded | allowed | now |"
    assert table[2:] and all(f"| {figure} |" in line for line in table[2:])
    assert re.match(rf"{H200}: {len(table) - 2} of \d+ figures", last)


NOISE = {
    "a little slower": changed("layers", "device_R", 1.02, **LAYER),
    "much faster": changed("layers", "device_R", 0.5, **LAYER),
    "less memory": changed("models", "peak_mib", 0.5, way="paramlora"),
    "another way slower": changed("layers", "device_R", 2.0, way="peft"),
    "another clock": changed("models", "device_ms", 2.0),
    "within the frozen layer's own noise": changed(
        "update_kept", "output", 0.95, way="paramlora", size=1e-4, case="linear 64×4096×4096 r16"
    ),
}


@pytest.mark.parametrize("name", NOISE)
def test_what_noise_allows_is_not_told(tmp_path, capsys, name):
    assert run_of(tmp_path, NOISE[name]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def without(kind, what):
    """Drops the rows of one case or way."""

    def change(content):
        if content["kind"] == kind:
            content["rows"] = [r for r in content["rows"] if what not in (r["case"], r["way"])]

    return change


def test_what_a_run_lacks_is_told(tmp_path, capsys):
    """It may have been asked for a part alone; a way that is gone there may also have failed."""
    assert run_of(tmp_path, without("models", "unet")) == 0
    told = capsys.readouterr().out.splitlines()
    lacks = "not in this run: unet, bf16, paramlora; unet, bf16, paramlora native"
    assert told[1] == lacks and len(told) == 3
    assert run_of(tmp_path, without("kinds", "paramlora dora")) == 0
    assert re.search(
        r"not in this run: (kinds, [^;]+; ){3}[^;]+ and \d more", capsys.readouterr().out
    )


def test_one_figure_that_a_run_lacks_is_told(tmp_path, capsys):
    """Such as the device's time, where no CUDA graph was captured."""

    def change(content):
        for row in content["rows"] if content["kind"] == "layers" else ():
            if all(row.get(key) == value for key, value in LAYER.items()):
                row.pop("device_R", None)

    assert run_of(tmp_path, change) == 0
    told = capsys.readouterr().out.splitlines()
    lacks = f"{LAYER['case']}, bf16, training, paramlora (device R)"
    assert len(told) == 3 and told[1] == f"not in this run: {lacks}"


@pytest.mark.parametrize(
    "kind, key", (("layers", "refused"), ("kinds", "refused"), ("llama", "outcome"))
)
def test_what_was_not_refused_before_is_told(tmp_path, capsys, kind, key):
    def change(content):
        row = next((r for r in content["rows"] if r["way"].startswith("paramlora")), None)
        if content["kind"] == kind and content["folder"] == "h200":
            for name in [n for n in row if n not in ("case", "dtype", "way", "inference")]:
                del row[name]
            row[key] = "OutOfMemoryError: none left"

    assert run_of(tmp_path, change) == 1
    *table, last, _ = capsys.readouterr().out.splitlines()
    assert len(table) == 3 and "| refused |  |  | OutOfMemoryError: none left |" in table[2]
    assert "0 of" in last and last.endswith("; 1 refused that were not")


def test_a_run_without_its_frozen_ones_is_compared_as_far_as_it_can_be(tmp_path, capsys):
    assert (
        run_of(
            tmp_path, lambda c: without(c["kind"], "frozen")(c) if "case" in c["rows"][0] else None
        )
        == 0
    )
    assert "0 of" in capsys.readouterr().out


def test_tiny_models_are_not_compared(tmp_path, capsys):
    assert run_of(tmp_path, lambda content: content.update(tiny=True)) == 2
    assert "nothing was compared: tiny models are not compared" in capsys.readouterr().out


def test_each_card_of_a_folder_is_compared_with_its_own_table(tmp_path, capsys):
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    assert run_of(tmp_path / "one", changed("layers", "device_R", 1.06, **LAYER)) == 1
    (alone,) = re.findall(r"NVIDIA H200: [1-9]\d* of", capsys.readouterr().out)
    assert run_of(tmp_path / "two", card="NVIDIA B300") == 2
    capsys.readouterr()
    assert check.main([str(tmp_path / "one"), str(tmp_path / "two")]) == 2
    told = capsys.readouterr().out
    assert "nothing is recorded of NVIDIA B300" in told and alone in told


@pytest.mark.parametrize("card", [card for card in recorded.cards() if card.startswith("cpu ")])
def test_a_processor_is_compared_with_its_own_table(card, tmp_path, capsys):
    for index, content in enumerate(recorded.recorded(card)):
        for row in content["rows"]:
            row["eager_R"] = row.get("eager_R", 1.0) * (2 if row["way"] == "paramlora" else 1)
        (tmp_path / f"{index}.json").write_text(json.dumps(content), encoding="utf-8")
    assert check.main([str(tmp_path)]) == 1
    table = capsys.readouterr().out.splitlines()
    assert len(table) > 5 and all("paramlora | eager R |" in line for line in table[2:-2])


def test_a_card_that_nobody_measured_is_told(tmp_path, capsys):
    assert run_of(tmp_path, card="NVIDIA B300") == 2
    want = (
        f"nothing is recorded of NVIDIA B300, only of {', '.join(recorded.cards())}; record the "
        "unchanged code's run first with python -m benchmarks.recorded FOLDER\n"
    )
    assert capsys.readouterr().out == want


def test_a_folder_without_results_is_told(tmp_path, capsys):
    assert check.main([str(tmp_path)]) == 2
    assert "no result file to compare; run python -m benchmarks.layers" in capsys.readouterr().out


def test_a_run_can_be_recorded_and_is_then_compared_with(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(recorded, "PLACE", tmp_path / "recorded")
    (tmp_path / "run").mkdir()
    rows = [{**LAYER, "device_R": 1.2}, {**LAYER, "way": "frozen", "device_R": 1.0}]
    content = {"kind": "layers", "machine": {"device": "NVIDIA B300"}, "rows": rows}
    (tmp_path / "run" / "layers.json").write_text(json.dumps(content), encoding="utf-8")
    assert recorded.main([str(tmp_path / "run")]) == 0 and recorded.cards() == ["NVIDIA B300"]
    assert recorded.recorded("NVIDIA B300") == [{"folder": "run", **content}]
    assert check.main([str(tmp_path / "run")]) == 0
    capsys.readouterr()
    rows[0]["device_R"] = 1.3
    (tmp_path / "run" / "layers.json").write_text(json.dumps(content), encoding="utf-8")
    assert check.main([str(tmp_path / "run")]) == 1
    assert "| 1.2 | 1.253 | 1.3 |" in capsys.readouterr().out


def test_every_table_of_the_results_says_its_commit_or_that_it_is_older():
    tables = [line for line in RESULTS.splitlines() if re.match(r"`[^`]+/\w+\.json`", line)]
    assert len(tables) > 10
    for line in tables:
        assert re.search(r"; (commit [0-9a-f]{7,}|measured before files said their commit)", line)


def test_a_report_keeps_the_tables_of_other_files(tmp_path):
    first = {"kind": "many", "machine": {"device": "a"}, "rows": [{"way": "ours", "layers": 1}]}
    made_on = {"processor": "p", "cores": 1, "threads": 1, "python": "3", "packages": {}}
    for name, commit in (("one", "aaa1111"), ("two", "bbb2222")):
        (tmp_path / name).mkdir()
        content = {**first, "machine": {"device": name, **made_on, "commit": commit}}
        (tmp_path / name / "many.json").write_text(json.dumps(content), encoding="utf-8")
        assert report.main([str(tmp_path / name), "--out", str(tmp_path / "r.md")]) == 0
    text = (tmp_path / "r.md").read_text(encoding="utf-8")
    assert text.count("## A thousand layers") == 2 == text.count("| ours | 1 |")
    assert "commit aaa1111." in text and "commit bbb2222." in text
    assert report.main([str(tmp_path / "two"), "--out", str(tmp_path / "r.md")]) == 0
    assert (tmp_path / "r.md").read_text(encoding="utf-8") == text
