"""The commands around training: what `targets` and `build` print, and whose fault a model is."""

import json
import os
import re
from pathlib import Path

import pytest
from torch import nn

pytest.importorskip("typer")


from tests.cli.running import NET, net, run


def factory():
    return nn.Sequential(nn.Linear(4, 3), nn.Conv2d(2, 2, 1))


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "lora.json"
    path.write_text(json.dumps({"0": {"r": 2}, "1": {"r": 1, "hard": 0}}))
    return path


def test_targets_lists_what_would_be_adapted(capsys, config):
    code, out, _ = run(capsys, "targets", config, "--model", f"{__name__}:factory")
    assert code == 0
    assert "3×4" in out and "soft" in out and "2 tensors, 18 parameters" in out


@pytest.mark.parametrize(
    "text, model, message",
    [
        ('{"0": {"r": 0}}', "factory", '"r" must be a whole number'),
        ('{"0": {"r": 2},}', "factory", "line 1, column"),
        ('{"9": {"r": 2}}', "factory", "nothing to adapt"),
        ('{"0": {"r": 2}}', "missing", "Give module:factory"),
        ('{"0": {"r": 2}}', "dict_factory", "not a torch.nn.Module"),
    ],
)
def test_wrong_input_is_one_line_and_exits_with_2(capsys, config, text, model, message):
    config.write_text(text)
    code, out, err = run(capsys, "targets", config, "--model", f"{__name__}:{model}")
    assert code == 2 and out == "" and "Traceback" not in err
    assert message in " ".join(err.split())


def dict_factory():
    return {}


def attending():
    layers = {f"layer{i}": nn.TransformerEncoderLayer(8, 2, 16) for i in range(2)}
    return nn.ModuleDict(layers)


def test_targets_spells_out_what_a_preset_and_a_class_mean(capsys, tmp_path):
    path = tmp_path / "presets.json"
    entries = {"attention": {"r": 2}, "type:Linear": {"r": 4}, "exclude": ["layer1.linear2"]}
    path.write_text(json.dumps(entries))
    code, out, _ = run(capsys, "targets", str(path), "--model", f"{__name__}:attending")
    assert code == 0
    assert '\n"attention": in_proj_weight, out_proj (2 layers each)\n' in out
    assert '\n"type:Linear": linear1 (2 layers); linear2 (1 layer)\n' in out


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
    _, out, _ = run(capsys, "targets", "c.json", "--model", NET)
    lines = [line.replace("│", " ").split() for line in out.splitlines()]
    assert ["0", "3×4", "0", *told] in [line[:5] for line in lines]


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


def test_what_matches_nothing_is_a_warning_in_one_line(folder, capsys):
    (folder / "c.json").write_text(json.dumps({"0": {"r": 2}, "gone": {"r": 1}}))
    code, _, err = run(capsys, "targets", "c.json", "--model", NET)
    assert code == 0 and err.startswith("warning: c.json: ") and err.count("\n") == 1


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
    spec = NET
    code, _, err = run(capsys, "targets", "c.json", "--model", spec, "--strict")
    assert code == 2 and err.endswith(
        '"gone" matches nothing. There are: 0 (1 layer). Remove it, or leave strict out.\n'
    )


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 10**30])
def test_a_seed_that_torch_does_not_take_is_refused(seed, folder, capsys):
    code, out, err = run(capsys, "demo", "--seed", seed, "--out", "d")
    assert (code, out) == (2, "") and "'--seed'" in err and not (folder / "d").exists()


def test_a_configuration_from_a_windows_editor_is_read(folder, capsys):
    (folder / "c.json").write_bytes(b'\xef\xbb\xbf{"0": {"r": 2}}')
    assert run(capsys, "targets", "c.json", "--model", NET)[0] == 0
    (folder / "c.json").write_bytes('{"0": {"r": 2}}'.encode("utf-16"))
    code, _, err = run(capsys, "targets", "c.json", "--model", NET)
    assert code == 2 and "c.json: not UTF-8 text" in err and "Save it as UTF-8." in err


def test_a_number_of_too_many_digits_is_refused_without_python_s_words(folder, capsys):
    (folder / "c.json").write_text(f'{{"0": {{"r": {"9" * 5000}}}}}')
    code, _, err = run(capsys, "targets", "c.json", "--model", NET)
    told = "error: c.json: cannot be read as JSON: a number has more digits than any real one. "
    told += "Mend it there.\n"
    assert (code, err) == (2, told)


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
