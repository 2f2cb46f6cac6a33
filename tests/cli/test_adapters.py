"""The commands `convert` and `inspect`: what they write, print, and exit with."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import paramlora
from paramlora import formats
from paramlora.files import adapters as interchange
from tests.formats import foreign

pytest.importorskip("typer")
from paramlora.cli import main


def net():
    return foreign.model()


@pytest.fixture
def style(tmp_path):
    """A kohya file of a Linear and a Conv2d."""
    content = formats.write(foreign.adapter(["linear", "conv2"]), "kohya", formats.base_of(net()))
    path = tmp_path / "style.safetensors"
    save_file(dict(content.state), path, dict(content.metadata))
    return path


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return stop.value.code, out, " ".join(err.split())


def test_names_come_from_a_model_or_from_its_checkpoint(capsys, tmp_path, style):
    save_file(net().state_dict(), tmp_path / "base.safetensors")
    known = {"model": f"{__name__}:net", "base": tmp_path / "base.safetensors"}
    for option, value in known.items():
        out = tmp_path / option
        code, *said = run(capsys, "convert", style, "-o", out, "--to", "peft", f"--{option}", value)
        assert (code, said) == (0, ["", f"converted 2 updates into {out}, as peft"])
        keys = load_file(out / "adapter_model.safetensors")
        assert "base_model.model.conv2.lora_A.weight" in keys
    code, _, err = run(capsys, "convert", style, "-o", tmp_path / "x", "--to", "peft")
    assert code == 2 and "cannot be read back without the model" in err
    both = ["--model", known["model"], "--base", known["base"]]
    code, _, err = run(capsys, "convert", style, "-o", tmp_path / "x", "--to", "peft", *both)
    assert code == 2 and "--model and --base both tell" in err


def test_a_report_for_machines_and_one_before_writing(capsys, tmp_path, style):
    arguments = ["convert", style, "-o", tmp_path / "n", "--to", "native"]
    arguments += ["--model", f"{__name__}:net"]
    code, out, _ = run(capsys, *arguments, "--dry-run")
    assert (
        code == 0
        and "would convert 2 updates into" in " ".join(out.split())
        and not (tmp_path / "n").exists()
    )
    code, out, _ = run(capsys, *arguments, "--json")
    assert json.loads(out) == {
        "out": str(tmp_path / "n"),
        "format": "native",
        "updates": 2,
        "dry_run": False,
    }
    code, _, err = run(capsys, *arguments)
    assert code == 2 and "exists" in err
    assert run(capsys, *arguments, "--force")[0] == 0


def test_the_names_of_keys_can_be_chosen(capsys, tmp_path, style):
    known = ["--model", f"{__name__}:net"]
    for to, prefix, start in (
        ("kohya", "lora_te1", "lora_te1_linear.lora_down.weight"),
        ("diffusers", "transformer", "transformer.linear.lora_A.weight"),
    ):
        out = tmp_path / to
        command = ("convert", style, "-o", out, "--to", to, "--prefix", prefix, *known)
        assert run(capsys, *command, "--quiet") == (0, "", "")
        assert start in load_file(out)
    code, _, err = run(
        capsys, "convert", style, "-o", tmp_path / "p", "--to", "peft", "--prefix", "x", *known
    )
    assert code == 2 and "--prefix is for kohya and diffusers" in err


def test_what_is_left_out_is_told(capsys, tmp_path, style):
    state = {**load_file(style), "lora_unet_x.oft_blocks": torch.ones(2)}
    save_file(state, style)
    arguments = ["convert", style, "-o", tmp_path / "p", "--to", "peft"]
    arguments += ["--model", f"{__name__}:net"]
    code, _, err = run(capsys, *arguments)
    assert code == 2 and "error: style.safetensors: tensors that are no update" in err
    code, _, err = run(capsys, *arguments, "--loose")
    assert code == 0 and "warning: style.safetensors: tensors that are no update" in err
    assert set(interchange.read_adapter(tmp_path / "p").updates) == {"linear", "conv2"}


def test_loosely_nothing_left_is_refused_by_the_folder_s_name(capsys, tmp_path, style):
    known = ("--model", f"{__name__}:net")
    assert run(capsys, "convert", style, "-o", tmp_path / "p", "--to", "peft", *known)[0] == 0
    save_file({"other.weight": torch.ones(2, 2)}, tmp_path / "base.safetensors")
    told = "error: p/adapter_model.safetensors: nothing in it belongs to the model. Give an"
    for command in (
        ("convert", tmp_path / "p", "--to", "native", "--base", tmp_path / "base.safetensors"),
        ("merge", tmp_path / "base.safetensors", tmp_path / "p"),
        ("embed", tmp_path / "base.safetensors", tmp_path / "p"),
    ):
        code, _, err = run(capsys, *command, "--loose", "-o", tmp_path / "x.safetensors")
        assert code == 2 and told in err and not (tmp_path / "x.safetensors").exists()


def test_a_part_whose_names_its_model_tells_is_converted_first(capsys, tmp_path, style):
    whole = ("convert", "--to", "diffusers", "-o", tmp_path / "x.safetensors", "--component")
    code, _, err = run(capsys, *whole, f"unet={style}")
    assert code == 2 and "or convert it alone to native first, with its model (--model)" in err
    one = tmp_path / "one.safetensors"
    alone = ("convert", style, "-o", one, "--to", "native", "--model", f"{__name__}:net")
    assert run(capsys, *alone)[0] == run(capsys, *whole, f"unet={one}")[0] == 0
    code, _, err = run(capsys, *whole, "unet=", "--force")
    assert code == 2 and "no file to convert. Give one, or --component PART=FILE" in err


def test_a_part_that_a_file_of_kohya_lacks_is_named(capsys, tmp_path, style):
    for command in (("inspect", style), ("convert", style, "--to", "kohya", "-o", tmp_path / "x")):
        code, out, err = run(capsys, *command, "--component", "vae")
        told = "error: style.safetensors: it has no part vae. Give another component (--component)"
        assert (code, out) == (2, "") and told in err


def test_an_inspection_in_print_and_in_json(capsys, style):
    state = load_file(style)
    state["lora_unet_linear.lora_up.weight"][0, 0] = math.nan
    save_file(state, style)
    code, out, err = run(capsys, "inspect", style)
    assert code == 0 and err == "" and "format: kohya" in out
    assert "not finite" in out and "2 updates, 1 flagged" in out
    code, out, _ = run(capsys, "inspect", style, "--json")
    rows = {row["path"]: row for row in json.loads(out)["rows"]}
    assert rows["lora_unet_linear"]["flag"] == "not finite"
    assert rows["lora_unet_conv2"]["r"] == 2 and rows["lora_unet_conv2"]["norm"] > 0


def test_a_file_that_is_no_adapter(capsys, tmp_path):
    save_file(net().state_dict(), tmp_path / "base.safetensors")
    code, out, err = run(capsys, "inspect", tmp_path / "base.safetensors")
    assert code == 2 and out == "" and "no adapter format that is known" in err
    code, _, err = run(capsys, "inspect", tmp_path / "gone")
    assert code == 2 and "cannot be read: No such file" in err


def test_parts_of_a_pipeline_become_one_file(capsys, tmp_path, style):
    native = ["--model", f"{__name__}:net", "--to", "native"]
    for name in ("unet", "text_encoder"):
        run(capsys, "convert", style, "-o", tmp_path / f"{name}.safetensors", *native)
    parts = [f"--component={n}={tmp_path / n}.safetensors" for n in ("unet", "text_encoder")]
    out = tmp_path / "one.safetensors"
    code, _, err = run(capsys, "convert", *parts, "-o", out, "--to", "diffusers")
    assert (code, err) == (0, f"converted 4 updates into {out}, as diffusers")
    assert {key.split(".")[0] for key in load_file(out)} == {"unet", "text_encoder"}
    for wrong, told in (
        ([], "no file to convert. Give one, or --component PART=FILE"),
        ([parts[0], parts[0]], "--component unet=...: that part has two files"),
        ([style, parts[0]], "gives each part its file. Leave out the other file"),
        ([*parts, "--model", f"{__name__}:net"], "--model tells the names of one model"),
        ([parts[0].replace("unet=", "unit=")], '"unit" is no part of a pipeline'),
    ):
        code, _, err = run(capsys, "convert", *wrong, "-o", tmp_path / "x", "--to", "diffusers")
        assert code == 2 and told in err


def test_the_task_and_the_base_are_written_for_peft(capsys, tmp_path, style):
    told = ("--task-type", "CAUSAL_LM", "--base-name", "my/base", "--model", f"{__name__}:net")
    assert run(capsys, "convert", style, "-o", tmp_path / "p", "--to", "peft", *told)[0] == 0
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM" and config["base_model_name_or_path"] == "my/base"


def test_inspect_tells_what_does_not_fit_the_base(tmp_path, monkeypatch, capsys):
    """Of our own format too: every update of another shape, with both shapes."""
    monkeypatch.chdir(tmp_path)
    model = paramlora.attach(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), {"*": {"r": 1}})
    paramlora.save_adapter(model, "a.safetensors")
    other = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
    save_file(other.state_dict(), "other.safetensors")
    code, out, err = run(capsys, "inspect", "a.safetensors", "--base", "other.safetensors")
    told = "a.safetensors: 1 update of other shapes than the model's: 0 (an update of [3, 4], and"
    assert (code, out) == (2, "") and told in err and "the model's is [3, 5])" in err
    for command in ("combine", "resize"):
        more = ["--rank", "1"] if command == "resize" else []
        words = [command, "a.safetensors", "-o", "o.safetensors", "--base", "other.safetensors"]
        code, out, err = run(capsys, *words, *more)
        assert (code, out) == (2, "") and told in err
