"""The commands `combine`, `resize`, `difference`: what they write, say and refuse."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn

import paramlora
from paramlora.files.adapters import read_adapter, write_adapter
from paramlora.formats import base_of
from paramlora.model.attach import updates
from paramlora.update.value import Adapter, KindUpdate
from tests.cli.running import run


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A base, two adapters of it in the native format, the first as kohya's and peft's too."""
    monkeypatch.chdir(tmp_path)
    safetensors.torch.save_file(net().state_dict(), "base.safetensors")
    for seed, name in enumerate("ab"):
        model = paramlora.attach(net(), {"0": {"r": 2, "scale": 0.7}, "1": {"r": 3}}, name)
        torch.manual_seed(seed)
        for _, _, low in updates(model):
            nn.init.normal_(low.lora_B)
        paramlora.save_adapter(model, f"{name}.safetensors", name)
    a = read_adapter("a.safetensors")
    write_adapter(a, "a-kohya.safetensors", "kohya")
    write_adapter(a, "a-peft", "peft")
    return tmp_path


def dense(adapter, path):
    update = adapter.updates[path]
    return update.scale * (update.lora_B.double() @ update.lora_A.double())


def wanted(path, *weights):
    read = [read_adapter(f"{name}.safetensors") for name in "ab"]
    return sum(w * dense(one, path) for w, one in zip(weights, read))


def close(found, expected, tolerance=1e-6):
    return float((found - expected).norm() / expected.norm()) < tolerance


def test_a_sum_is_written_and_told_in_one_line(folder, capsys):
    command = ("combine", "a.safetensors:0.7", "b.safetensors", "-o", "both.safetensors")
    told = "combined 2 adapters into both.safetensors: 2 updates as native\n"
    assert run(capsys, *command) == (0, "", told)
    assert all(close(dense(read_adapter("both.safetensors"), p), wanted(p, 0.7, 1)) for p in "01")
    assert run(capsys, *command, "--force", "-q") == (0, "", "")


@pytest.mark.parametrize("first", ["a-kohya.safetensors", "a-peft"])
def test_files_of_any_format_add_and_keep_the_first_one_s(folder, capsys, first):
    out = "sum" if first == "a-peft" else "sum.safetensors"
    known = ("--model", f"{__name__}:net")
    code, _, err = run(capsys, "combine", first, "b.safetensors:-2", "-o", out, *known)
    assert code == 0 and err.endswith(f"as {'peft' if out == 'sum' else 'kohya'}\n")
    found = read_adapter(out, base_of(net()))
    assert all(close(dense(found, path), wanted(path, 1, -2)) for path in "01")


def test_two_files_of_kohya_need_no_model(folder, capsys):
    two = ("a-kohya.safetensors", "a-kohya.safetensors:0.5")
    code, _, err = run(capsys, "combine", *two, "-o", "k.safetensors")
    assert code == 0 and "as kohya" in err
    found = read_adapter("k.safetensors", base_of(net()))
    assert all(close(dense(found, path), wanted(path, 1.5, 0)) for path in "01")
    code, _, err = run(capsys, "combine", two[0], "b.safetensors", "-o", "x.safetensors")
    assert code == 2 and "names of layers cannot be compared" in err and "(--model)" in err
    code, _, err = run(capsys, "combine", *two, "-o", "x", "--to", "peft")
    assert code == 2 and "names of layers cannot be read back without the model" in err


@pytest.mark.parametrize("options", [
    ("svd", "--rank", "1"), ("ties", "--rank", "2", "--density", "0.5"),
    ("dare", "--rank", "2", "--density", "0.5", "--seed", "3"),
])  # fmt: skip
def test_what_is_only_near_tells_how_near(folder, capsys, options):
    command = ("combine", "a.safetensors", "b.safetensors", "-o", "o.safetensors", "--how")
    code, out, err = run(capsys, *command, *options)
    assert code == 0 and "largest error" in err
    code, out, _ = run(capsys, *command, *options, "--force", "--json")
    told = json.loads(out)
    assert 0 < told["errors"]["0"] < 1 and told["ranks"] == dict.fromkeys("01", int(options[2]))


def test_whole_differences_are_counted_among_the_updates(folder, capsys):
    one = KindUpdate("difference", {"lora_diff": torch.ones(6)}, shape=(6,))
    write_adapter(Adapter({}, others={"0.bias": one}), "d.safetensors")
    command = ("combine", "d.safetensors:2", "d.safetensors", "-o", "e.safetensors")
    told = "combined 2 adapters into e.safetensors: 1 update as native\n"
    assert run(capsys, *command) == (0, "", told)
    code, out, _ = run(capsys, *command, "--force", "--json")
    assert code == 0 and json.loads(out)["updates"] == 1
    code, _, err = run(capsys, "resize", "d.safetensors", "-o", "r.safetensors", "--rank", "1")
    assert code == 0 and "1 whole difference without a rank, kept as before: 0.bias" in err


