"""What the command line says: of files that are none, of names like markup, and in JSON."""

import gzip
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

pytest.importorskip("typer")

import paramlora
from paramlora import FileError
from paramlora.files.inspection import inspect
from tests.cli.test_cli import run

ROOT = Path(__file__).parents[2]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>"


def gzipped():
    return gzip.compress(b"x" * 1000)


def zipped():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("adapter_model.safetensors", b"x" * 100)
    return out.getvalue()


def tarred():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("adapter_model.safetensors"))
    return out.getvalue()


OTHERS = {
    "pointer": (POINTER, "a Git LFS pointer, not the file itself. Run git lfs pull."),
    "page": (PAGE, "an HTML page.*Download the file itself."),
    "page after blanks": (b"\xef\xbb\xbf \n\n<HTML lang='en'>", "an HTML page"),
    "json": (b'{"r": 8, "lora_alpha": 16}', "a JSON file, without tensors."),
    "json of an object": (b'{"a":1,\n{"b": 2}}', "a JSON file"),  # "{" where safetensors has one
    "json list": (b"[1, 2]", "a JSON file"),
    "gzip": (gzipped(), "compressed with gzip. Unpack it"),
    "zip": (zipped(), "a zip archive, not a file of torch.save. Unpack it"),
    "tar": (tarred(), "a tar archive. Unpack it"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(100), "a GGUF file.*safetensors"),
    "empty": (b"", "an empty file. Copy or save it again."),
    "bzip2": (b"BZh91AY&SY" + bytes(20), "compressed with bzip2"),
    "numpy": (b"\x93NUMPY\x01\x00" + bytes(20), "an array of NumPy"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(20), "an HDF5 file"),
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = net()
    safetensors.torch.save_file(model.state_dict(), "base.safetensors")
    paramlora.attach(model, {"0": {"r": 2}, "1": {"whole": True}})
    paramlora.save_adapter(model, "a.safetensors")
    return tmp_path


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x.bin"])
@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_of_another_kind_is_recognised(kind, name, folder, capsys):
    content, told = OTHERS[kind]
    (folder / name).write_bytes(content)
    commands = [
        ("inspect", name),
        ("convert", name, "-o", "out", "--to", "peft"),
        ("merge", "base.safetensors", name, "-o", "out.safetensors"),
        ("merge", name, "a.safetensors", "-o", "out.safetensors"),
        ("extract", name, "-o", "out.safetensors"),
    ]

    for command in commands:
        code, out, err = run(capsys, *command)
        assert (code, out) == (2, "") and err.count("\n") == 1
        assert re.search(f"error: (.*/)?{name}: {told}", err), err
    with pytest.raises(FileError, match=told):
        paramlora.load_adapter(net(), name)
    assert not (folder / "out").exists() and not (folder / "out.safetensors").exists()


def test_a_pointer_in_a_folder_and_among_shards_is_recognised(folder):
    (folder / "peft").mkdir()
    (folder / "peft" / "adapter_config.json").write_text("{}")
    (folder / "peft" / "adapter_model.safetensors").write_bytes(POINTER)
    with pytest.raises(FileError, match="adapter_model.safetensors: a Git LFS pointer"):
        paramlora.load_adapter(net(), folder / "peft")
    index = {"weight_map": {"0.weight": "m.safetensors"}}
    (folder / "peft" / "m.safetensors.index.json").write_text(json.dumps(index))
    (folder / "peft" / "m.safetensors").write_bytes(POINTER)
    with pytest.raises(FileError, match="m.safetensors: a Git LFS pointer"):
        paramlora.files.merge(folder / "peft", ["a.safetensors"], folder / "out")


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
    _, out, _ = run(capsys, "targets", "c.json", "--model", f"{__name__}:net")
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


@pytest.mark.parametrize(
    "entry, told",
    [
        ({"r": 2, "kind": "dora"}, ["2", "dora"]),
        ({"kind": "rows", "rows": [0]}, ["-", "rows"]),
        ({"r": 2, "hard": 0}, ["2", "soft"]),
    ],
)
def test_targets_names_the_kind_of_an_update(entry, told, folder, capsys):
    (folder / "c.json").write_text(json.dumps({"0": entry}))
    _, out, _ = run(capsys, "targets", "c.json", "--model", f"{__name__}:net")
    lines = [line.replace("│", " ").split() for line in out.splitlines()]
    assert ["0", "3×4", "0", *told] in [line[:5] for line in lines]


def test_a_damaged_whole_tensor_is_flagged(folder):
    with safetensors.safe_open("a.safetensors", "pt") as file:
        metadata = file.metadata()
    state = safetensors.torch.load_file("a.safetensors")
    state["1.lora_whole"][0] = torch.nan
    safetensors.torch.save_file(state, "a.safetensors", metadata)
    found = inspect("a.safetensors")
    assert {row.path: row.flag for row in found.rows}["1"] == "not finite"
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["flagged"] == 2


def failing():
    raise RuntimeError("no weights at /data.\nSecond line")


def leaving():
    raise SystemExit(7)


def needing(size):
    return net()


@pytest.mark.parametrize("factory, told", [
    ("failing", r"failing\(\) raised RuntimeError: no weights at /data. Mend the factory"),
    ("leaving", r"leaving\(\) raised SystemExit: 7. Mend the factory"),
    ("needing", r"needing\(\) raised TypeError.*size.*without arguments"),
    ("absent", "absent.*Give module:factory"),
])  # fmt: skip
def test_a_failing_factory_is_no_fault_of_ours(factory, told, folder, capsys):

    (folder / "c.json").write_text(json.dumps({"0": {"r": 2}}))
    spec = f"{__name__}:{factory}"
    for command in (
        ("targets", "c.json", "--model", spec),
        ("convert", "a.safetensors", "-o", "o", "--to", "native", "--model", spec),
    ):
        code, out, err = run(capsys, *command)
        assert (code, out) == (2, "") and "fault of paramlora" not in err
        assert re.search(told, err) and err.count("\n") == 1
        assert "Traceback" in run(capsys, "--debug", *command)[2]


def test_a_module_that_does_not_import_is_no_fault_of_ours(folder, capsys):
    (folder / "broken_model_file.py").write_text("raise KeyError('config')")
    (folder / "c.json").write_text(json.dumps({"0": {"r": 2}}))
    code, _, err = run(capsys, "targets", "c.json", "--model", "broken_model_file:build")
    assert code == 2 and "KeyError: 'config'. Give module:factory" in err


def test_messages_name_ways_out_that_the_command_line_has(folder, capsys):
    state = {"elsewhere.lora_A": torch.randn(2, 4), "elsewhere.lora_B": torch.randn(3, 2)}
    state["elsewhere.lora_scale"] = torch.ones(())
    torch.save(state, "other.pt")
    code, _, err = run(capsys, "merge", "base.safetensors", "other.pt", "-o", "x.safetensors")
    assert code == 2 and "component=... (--component)" in err
    assert "--component" in run(capsys, "convert", "--help")[1]


def test_what_matches_nothing_is_a_warning_in_one_line(folder, capsys):
    (folder / "c.json").write_text(json.dumps({"0": {"r": 2}, "gone": {"r": 1}}))
    code, _, err = run(capsys, "targets", "c.json", "--model", f"{__name__}:net")
    assert code == 0 and err.startswith("warning: c.json: ") and err.count("\n") == 1


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


def moving():
    model = nn.Module()
    model.add_module("a\x1b[31m\nb", nn.Linear(4, 3))
    return model


def test_a_table_prints_names_without_what_moves_the_cursor(folder, capsys):
    (folder / "c.json").write_text(json.dumps({"a\x1b[31m\nb": {"r": 2}}))
    _, out, _ = run(capsys, "targets", "c.json", "--model", f"{__name__}:moving")
    assert "\x1b" not in out and r"a\x1b[31m\nb" in out


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no")


class Outside(BaseException):
    pass


def unspeakable():
    raise Unspeakable


def outside():
    raise Outside("x")


@pytest.mark.parametrize("factory", ["unspeakable", "outside"])
def test_any_error_of_a_factory_is_its_own(factory, folder, capsys):
    (folder / "c.json").write_text(json.dumps({"0": {"r": 2}}))
    code, _, err = run(capsys, "targets", "c.json", "--model", f"{__name__}:{factory}")
    assert code == 2 and f"{factory}() raised {factory.capitalize()}" in err


def stopping():
    raise KeyboardInterrupt


def test_ctrl_c_in_a_factory_stops(folder, capsys):
    (folder / "c.json").write_text(json.dumps({"0": {"r": 2}}))
    code, _, err = run(capsys, "targets", "c.json", "--model", f"{__name__}:stopping")
    assert (code, err) == (130, "stopped\n")


def test_a_strict_run_says_which_option_to_leave_out(folder, capsys):
    (folder / "c.json").write_text(json.dumps({"0": {"r": 2}, "gone": {"r": 1}}))
    spec = f"{__name__}:net"
    code, _, err = run(capsys, "targets", "c.json", "--model", spec, "--strict")
    assert code == 2 and err.endswith(
        '"gone" matches nothing. There are: 0 (1 layer). Remove it, or leave strict out.\n'
    )


@pytest.mark.parametrize("content", [b"hello there\n" * 5, bytes(1000), bytes(range(255, 0, -1))])
def test_a_file_of_no_kind_is_not_called_half_of_one(content, folder, capsys):
    (folder / "x").write_bytes(content)
    code, _, err = run(capsys, "inspect", "x")
    told = "error: x: neither a safetensors file nor one of torch.save. Give one of those.\n"
    assert (code, err) == (2, told)


@pytest.mark.parametrize("weight", ["nan", "inf", "1e400", "O.7", ""])
def test_a_weight_that_is_no_number_is_named(weight, folder, capsys):
    one = f"a.safetensors:{weight}"
    code, _, err = run(capsys, "merge", "base.safetensors", one, "-o", "x.safetensors")
    told = "is no weight. Give a finite number, as in a.safetensors:0.7."
    assert (code, err) == (2, f'error: {one}: "{weight}" {told}\n')


@pytest.mark.parametrize("alpha", ["nan", "inf", "1e400"])
def test_an_alpha_that_is_not_finite_is_refused(alpha, folder, capsys):
    (folder / "c.json").write_text("{}")
    code, _, err = run(
        capsys, "convert", "a.safetensors", "-o", "o", "--to", "native", "--alpha", alpha
    )
    assert code == 2 and "alpha must be finite, got " in err


def test_every_format_that_can_be_written_is_known(folder, capsys):
    code, _, err = run(capsys, "convert", "a.safetensors", "-o", "o", "--to", "pefft")
    assert code == 2 and "Known: comfyui, diffusers, kohya, litgpt, loralib, native, orig" in err


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 10**30])
def test_a_seed_that_torch_does_not_take_is_refused(seed, folder, capsys):
    code, out, err = run(capsys, "demo", "--seed", seed, "--out", "d")
    assert (code, out) == (2, "") and "'--seed'" in err and not (folder / "d").exists()


