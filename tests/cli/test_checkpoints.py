"""The commands on checkpoint files: what they write, print, refuse and exit with."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from torch import nn

pytest.importorskip("typer")

import paramlora
from paramlora import checkpoint, files
from paramlora.cli.options import weighted
from paramlora.files import read_adapter
from paramlora.files.adapters import load_adapter, write_adapter
from paramlora.files.native import write_native
from paramlora.model.attach import updates
from paramlora.update.value import Adapter, Update
from tests.cli.running import run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a base, two adapters, and the state dict of the base."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    safetensors.torch.save_file(state, "base.safetensors")
    for name in ("a", "b"):
        paramlora.attach(model, {"0": {"r": 2}, "1": {"r": 1}}, name)
        for _, _, low in updates(model):
            nn.init.normal_(low.lora_B)
        paramlora.save_adapter(model, f"{name}.safetensors", name)
    return tmp_path, state


def loaded(path):
    return safetensors.torch.load_file(path)


def equal(one, other):
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_commands_do_what_the_functions_do_and_say_so_in_one_line(folder, capsys):
    _, state = folder
    a, b = read_adapter("a.safetensors"), read_adapter("b.safetensors")
    commands = [
        ("embed", "base.safetensors", "a.safetensors", "-o", "in.safetensors"),
        ("extract", "in.safetensors", "--out", "back.safetensors"),
        ("merge", "in.safetensors", "-o", "merged.safetensors"),
        (
            "merge",
            "base.safetensors",
            "a.safetensors:0.5",
            "b.safetensors",
            "-o",
            "2.safetensors",
        ),
    ]
    said = {
        "embed": "embedded 2 updates into {}, 10 tensors of 776 bytes",
        "extract": "extracted 2 updates into {}, as native",
        "merge": "merged 2 of 4 tensors into {}, largest change [0-9.]+ of its norm",
    }
    for command in commands:
        code, out, err = run(capsys, *command)
        place = command[command.index("-o" if "-o" in command else "--out") + 1]
        assert (code, out) == (0, "") and err.count("\n") == 1
        assert re.fullmatch(said[command[0]].format(place), err.strip()), err
        assert run(capsys, *command, "--force", "--quiet") == (0, "", "")
    equal(loaded("in.safetensors"), checkpoint.embed(state, a))
    equal(loaded("merged.safetensors"), checkpoint.merge(state, a))
    equal(loaded("2.safetensors"), checkpoint.merge(state, (a, 0.5), b))
    equal(checkpoint.merge(state, read_adapter("back.safetensors")), checkpoint.merge(state, a))


def test_a_report_is_printed_where_it_is_asked_for(folder, capsys):
    command = ("merge", "base.safetensors", "a.safetensors", "-o", "out.safetensors")
    code, out, err = run(capsys, *command, "--dry-run")
    assert (code, err) == (0, "") and not os.path.exists("out.safetensors")
    assert out.split() == "would merge 2 of 4 tensors into out.safetensors".split()
    code, out, err = run(capsys, *command, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    found, base = loaded("out.safetensors"), folder[1]
    changes = [float((found[key] - base[key]).norm() / base[key].norm()) for key in base]
    assert told.pop("largest") == pytest.approx(max(changes), rel=1e-5)
    assert told == {
        "out": "out.safetensors", "tensors": 4, "changed": 2, "bytes": 576, "dry_run": False
    }  # fmt: skip


def test_nothing_is_overwritten_without_force(folder, capsys):
    command = ("merge", "base.safetensors", "a.safetensors", "-o", "b.safetensors")
    before = open("b.safetensors", "rb").read()
    code, out, err = run(capsys, *command)
    assert (code, out) == (2, "") and "exists" in err and "--force" in err
    assert open("b.safetensors", "rb").read() == before
    assert run(capsys, *command, "--force")[0] == 0
    assert open("b.safetensors", "rb").read() != before


@pytest.mark.parametrize(
    "command, text",
    [
        (
            ("merge", "none.safetensors", "a.safetensors", "-o", "x.pt"),
            "none.safetensors: cannot be",
        ),
        (("merge", "base.safetensors", "-o", "x.pt"), "base.safetensors: nothing to merge"),
        (("merge", "base.safetensors", "none.st:2", "-o", "x.pt"), "none.st: cannot be read"),
        (("merge", "base.safetensors", "a.safetensors:nan", "-o", "x.pt"), '"nan" is no weight'),
        (
            ("extract", "base.safetensors", "-o", "x.safetensors"),
            "base.safetensors: nothing to extract",
        ),
        (
            ("embed", "base.safetensors", "base.safetensors", "-o", "x.pt"),
            "no adapter format that is known",
        ),
        (("merge", "base.safetensors"), "Missing option"),
        (("embed", "base.safetensors", "-o", "x.pt"), "Missing argument"),
    ],
)
def test_wrong_input_exits_with_2_and_one_message_on_stderr(folder, capsys, command, text):
    there = sorted(os.listdir())
    code, out, err = run(capsys, *command)
    assert (code, out) == (2, "") and "Traceback" not in err
    assert text in " ".join(err.split())
    assert sorted(os.listdir()) == there


def test_debug_shows_where(folder, capsys):
    code, _, err = run(capsys, "--debug", "extract", "base.safetensors", "-o", "x.safetensors")
    assert code == 2 and "Traceback" in err and "nothing to extract" in err


def test_a_fault_of_ours_is_one_line_and_exits_with_1(folder, capsys, monkeypatch):
    monkeypatch.setattr(files, "extract", lambda *_, **__: 1 / 0)
    command = ("extract", "base.safetensors", "-o", "x.safetensors")
    code, out, err = run(capsys, *command)
    assert (code, out) == (1, "") and "ZeroDivisionError" in err and "Traceback" not in err
    assert "Traceback" in run(capsys, "--debug", *command)[2]


@pytest.mark.parametrize(
    "command", ["embed", "extract", "merge", "targets", "demo", "combine", "resize", "difference"]
)
def test_help_has_an_example(command, capsys):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0 and f"Example: paramlora {command} " in " ".join(out.split())


def test_exit_codes_are_documented(capsys):
    text = " ".join(run(capsys, "--help")[1].split())
    assert "0 done, 1 a fault of paramlora, 2 wrong input, 128 + N stopped by signal N" in text


def test_weights_are_read_from_the_end(folder):
    path, _ = folder
    for text, want in {
        "a.st": ("a.st", 1),
        "a.st:0.5": ("a.st", 0.5),
        "a.st:-1e-2": ("a.st", -0.01),
        "C:\\a.st": ("C:\\a.st", 1),
        "C:\\a.st:2": ("C:\\a.st", 2),
        "a.st:two": ("a.st:two", 1),
        ":2": (":2", 1),
    }.items():
        assert tuple(map(str, weighted(text))) == (want[0], str(float(want[1])))
    (path / "b:2").write_text("")
    assert str(weighted("b:2")[0]) == "b:2"


STOPS = {  # a signal, and the exit code that a shell knows it by
    signal.SIGINT: 130,
    signal.SIGTERM: 143,
    getattr(signal, "SIGHUP", signal.SIGTERM): 129 if hasattr(signal, "SIGHUP") else 143,
}


def signalled(command, number):
    """The exit code and the errors of a process that gets a signal once it writes."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not any(n.startswith(".out") for n in os.listdir()):
            time.sleep(1e-3)  # it writes for far longer, and sooner with a core to itself
        process.send_signal(number)
        _, err = process.communicate(timeout=600)
    return process.returncode, err


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_while_converting(number, folder):
    """The same of `convert`, whose file takes long enough to be stopped in."""
    big = {"0": Update(torch.ones(64, 500_000), torch.ones(500_000, 64), 1.0, (500_000, 500_000))}
    write_native(Adapter(big), "big.safetensors")
    there = sorted(os.listdir())
    command = [sys.executable, "-m", "paramlora", "convert", "big.safetensors"]
    for _ in range(10):
        code, err = signalled([*command, "-o", "out.safetensors", "--to", "native"], number)
        if code != 0:
            break
        os.unlink("out.safetensors")
    assert (code, err) == (STOPS[number], "stopped\n")
    assert sorted(os.listdir()) == there


