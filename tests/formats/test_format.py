"""A format of somebody else's: one value, and everything knows it, with no edit of the package."""

import ast
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import paramlora
from paramlora import FileError, files, formats
from paramlora.files import adapters as interchange
from paramlora.files.inspection import inspect
from paramlora.files.served import unserved_in
from paramlora.update.value import Adapter, Update

PACKAGE = Path(paramlora.__file__).parent
MINE = r'''
"""The format of a tool that nobody has: up and down beside each other, and gain beside the file."""

from paramlora.update.value import Adapter, Update
from paramlora.errors import FileError
from paramlora.formats.content import Content, number
from paramlora.formats.format import Format, Mark, Prefix, any_key


def read(content, base, options):
    stems = dict.fromkeys(key.rpartition("@")[0] for key in content.state)
    gain = number(content.config.get("gain", options.alpha or 1.0), content.source)
    pairs = {s.partition("/")[2]: (content.state[f"{s}@d"], content.state[f"{s}@u"]) for s in stems}
    return Adapter({path: Update(down, up, gain) for path, (down, up) in pairs.items()})


def write(adapter, base=None, start="top"):
    gain = {update.scale for update in adapter.updates.values()}
    if len(gain) > 1:
        raise FileError(f"mine holds one scale, not {sorted(gain)}.")
    state = {f"{start}/{p}@d": u.lora_A.contiguous() for p, u in adapter.updates.items()}
    state |= {f"{start}/{p}@u": u.lora_B.contiguous() for p, u in adapter.updates.items()}
    return Content(state, {}, {"gain": gain.pop()})


FORMAT = Format(
    "mine",
    marks=(Mark(5, any_key(r".+/.+@[du]")),),
    read=read,
    write=write,
    weights=("mine.safetensors",),
    config="mine.json",
    prefix=Prefix("start", "mine's first word (top)"),
)
'''


def value():
    space = {}
    exec(MINE, space)
    return space["FORMAT"]


@pytest.fixture
def mine():
    before = dict(formats.FORMATS)
    formats.register(value())
    yield formats.FORMATS["mine"]
    assert formats.unregister("mine").name == "mine"
    assert formats.FORMATS == before


@pytest.fixture
def native(tmp_path):
    """A trained adapter's file, and what the model then gives."""
    model = paramlora.attach(net(), {"0": {"r": 2, "scale": 0.7}, "2": {"r": 3, "scale": 0.7}})
    torch.manual_seed(1)
    for low in (m.parametrizations.weight[0] for m in (model[0], model[2])):
        for update in low.parameters(recurse=True):
            nn.init.normal_(update)
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def reference(path, x):
    """The net's output with the native file's update, in float64, from its tensors alone."""
    state, plain = load_file(path), net()
    y = x
    for name, layer in plain.named_children():
        if isinstance(layer, nn.Linear):
            a, b, s = (state[f"{name}.lora_{k}"].double() for k in ("A", "B", "scale"))
            y = y @ (layer.weight + s * b @ a).T + layer.bias
        else:
            y = layer(y)
    return y


