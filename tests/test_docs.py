"""The blocks of the documents run, in order, each document in a folder of its own."""

import re
import shlex
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")

from paramlora.cli import main

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("name", ["arithmetic.md", "checkpoints.md"])
def test_the_blocks_run(name, tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(python|sh)\n(.*?)```", (DOCS / name).read_text("utf-8"), re.S)
    assert len(blocks) > 5
    names = {}
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, name, "exec"), names)
            continue
        for line in text.strip().splitlines():
            program, *arguments = shlex.split(line)
            assert program == "paramlora"
            with pytest.raises(SystemExit) as stop:
                main(arguments)
            assert stop.value.code == 0, line
