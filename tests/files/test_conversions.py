"""Embed, extract and merge on files: every kind of file, with nothing lost on the way."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import paramlora
from paramlora import Adapter, FileError, ParamloraWarning, Update, adapter_of, checkpoint, files
from paramlora.files import read_adapter
from paramlora.files.checkpoint import Stored
from paramlora.files.native import write_native
from paramlora.files.safetensors import Spec, write_safetensors
from paramlora.model.attach import updates
from tests.files.fuzzed import LINEAR, indexed
from tests.files.written import untouched

CONFIG = {"0": {"r": 2, "scale": 0.3}, "2": {"r": 3, "hard": 0}, "3": {"r": 2}}


def net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1), nn.Embedding(6, 6)
    )


@pytest.fixture
def parts(tmp_path):
    """(the base's state dict, the attached model, the adapter's file)."""
    torch.manual_seed(0)
    base = net().bfloat16()
    state = {key: value.clone() for key, value in base.state_dict().items()}
    model = paramlora.attach(base, CONFIG, "style")
    for _, _, low in updates(model):
        nn.init.normal_(low.lora_B)
    path = tmp_path / "style.safetensors"
    paramlora.save_adapter(model, path, "style")
    return state, model, path


def lightning(state):
    return {"state_dict": state, "epoch": 3, "optimizer_states": [{"step": torch.ones(2)}]}


def write_shards(folder, state, kind="safetensors"):
    folder.mkdir()
    stem = "model" if kind == "safetensors" else "pytorch_model"
    keys = sorted(state)
    halves = keys[: len(keys) // 2], keys[len(keys) // 2 :]
    names = [f"{stem}-0000{i}-of-00002.{kind}" for i in (1, 2)]
    for name, half in zip(names, halves):
        content = {key: state[key] for key in half}
        if kind == "safetensors":
            safetensors.torch.save_file(content, folder / name, {"format": "pt", "half": name})
        else:
            torch.save(content, folder / name)
    where = {key: name for name, half in zip(names, halves) for key in half}
    size = sum(value.nbytes for value in state.values())
    index = {"metadata": {"total_size": size, "by": "a test"}, "weight_map": where}
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"hidden": 4}')


def write_base(kind, folder, state):
    """A checkpoint of that kind; gives its path."""
    path = folder / {"shards": "base", "bin shards": "base", "nested": "base.pth"}.get(kind, kind)
    if kind == "base.safetensors":
        safetensors.torch.save_file(state, path, {"format": "pt", "title": "é"})
    elif kind == "base.ckpt":
        torch.save(lightning(state), path)
    elif kind == "nested":
        torch.save({"epoch": 1, "nets": {"ema": state}}, path)
    elif kind == "legacy.pt":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif kind in ("shards", "bin shards"):
        write_shards(path, state, "safetensors" if kind == "shards" else "bin")
    else:
        torch.save(state, path)
    return path


def read(path, key=None):
    with Stored(path, key) as stored:
        return {k: stored.read(k).clone() for k in stored.specs}


def equal(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]), key


KINDS = ["base.safetensors", "base.pt", "base.bin", "base.ckpt", "nested", "legacy.pt"]
KINDS += ["shards", "bin shards"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_three_conversions_on_every_kind_of_file(kind, parts, tmp_path):
    state, model, adapter = parts
    base = write_base(kind, tmp_path, state)
    key = "nets.ema" if kind == "nested" else None
    out = [base.with_name(f"{name}{base.suffix}") for name in ("embedded", "merged", "again")]
    inside = checkpoint.embed(state, adapter_of(model, "style"))
    live = dict(model.state_dict())
    files.embed(base, adapter, out[0], key=key)
    equal(read(out[0], key), inside)
    model.load_state_dict(read(out[0], key), strict=True)
    equal(dict(model.state_dict()), live)
    files.extract(out[0], tmp_path / "back.safetensors", key=key)
    files.merge(base, [adapter], out[1], key=key)
    files.merge(out[0], [], out[2], key=key)
    merged = read(out[1], key)
    equal(merged, read(out[2], key))
    equal(merged, checkpoint.merge(state, read_adapter(tmp_path / "back.safetensors")))
    equal(merged, dict(paramlora.merge(model).state_dict()))
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_safetensors_keep_their_metadata_and_open_elsewhere(parts, tmp_path):
    state, _, adapter = parts
    base = write_base("base.safetensors", tmp_path, state)
    out = tmp_path / "merged.safetensors"
    report = files.merge(base, [(adapter, 0.5)], out)
    with safe_open(base, "pt") as one, safe_open(out, "pt") as other:
        assert one.metadata() == other.metadata() == {"format": "pt", "title": "é"}
        assert list(one.keys()) == list(other.keys())
        equal({k: other.get_tensor(k) for k in other.keys()}, read(out))
    assert (report.changed, report.tensors) == (3, len(state))
    assert report.bytes == sum(value.nbytes for value in state.values())
    assert base.stat().st_size == out.stat().st_size


def test_what_is_no_tensor_keeps_its_place_among_its_like(parts, tmp_path):
    state, _, adapter = parts
    names = ["north", "east", "south", "west", "up", "down", "left", "right"]
    torch.save({**state, **dict.fromkeys(names, 1)}, tmp_path / "base.pt")
    files.merge(tmp_path / "base.pt", [adapter], tmp_path / "merged.pt")
    assert list(torch.load(tmp_path / "merged.pt", weights_only=True)) == [*state, *names]


def test_the_rest_of_a_lightning_checkpoint_is_kept(parts, tmp_path):
    state, _, adapter = parts
    base = write_base("base.ckpt", tmp_path, state)
    files.merge(base, [adapter], tmp_path / "merged.ckpt")
    whole = torch.load(tmp_path / "merged.ckpt", weights_only=True)
    assert whole["epoch"] == 3 and list(whole) == ["state_dict", "epoch", "optimizer_states"]
    assert torch.equal(whole["optimizer_states"][0]["step"], torch.ones(2))
    with pytest.raises(FileError, match="base.ckpt also has epoch, optimizer_states. Give an out"):
        files.merge(base, [adapter], tmp_path / "merged.safetensors")
    assert not (tmp_path / "merged.safetensors").exists()


def test_what_is_no_tensor_stays_in_a_state_dict(parts, tmp_path):
    state, _, adapter = parts
    torch.save({**state, "head._extra_state": {"scale": 2}}, tmp_path / "base.pt")
    files.merge(tmp_path / "base.pt", [adapter], tmp_path / "merged.pt")
    merged = torch.load(tmp_path / "merged.pt", weights_only=True)
    assert merged["head._extra_state"] == {"scale": 2}


def test_shards_stay_where_they_are(parts, tmp_path):
    state, _, adapter = parts
    base = write_base("shards", tmp_path, state)
    for convert, out in ((files.embed, tmp_path / "in"), (files.merge, tmp_path / "out")):
        convert(base, adapter if convert is files.embed else [adapter], out)
        assert sorted(os.listdir(out)) == sorted(os.listdir(base))
        assert (out / "config.json").read_text() == '{"hidden": 4}'
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["by"] == "a test"
        assert index["metadata"]["total_size"] == sum(v.nbytes for v in read(out).values())
        for name in set(index["weight_map"].values()):
            with safe_open(out / name, "pt") as file:
                mine = {k for k, v in index["weight_map"].items() if v == name}
                assert set(file.keys()) == mine and file.metadata()["half"] == name
    # and several files can become one
    files.merge(base / "model.safetensors.index.json", [adapter], tmp_path / "one.safetensors")
    equal(read(tmp_path / "one.safetensors"), read(tmp_path / "out"))


def test_one_kind_of_file_can_become_another(parts, tmp_path):
    state, _, adapter = parts
    base = write_base("base.pt", tmp_path, state)
    files.merge(base, [adapter], tmp_path / "a.safetensors")
    safe = write_base("base.safetensors", tmp_path, state)
    files.merge(safe, [adapter], tmp_path / "b.pt")
    equal(torch.load(tmp_path / "b.pt", weights_only=True), read(tmp_path / "a.safetensors"))


def test_tensors_in_another_order_become_safetensors(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)).to(
        memory_format=torch.channels_last
    )
    state = model.state_dict()
    assert not state["0.weight"].is_contiguous()
    torch.save(state, tmp_path / "base.pt")
    paramlora.attach(model, {"0": {"r": 2}})
    nn.init.normal_(next(updates(model))[2].lora_B)
    adapter = adapter_of(model)
    files.merge(tmp_path / "base.pt", [adapter], tmp_path / "out.safetensors")
    equal(read(tmp_path / "out.safetensors"), dict(paramlora.merge(model).state_dict()))


def test_tied_tensors_stay_one_in_a_pickled_file(tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleDict({"wte": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model.head.weight = model.wte.weight
    torch.save(model.state_dict(), tmp_path / "base.pt")
    paramlora.attach(model, {"re:wte|head": {"r": 2}})
    files.merge(tmp_path / "base.pt", [adapter_of(model)], tmp_path / "merged.pt")
    merged = torch.load(tmp_path / "merged.pt", weights_only=True)
    assert merged["wte.weight"].data_ptr() == merged["head.weight"].data_ptr()


def test_the_input_may_be_the_output(parts, tmp_path):
    state, model, adapter = parts
    for kind in KINDS:
        base = write_base(kind, tmp_path, state)
        key = "nets.ema" if kind == "nested" else None
        with pytest.raises(FileError, match="exists. Give another place, or force"):
            files.merge(base, [adapter], base, key=key)
        equal(read(base, key), state)
        files.merge(base, [adapter], base, key=key, force=True)
        equal(read(base, key), checkpoint.merge(state, adapter_of(model, "style")))
        if base.is_dir():
            for path in base.iterdir():
                path.unlink()
            base.rmdir()


def test_a_dry_run_reports_and_writes_nothing(parts, tmp_path):
    state, _, adapter = parts
    base = write_base("shards", tmp_path, state)
    before = sorted(os.listdir(tmp_path))
    seen = files.merge(base, [adapter], tmp_path / "out", dry_run=True)
    assert sorted(os.listdir(tmp_path)) == before
    done = files.merge(base, [adapter], tmp_path / "out")
    assert replace(done, largest=None) == seen and done.largest > 0


def test_progress_adds_up(parts, tmp_path):
    state, _, adapter = parts
    base = write_base("base.safetensors", tmp_path, state)
    told, out = [], tmp_path / "out.safetensors"
    report = files.merge(base, [adapter], out, progress=lambda *now: told.append(now))
    assert sum(count for count, _ in told) == report.bytes
    assert {total for _, total in told} == {report.bytes}


def test_a_folder_is_replaced_only_where_nothing_else_is_lost(parts, tmp_path):
    state, _, adapter = parts
    base = write_base("shards", tmp_path, state)
    out = tmp_path / "out"
    files.merge(base, [adapter], out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileError, match="replacing it would lose notes.txt"):
        files.merge(base, [(adapter, 2)], out, force=True)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    files.merge(base, [(adapter, 2)], out, force=True)
    equal(read(out), checkpoint.merge(state, (read_adapter(adapter), 2)))
    assert sorted(os.listdir(tmp_path)) == ["base", "out", "style.safetensors"]


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "not there, and mod"),
        (
            lambda f: (f / "model.safetensors.index.json").unlink(),
            "several files .*, and no",
        ),
        (lambda f: (f / "model.safetensors.index.json").write_text("{"), "not an index of shards"),
        (lambda f: index(f, lambda i: i["weight_map"].update(x="../x")), "and is not followed"),
        (lambda f: index(f, lambda i: i["weight_map"].update(x="/x")), "and is not followed"),
        (lambda f: index(f, lambda i: i.update(weight_map=[])), "not an index of shards"),
        (lambda f: index(f, lambda i: i["weight_map"].update(x=name(1))), "lacks x, which the ind"),
        (lambda f: (f / name(2)).write_bytes((f / name(1)).read_bytes()), "is both in"),
    ],
)
def test_a_wrong_index_is_refused(parts, tmp_path, change, text):
    state, _, adapter = parts
    base = write_base("shards", tmp_path, state)
    change(base)
    with pytest.raises(FileError, match=text):
        files.merge(base, [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def name(number):
    return f"model-0000{number}-of-00002.safetensors"


def index(folder, change):
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_wrong_outputs_are_refused(parts, tmp_path):
    state, _, adapter = parts
    base = write_base("base.safetensors", tmp_path, state)
    with pytest.raises(FileError, match="its ending tells no kind of file. Give one of .safetens"):
        files.merge(base, [adapter], tmp_path / "out")
    with pytest.raises(FileError, match="cannot be written: No such file"):
        files.merge(base, [adapter], tmp_path / "none" / "out.safetensors")
    with pytest.raises(FileError, match="no levels; leave out the key"):
        files.merge(base, [adapter], tmp_path / "out.safetensors", key="model")
    pickled = write_base("nested", tmp_path, state)
    with pytest.raises(FileError, match="no state dict at the top.*Name its place with key"):
        files.merge(pickled, [adapter], tmp_path / "out.pt")
    with pytest.raises(FileError, match='no state dict under "nets.other"'):
        files.merge(pickled, [adapter], tmp_path / "out.pt", key="nets.other")


def test_only_files_of_the_folder_itself_are_copied(tmp_path):
    folder, secret = indexed(tmp_path / "base"), tmp_path / "secret"
    secret.write_text("secret")
    (folder / "tokenizer.json").symlink_to(secret)
    (folder / "same.json").symlink_to("config.json")
    os.mkfifo(folder / "pipe")
    with pytest.warns(ParamloraWarning, match="links to elsewhere: tokenizer.json. Copy those"):
        files.merge(folder, [LINEAR], tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "model.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "same.json",
    }
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def cached(tmp_path):
    """A folder as the Hugging Face cache lays it out."""
    folder, blobs = (
        indexed(tmp_path / "models--a" / "snapshots" / "1"),
        tmp_path / "models--a/blobs",
    )
    blobs.mkdir()
    (folder / "config.json").rename(blobs / "123")
    (folder / "config.json").symlink_to("../../blobs/123")
    return folder, blobs


def test_a_snapshot_of_the_hugging_face_cache_is_copied_whole(tmp_path):
    folder, _ = cached(tmp_path)
    files.merge(folder, [LINEAR], tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "{}"


def test_blobs_that_are_elsewhere_are_not(tmp_path):
    folder, blobs = cached(tmp_path)
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.warns(ParamloraWarning, match="config.json"):
        files.merge(folder, [LINEAR], tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_the_room_for_files_beside_is_checked_first(tmp_path):
    folder = indexed(tmp_path / "base")
    with open(folder / "notes.txt", "wb") as file:
        file.truncate(2**42)
    with pytest.raises(FileError, match=r"needs 4,398,\d+,\d+,\d+ bytes.*Nothing was written"):
        files.merge(folder, [LINEAR], tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["base"]


# sums that their type cannot hold

OVER = {  # the base's type: a base and an update whose sum is beyond it
    torch.float16: (6e4, 1e4),
    torch.bfloat16: (3e38, 1e38),
    torch.float32: (3e38, 1e38),
    torch.float64: (1.5e308, 1e308),
}


def over(dtype, whole=False):
    """A checkpoint and an adapter of which one element's sum is beyond the base's type."""
    first, second = OVER[dtype]
    base = {"a.weight": torch.zeros(3, 4), "b.weight": torch.zeros(2, 2)}
    base = {key: value.to(dtype) for key, value in base.items()}
    base["a.weight"][1, 2] = first
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    if whole:  # a value between the weight's own range and its factors'
        return base, Adapter({}, whole={"a": torch.full((3, 4), 2.0 * first, dtype=kind)})
    a, b = torch.zeros(1, 4, dtype=kind), torch.zeros(3, 1, dtype=kind)
    a[0, 2], b[1, 0] = 1, second
    return base, Adapter({"a": Update(a, b)})


def at(kind, folder, base):
    """The checkpoint on disk, and the place of the merged one, where an older one is."""
    if kind == "shards":
        for place in ("base", "out"):
            (folder / place).mkdir()
            save_file(base, folder / place / "model.safetensors")
            index = {"weight_map": dict.fromkeys(base, "model.safetensors")}
            (folder / place / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder / "base", folder / "out"
    write = save_file if kind == "safetensors" else torch.save
    for place in ("base", "out"):
        write(base, folder / f"{place}.{kind}")
    return folder / f"base.{kind}", folder / f"out.{kind}"


@pytest.mark.parametrize("kind", ["dict", "safetensors", "pt", "shards"])
@pytest.mark.parametrize("dtype", OVER, ids=str)
def test_a_sum_beyond_its_type_is_refused_and_the_old_file_stays(dtype, kind, tmp_path):
    base, adapter = over(dtype)
    told = r"a\.weight: its sum with the update is (7e\+?04|70000|inf|4e\+38).*Nothing was merged"
    if kind == "dict":
        with pytest.raises(paramlora.AdapterError, match=told):
            paramlora.checkpoint.merge(base, adapter)
        return
    source, out = at(kind, tmp_path, base)
    with untouched(tmp_path), pytest.raises(paramlora.AdapterError, match=told):
        files.merge(source, [adapter], out, force=True)
    files.merge(source, [(adapter, 0.25)], out, force=True)  # which the type holds


def test_a_tensor_had_whole_beyond_the_type_is_refused(tmp_path):
    base, adapter = over(torch.float16, whole=True)
    source, out = at("safetensors", tmp_path, base)
    for merge in (
        lambda: paramlora.checkpoint.merge(base, adapter),
        lambda: files.merge(source, [adapter], out, force=True),
    ):
        with untouched(tmp_path), pytest.raises(paramlora.AdapterError, match="a.weight.*120000"):
            merge()


def test_what_the_base_itself_has_not_finite_stays(tmp_path):
    base = {"a.weight": torch.zeros(3, 4)}
    base["a.weight"][0, 0], base["a.weight"][0, 1] = -torch.inf, torch.nan
    adapter = Adapter({"a": Update(torch.ones(1, 4), torch.ones(3, 1))})
    merged = paramlora.checkpoint.merge(base, adapter)["a.weight"]
    assert merged[0, 0] == -torch.inf and merged[0, 1].isnan() and (merged[1:] == 1).all()
    save_file(base, tmp_path / "a.safetensors")
    files.merge(tmp_path / "a.safetensors", [adapter], tmp_path / "b.safetensors")
    got = load_file(tmp_path / "b.safetensors")["a.weight"]
    assert torch.equal(got.nan_to_num(), merged.nan_to_num())


def test_embedding_what_the_factors_type_cannot_hold_is_refused(tmp_path):
    base = {"a.weight": torch.zeros(3, 4)}
    a, b = torch.ones(1, 4, dtype=torch.float64), torch.full((3, 1), 1e300, dtype=torch.float64)
    source, out = at("safetensors", tmp_path, base)
    wrong = (Update(a, b), Update(a, b, adapter_dtype="float16"), Update(a, a[:, :3].mT, 1e39))
    for update in wrong:
        for embed in (
            lambda one: paramlora.checkpoint.embed(base, one),
            lambda one: files.embed(source, one, out, force=True),
        ):
            told = pytest.raises(paramlora.AdapterError, match=r"a\.lora_(B|scale): not finite in")
            with untouched(tmp_path), told:
                embed(Adapter({"a": update}))


# prints the peak over the start, in MiB
MERGE = """
import sys
from pathlib import Path
from paramlora import files

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) // 1024

start = resident("VmRSS")
files.merge(sys.argv[1], [sys.argv[2]], sys.argv[3], force=True)
print(resident("VmHWM") - start)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_the_peak_does_not_grow_with_the_file(tmp_path):
    peaks = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        for rows in (8_000, 40_000):
            base, adapter, out = (Path(name) / f"{n}.safetensors" for n in ("base", "a", "out"))
            specs = {f"{n}.weight": Spec(torch.bfloat16, (rows, 2048)) for n in ("one", "two")}
            pieces = [memoryview(bytes(range(256)) * 16)] * rows  # each one row
            with open(base, "wb") as file:
                write_safetensors(file, specs, {}, lambda key, pieces=pieces: pieces)
            update = Update(torch.ones(4, 2048), torch.ones(rows, 4), shape=(rows, 2048))
            write_native(Adapter({"one": update}), adapter)
            command = [sys.executable, "-c", MERGE, base, adapter, out]
            told = subprocess.run(command, capture_output=True, text=True)
            assert told.returncode == 0, told.stderr
            peaks.append(int(told.stdout))
            assert out.stat().st_size == base.stat().st_size
    assert specs["one.weight"].nbytes >> 20 == 156
    assert max(peaks) < 64, peaks
