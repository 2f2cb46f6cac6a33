"""Files of ``torch.save``, hostile and damaged: one clear error, no output, bounded memory, and no
code is run."""

import io
import os
import pickle
import struct
import tracemalloc
import warnings
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from paramlora import FileError
from paramlora.files.adapters import opened
from paramlora.files.checkpoint import Stored
from tests.files.damaged import LONG_FUZZ, STATE, merged_or_refused, refused
from tests.files.fuzzed import no_longer_than

pytestmark = pytest.mark.usefixtures("bounded")


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
    @LONG_FUZZ
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


@pytest.mark.parametrize(
    "start", [b"c", b"V", b"X\xff\xff\xff\x6f", b"\x8e" + bytes([0, 0, 0, 64] + [0] * 4)]
)
def test_a_name_of_an_old_file_of_holes_is_not_read_to_its_end(start, tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"\x80\x02" + start)
    os.truncate(path, 2**40)
    tracemalloc.start()
    try:
        with no_longer_than(5), pytest.raises(FileError, match="not a whole file of torch.save"):
            opened(path)
        assert tracemalloc.get_traced_memory()[1] < 2**28
    finally:
        tracemalloc.stop()


def test_a_small_file_of_torch_save_may_become_shorter_once_it_is_open(tmp_path):
    """Mapped, it would end the process at the first number that is gone."""
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(1_000_000)}, path)
    with Stored(path) as stored:
        os.truncate(path, 1_000)
        assert torch.equal(stored.read("a"), torch.ones(1_000_000))
    with pytest.raises(FileError, match="its list of records is not at its end"):
        Stored(path)
