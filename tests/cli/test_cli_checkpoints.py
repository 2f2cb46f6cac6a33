"""The commands on checkpoint files: what they write, print, refuse and exit with."""

import json
import os
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from torch import nn

pytest.importorskip("typer")

from test_cli import run

import paramlora
from paramlora import checkpoint, files
from paramlora.cli.checkpoints import weighted
from paramlora.files.native import read_native
from paramlora.model.attach import lowranks


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
        for _, _, low in lowranks(model):
            nn.init.normal_(low.lora_B)
        paramlora.save_adapter(model, f"{name}.safetensors", name)
    return tmp_path, state


def loaded(path):
    return safetensors.torch.load_file(path)


def equal(one, other):
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_commands_do_what_the_functions_do_and_say_so_in_one_line(folder, capsys):
    _, state = folder
    a, b = read_native("a.safetensors"), read_native("b.safetensors")
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
    for command in commands:
        code, out, err = run(capsys, *command)
        place = command[command.index("-o" if "-o" in command else "--out") + 1]
        assert (code, out) == (0, "") and err.startswith(f"wrote {place}: ")
        assert err.endswith(" bytes\n") and err.count("\n") == 1
        assert run(capsys, *command, "--force", "--quiet") == (0, "", "")
    equal(loaded("in.safetensors"), checkpoint.embed(state, a))
    equal(loaded("merged.safetensors"), checkpoint.merge(state, a))
    equal(loaded("2.safetensors"), checkpoint.merge(state, (a, 0.5), b))
    equal(checkpoint.merge(state, read_native("back.safetensors")), checkpoint.merge(state, a))


def test_a_report_is_printed_where_it_is_asked_for(folder, capsys):
    command = ("merge", "base.safetensors", "a.safetensors", "-o", "out.safetensors")
    code, out, err = run(capsys, *command, "--dry-run")
    assert (code, err) == (0, "") and not os.path.exists("out.safetensors")
    assert out.split() == "would write out.safetensors: 4 tensors, 2 changed, 576 bytes".split()
    code, out, err = run(capsys, *command, "--json")
    assert (code, err) == (0, "")
    told = {"out": "out.safetensors", "tensors": 4, "changed": 2, "bytes": 576, "dry_run": False}
    assert json.loads(out) == told


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
        (("merge", "base.safetensors", "-o", "x.pt"), "nothing to merge"),
        (("merge", "base.safetensors", "none.st:2", "-o", "x.pt"), "none.st: cannot be read"),
        (("merge", "base.safetensors", "a.safetensors:nan", "-o", "x.pt"), '"nan" is no weight'),
        (("extract", "base.safetensors", "-o", "x.safetensors"), "nothing to extract"),
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


@pytest.mark.parametrize("command", ["embed", "extract", "merge", "targets", "demo"])
def test_help_has_an_example(command, capsys):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0 and f"Example: paramlora {command} " in " ".join(out.split())


def test_exit_codes_are_documented(capsys):
    text = " ".join(run(capsys, "--help")[1].split())
    assert "0 done, 1 a fault of paramlora, 2 wrong input, 130 stopped" in text


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


def signalled(command):
    """The exit code and the errors of a process that gets SIGINT once it writes."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not any(n.startswith(".out") for n in os.listdir()):
            pass
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    return process.returncode, err


def test_ctrl_c_in_the_real_process(folder):
    """Signalled as soon as its temporary file is there: exit 130, one word, nothing left."""
    path, _ = folder
    state = {"0.weight": torch.ones(8, 8), "big": torch.zeros(100_000_000)}
    safetensors.torch.save_file(state, "base.safetensors")
    model = paramlora.attach(nn.Sequential(nn.Linear(8, 8)), {"0": {"r": 1}})
    paramlora.save_adapter(model, "a.safetensors")
    there = sorted(os.listdir())
    command = [sys.executable, "-m", "paramlora", "merge"]
    command += ["base.safetensors", "a.safetensors", "-o", "out.safetensors"]
    for _ in range(10):
        code, err = signalled(command)
        if code != 0:
            break
        os.unlink("out.safetensors")  # it was done before the signal came: try again
    assert (code, err) == (130, "stopped\n")
    assert sorted(os.listdir()) == there
