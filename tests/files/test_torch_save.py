"""Hostile and damaged files: one clear error, no output, bounded memory, and no code is run."""

import io
import json
import os
import pickle
import struct
import warnings
import zipfile

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

import paramlora
from paramlora import Adapter, AdapterError, FileError, Update, files
from paramlora.files.checkpoint import Stored
from paramlora.files.inspection import inspect
from paramlora.files.native import read_native, write_native
from tests.files import resident

STATE = {"a.weight": torch.arange(12.0).reshape(3, 4), "b.bias": torch.ones(3).bfloat16()}
ADAPTER = Adapter({"a": Update(torch.ones(1, 4), torch.ones(3, 1), shape=(3, 4))})
FUZZ = settings(max_examples=300, deadline=None, derandomize=True)
FUZZ = settings(FUZZ, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def bounded():
    """No test here may need more than 400 MB beyond what torch itself takes: a fraction of the
    1 GiB that a refusal may, with room for what is imported when it is first needed."""
    resident.restart()
    before = resident.peak() if resident.COUNTED else 0
    yield
    assert not resident.COUNTED or resident.peak() - before < 400


def refused(path, text="", error=FileError):
    """Both opening and merging say the same, and leave nothing."""
    there = sorted(os.listdir(path.parent))
    with pytest.raises(error, match=text) as caught:
        files.merge(path, [ADAPTER], path.with_name(f"out{path.suffix}"))
    assert len(str(caught.value)) < 1000
    assert sorted(os.listdir(path.parent)) == there


def merged_or_refused(path):
    """A damaged file is refused, or still a whole file."""
    out = path.with_name(f"out{path.suffix}")
    try:
        files.merge(path, [ADAPTER], out)
    except paramlora.ParamloraError:
        assert not out.exists()
        return False
    out.unlink()
    return True


def safe_bytes(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


SAFE = safetensors.torch.save(STATE, {"format": "pt"})
BAD_HEADERS = {
    "empty": b"",
    "short": b"\x01\x00",
    "header beyond the file": struct.pack("<Q", 1000) + b"{}",
    "header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "no JSON": safe_bytes(b"{x}"),
    "no text": safe_bytes(b'{"\xff": 1}'),
    "a list": safe_bytes(b"[]"),
    "nested deeply": safe_bytes(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "a key twice": safe_bytes(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        bytes(8),
    ),
    "no tensor": safe_bytes({"a": 3}),
    "beyond the file": safe_bytes({"a": entry()}, bytes(4)),
    "more in the file": safe_bytes({"a": entry()}, bytes(12)),
    "overlap": safe_bytes({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "hole": safe_bytes({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
    "backwards": safe_bytes({"a": entry(offsets=(8, 0))}, bytes(8)),
    "negative": safe_bytes({"a": entry(shape=(-2,), offsets=(0, -8))}, bytes(8)),
    "shape of another size": safe_bytes({"a": entry(shape=(3,))}, bytes(8)),
    "shape of 2^64": safe_bytes({"a": entry(shape=(2**64, 0), offsets=(0, 0))}),
    "a side of 1.5": safe_bytes({"a": entry(shape=(1.5,))}, bytes(8)),
    "true sides": safe_bytes({"a": entry(shape=(True, 2))}, bytes(8)),
    "100 sides": safe_bytes({"a": entry(shape=[1] * 100, offsets=(0, 4))}, bytes(4)),
    "metadata of numbers": safe_bytes({"__metadata__": {"a": 1}, "a": entry()}, bytes(8)),
    "half a character": safe_bytes(b'{"__metadata__":{"a":"\\ud800"}}'),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_a_safetensors_file_that_is_not_whole(name, tmp_path):
    path = tmp_path / "base.safetensors"
    path.write_bytes(BAD_HEADERS[name])
    told = r"not a whole safetensors file \(.+\). Copy or save it again."
    if name == "empty":
        told = "an empty file. Copy or save it again."
    if name in ("header of 2^63 bytes", "a list"):  # nothing of it is as in such a file
        told = "neither a safetensors file nor one of torch.save. Give one of those."
    refused(path, f"base.safetensors: {told}")


def test_an_unknown_type_is_named(tmp_path):
    path = tmp_path / "base.safetensors"
    path.write_bytes(safe_bytes({"a": entry("F4")}, bytes(8)))
    refused(path, '"a" is of type F4, which is not known here. Known: F64')


def test_a_name_like_a_path_is_only_a_name(tmp_path):
    path = tmp_path / "base.safetensors"
    names = ["../../etc/passwd", "/a/b", "..", "a\0b", "C:\\x"]
    safetensors.torch.save_file({**STATE, **{n: torch.zeros(1) for n in names}}, path)
    files.merge(path, [ADAPTER], tmp_path / "out.safetensors")
    assert set(safetensors.torch.load_file(tmp_path / "out.safetensors")) == {*STATE, *names}
    assert sorted(os.listdir(tmp_path)) == ["base.safetensors", "out.safetensors"]


numbers = st.integers(-2, 40) | st.integers(0, 2**66)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "BOOL", "F99"]),
        "shape": st.lists(numbers, max_size=4),
        "data_offsets": st.lists(numbers, min_size=1, max_size=3),
    }
)


@given(header=st.dictionaries(st.text(max_size=3), entries, max_size=3), size=st.integers(0, 40))
@FUZZ
def test_what_is_accepted_is_what_the_library_accepts(header, size, tmp_path):
    path = tmp_path / "base.safetensors"
    path.write_bytes(safe_bytes(header, bytes(size)))
    try:
        with Stored(path) as stored:
            ours = {key: stored.read(key) for key in stored.specs}
    except FileError:
        return
    theirs = safetensors.torch.load_file(path)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@given(at=st.integers(0, len(SAFE) - 1), byte=st.integers(0, 255), keep=st.integers(0, len(SAFE)))
@example(at=0, byte=SAFE[0], keep=len(SAFE))
@FUZZ
def test_a_flipped_byte_or_a_short_safetensors_file(at, byte, keep, tmp_path):
    for content in (SAFE[:at] + bytes([byte]) + SAFE[at + 1 :], SAFE[:keep]):
        path = tmp_path / "base.safetensors"
        path.write_bytes(content)
        assert merged_or_refused(path) <= (len(content) == len(SAFE))
        try:
            with Stored(path) as stored:
                ours = {key: stored.read(key) for key in stored.specs}
        except FileError:
            continue
        theirs = safetensors.torch.load(content)
        for key in ours:
            assert torch.equal(ours[key].view(torch.uint8), theirs[key].view(torch.uint8))


def torch_bytes(content, **options):
    out = io.BytesIO()
    torch.save(content, out, **options)
    return out.getvalue()


ZIPPED = torch_bytes(STATE)
LEGACY = torch_bytes(STATE, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("whole", [ZIPPED, LEGACY], ids=["zip", "legacy"])
def test_a_flipped_byte_or_a_short_pickled_file(whole, tmp_path):
    path = tmp_path / "base.pt"

    @given(at=st.integers(0, len(whole) - 1), byte=st.integers(0, 255))
    @FUZZ
    def one(at, byte):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about versions and protocols
            for content in (whole[:at] + bytes([byte]) + whole[at + 1 :], whole[:at]):
                path.write_bytes(content)
                assert merged_or_refused(path) <= (len(content) == len(whole))

    one()


class Attack:
    def __init__(self, call, *arguments):
        self.call = (call, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "content, needed",
    [
        (Attack(os.system, "touch owned"), "posix.system|nt.system"),
        (Attack(eval, "1"), "eval"),
        (nn.Linear(4, 3), "torch.nn.modules.linear.Linear"),
        ({"a": Attack(bytearray, 10**11)}, "bytearray"),
    ],
)
def test_what_would_run_code_is_refused_by_name(zipped, content, needed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "base.pt"
    torch.save({**STATE, "more": content}, path, _use_new_zipfile_serialization=zipped)
    refused(
        path, f"needs [^ ]*({needed}).* to be unpickled.*Where you trust it: state = torch.load"
    )
    assert os.listdir(tmp_path) == ["base.pt"]


def test_a_plain_pickle_is_refused(tmp_path):
    path = tmp_path / "base.pt"
    path.write_bytes(pickle.dumps({"a": Attack(os.system, "touch owned")}))
    refused(path, "not a whole file of torch.save|needs")


def rezipped(change):
    """The records of a good file, each through `change(name, bytes)` into a new archive."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(ZIPPED)) as old, zipfile.ZipFile(out, "w") as new:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about doubled names
            for record in old.infolist():
                change(new, record.filename, old.read(record))
    return out.getvalue()


def test_a_zip_bomb_is_refused(tmp_path):
    path = tmp_path / "base.pt"

    def inflate(new, name, content):
        bomb = bytes(50_000_000) if name.endswith("data/0") else content
        new.writestr(name, bomb, zipfile.ZIP_DEFLATED)

    def twice(new, name, content):
        new.writestr(name, content)
        new.writestr(name, content)

    for change in (inflate, twice):
        path.write_bytes(rezipped(change))
        refused(path, "records are compressed, doubled or larger than the file")


def test_a_record_that_is_missing_is_named(tmp_path):
    path = tmp_path / "base.pt"

    def without(new, name, content):
        if not name.endswith("data/1"):
            new.writestr(name, content)

    path.write_bytes(rezipped(without))
    refused(path, r"not a whole file of torch.save \(the record of storage 1 is missing\)")


def test_a_size_that_the_zip_only_claims(tmp_path):
    path = tmp_path / "base.pt"
    with zipfile.ZipFile(io.BytesIO(ZIPPED)) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data/0"))
        size = archive.getinfo(name).file_size
    content = bytearray(ZIPPED)
    at = content.rindex(name.encode()) - 46  # its record in the central directory
    assert struct.unpack_from("<I", content, at + 24)[0] == size
    struct.pack_into("<II", content, at + 20, 2**31, 2**31)
    path.write_bytes(content)
    refused(path, "larger than the file")


@pytest.mark.parametrize(
    "tensor, text",
    [
        (torch.zeros(1).expand(10**12), "claims more bytes than its file holds"),
        (torch.eye(3).to_sparse(), "no dense tensor"),
        (torch.empty(3, device="meta"), "no dense tensor"),
    ],
)
def test_a_tensor_that_is_not_plainly_there(tensor, text, tmp_path):
    path = tmp_path / "base.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about quantisation
        torch.save({**STATE, "odd": tensor}, path)
        refused(path, f"odd.* {text}")


ONE = torch.ones(1)


@pytest.mark.parametrize("content", [[], 3, None, {}, {"a": 3}, {1: ONE}, [ONE]])
def test_a_file_without_a_state_dict(content, tmp_path):
    path = tmp_path / "base.pt"
    torch.save(content, path)
    refused(path, "no state dict at the top")


def spoil(path, key, tensor):
    """Put another tensor into a safetensors file."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = {**safetensors.torch.load_file(path), key: tensor}
    safetensors.torch.save_file(state, path, metadata)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(bad, tmp_path):
    path = tmp_path / "base.safetensors"
    a = torch.ones(1, 4)
    a[0, 2] = bad
    sound = Adapter({"a": Update(torch.ones(1, 4), torch.ones(3, 1))})
    write_native(sound, tmp_path / "adapter.safetensors")
    spoil(tmp_path / "adapter.safetensors", "a.lora_A", a)  # no writer of ours would
    safetensors.torch.save_file(STATE, path)
    out = tmp_path / "out.safetensors"
    told = "adapter.safetensors: not finite: a.lora_A. It was damaged .* give a sound copy"
    with pytest.raises(FileError, match=told):
        files.merge(path, [tmp_path / "adapter.safetensors"], out)
    with pytest.raises(FileError, match=told):
        files.embed(path, tmp_path / "adapter.safetensors", tmp_path / "in.safetensors")
    files.embed(path, sound, tmp_path / "in.safetensors")
    spoil(tmp_path / "in.safetensors", "a.parametrizations.weight.0.lora_A", a)
    with pytest.raises(AdapterError, match="a.lora_A: not finite. Nothing was merged"):
        files.merge(tmp_path / "in.safetensors", [], out)
    assert not out.exists()
    # the base's own are the base's affair
    state = {"a.weight": torch.full((3, 4), bad)}
    safetensors.torch.save_file(state, path)
    files.merge(path, [ADAPTER], out)
    assert not torch.isfinite(safetensors.torch.load_file(out)["a.weight"]).any()


@pytest.mark.parametrize(
    "dtype",
    [torch.float8_e4m3fn, torch.float8_e5m2, torch.int32, torch.bool, torch.complex64, torch.int64],
    ids=str,
)
@pytest.mark.parametrize("name", ["a.lora_A", "a.lora_B", "a.lora_scale", "a.bias.lora_whole"])
def test_a_type_in_which_nothing_is_computed(name, dtype, tmp_path):
    path, base, inside = (tmp_path / f"{n}.safetensors" for n in ("adapter", "base", "inside"))
    layer = nn.ModuleDict({"a": nn.Linear(4, 3)})
    safetensors.torch.save_file(layer.state_dict(), base)
    paramlora.attach(layer, {"a": {"r": 2}, "a.bias": {"whole": True}})
    paramlora.save_adapter(layer, path)
    safetensors.torch.save_file(layer.state_dict(), inside)
    told = safetensors.torch.load_file(path)[name]
    spoil(path, name, told.to(dtype))
    _, owner, leaf = f".{name}".replace(".a.bias.", ".bias.").replace(".a.", ".weight.").split(".")
    spoil(inside, f"a.parametrizations.{owner}.0.{leaf}", told.to(dtype))
    calls = (
        lambda: paramlora.load_adapter(nn.ModuleDict({"a": nn.Linear(4, 3)}), path),
        lambda: files.merge(base, [path], tmp_path / "out.safetensors"),
        lambda: files.embed(base, path, tmp_path / "out.safetensors"),
        lambda: files.merge(inside, [], tmp_path / "out.safetensors"),
        lambda: files.extract(inside, tmp_path / "out.safetensors"),
        lambda: inspect(path),
    )
    counts = name.endswith("whole") and dtype == torch.int64  # as BatchNorm's, which are sound
    for call in calls[:-1] if counts else calls:
        with pytest.raises(paramlora.ParamloraError, match=rf"{str(dtype).split('.')[1]}"):
            call()
    assert not (tmp_path / "out.safetensors").exists()


values = st.none() | st.booleans() | st.integers(-1, 5) | st.floats() | st.text(max_size=3)
values = st.recursive(
    values, lambda v: st.lists(v, max_size=2) | st.dictionaries(st.text(max_size=3), v, max_size=2)
)


@given(
    key=st.sampled_from(["format", "adapter", "config", "shapes", "ties"]),
    deep=st.sampled_from([None, "a", "shape", "layout", "r", "scale"]),
    value=values,
)
@FUZZ
def test_metadata_of_an_adapter_that_says_anything(key, deep, value, tmp_path):
    path = tmp_path / "adapter.safetensors"
    write_native(ADAPTER, path)
    state = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["paramlora"])
    if deep is None or not isinstance(about[key], dict):
        about[key] = value
    elif deep == "a":
        about[key]["a"] = value
    else:
        about[key].setdefault("a", {})[deep] = value
    safetensors.torch.save_file(state, path, {"paramlora": json.dumps(about)})
    base = tmp_path / "base.safetensors"
    safetensors.torch.save_file(STATE, base)
    try:
        files.merge(base, [path], tmp_path / "out.safetensors", force=True)
        paramlora.attach_adapter(nn.ModuleDict({"a": nn.Linear(4, 3)}), read_native(path))
    except paramlora.ParamloraError:
        return