def test_a_merge_into_what_is_merged_already_is_told(folder, capsys):
    command = ("merge", "base.safetensors", "a.safetensors", "-o", "once.safetensors")
    assert "warning" not in run(capsys, *command)[2]
    code, _, err = run(capsys, "merge", "once.safetensors", "a.safetensors", "-o", "2.safetensors")
    assert code == 0 and err.startswith("warning: 2 of 2 tensors, such as 0, hold other values")
    assert "is the adapter not merged into it already?" in err


def test_a_largest_change_is_of_its_own_norm(folder):
    for out in ("m.safetensors", "m.pt"):
        done = files.merge("base.safetensors", [("a.safetensors", 2.0)], out)
        a, state = read_adapter("a.safetensors").updates, folder[1]
        want = [float((2 * a[n].delta()).norm() / state[f"{n}.weight"].norm()) for n in ("0", "1")]
        assert done.largest == pytest.approx(max(want), rel=1e-4)


def test_a_dry_run_refuses_what_writing_would(folder, capsys):
    commands = [
        ("merge", "base.safetensors", "a.safetensors"),
        ("embed", "base.safetensors", "a.safetensors"),
        ("convert", "a.safetensors", "--to", "native"),
        ("combine", "a.safetensors", "b.safetensors"),
        ("resize", "a.safetensors", "--rank", "1"),
    ]
    for command in commands:
        for place, told in {
            "b.safetensors": "b.safetensors: exists. Give another place, or force (--force)",
            "gone/x.safetensors": "gone/x.safetensors: cannot be written: No such file",
        }.items():
            code, out, err = run(capsys, *command, "-o", place, "--dry-run")
            assert (code, out) == (2, "") and told in err, command


