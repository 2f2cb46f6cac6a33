"""A benchmark's table filled by several runs: each goes on with the file of the last."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from benchmarks import report, sharded_llama, stable_diffusion
from benchmarks.machine import commit
from tests.model import forked

pytestmark = pytest.mark.filterwarnings("ignore")  # the other libraries' own advice
ROOT = Path(__file__).parents[1]
PAIR = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SCRIPTS = {
    "stable_diffusion_fsdp": (stable_diffusion.main, ["--seconds", "0", "--fsdp"]),
    "sharded_llama": (sharded_llama.main, ["--steps", "2"]),
}
NUMBERS = ("per_second", "tokens_per_second")


def pair(*arguments):
    """What two processes print."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    whole = [sys.executable, *PAIR, *arguments]
    done = subprocess.run(whole, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read(folder, kind):
    return json.loads((folder / f"{kind}.json").read_text(encoding="utf-8"))


def measured(content):
    return {
        (r["way"], r.get("checkpointing")): r
        for r in content["rows"]
        if any(n in r for n in NUMBERS)
    }


# their time counts from the start of the process, this one's
TINY = ["--tiny", "--limit", "1e6"]


def sd(folder, *options):
    arguments = [*TINY, "--seconds", "0", "--ways", "full", "paramlora", "--out", str(folder)]
    return stable_diffusion.main([*arguments, *options])


@pytest.fixture
def counted(monkeypatch):
    """The cells that were begun; `cut` is the number of the one that ends the run."""
    own, begun = stable_diffusion.run_cell, []

    def run_cell(training, frozen, cell):
        begun.append((training.way, cell[2]))
        if len(begun) == counting.cut:
            raise KeyboardInterrupt
        return own(training, frozen, cell)

    class counting:
        cells, cut = begun, None

    monkeypatch.setattr(stable_diffusion, "run_cell", run_cell)
    return counting


def test_a_run_that_was_cut_is_gone_on_with(tmp_path, counted):
    counted.cut = 2
    with pytest.raises(KeyboardInterrupt):
        sd(tmp_path)
    cut = read(tmp_path, "stable_diffusion")
    assert list(measured(cut)) == [("full", False)]
    outcomes = [row["outcome"] for row in cut["rows"] if "outcome" in row]
    assert sorted(outcomes) == 2 * ["not run: no time left"] + [stable_diffusion.CUT]
    assert sd(tmp_path) == 0
    whole = read(tmp_path, "stable_diffusion")
    assert len(measured(whole)) == len(whole["rows"]) == 4
    assert measured(whole)["full", False] == measured(cut)["full", False]
    # the one that ended the first run comes last
    ways = [("full", False), ("full", True), ("paramlora", False), ("paramlora", True)]
    assert counted.cells == [*ways[:2], *ways[2:], ways[1]]
    assert all(row["steps"] == 2 and row["commit"] == commit() for row in whole["rows"])
    assert sd(tmp_path) == 0 and len(counted.cells) == 5  # nothing is left
    assert [p.name for p in tmp_path.iterdir()] == ["stable_diffusion.json"]


def test_what_failed_is_run_again_and_what_did_not_fit_is_not(tmp_path, counted):
    assert sd(tmp_path) == 0
    content = read(tmp_path, "stable_diffusion")
    for row, outcome in zip(content["rows"], ("OOM", "RuntimeError: no luck")):
        row.pop("per_second")
        row["outcome"] = outcome
    again = (content["rows"][1]["way"], content["rows"][1]["checkpointing"])
    (tmp_path / "stable_diffusion.json").write_text(json.dumps(content), encoding="utf-8")
    counted.cells.clear()
    assert sd(tmp_path) == 0 and counted.cells == [again]


def test_what_failed_comes_after_what_was_not_run(tmp_path, counted):
    assert sd(tmp_path, "--count", "1") == 0
    content = read(tmp_path, "stable_diffusion")
    content["rows"][0].pop("per_second")
    content["rows"][0]["outcome"] = "RuntimeError: no luck"
    (tmp_path / "stable_diffusion.json").write_text(json.dumps(content), encoding="utf-8")
    counted.cells.clear()
    assert sd(tmp_path) == 0
    assert len(counted.cells) == 4 and counted.cells[-1] == ("full", False)


@pytest.mark.parametrize("way", ["full", "paramlora"])
def test_a_rehearsal_needs_what_a_step_needs_and_changes_nothing(way):
    options = stable_diffusion._parser().parse_args(["--tiny"])
    training = stable_diffusion.Training(way, options)
    frozen = stable_diffusion.Frozen(torch.float32, tiny=True)
    training.prepare(checkpointing=False)
    before = {n: t.clone() for n, t in training.unet.state_dict().items()}
    # the moments are there before the first step, and moved nothing
    assert len(training.optimizer.state) == len(training.parameters)
    if way == "full":
        torch.manual_seed(0)
        fresh = stable_diffusion.unet(tiny=True)
        assert all(torch.equal(before[n], t) for n, t in fresh.state_dict().items())
    gradients: list[int] = []
    for p in training.parameters:  # called before the rehearsal's own, which drops the gradient
        p.register_post_accumulate_grad_hook(
            lambda _: gradients.append(sum(q.grad is not None for q in training.parameters))
        )
    data = stable_diffusion.Batch.draw(torch.Generator().manual_seed(0), 2, 64, frozen.words)
    training.rehearse(frozen(data))
    assert gradients == [1] * len(training.parameters)
    assert all(torch.equal(before[n], t) for n, t in training.unet.state_dict().items())
    training.start()
    training.step(frozen(data))
    assert all(p.grad is not None for p in training.parameters)
    assert any(not torch.equal(before[n], t) for n, t in training.unet.state_dict().items())


def test_a_copy_says_which_commit_it_is_of(monkeypatch):
    monkeypatch.setenv("PARAMLORA_COMMIT", "told")
    assert commit.__wrapped__() == "told"
    monkeypatch.delenv("PARAMLORA_COMMIT")
    assert commit.__wrapped__() != "told"


def test_no_time_runs_nothing_and_loses_nothing(tmp_path, counted):
    assert sd(tmp_path, "--count", "1") == 0
    first = measured(read(tmp_path, "stable_diffusion"))
    assert sd(tmp_path, "--limit", "0") == 0
    assert measured(read(tmp_path, "stable_diffusion")) == first and len(counted.cells) == 1


def test_rows_made_otherwise_do_not_mix(tmp_path):
    assert sd(tmp_path, "--count", "1") == 0
    before = (tmp_path / "stable_diffusion.json").read_bytes()
    want = "was made with dtype float32, this run has float64; name another folder with --out"
    with pytest.raises(SystemExit, match=want):
        sd(tmp_path, "--dtype", "float64")
    assert (tmp_path / "stable_diffusion.json").read_bytes() == before


def test_what_tells_most_comes_first():
    options = stable_diffusion._parser().parse_args([])
    order = stable_diffusion.plan(options)
    first = [(512, 8, False), (512, 4, False), (512, 8, True), (512, 4, True)]
    assert order[:16] == [(way, cell) for way in stable_diffusion.WAYS for cell in first]
    assert len(set(order)) == len(order) == 4 * 16
    options = stable_diffusion._parser().parse_args(["--fsdp"])
    assert stable_diffusion.plan(options) == [(w, (512, 4, False)) for w in stable_diffusion.WAYS]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
@pytest.mark.parametrize("kind", SCRIPTS)
def test_two_processes_go_on(tmp_path, kind):
    main, options = SCRIPTS[kind]
    options = [*TINY, *options, "--out", str(tmp_path)]
    forked.both(main, [*options, "--count", "1"])
    first = measured(read(tmp_path, kind))
    assert len(first) == 1
    forked.both(main, options)
    content = read(tmp_path, kind)
    assert len(measured(content)) == len(content["rows"]) == (4 if kind == "sharded_llama" else 8)
    assert first.items() <= measured(content).items()  # to the last digit: not measured again
    assert content["processes"] == 2
    assert report.main([str(tmp_path), "--out", str(tmp_path / "r.md")]) == 0
    text = (tmp_path / "r.md").read_text(encoding="utf-8")
    assert f"Measured at commit {commit()} on cpu." in text
    assert "| paramlora | " in text if kind == "sharded_llama" else "| 64 & 2×2 | yes | " in text


FAILING = """
import sys, torch
from pathlib import Path
from benchmarks import processes

processes.start(60)
lines = []
for error in (torch.OutOfMemoryError, RuntimeError):
    for where in (0, 1, 2):

        def act():
            if processes.rank() == where:
                raise error("told")
            return "fine"

        try:
            lines.append(processes.together(act))
        except RuntimeError as seen:
            lines.append(type(seen).__name__)
Path(sys.argv[1], str(processes.rank())).write_text(" ".join(lines))
processes.stop()
"""


def test_an_error_in_one_process_reaches_every_one(tmp_path):
    (tmp_path / "script.py").write_text(FAILING, encoding="utf-8")
    pair(str(tmp_path / "script.py"), str(tmp_path))
    want = ["OutOfMemoryError"] * 2 + ["fine"] + ["RuntimeError"] * 2 + ["fine"]
    assert [(tmp_path / rank).read_text().split() for rank in "01"] == [want, want]


def test_rows_of_several_commits_say_which(tmp_path):
    cell = {"image": 512, "batch": 8, "checkpointing": False}
    made = [("aaa1111", "NVIDIA H100"), ("bbb2222", "NVIDIA H200")]
    rows = [
        {"way": w, **cell, "per_second": 2.5, "peak_mib": 10.0, "commit": c, "device": d}
        for w, (c, d) in zip(("peft", "paramlora"), made)
    ]
    rows.append({"way": "full", **cell, "outcome": "not run: no time left"})
    from benchmarks.results import diffusion_table

    text = diffusion_table({"rows": rows, "processes": 2, "ways": {}})
    assert "| 2.50 it/s, 10 MiB (a) | 2.50 it/s, 10 MiB (b) | not run: no time left |" in text
    want = "(a) commit aaa1111 on NVIDIA H100; (b) commit bbb2222 on NVIDIA H200"
    assert f"Measured at {want}." in text


def test_the_commit_is_told_where_there_is_no_git(monkeypatch, tmp_path):
    from benchmarks import machine

    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("PARAMLORA_COMMIT", "abc1234")
    assert machine.commit.__wrapped__() == "abc1234"
    monkeypatch.delenv("PARAMLORA_COMMIT")
    assert machine.commit.__wrapped__() == "unknown"