def test_a_configuration_from_a_windows_editor_is_read(folder, capsys):
    (folder / "c.json").write_bytes(b'\xef\xbb\xbf{"0": {"r": 2}}')
    assert run(capsys, "targets", "c.json", "--model", f"{__name__}:net")[0] == 0
    (folder / "c.json").write_bytes('{"0": {"r": 2}}'.encode("utf-16"))
    code, _, err = run(capsys, "targets", "c.json", "--model", f"{__name__}:net")
    assert code == 2 and "c.json: not UTF-8 text" in err and "Save it as UTF-8." in err


def test_a_number_of_too_many_digits_is_refused_without_python_s_words(folder, capsys):
    (folder / "c.json").write_text(f'{{"0": {{"r": {"9" * 5000}}}}}')
    code, _, err = run(capsys, "targets", "c.json", "--model", f"{__name__}:net")
    told = "error: c.json: cannot be read as JSON: a number has more digits than any real one. "
    told += "Mend it there.\n"
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


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
def test_build_compiles_once_and_prints_the_file(folder, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "built"))
    compiler = folder / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done; echo made > "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    code, out, err = run(capsys, "build")
    assert (code, err) == (0, "") and Path(out.strip()).read_text() == "made\n"
    monkeypatch.setenv("CXX", "false")
    assert run(capsys, "build") == (0, out, "")
    Path(out.strip()).unlink()
    code, out, err = run(capsys, "build")
    assert (
        (code, out) == (2, "")
        and "false ended with 1" in err
        and "name it by the environment" in err
    )


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
    command = ("targets", "c.json", "--model", f"{__name__}:net")
    code, out, err = piped(folder, *command, encoding="ascii")
    assert (code, err) == (0, "") and b"3\\xd74" in out


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_an_answer_that_cannot_be_printed_is_no_fault_of_ours(folder):
    with open("/dev/full", "wb") as full:
        code, _, err = piped(folder, "inspect", "a.safetensors", stdout=full)
    assert (code, err) == (2, "error: cannot be written: No space left on device.\n")
