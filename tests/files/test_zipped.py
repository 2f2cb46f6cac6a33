"""Zip archives of ``torch.save``: a list of records is read if it is small and all find it."""

import io
import os
import struct
import tracemalloc
import zipfile

import pytest
import torch

from paramlora import FileError
from paramlora.files import torch_save
from paramlora.files.adapters import opened
from tests.files import hostile_files


def ends_of_zip(length, start, wide=None, remark=b""):
    """A zip file's last bytes: what they tell of its list, and where the wide record of it is."""
    first = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, length, start, len(remark)) + remark
    if wide is None:
        return first
    second = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, length, start)
    return second + struct.pack("<4sLQL", b"PK\6\7", 0, wide, 1) + first


@pytest.mark.parametrize("length, wide", [(17 << 20, False), (17 << 20, True), (2**31, False)])
def test_a_long_list_of_records_is_not_read(length, wide, tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(hostile_files.zipped(b"")[:100])
    os.truncate(path, 100 + length)
    with open(path, "ab") as file:
        file.write(ends_of_zip(length, 100, 100 + length if wide else None))
    tracemalloc.start()
    try:
        with pytest.raises(FileError, match=f"{length:,} bytes of a list of records, more than"):
            opened(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_list_of_records_that_not_all_readers_find_is_refused(tmp_path):
    path, whole = tmp_path / "a.pt", io.BytesIO()
    torch.save({"a.lora_A": torch.ones(1, 4), "a.lora_B": torch.ones(3, 1)}, whole)
    sound = whole.getvalue()
    wide, where, end = len(sound) - 98, len(sound) - 42, len(sound) - 22  # torch writes all three
    (start,) = struct.unpack_from("<Q", sound, wide + 48)

    def changed(kind, at, number, more=b""):
        content = bytearray(sound)
        struct.pack_into(kind, content, at, number)
        return bytes(content) + more

    path.write_bytes(changed("<Q", wide + 48, start))
    assert opened(path).state.keys() == {"a.lora_A", "a.lora_B"}
    for content in (
        changed("<Q", where + 8, wide - 56),
        changed("<Q", wide + 48, start + 1),
        changed("<H", end + 20, 1, b"a"),
        sound + sound[end:],
        sound[:where] + sound[end:],
        sound[:40],
    ):
        path.write_bytes(content)
        with pytest.raises(FileError, match="its list of records is not at its end"):
            opened(path)


def test_a_record_of_a_name_in_other_letters_is_the_one_that_torch_reads(tmp_path):
    path = tmp_path / "a.pt"
    parts = {"a.lora_A": hostile_files.tensor((4, 4)), "a.lora_B": hostile_files.tensor((4, 4))}
    bad = {**parts, "a.lora_A": hostile_files.Call("torch.FloatTensor", (6, 6))}
    good = hostile_files.zipped(hostile_files.pickled(parts))
    other = hostile_files.zipped(hostile_files.pickled(bad)).replace(b"data.pkl", b"DATA.PKL")
    path.write_bytes(other)
    with pytest.raises(FileError, match="needs torch.FloatTensor"):
        torch_save.load(path)
    with zipfile.ZipFile(io.BytesIO(other)) as archive, zipfile.ZipFile(path, "w") as both:
        both.writestr("archive/DATA.PKL", archive.read("archive/DATA.PKL"))
        with zipfile.ZipFile(io.BytesIO(good)) as sound:
            for record in sound.infolist():
                both.writestr(record, sound.read(record))
    with pytest.raises(FileError, match="compressed, doubled or larger"):
        opened(path)
    with zipfile.ZipFile(path, "w") as twice:
        for name in ("a/data.pkl", "b/data.pkl"):
            twice.writestr(name, hostile_files.pickled(parts))
    with pytest.raises(FileError, match="2 records of names and values, and one is to be there"):
        opened(path)
