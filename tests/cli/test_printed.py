"""A sweep of the commands: what they print of names, tables, and numbers, and what they refuse."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn

pytest.importorskip("typer")


import paramlora
from paramlora import FileError
from tests.cli.running import NET, net, run


@pytest.mark.parametrize("name", ["a:abc", "[red]x[/red]", "[/]", ":smile:", "[bold", "a\\[b]"])
def test_names_are_printed_as_they_are(name, folder, capsys):
    name = name.replace("/", "_") + ".safetensors"
    for command in (("inspect", f"{name}:abc"), ("merge", "base.safetensors", name, "-o", "x.pt")):
        code, _, err = run(capsys, *command)
        assert code == 2 and f"error: {command[-1] if command[0] == 'inspect' else name}: " in err
    code, out, err = run(capsys, "convert", "a.safetensors", "-o", name, "--to", "native")
    assert (code, out, err) == (
        0,
        "",
        f"converted 1 update, 2 whole tensors into {name}, as native\n",
    )
    code, out, _ = run(capsys, "convert", name, "-o", f"b{name}", "--to", "native", "--dry-run")
    assert code == 0 and out.endswith(f" into b{name}, as native\n")


def marked():
    model = nn.Module()
    model.add_module("[red]x[_red]:smile:", nn.Linear(4, 3))
    return model


def test_tables_print_names_as_they_are(folder, capsys):
    (folder / "c.json").write_text(json.dumps({"[red]x[_red]:smile:": {"r": 2}}))
    code, out, _ = run(capsys, "targets", "c.json", "--model", f"{__name__}:marked")
    assert code == 0 and "[red]x[_red]:smile:" in "".join(out.split())
    paramlora.save_adapter(paramlora.attach(marked(), folder / "c.json"), "m.safetensors")
    assert "[red]x[_red]:smile:" in run(capsys, "inspect", "m.safetensors")[1]


def test_whole_tensors_are_shown_as_such(folder, capsys):
    code, out, _ = run(capsys, "inspect", "a.safetensors", "--json")
    rows = {row["path"]: row for row in json.loads(out)["rows"]}
    assert code == 0 and {path: row["kind"] for path, row in rows.items()} == {
        "0": "low-rank", "1": "whole", "1.bias": "whole",
    }  # fmt: skip
    assert rows["1"]["shape"] == [3] and rows["1"]["r"] == 0 and rows["1"]["norm"] == 3**0.5
    _, out, _ = run(capsys, "inspect", "a.safetensors")
    assert "1 update, 2 whole tensors, 1 flagged" in out  # the update is fresh: all zero
    assert any(line.split() == ["1", "3", "whole", "-", "1.732"] for line in out.splitlines())
    (folder / "c.json").write_text(json.dumps({"0": {"r": 2}, "1": {"whole": True}}))
    _, out, _ = run(capsys, "targets", "c.json", "--model", NET)
    lines = [line.replace("│", " ").split() for line in out.splitlines()]
    assert ["1", "3", "1", "-", "whole", "3"] in lines and [
        "0",
        "3×4",
        "0",
        "2",
        "hard",
        "14",
    ] in lines
    assert "3 tensors, 20 parameters" in out


def test_messages_name_ways_out_that_the_command_line_has(folder, capsys):
    state = {"elsewhere.lora_A": torch.randn(2, 4), "elsewhere.lora_B": torch.randn(3, 2)}
    state["elsewhere.lora_scale"] = torch.ones(())
    torch.save(state, "other.pt")
    code, _, err = run(capsys, "merge", "base.safetensors", "other.pt", "-o", "x.safetensors")
    assert code == 2 and "component=... (--component)" in err
    assert "--component" in run(capsys, "convert", "--help")[1]


# the same of the functions


def test_loose_reading_leaves_out_whole_tensors_that_the_model_lacks(folder):
    plain = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(paramlora.ParamloraError, match=r'"1" matches nothing'):
        paramlora.load_adapter(plain, "a.safetensors")
    told = "a.safetensors: tensors of what the model does not have: 1, 1.bias. They were left out"
    with pytest.warns(paramlora.ParamloraWarning, match=told):
        paramlora.load_adapter(plain, "a.safetensors", strict=False)
    assert paramlora.adapter_of(plain).updates.keys() == {"0"}
    other = nn.Sequential(nn.ReLU(), nn.ReLU())
    with pytest.warns(paramlora.ParamloraWarning), pytest.raises(FileError, match="nothing in it"):
        paramlora.load_adapter(other, "a.safetensors", strict=False)


def test_whole_tensors_that_the_model_has_are_read_loosely_too(folder):
    model = paramlora.load_adapter(net(), "a.safetensors", strict=False)
    assert paramlora.adapter_of(model).whole.keys() == {"1", "1.bias"}


@pytest.mark.parametrize(
    "to, name", [("kohya", "x.pt"), ("original", "x.safetensors"), ("native", "x.bin")]
)
def test_a_converted_file_has_a_name_of_its_kind(to, name, folder):
    with pytest.raises(FileError, match="Give a name that ends in"):
        paramlora.files.adapters.convert("a.safetensors", name, to)


def test_a_notebook_shows_a_table(folder):
    shown = paramlora.summary(paramlora.attach(marked(), {"*": {"r": 2}}, "<b>"))._repr_html_()
    assert shown.startswith("<pre>tensor ") and "&lt;b&gt;" in shown and "<b>" not in shown


# outputs, streams and options


@pytest.mark.parametrize("out", ["/", "..", ".", "", "a.safetensors/x", "\x00"])
@pytest.mark.parametrize("command", [
    ("merge", "base.safetensors", "a.safetensors"), ("extract", "base.pt"),
    ("convert", "a.safetensors", "--to", "kohya"), ("convert", "a.safetensors", "--to", "native"),
])  # fmt: skip
def test_an_output_that_no_file_can_be_is_refused(command, out, folder, capsys):
    torch.save(paramlora.attach(net(), {"0": {"r": 2}}).state_dict(), "base.pt")
    code, printed, err = run(capsys, *command, "--force", "-o", out)
    assert (code, printed) == (2, "") and "fault of paramlora" not in err


def test_names_are_printed_without_what_moves_the_cursor(folder, capsys):
    name = "\x1b[31m\nq\udcff.safetensors"
    shown = r"1 update, 2 whole tensors into \x1b[31m\nq\udcff.safetensors, as native"
    told = ("convert", "a.safetensors", "-o", name, "--to", "native")
    assert run(capsys, *told, "--dry-run") == (0, f"would convert {shown}\n", "")
    assert run(capsys, *told) == (0, "", f"converted {shown}\n")


@pytest.mark.parametrize("content", [b"hello there\n" * 5, bytes(1000), bytes(range(255, 0, -1))])
def test_a_file_of_no_kind_is_not_called_half_of_one(content, folder, capsys):
    (folder / "x").write_bytes(content)
    code, _, err = run(capsys, "inspect", "x")
    told = "error: x: neither a safetensors file nor one of torch.save. Give one of those.\n"
    assert (code, err) == (2, told)


def test_a_scale_that_is_not_finite_is_flagged(folder, capsys):
    with safetensors.safe_open("a.safetensors", "pt") as file:
        metadata = file.metadata()
    state = safetensors.torch.load_file("a.safetensors")
    state["0.lora_scale"].fill_(torch.nan)
    safetensors.torch.save_file(state, "a.safetensors", metadata)
    _, out, _ = run(capsys, "inspect", "a.safetensors", "--json")
    row = json.loads(out, parse_constant=pytest.fail)["rows"][0]
    assert (row["scale"], row["norm"], row["flag"]) == (None, None, "not finite")
    assert "nan" in run(capsys, "inspect", "a.safetensors")[1]
