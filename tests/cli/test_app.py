"""What the application does where its answer cannot be printed as it is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")


from tests.cli.running import NET

ROOT = Path(__file__).parents[2]


def piped(folder, *command, stdout=subprocess.PIPE, encoding="utf-8"):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "80"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "paramlora", *command]
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, env=environment)
    return done.returncode, done.stdout, done.stderr.decode()


def test_a_terminal_of_few_letters_shows_the_others_escaped(folder):
    (folder / "c.json").write_text(json.dumps({"0": {"r": 2}}))
    code, out, err = piped(folder, "inspect", "a.safetensors", encoding="ascii")
    assert (code, err) == (0, "") and b"3\\xd74" in out
    command = ("targets", "c.json", "--model", NET)
    code, out, err = piped(folder, *command, encoding="ascii")
    assert (code, err) == (0, "") and b"3\\xd74" in out


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_an_answer_that_cannot_be_printed_is_no_fault_of_ours(folder):
    with open("/dev/full", "wb") as full:
        code, _, err = piped(folder, "inspect", "a.safetensors", stdout=full)
    assert (code, err) == (2, "error: cannot be written: No space left on device.\n")
