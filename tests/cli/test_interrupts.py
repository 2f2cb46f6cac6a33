"""A sweep of Ctrl-C and `kill` in the middle of each command: nothing half written, its exit code,
a line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("typer")


SCRIPT = Path(__file__).with_name("interrupted.py")
COUNT = 4  # stops of each command
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), str(SCRIPT.parent)]),
    "OMP_NUM_THREADS": "1",
}


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and sends signals")
def test_a_command_that_is_stopped_leaves_all_or_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path, str(COUNT)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    harm, hits = (json.loads(line) for line in done.stdout.splitlines())
    assert harm["harm"] == []
    assert hits["hits"] > 12  # of 44


@pytest.mark.skipif(sys.platform != "linux", reason="looks for torch among a process's files")
@pytest.mark.parametrize(
    "start", [["-m", "paramlora"], ["-c", "from paramlora.cli import main; main()"]]
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_torch_is_imported(start, number):
    process = subprocess.Popen(
        [sys.executable, *start, "--version"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "libtorch_python" not in maps.read_text():
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=600)
    assert (process.returncode, out, err) == (128 + number, "", "stopped\n")


class Late:
    def __set_name__(self, owner, name):
        raise KeyboardInterrupt


def making(*_, **__):
    """What an import does where Ctrl-C comes while it makes a class."""
    type("Made", (), {"late": Late()})


def test_ctrl_c_while_a_class_is_made(monkeypatch, capsys):
    from paramlora.cli import app

    monkeypatch.setattr(app, "app", making)
    with pytest.raises(SystemExit) as done:
        app.run(["inspect", "a.safetensors"])
    assert done.value.code == 130 and capsys.readouterr().err == "stopped\n"


def test_ctrl_c_while_the_commands_or_a_model_make_a_class(monkeypatch, capsys, tmp_path):
    from paramlora import cli
    from paramlora.cli.commands import run

    (tmp_path / "c.json").write_text('{"*": {"r": 4}}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "late_model", SimpleNamespace(build=making))
    with pytest.raises(SystemExit) as done:
        run(["targets", "c.json", "--model", "late_model:build"])
    assert done.value.code == 130 and capsys.readouterr().err == "stopped\n"

    class Finder:
        def find_spec(self, name, *_):
            if name == "paramlora.cli.commands":
                making()

    monkeypatch.delitem(sys.modules, "paramlora.cli.commands")
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(SystemExit) as done:
        cli.main(["--version"])
    assert done.value.code == 130 and capsys.readouterr().err == "stopped\n"
