"""A sweep of what a stranger is told by the commands: what is wrong, with its value and place, and
the way out of it."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import typing
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

pytest.importorskip("typer")

import paramlora
from paramlora.cli.commands import app
from tests.cli.running import run

POSIX = pytest.mark.skipif(os.name != "posix", reason="modes and links as POSIX has them")
THERE = "Give the path of a file that is there."
WRITE = "Give a place in a folder that you may write in. Nothing was written."
MINE = "Have its owner let you read it, or give a copy of your own."


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))


def fill(path):
    """A base, adapters of several tools, and checkpoints with one inside."""
    os.chdir(path)
    safetensors.torch.save_file(net().state_dict(), "base.safetensors")
    torch.save({"model": {"ema": net().state_dict()}, "step": 3}, "nested.pt")
    torch.save(net().state_dict(), "base.pt")
    for name, config in {
        "a": {"*": {"r": 2}},
        "b": {"0": {"r": 1}},
        "whole": {"0": {"whole": 1}},
        "dora": {"0": {"r": 2, "kind": "dora"}},
        "loha": {"2": {"r": 2, "kind": "loha"}},
    }.items():
        model = paramlora.attach(net(), config, name)
        with torch.no_grad():
            for p in paramlora.trainable_parameters(model):
                p.normal_()
        paramlora.save_adapter(model, f"{name}.safetensors", name)
        if name in ("a", "whole"):
            state = {key: value.contiguous() for key, value in model.state_dict().items()}
            safetensors.torch.save_file(state, f"inside-{name}.safetensors")
    odd = paramlora.attach(nn.Sequential(nn.Linear(6, 3)), {"0": {"r": 1}}, "odd")
    paramlora.save_adapter(odd, "odd.safetensors", "odd")
    nan = {key: value + float("nan") for key, value in net().state_dict().items()}
    safetensors.torch.save_file(nan, "nan.safetensors")
    state, told = safetensors.torch.load_file("a.safetensors"), "a.safetensors"
    with safetensors.safe_open(told, "pt") as file:
        told = file.metadata()
    state["0.lora_scale"] = torch.tensor(float("inf"))
    safetensors.torch.save_file(state, "scale.safetensors", told)
    Path("file").write_text("x")
    Path("c.json").write_text(json.dumps({"*": {"r": 2}}))


@pytest.fixture
def folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path)
    assert run(capsys, "convert", "a.safetensors", "-o", "peft", "--to", "peft", "-q")[0] == 0
    shutil.copytree("peft", "null")
    (tmp_path / "null" / "adapter_config.json").write_text('{"peft_type": null}')
    kohya = ("convert", "a.safetensors", "-o", "kohya.safetensors", "--to", "kohya", "-q")
    assert run(capsys, *kohya)[0] == 0
    return tmp_path


def refused(capsys, command, *told):
    """The command exits with 2, leaves nothing new, and says `told` in its last line."""
    before = sorted(os.listdir())
    code, out, err = run(capsys, *command.split())
    assert (code, out) == (2, ""), (code, out, err)
    last = err.splitlines()[-1]
    assert all(one in last for one in told), err
    assert (
        last.startswith("error: ") and last.endswith((".", "?")) and "fault of paramlora" not in err
    )
    assert sorted(os.listdir()) == before


OUT = "-o out.safetensors"
REFUSED = {
    # a weight where none is taken
    "inspect a.safetensors:0.5": ('a weight (":0.5") is only for', "Give a.safetensors."),
    f"convert a.safetensors:0.5 {OUT} --to kohya": ("Give a.safetensors.",),
    f"embed base.safetensors a.safetensors:0.5 {OUT}": ("Give a.safetensors.",),
    f"resize peft:0.5 {OUT} --rank 1": ("Give peft.",),
    f"merge base.safetensors:0.5 a.safetensors {OUT}": ("Give base.safetensors.",),
    f"extract inside-a.safetensors:1 {OUT}": ("Give inside-a.safetensors.",),
    f"difference base.safetensors base.pt:1 {OUT} --rank 1": ("Give base.pt.",),
    f"convert {OUT} --to native --component unet=a.safetensors:1": ("Give a.safetensors.",),
    # options that say nothing, or something else
    "inspect a.safetensors --alpha 3": ("alpha = 3 says nothing", "(--alpha)"),
    "inspect kohya.safetensors --alpha 3": ("alpha = 3 says nothing", "(--alpha)"),
    f"combine a.safetensors b.safetensors {OUT} --how foo": ("how (--how)", '"foo"'),
    f"combine a.safetensors {OUT} --how svd --rank 2 --density 0.5": ("density (--density)",),
    f"combine a.safetensors {OUT} --how ties --rank 2 --density 2": ("(--density)", "got 2.0"),
    f"combine a.safetensors {OUT} --rank 2": ("rank (--rank)", '"svd" (--how)'),
    f"combine a.safetensors {OUT} --how svd --rank 9": (
        "rank (--rank) 9",
        '"0". Give at most that',
    ),
    f"resize a.safetensors {OUT} --energy 3": ("energy (--energy)", "such as 0.95; got 3.0"),
    f"resize a.safetensors {OUT} --rank 0": ("rank (--rank)", "got 0"),
    f"resize a.safetensors {OUT} --rank 9": ("(--rank) 9", 'the highest is 2, of "0".', "at most"),
    f"resize a.safetensors {OUT} --rank 0=1 --rank 0=2": ("--rank 0=2", "two ranks"),
    f"difference base.safetensors base.pt {OUT} --rank 9": ("(--rank) 9", "the most is 3"),
    f"difference base.safetensors base.pt {OUT} --rank 1 --exclude 0 --exclude 2": ("--exclude",),
    f"difference base.safetensors base.pt {OUT} --rank 1": ("from after training.",),
    # which of several files
    f"merge base.safetensors a.safetensors odd.safetensors {OUT}": (
        "odd.safetensors does not fit base.safetensors: 0.weight: shape [3, 4]",
        "made for [3, 6]",
    ),
    f"embed base.safetensors odd.safetensors {OUT}": ("odd.safetensors does not fit base.safet",),
    f"combine a.safetensors odd.safetensors {OUT}": ('0: "a" updates a weight of', '"odd" one of'),
    f"difference base.safetensors nan.safetensors {OUT} --rank 1": ("not finite in nan.safete",),
    f"difference nan.safetensors base.safetensors {OUT} --rank 1": ("not finite in nan.safete",),
    f"merge base.safetensors a.safetensors scale.safetensors {OUT}": (
        "scale.safetensors: not finite: 0.lora_scale",
    ),
    f"combine a.safetensors:1e39 {OUT}": (
        "the scale of 0, 1e+39, is beyond",
        "give a smaller scale or weight",
    ),
    "inspect null": ("peft_type null; only LORA",),
    f"convert {OUT} --to native --component unet=a.safetensors --component unet=a.safetensors": (
        "--component unet=...: that part has two files",
    ),
    # wrong use, in the words of the parser
    f"convert a.safetensors {OUT} --to kohya --alpha x": (
        "'--alpha'",
        "got 'x'",
        "See paramlora convert --help.",
    ),
    f"convert a.safetensors {OUT} --to kohya --rank=0": ("'--rank'", "got '0'", "See paramlora"),
    f"merge base.safetensors a.safetensors {OUT} --seed -1": ("'--seed'", "got '-1'", "merge --h"),
    f"merge base.safetensors a.safetensors {OUT} --alpha": ("'--alpha'", "See paramlora"),
    f"convert a.safetensors {OUT} --to kohya --forec": ("--forec", "--force", "convert --help"),
    f"convert a.safetensors b.safetensors {OUT} --to kohya": ("b.safetensors", "See paramlora"),
    "inspect": ("Missing argument", "See paramlora inspect --help."),
    "targets c.json": ("Missing option '--model'", "See paramlora targets --help."),
    "inspekt": ("Did you mean 'inspect'? See paramlora --help.",),
    "frob": ("'frob'", "See paramlora --help."),
    "inspect a.safetensors --model torch": ("--model torch: names no factory", "module:factory"),
    "inspect file": ("file: not a whole safetensors file (1 byte, and it begins", "Copy or save"),
    # a folder under a name of a file
    f"convert a.safetensors {OUT} --to peft": ("peft is a folder of two files", "name without"),
    "extract inside-a.safetensors -o x.pt --to litgpt": ("litgpt is a folder", "without .pt, or"),
    # what is not there
    "inspect gone.safetensors": ("gone.safetensors: cannot be read: No such file", THERE),
    f"merge base.safetensors gone.safetensors:0.5 {OUT}": ("gone.safetensors: cannot", THERE),
    "merge base.safetensors a.safetensors -o gone/x.safetensors": (
        "gone/x.safetensors: cannot be written: No such file",
        "Make its folder first, or give a folder that is there. Nothing was written.",
    ),
    "convert a.safetensors -o file/x --to peft": ("file/x: cannot", "Give a place in a folder."),
    # a state dict that is elsewhere
    "merge nested.pt a.safetensors -o out.pt": ("with key (--key), of: model.ema.",),
    "merge nested.pt a.safetensors -o out.pt --key model.emma": ('"model.emma"', "model.ema."),
    "extract base.pt -o out.safetensors --key model": ("at the top: leave out key (--key)",),
    # what is inside already
    f"merge inside-a.safetensors b.safetensors {OUT}": ("is inside already", "then these into"),
    f"merge inside-a.safetensors peft {OUT}": ("is inside already", "then these into"),
    f"merge inside-a.safetensors kohya.safetensors {OUT}": ("is inside already",),
    f"embed inside-a.safetensors whole.safetensors {OUT}": ("0: an update is inside already",),
    f"embed inside-whole.safetensors a.safetensors {OUT}": ("0: an update is inside already",),
    f"difference base.safetensors inside-a.safetensors {OUT} --rank 1": (
        "inside-a.safetensors: a model with an adapter attached.",
        "paramlora extract",
    ),
    # kinds that do not add
    f"resize dora.safetensors {OUT} --rank 1": ('in "dora.safetensors" it is of a kind (dora)',),
    f"combine a.safetensors loha.safetensors {OUT}": ('in "loha.safetensors"', "Merge it into"),
}


@pytest.mark.parametrize("command", REFUSED)
def test_a_refusal_says_what_where_and_the_way_out(command, folder, capsys):
    refused(capsys, command, *REFUSED[command])


def spoiled(name, change):
    with safetensors.safe_open("a.safetensors", "pt") as file:
        metadata = file.metadata()
    state = safetensors.torch.load_file("a.safetensors")
    change(state, metadata)
    safetensors.torch.save_file(state, name, metadata)


def not_finite(state, _):
    state["0.lora_A"][0, 0] = torch.nan


def no_json(_, metadata):
    metadata["paramlora"] = "{x"


def newer(_, metadata):
    metadata["paramlora"] = json.dumps({**json.loads(metadata["paramlora"]), "format": 9})


def no_entries(_, metadata):
    metadata["paramlora"] = json.dumps({**json.loads(metadata["paramlora"]), "config": {}})


SPOILED = {
    not_finite: ("bad.safetensors: not finite: 0.lora_A.", "give a sound copy, or one from before"),
    no_json: ('bad.safetensors: its "paramlora" metadata is damaged', "Copy or save it again."),
    newer: ("bad.safetensors: written in format 9, and", "Upgrade paramlora."),
    no_entries: ("bad.safetensors: the configuration in its metadata is", "Copy or save it again."),
}
VERBS = [
    f"merge base.safetensors bad.safetensors {OUT}",
    f"embed base.safetensors bad.safetensors {OUT}",
    f"resize bad.safetensors {OUT} --rank 1",
    f"combine a.safetensors bad.safetensors {OUT}",
    "convert bad.safetensors -o out --to peft",
]


@pytest.mark.parametrize("change", SPOILED)
@pytest.mark.parametrize("verb", VERBS)
def test_a_damaged_file_is_named_by_each_command(verb, change, folder, capsys):
    spoiled("bad.safetensors", change)
    refused(capsys, verb, *SPOILED[change])


@pytest.mark.parametrize("text, told", [("{", "cannot be read"), ("[]", "a list, not an object")])
def test_a_damaged_configuration_is_named(text, told, folder, capsys):
    Path("peft/adapter_config.json").write_text(text)
    refused(capsys, "inspect peft", "adapter_config.json: ", told, "Copy or save it again.")


def shards(change):
    """A folder of two shards, and what is wrong with it."""
    os.mkdir("shards")
    state = net().state_dict()
    places = {key: f"m-{1 + int(key[0] == '2')}.safetensors" for key in state}
    index = {"metadata": {}, "weight_map": places}
    parts = {
        name: {key: state[key] for key in state if places[key] == name}
        for name in dict.fromkeys(places.values())
    }
    index = change(index, parts) or index
    for name, part in parts.items():
        safetensors.torch.save_file(part, f"shards/{name}")
    Path("shards/model.safetensors.index.json").write_text(json.dumps(index))


def place(name):
    return lambda index, parts: index["weight_map"].update({"2.weight": name})


SHARDS = {
    "missing": (
        lambda index, parts: parts.pop("m-2.safetensors") and None,
        ("shards/m-2.safetensors: not there, and model.safetensors.index.json", "Download it too."),
    ),
    "outside": (
        place("../base.safetensors"),
        ("places 2.weight in '../base.safetensors'", "is not followed. Put all files in one"),
    ),
    "absolute": (place("/etc/passwd"), ("places 2.weight in '/etc/passwd'", "Put all files")),
    "no name": (place(7), ("places 2.weight in 7", "Put all files in one folder")),
    "wrong": (
        place("m-1.safetensors"),
        ("m-1.safetensors lacks 2.weight, which the index", "Download the index and all"),
    ),
    "twice": (
        lambda index, parts: parts["m-2.safetensors"].update({"0.bias": torch.ones(3)}),
        ("0.bias is both in m-1.safetensors and in m-2", "Remove the one of another copy"),
    ),
    "of nothing": (lambda index, parts: {"weight_map": {}}, ('a "weight_map" of', "Download it")),
    "a number": (lambda index, parts: {"weight_map": 3}, ('a "weight_map" of', "Download it")),
    "a list": (lambda index, parts: [1], ('has a "weight_map" of tensors', "Download it again.")),
}


@pytest.mark.parametrize("fault", SHARDS)
def test_a_fault_of_shards_says_which_file_and_what_to_do(fault, folder, capsys):
    change, told = SHARDS[fault]
    shards(change)
    refused(capsys, "merge shards a.safetensors -o out", *told)


def test_shards_without_their_index_are_told_so(folder, capsys):
    shards(lambda index, parts: None)
    os.remove("shards/model.safetensors.index.json")
    refused(capsys, "merge shards a.safetensors -o out", "m-1.safetensors, m-2", "Add the index")


def test_an_index_that_is_no_json_says_so(folder, capsys):
    shards(lambda index, parts: None)
    Path("shards/model.safetensors.index.json").write_text('{"weight_map": ')
    refused(
        capsys, "merge shards a.safetensors -o out", "not an index of shards (Expecting", "Down"
    )


@pytest.mark.parametrize("adapter", ["peft", "kohya.safetensors", "b.safetensors"])
def test_an_adapter_of_any_tool_goes_beside_one_that_is_inside(adapter, folder, capsys):
    command = f"embed inside-a.safetensors {adapter} -o both.safetensors".split()
    code, _, err = run(capsys, *command)
    assert code == 0 and "extract cannot take them apart again: keep their own files." in err
    file = "b.safetensors" if adapter == "b.safetensors" else "a.safetensors"
    model = paramlora.load_adapter(paramlora.load_adapter(net(), "a.safetensors"), file, "other")
    model.load_state_dict(safetensors.torch.load_file("both.safetensors"), strict=True)
    weight, doubled = net()[0].weight.double(), 0
    for name in ("a.safetensors", file):
        held = {k: t.double() for k, t in safetensors.torch.load_file(name).items()}
        doubled = doubled + held["0.lora_scale"] * held["0.lora_B"] @ held["0.lora_A"]
    torch.testing.assert_close(model[0].weight.double(), weight + doubled, rtol=1e-5, atol=1e-6)
    refused(capsys, f"extract both.safetensors {OUT}", "holds 2 updates", "save_adapter")
    base = ("--base", "inside-a.safetensors")  # names layers as the base without it does
    code, _, err = run(capsys, "convert", "kohya.safetensors", "-o", "n", "--to", "native", *base)
    assert code == 0, err


@pytest.mark.parametrize("name", ["dora", "loha", "whole"])
def test_updates_of_every_kind_are_counted(name, folder, capsys):
    count = 2 if name == "whole" else 1  # weight and bias
    command = f"embed base.safetensors {name}.safetensors -o in.safetensors --json".split()
    code, out, _ = run(capsys, *command)
    assert (code, json.loads(out)["updates"]) == (0, count)


def test_integers_beside_floats_are_not_subtracted(folder, capsys):
    state = {key: value.to(torch.int8) for key, value in net().state_dict().items()}
    safetensors.torch.save_file(state, "int8.safetensors")
    command = f"difference base.safetensors int8.safetensors {OUT} --rank 1"
    refused(capsys, command, "torch.float32 in base.safetensors, and torch.int8", "(--exclude)")


@POSIX
def test_links_and_long_names_say_the_way_out(folder, capsys):
    os.symlink("loop", "loop")
    refused(capsys, "inspect loop", "loop: cannot be read: Too many levels", "not a link.")
    long = "x" * 300
    refused(capsys, f"merge base.safetensors a.safetensors -o {long}", "Give a shorter name.")


def paths():
    """Each parameter of a command that is a path, with what the parser is told of it."""
    for command in app.registered_commands:
        hints = typing.get_type_hints(command.callback, include_extras=True)
        for name, hint in hints.items():
            kind, *about = typing.get_args(hint) or (None,)
            if about and Path in (kind, *typing.get_args(kind)):
                yield command.callback.__name__, name, about[0]


def test_no_parameter_leaves_reading_to_the_parser():
    """Its words have no way out; ours are said where the file is read."""
    found = list(paths())
    assert len(found) > 15
    assert [(command, name) for command, name, about in found if about.readable] == []


@pytest.fixture
def unprivileged(monkeypatch, capsys):
    """A folder of one's own, and what gives up the right to read everything, where root has it."""
    place = Path(tempfile.mkdtemp())
    os.chmod(place, 0o777)
    monkeypatch.chdir(place)
    fill(place)
    for path in place.iterdir():
        os.chmod(path, 0o644)
    os.mkdir("shut")
    shutil.copy("a.safetensors", "shut")
    os.mkdir("fixed")
    shutil.copy("a.safetensors", "noread.safetensors")
    shutil.copy("c.json", "noread.json")
    run(capsys, "inspect", "a.safetensors")  # imports what only root may find
    run(capsys, "merge", "base.safetensors", "a.safetensors", "-o", "fixed/x.safetensors")
    os.remove("fixed/x.safetensors")
    os.chmod("fixed", 0o555)
    for path in ("shut", "noread.safetensors", "noread.json"):
        os.chmod(path, 0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield place
    if root:
        os.seteuid(0)
    os.chmod("shut", 0o755)
    os.chmod("fixed", 0o755)
    shutil.rmtree(place)


FORBIDDEN = {
    "inspect noread.safetensors": ("noread.safetensors: cannot be read: Permission denied", MINE),
    "inspect shut/a.safetensors": ("shut/a.safetensors: cannot be read: Permission", MINE),
    "inspect shut": ("shut: cannot be read: Permission denied", MINE),
    f"merge noread.safetensors a.safetensors {OUT}": ("noread.safetensors: cannot", MINE),
    "merge shut a.safetensors -o out": ("shut: cannot be read: Permission denied", MINE),
    f"merge base.safetensors noread.safetensors {OUT}": ("noread.safetensors: cannot", MINE),
    f"convert a.safetensors {OUT} --to kohya --base noread.safetensors": ("noread", MINE),
    "merge base.safetensors a.safetensors -o fixed/x.safetensors": (
        "fixed/x.safetensors: cannot be written: Permission denied",
        WRITE,
    ),
    "convert a.safetensors -o fixed/x --to peft": ("fixed/x: cannot be written: Perm", WRITE),
    "extract inside-a.safetensors -o shut/x.safetensors": ("shut/x.safetensors: cannot", WRITE),
    "targets noread.json --model m:m": ("noread.json: cannot be read: Permission", MINE),
}


@POSIX
def test_what_is_not_permitted_says_the_way_out(unprivileged, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(unprivileged))
    for command, told in FORBIDDEN.items():
        if command.startswith("targets"):
            command = command.replace("m:m", "torch.nn:Identity")
        refused(capsys, command, *told)


def test_saying_nothing_shows_the_help_alone(capsys):
    code, out, err = run(capsys)
    assert code == 2 and "Commands" in out and err == ""


def test_what_loose_left_out_is_not_told_to_leave_out(folder, capsys):
    state = safetensors.torch.load_file("kohya.safetensors")
    safetensors.torch.save_file({**state, "stranger": torch.ones(1)}, "more.safetensors")
    command = "convert more.safetensors -o out.safetensors --to native --base base.safetensors"
    code, _, err = run(capsys, *command.split(), "--loose")
    assert code == 0 and "stranger. They were left out." in err and "--loose" not in err


BROKEN = {  # no file of tensors, each for another reason
    "a pipe": os.mkfifo,
    "text": lambda path: path.write_text("some text, and more of it"),
    "nothing": lambda path: path.write_bytes(b""),
    "a pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"),
    "a page": lambda path: path.write_text("<!DOCTYPE html>"),
    "json": lambda path: path.write_text('{"a": 1}'),
    "gzip": lambda path: path.write_bytes(b"\x1f\x8b" + bytes(99)),
    "a zip file": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(99)),
    "a short one": lambda path: path.write_bytes(Path("a.safetensors").read_bytes()[:-9]),
    "half a header": lambda path: path.write_bytes(Path("a.safetensors").read_bytes()[:40]),
    "a short pickle": lambda path: path.write_bytes(Path("base.pt").read_bytes()[:-40]),
    "a list": lambda path: torch.save([1, 2], path),
    "no tensors": lambda path: torch.save({"step": 3}, path),
    "a module": lambda path: torch.save(nn.Linear(2, 2), path),
    "sparse": lambda path: torch.save({"a.lora_A": torch.eye(3).to_sparse()}, path),
    "a folder": lambda path: path.mkdir(),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path),
    "none": lambda path: None,
}