def test_ranks_are_cut(folder, capsys):
    code, _, err = run(capsys, "resize", "a.safetensors", "-o", "s.safetensors", "--rank", "1")
    assert code == 0 and err.startswith("resized 2 updates into s.safetensors: 2 updates as native")
    code, out, _ = run(
        capsys, "resize", "a.safetensors", "-o", "t.safetensors",
        *("--rank", "1=2", "--rank", "0=1", "--json"),
    )  # fmt: skip
    told = json.loads(out)
    assert told["ranks"] == {"0": 1, "1": 2}
    before, after = (dense(read_adapter(f"{n}.safetensors"), "1") for n in "at")
    assert told["errors"]["1"] == pytest.approx(float((after - before).norm() / before.norm()))
    code, out, _ = run(capsys, "resize", "a-peft", "-o", "u", "--energy", "0.999999", "--dry-run")
    assert out == "would resize 2 updates into u: 2 updates as peft\n" or "largest error" in out


def test_a_difference_gives_the_merged_model_back(folder, capsys):
    merge = ("merge", "base.safetensors", "a.safetensors", "-o", "tuned.safetensors")
    assert run(capsys, *merge)[0] == 0
    command = ("difference", "base.safetensors", "tuned.safetensors")
    code, _, err = run(capsys, *command, "-o", "d.safetensors", "--rank", "3")
    assert code == 0 and err.startswith("subtracted two checkpoints into d.safetensors: 2 updates")
    found = read_adapter("d.safetensors")
    assert all(close(dense(found, path), wanted(path, 1, 0), 1e-5) for path in "01")
    run(capsys, "merge", "base.safetensors", "d.safetensors", "-o", "again.safetensors")
    one, two = (safetensors.torch.load_file(f"{n}.safetensors") for n in ("tuned", "again"))
    assert all((one[key] - two[key]).abs().max() < 1e-6 for key in one)
    code, _, err = run(capsys, *command, "-o", "p", "--to", "peft", "--energy", "0.9",
                       "--model", f"{__name__}:net", "--exclude", "1")  # fmt: skip
    assert code == 0 and "1 update as peft" in err


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (("combine", "a.safetensors", "--how", "mean"), '(--how) "mean" is not known. Known: '),
        (("combine", "a.safetensors", "--seed", "1"), '--seed is for "dare", and "exact" has no'),
        (("combine", "a.safetensors:x"), '"x" is no weight'),
        (("combine", "a.safetensors", "--how", "svd"), "give a rank (--rank), such as 16"),
        (("combine", "a.safetensors", "--alpha", "2"), "it tells its own scales. Leave alpha"),
        (("resize", "a.safetensors"), "give a rank or an energy, and one of them only"),
        (("resize", "a.safetensors", "--rank", "4"), 'the highest is 3, of "1".'),
        (("resize", "a.safetensors", "--rank", "to_q=x"), "--rank to_q=x: no rank. Give a whole"),
        (("resize", "a.safetensors", "--rank", "1", "--rank", "2"), "--rank 1: no rank"),
        (("difference", "base.safetensors", "base.safetensors", "--rank", "1"),
         "base.safetensors: no tensor differs from the base's"),
        (("difference", "base.safetensors", "a.safetensors", "--rank", "1"), "lacks"),
    ],
)  # fmt: skip
def test_wrong_input_is_a_sentence(folder, capsys, command, told):
    there = sorted(p.name for p in folder.iterdir())
    code, out, err = run(capsys, *command, "-o", "x.safetensors")
    assert (code, out) == (2, "") and told in err and err.count("\n") == 1
    assert sorted(p.name for p in folder.iterdir()) == there


def test_a_key_is_of_the_file_that_has_levels(folder, capsys):
    tuned = {key: value + 1 for key, value in net().state_dict().items()}
    torch.save({"a": {"ema": tuned}}, "tuned.pt")
    command = ("difference", "base.safetensors", "tuned.pt", "-o", "d.safetensors", "--rank", "1")
    code, _, err = run(capsys, *command, "--key", "a.ema")
    assert code == 0 and "subtracted two checkpoints into d.safetensors" in err
    two = ("difference", "base.safetensors", "base.safetensors", "-o", "x.safetensors")
    code, _, err = run(capsys, *two, "--rank", "1", "--key", "a")
    assert code == 2 and "has no levels; leave out the key" in err


def test_the_functions_take_values_files_and_models(folder):
    a = read_adapter("a.safetensors")
    both = paramlora.combine([(a, 0.5), ("b.safetensors", 2)])
    assert close(dense(both, "0"), wanted("0", 0.5, 2))
    small = paramlora.resize("a.safetensors", 1)
    assert small.adapter.updates["0"].r == 1 and small.error > 0
    tuned = paramlora.merge(paramlora.load_adapter(net(), "a.safetensors"))
    found = paramlora.difference(net(), tuned, rank=3)
    assert close(dense(found.adapter, "1"), wanted("1", 1, 0), 1e-5)
    assert found.adapter.updates["0"].kind == "linear"
