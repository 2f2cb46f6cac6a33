"""A sweep of the recipes of docs/checkpoints.md, run in their order."""

import re
import warnings
from pathlib import Path

import pytest
import torch

import paramlora

pytest.importorskip("peft")
pytest.importorskip("diffusers")
pytest.importorskip("typer")


def test_the_recipes_run(tmp_path, monkeypatch, capsys):
    from paramlora.cli import main

    text = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"\n## Formats\n(.*?)(?=\n## |\Z)", text, re.S)
    blocks = re.findall(r"```(python|sh)\n(.*?)```", section, re.S)
    monkeypatch.chdir(tmp_path)
    names = {}
    torch.manual_seed(0)
    for language, code in blocks:
        if language == "python":
            with warnings.catch_warnings():
                warnings.simplefilter("error", paramlora.ParamloraWarning)
                exec(compile(code, "checkpoints.md", "exec"), names)
            continue
        for line in code.splitlines():
            with pytest.raises(SystemExit) as stop:
                main(line.split()[1:])
            assert stop.value.code == 0, capsys.readouterr().err
    assert len(blocks) > 6 and "format: kohya" in capsys.readouterr().out
    same(names)


def same(names):
    """What the last recipes loaded is what the first ones saved."""
    x, t, c = torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 6)
    base = names["theirs"].state_dict()
    base = {k.replace(".base_layer", ""): v for k, v in base.items() if "lora_" not in k}
    with torch.no_grad():
        want = names["theirs"](x, t, c).sample
        paramlora.detach(names["model"]).load_state_dict(base)
        plain = names["model"](x, t, c).sample
        ours = paramlora.load_adapter(names["model"], "style-kohya.safetensors")(x, t, c).sample
    assert (plain - want).abs().max() > 0.01
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)