def test_warnings_come_before_the_error(folder, capsys):
    command = ("merge", "base.safetensors", "a.safetensors", "-o", "once.safetensors")
    run(capsys, *command)
    b = read_adapter("b.safetensors")
    huge = {path: replace(update, scale=1e38) for path, update in b.updates.items()}
    write_native(replace(b, updates=huge), "huge.safetensors")
    code, _, err = run(
        capsys, "merge", "once.safetensors", "huge.safetensors:1000", "-o", "2.safetensors"
    )
    lines = err.splitlines()
    assert code == 2 and [line.split(":")[0] for line in lines] == ["warning", "error"]


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (("merge", "base.safetensors", "a.safetensors", "--base", "base.safetensors"),
         "--base tells the names of layers where no checkpoint is given; here BASE does. Leave"),
        (("embed", "base.safetensors", "a.safetensors", "--base", "base.safetensors"),
         "here BASE does. Leave it out"),
        (("merge", "in.safetensors", "--loose"), "--loose is for an adapter's file, and none is"),
        (("merge", "in.safetensors", "--component", "unet"), "--component is for an adapter's"),
        (("merge", "base.safetensors", "a.safetensors", "--component", "unet"),
         "a.safetensors: it has no part unet. Its names begin with 0, 1; give one of those as"),
        (("embed", "base.safetensors", "a.safetensors", "--component", "unet"), "no part unet"),
        (("merge", "base.safetensors", "a.safetensors", "--alpha", "3"),
         "a.safetensors: alpha = 3 says nothing to it, since it tells its own scales. Leave alpha"),
        (("convert", "a.safetensors", "--to", "native", "--alpha", "3"), "tells its own scales"),
        (("extract", "in.safetensors", "--alpha", "3"), "--alpha is for files without scales"),
        (("extract", "in.safetensors", "--loose"), "--loose is for an adapter that does not fit"),
        (("extract", "in.safetensors", "--component", "unet"), "it has no part unet. Its names"),
        (("convert", "a.safetensors", "--to", "native", "--key", "model"), "--key is for --base"),
        (("convert", "a.safetensors", "--to", "native", "--component", "unet"),
         "it has no part unet. Its names begin with 0, 1; give one of those as component"),
    ],
)  # fmt: skip
def test_an_option_that_says_nothing_is_refused(folder, capsys, command, told):
    run(capsys, "embed", "base.safetensors", "a.safetensors", "-o", "in.safetensors")
    code, out, err = run(capsys, *command, "-o", "x.safetensors")
    assert (code, out) == (2, "") and told in err
    assert not os.path.exists("x.safetensors")