@POSIX
@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of sparse tensors
def test_every_command_names_the_file_that_it_cannot_take(kind, folder, capsys):
    """Whatever it is, and in whichever place it is given."""
    BROKEN[kind](folder / "bad")
    for command in (
        "inspect bad",
        "inspect bad --for vllm",
        "inspect a.safetensors --base bad",
        f"convert bad {OUT} --to native",
        f"convert a.safetensors {OUT} --to native --base bad",
        f"convert {OUT} --to native --component unet=bad",
        f"combine a.safetensors bad {OUT}",
        f"resize bad {OUT} --rank 1",
        f"difference bad base.safetensors {OUT} --rank 1",
        f"difference base.safetensors bad {OUT} --rank 1",
        f"embed bad a.safetensors {OUT}",
        f"embed base.safetensors bad {OUT}",
        f"extract bad {OUT}",
        f"merge bad a.safetensors {OUT}",
        f"merge base.safetensors a.safetensors bad:0.5 {OUT}",
        f"merge bad {OUT}",
    ):
        refused(capsys, command, "bad: ")
    refused(capsys, f"targets bad --model {__name__}:net", "error: bad")


# forks a child for each command and limit, so that torch is imported once
LIMITED = """
import json, os, resource, sys
from paramlora.cli import commands, main

for command in sys.argv[1:]:
    for size in (10, 60):
        read, write = os.pipe()
        if os.fork() == 0:
            os.dup2(write, 2)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            try:
                main(command.split())
            except SystemExit as done:
                sys.stderr.flush()
                os._exit(done.code)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.wait()[1])
        os.close(write)
        print(json.dumps([command, code, os.fdopen(read).read(), os.listdir()]))
"""


@POSIX
def test_a_limit_on_files_leaves_nothing(folder):
    """As a full disk does, which only root can make."""
    commands = {
        "merge base.safetensors a.safetensors -o out.safetensors": "out.safetensors",
        "merge base.pt a.safetensors -o out.pt": "out.pt",
        "convert a.safetensors --to peft -o out": "out",
        "resize a.safetensors --rank 1 -o out.safetensors": "out.safetensors",
    }
    before = sorted(os.listdir())
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *commands],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 2 * len(commands)
    for command, code, err, there in found:
        told = f"error: {commands[command]}: cannot be written: File too large. Raise the limit on"
        assert code == 2 and err.startswith(f"{told} the size of"), (command, code, err)
        assert sorted(there) == before, command
