"""Safetensors files, hostile and damaged: what the library accepts, or one clear error."""

import json
import os
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from paramlora import FileError, files
from paramlora.files.adapters import opened
from paramlora.files.checkpoint import Stored
from paramlora.files.safetensors import SafeFile
from tests.files import hostile_files
from tests.files.damaged import (
    ADAPTER,
    LONG_FUZZ,
    SAFE,
    STATE,
    entry,
    merged_or_refused,
    refused,
    safe_bytes,
)
from tests.files.fuzzed import FUZZ, LINEAR, json_values, names, sides, tried

pytestmark = pytest.mark.usefixtures("bounded")
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
@LONG_FUZZ
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
@LONG_FUZZ
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


@given(
    header=st.dictionaries(
        names | st.just("__metadata__"),
        json_values
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "I64", "BOOL", "F8_E8M0"]) | json_values,
                "shape": sides | json_values,
                "data_offsets": st.just([0, 4]) | json_values,
            }
        ),
        max_size=3,
    ),
    size=st.sampled_from([0, 4, 48]),
)
@FUZZ
def test_any_header_is_read_or_refused(header, size, tmp_path):
    path = tmp_path / "any.safetensors"
    path.write_bytes(hostile_files.raw(json.dumps(header), bytes(size)))
    tried(lambda: opened(path))
    tried(lambda: files.merge(path, [LINEAR], tmp_path / "out.safetensors", dry_run=True))


def test_a_file_that_becomes_shorter_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.ones(1_000_000)}, path)
    file = SafeFile(path)
    try:
        os.truncate(path, 1_000)
        with pytest.raises(FileError, match="it became shorter while it was read"):
            file.read("a")
    finally:
        file.close()