def net():
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def test_the_commands_share_how_an_adapter_is_read(folder, capsys):
    """A kohya file of more layers than the base has, and one without scales."""
    named = {"--model": f"{__name__}:net", "--base": "base.safetensors"}
    more = read_adapter("a.safetensors")
    more = replace(more, updates={**more.updates, "2": replace(more.updates["1"])})
    write_adapter(more, "k.safetensors", "kohya")
    bare = {"0.lora_A": torch.ones(2, 8), "0.lora_B": torch.ones(8, 2)}
    torch.save(bare, "bare.pt")
    for command in ("embed", "merge"):
        start = (command, "base.safetensors")
        code, _, err = run(capsys, *start, "k.safetensors", "-o", "none.safetensors")
        assert code == 2 and "updates of what the model does not have" in err
        for option in ([], ["--model", named["--model"]]):
            known = (*start, "k.safetensors", "--loose", *option, "-o", "x.safetensors", "--force")
            code, _, err = run(capsys, *known)
            assert code == 0 and "warning: k.safetensors: updates of what the model" in err
        alpha = (*start, "bare.pt", "--alpha", "1", "-o", f"{command}.safetensors")
        assert run(capsys, *alpha)[0] == 0
    moved = loaded("merge.safetensors")["0.weight"] - folder[1]["0.weight"]
    assert torch.allclose(moved, torch.ones(8, 8), atol=1e-6)  # 2 · alpha / r
    for option, value in named.items():
        code, out, _ = run(capsys, "inspect", "k.safetensors", option, value)
        assert code == 0 and any(line.startswith("0  ") for line in out.splitlines())
        assert "updates of what the model does not have" in out


def test_a_part_of_a_pipeline_is_taken_out_alone(folder, capsys):
    pipe = nn.ModuleDict({"unet": net(), "text_encoder": net()})
    paramlora.attach(pipe, {"unet.0": {"r": 2}, "text_encoder.1": {"r": 1}})
    for _, _, low in updates(pipe):
        nn.init.normal_(low.lora_B)
    safetensors.torch.save_file(pipe.state_dict(), "pipe.safetensors")
    told = ("extract", "pipe.safetensors", "--component", "unet", "--to", "peft", "-o", "unet")
    assert run(capsys, *told)[0] == 0
    again = load_adapter(net(), "unet")
    weight = pipe["unet"][0].weight
    base = pipe["unet"][0].parametrizations.weight.original
    assert torch.allclose(again[0].weight - loaded_base(again), weight - base, atol=1e-6)


def loaded_base(model):
    return model[0].parametrizations.weight.original


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_in_the_real_process(number, folder):
    """Signalled as soon as its temporary file is there: one word, nothing left."""
    path, _ = folder
    model = nn.Sequential(nn.Linear(8, 8))
    state = {"0.weight": model[0].weight.detach(), "big": torch.zeros(100_000_000)}
    safetensors.torch.save_file(state, "base.safetensors")
    paramlora.attach(model, {"0": {"r": 1}})
    paramlora.save_adapter(model, "a.safetensors")
    there = sorted(os.listdir())
    command = [sys.executable, "-m", "paramlora", "merge"]
    command += ["base.safetensors", "a.safetensors", "-o", "out.safetensors"]
    for _ in range(10):
        code, err = signalled(command, number)
        if code != 0:
            break
        os.unlink("out.safetensors")  # it was done before the signal came: try again
    assert (code, err) == (STOPS[number], "stopped\n")
    assert sorted(os.listdir()) == there


@pytest.mark.parametrize("form", ["native", "peft"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_part_of_a_file_is_merged_alone(form, whole, folder, capsys):
    """Into its own model, and into the pipeline, where the other part stays as it is."""
    base = {k: v for k, v in net().state_dict().items() if k.endswith("weight")}
    found = read_adapter("a.safetensors")
    parts = [(part, *one) for part in ("unet", "vae") for one in found.updates.items()]
    both = {f"{part}.{path}": replace(update) for part, path, update in parts}  # tied to none
    write_adapter(replace(found, updates=both, base={}), "both", form)
    start = "unet." if whole else ""
    state = (
        {f"{part}.{k}": v for part in ("unet", "vae") for k, v in base.items()} if whole else base
    )
    safetensors.torch.save_file({k: v.clone() for k, v in state.items()}, "of.safetensors")
    command = ("merge", "of.safetensors", "both", "--component", "unet", "-o", "m.safetensors")
    code, _, err = run(capsys, *command)
    assert code == 0, err
    merged = loaded("m.safetensors")
    for path, u in found.updates.items():
        want = base[f"{path}.weight"].double() + u.scale * u.lora_B.double() @ u.lora_A.double()
        close = (merged[f"{start}{path}.weight"].double() - want).abs().max()
        assert close < 1e-5 * want.abs().max()
    assert all(torch.equal(merged[k], v) for k, v in state.items() if k.startswith("vae."))
