"""What a file is that was taken for one of tensors, wherever it is met."""

import gzip
import io
import json
import re
import tarfile
import zipfile

import pytest

pytest.importorskip("typer")


import paramlora
from paramlora import FileError
from tests.cli.running import net, run

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