def test_a_registered_format_is_written_told_read_and_inspected(tmp_path, native, mine):
    out = tmp_path / "out"
    interchange.convert(native, out, "mine")
    assert sorted(p.name for p in out.iterdir()) == ["mine.json", "mine.safetensors"]
    assert json.loads((out / "mine.json").read_text()) == {"gain": pytest.approx(0.7)}
    assert set(load_file(out / "mine.safetensors")) == {f"top/{i}@{k}" for i in "02" for k in "du"}
    assert interchange.format_of(out) == "mine" and inspect(out).format == "mine"
    assert "mine" in formats.READERS and "mine" in formats.WRITERS
    x = torch.randn(3, 6).double()
    model = paramlora.load_adapter(net(), out)
    torch.testing.assert_close(model(x), reference(native, x), rtol=1e-6, atol=1e-6)
    save_file(net().state_dict(), tmp_path / "base.safetensors")
    files.merge(tmp_path / "base.safetensors", [out], tmp_path / "merged.safetensors")
    merged = net()
    merged.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    torch.testing.assert_close(merged(x), reference(native, x), rtol=1e-6, atol=1e-6)
    for to in ("native", "peft", "mine"):
        again = tmp_path / ("native.safetensors" if to == "native" else f"{to} again")
        interchange.convert(out, again, to, formats.base_of(net()))
        model = paramlora.load_adapter(net(), again)
        torch.testing.assert_close(model(x), reference(native, x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("base", (None, "told"))
def test_a_layer_that_a_format_leaves_out_is_told_and_nothing_is_left(tmp_path, native, base):
    """Also where no model is given, whose names would tell which."""

    def write(adapter, base=None, **how):
        some = {p: u for p, u in adapter.updates.items() if p != "2"}
        return value().write(replace(adapter, updates=some), base, **how)

    formats.register(replace(value(), write=write))
    try:
        slots = None if base is None else formats.base_of(net())
        with pytest.raises(paramlora.FileError, match="read back as a file of mine it lacks"):
            interchange.convert(native, tmp_path / "out", "mine", slots)
        assert not (tmp_path / "out").exists()
    finally:
        formats.unregister("mine")


def test_a_dictionary_around_the_tensors_is_taken_off_again(tmp_path, native):
    out, seen = tmp_path / "out.pt", []

    def read(content, base, options):
        seen.extend(content.state)
        return value().read(content, base, options)

    whole = {"weights": ("mine.pt",), "config": "", "pickled": True, "wrap": "tensors of mine"}
    formats.register(replace(value(), read=read, **whole))
    try:
        interchange.convert(native, out, "mine")
        assert torch.load(out).keys() == {"tensors of mine"}
        assert interchange.format_of(out) == "mine"
        x = torch.randn(3, 6).double()
        got = paramlora.load_adapter(net(), out, alpha=0.7)(x)  # no gain is told beside it
        assert seen and all(key.startswith("top/") for key in seen)
        torch.testing.assert_close(got, reference(native, x), rtol=1e-6, atol=1e-6)
    finally:
        formats.unregister("mine")


def test_a_format_says_who_loads_it_from_memory_and_what_is_lost(native):
    def unserved(adapter, name):
        return [
            f"{path}: too deep for {name}." for path, one in adapter.updates.items() if one.r > 2
        ]

    formats.register(replace(value(), servers={"mine": "Mine"}, unserved=unserved))
    try:
        assert unserved_in(native, "mine") == ["2: too deep for Mine."]
        model = paramlora.load_adapter(net(), native)
        with pytest.raises(paramlora.AdapterError, match='"default" for Mine: 2: too deep'):
            paramlora.tensors_for(model, "mine")
        small = paramlora.attach(net(), {"0": {"r": 2}})
        tensors, config = paramlora.tensors_for(small, "mine")
        assert tensors.keys() == {"top/0@d", "top/0@u"} and config == {"gain": 1.0}
    finally:
        formats.unregister("mine")


@pytest.mark.parametrize("path", [p for f in ("files", "cli") for p in (PACKAGE / f).rglob("*.py")],
                         ids=lambda p: f"{p.parent.name}/{p.name}")  # fmt: skip
def test_files_and_the_command_line_know_no_format_by_name(path):
    if path.name == "demo.py":  # which is written about one
        return
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    assert not {n.value for n in tree if isinstance(n, ast.Constant)} & formats.FORMATS.keys()


def test_what_is_checked_for_every_format_is_checked_for_it(tmp_path, native, mine):
    whole = Adapter({"0": Update(torch.ones(1, 6), torch.ones(5, 1))}, whole={"n": torch.ones(2)})
    with pytest.raises(FileError, match="n: whole tensors beside the updates"):
        formats.write(whole, "mine")
    out = tmp_path / "out"
    interchange.convert(native, out, "mine")
    state = load_file(out / "mine.safetensors")
    state["top/0@d"][0, 0] = float("nan")
    save_file(state, out / "mine.safetensors")
    model = net()
    with pytest.raises(FileError, match="mine.safetensors: not finite: 0.lora_A"):
        paramlora.load_adapter(model, out)
    assert type(model[0]) is nn.Linear
    (out / "mine.json").write_text("{")
    with pytest.raises(FileError, match="mine.json: cannot be read"):
        paramlora.load_adapter(model, out)


def test_the_command_line_lists_and_writes_it(capsys, tmp_path, native, mine):
    pytest.importorskip("typer")
    from paramlora.cli import main

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return stop.value.code, *(" ".join(s.replace("│", " ").split()) for s in (out, err))

    told = run("convert", "--help")[1]
    assert "loralib, mine, native," in told and "Of mine's first word (top), or of kohya's" in told
    out = tmp_path / "out"
    code, _, said = run("convert", native, "-o", out, "--to", "mine", "--prefix", "low")
    assert (code, said) == (0, f"converted 2 updates into {out}, as mine")
    assert "low/0@d" in load_file(out / "mine.safetensors")
    code, _, said = run("convert", native, "-o", out, "--to", "peft", "--prefix", "x", "--force")
    assert code == 2 and "is for mine and kohya and diffusers and comfyui, not for peft" in said
    assert "format: mine" in run("inspect", out)[1]
    formats.unregister("mine")
    assert "mine" not in run("convert", "--help")[1]
    code, _, said = run("convert", native, "-o", tmp_path / "x", "--to", "mine")
    assert code == 2 and '"mine" cannot be written. Known: comfyui, diffusers, kohya, ' in said
    with pytest.raises(FileError, match="no adapter format that is known. Its first keys: low/0@d"):
        interchange.read_adapter(out)
    formats.register(mine)


DROPPED = """
import sys
from paramlora import formats
from paramlora.files import adapters as interchange
interchange.convert(sys.argv[1], "out", "mine")
print(formats.FORMATS["mine"].read.__module__, interchange.format_of("out"))
"""


def test_a_file_in_the_folder_is_all_that_a_format_takes(tmp_path, native):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "copy" / "paramlora", ignore=ignored)
    (tmp_path / "copy" / "paramlora" / "formats" / "mine.py").write_text(MINE, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", DROPPED, str(native)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "copy")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["paramlora.formats.mine", "mine"]


def test_a_name_is_taken_once(mine):
    with pytest.raises(FileError, match='a format "mine" is known already. Unregister it first'):
        formats.register(value())
    with pytest.raises(FileError, match='no format "yours" is known. Known: cloneofsimo, comfyui'):
        formats.unregister("yours")


@pytest.mark.parametrize(
    "change, text",
    [
        ({"marks": ()}, 'the format "mine" has no marks'),
        ({"weights": ()}, r'beside its weights \(none\) is "mine.json". Name both'),
        ({"config": "mine.toml"}, r'\(mine.safetensors\) is "mine.toml". Name both, the second as'),
    ],
)
def test_a_value_that_could_not_be_used_is_refused(change, text):
    with pytest.raises(FileError, match=text):
        formats.Format(**{**vars(value()), **change})


def test_no_two_marks_of_the_package_have_one_rank():
    ranks = [mark.rank for form in formats.FORMATS.values() for mark in form.marks]
    assert len(set(ranks)) == len(ranks) and not {40, 41} & set(ranks)


def test_a_folder_of_several_files_means_the_same_as_ever(tmp_path):
    order = (
        "adapter_model.safetensors adapter_model.bin adapter_model.pt "
        "pytorch_lora_weights.safetensors pytorch_lora_weights.bin lit_model.pth.lora "
        "adapter.safetensors"
    ).split()
    for name in order:
        torch.save({"a.lora_A": torch.ones(1, 4), "a.lora_B": torch.ones(3, 1)}, tmp_path / name)
    for name in order:
        assert interchange.weights_in(tmp_path).name == name
        (tmp_path / name).unlink()


@pytest.mark.parametrize("to", sorted(["native", *formats.WRITERS]))
def test_a_conversion_is_the_same_on_another_default_device(tmp_path, to):
    one = Adapter({"a": Update(torch.ones(1, 4), torch.ones(3, 1), 1.0, (3, 4), kind="linear")})
    paramlora.files.native.write_native(one, tmp_path / "a.safetensors")
    interchange.convert(tmp_path / "a.safetensors", tmp_path / "plain", to)
    with torch.device("meta"):
        interchange.convert(tmp_path / "a.safetensors", tmp_path / "meta", to)
        assert inspect(tmp_path / "meta").flagged == 0
    plain, meta = tmp_path / "plain", tmp_path / "meta"
    for name in os.listdir(plain) if plain.is_dir() else [""]:
        assert (plain / name).read_bytes() == (meta / name).read_bytes()


def test_layers_under_the_name_of_a_dictionary_come_back(tmp_path):
    """``model.`` in front of every key is taken for a dictionary around tensors, but not here."""
    ours = Adapter({"model.a": Update(torch.ones(1, 4), torch.ones(3, 1), 0.5, (3, 4))})
    content = formats.write(ours, "native")
    assert formats.detect(content) == "native"
    assert set(formats.read(content).updates) == {"model.a"}
    paramlora.files.native.write_native(ours, tmp_path / "a.safetensors")
    assert set(interchange.read_adapter(tmp_path / "a.safetensors").updates) == {"model.a"}
    assert [row.path for row in inspect(tmp_path / "a.safetensors").rows] == ["model.a"]
