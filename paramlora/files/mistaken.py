"""What a file is that was taken for one of tensors: told by its first bytes, with the way out."""

import stat
from pathlib import Path
from typing import Optional

from paramlora.config.reading import open_regular
from paramlora.errors import FileError
from paramlora.files.zipped import archive_of

_HEAD = 512  # the mark of tar comes last, at byte 257
_UNPACK = "Unpack it, and give the file inside"
_KINDS = {  # what the first bytes are, and what they tell
    b"version https://git-lfs": "a Git LFS pointer, not the file itself. Run git lfs pull",
    b"GGUF": "a GGUF file, of llama.cpp. Give the safetensors or torch.save file it was made from",
    b"\x1f\x8b": f"compressed with gzip. {_UNPACK}",
    b"BZh": f"compressed with bzip2. {_UNPACK}",
    b"\xfd7zXZ\x00": f"compressed with xz. {_UNPACK}",
    b"\x28\xb5\x2f\xfd": f"compressed with zstd. {_UNPACK}",
    b"7z\xbc\xaf\x27\x1c": f"a 7z archive. {_UNPACK}",
    b"Rar!": f"a RAR archive. {_UNPACK}",
    b"\x93NUMPY": "an array of NumPy. Save its tensors with torch.save or safetensors",
    b"\x89HDF": "an HDF5 file. Save its tensors with torch.save or safetensors",
}
_HTML = (b"<!doctype", b"<html", b"<?xml", b"<head")


def check_tensors(path: Path) -> None:
    """Refuse what is plainly another kind of file; what cannot be opened is left to its reader.

    Raises:
        FileError: says what it is, and what to do.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return
        with open(path, "rb") as file:
            kind = _kind(path, file.read(_HEAD))
    except OSError:
        return
    if kind is not None:
        raise FileError(f"{path}: {kind}.")


def _kind(path: Path, head: bytes) -> Optional[str]:
    if not head:
        return "an empty file. Copy or save it again"
    for start, kind in _KINDS.items():
        if head.startswith(start):
            return kind
    if head[257:262] == b"ustar":
        return f"a tar archive. {_UNPACK}"
    if head.startswith(b"PK\x03\x04"):
        return _archive(path)
    # UTF-8's mark, as editors of Windows put it in front
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.lower().startswith(_HTML):
        return (
            "an HTML page, as a website sends where a file is not found or needs a login. "
            "Download the file itself"
        )
    if text[:1] in (b"{", b"[") and b"\0" not in head:  # safetensors begins with a length
        return "a JSON file, without tensors. Give the file of tensors that it stands beside"
    return None


def _archive(path: Path) -> Optional[str]:
    """What a zip file is: torch.save's holds ``data.pkl``, and is none to be unpacked."""
    try:
        with open_regular(path) as file, archive_of(file) as archive:
            names = archive.namelist()
    except Exception:  # whatever a damaged list leads to: its reader says so
        return None
    if any(name.rpartition("/")[2] in ("data.pkl", "constants.pkl") for name in names):
        return None
    return f"a zip archive, not a file of torch.save. {_UNPACK}"
