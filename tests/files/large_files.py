"""Files of some 300 MiB that fit no model, of every format; and the memory that it takes to refuse
each.

Run as ``python large_files.py FOLDER [written]``; a line of JSON for each file and each action. All
are of holes, which are refused as such, but taken for written ones where that is said.
"""

import contextlib
import json
import struct
import sys
import warnings
import zipfile
from pathlib import Path

import torch
from torch import nn

import paramlora
from paramlora import files
from paramlora.files import safetensors, torch_save
from paramlora.files.inspection import inspect
from tests.files import hostile_files, resident

MANY = 19 << 22  # numbers of four bytes; seven eighths of them are more than `reading.LARGE`
ABOUT = {"format": 1, "adapter": "default"}
LAYER = {"shape": [3, 4], "layout": "matrix", "groups": 1, "kind": "linear"}


def sparse(path, tensors, metadata=None):
    """A safetensors file of ``{name: (type, shape)}``: only its header is written."""
    header, at = {"__metadata__": metadata} if metadata else {}, 0
    for name, (dtype, shape) in tensors.items():
        size = {"F32": 4, "I64": 8}[dtype]
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at := at + size]}
    content = hostile_files.raw(json.dumps(header))
    with open(path, "wb") as file:
        file.write(content)
        file.truncate(len(content) + at)


def native(entry, parts, shape, **more):
    """A native file's tensors and metadata, of a layer "a"."""
    told = {} if shape is None else {"shapes": {"a": {**LAYER, "shape": shape, **more}}}
    about = {**ABOUT, "config": {"a": entry}, **told}
    tensors = {
        f"a.{name}": ("I64" if name == "lora_ids" else "F32", s) for name, s in parts.items()
    }
    return tensors, {"paramlora": json.dumps(about)}


def low_rank(a, b, **more):
    return {"lora_A": a, "lora_B": b, "lora_scale": (), **more}


def pair(path, ends, a=(1, MANY), b=(3, 1), **more):
    return {f"{path}{end}": ("F32", shape) for end, shape in zip(ends, (a, b))} | more


def inside(**parts):
    """A checkpoint of a model with an update of the layer "a" attached."""
    start, names = "a.parametrizations.weight", {"a": "A", "b": "B"}
    told = {
        f"{start}.0.lora_{names.get(n, n)}": ("I64" if n == "ids" else "F32", s)
        for n, s in parts.items()
    }
    return {f"{start}.original": ("F32", (3, 4)), f"{start}.0.lora_scale": ("F32", ())} | told


KOHYA, PEFT = (".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")
ALPHA = {"lora_unet_a.alpha": ("F32", ())}
LOHA_SIDES = {"w1_a": (3, 1), "w1_b": (1, MANY), "w2_a": (3, 1), "w2_b": (1, MANY)}
LOHA = {f"lora_unet_a.hada_{name}": ("F32", shape) for name, shape in LOHA_SIDES.items()}
SAFE = {
    "another shape": native({"r": 1}, low_rank((1, MANY), (3, 1)), [3, MANY]),
    "a false shape": native({"r": 1}, low_rank((1, MANY), (3, 1)), [3, 4]),
    "no shape": native({"r": 1}, low_rank((1, MANY), (3, 1)), None),
    "a rank": native({"r": MANY >> 3}, low_rank((MANY >> 3, 4), (3, MANY >> 3)), [3, 4]),
    "another rank": native({"r": 1}, low_rank((MANY >> 3, 4), (3, MANY >> 3)), [3, 4]),
    "whole": (
        {"a.lora_whole": ("F32", (3, MANY >> 1))},
        {"paramlora": json.dumps({**ABOUT, "config": {"a": {"whole": True}}})},
    ),
    "dora": native(
        {"r": 1, "kind": "dora"}, low_rank((1, MANY), (3, 1), lora_magnitude=(3,)), [3, MANY]
    ),
    "loha": native(
        {"r": 1, "kind": "loha"},
        {f"hada_{n}": s for n, s in LOHA_SIDES.items()} | {"lora_scale": ()},
        [3, MANY],
    ),
    "lokr": native(
        {"r": 1, "kind": "lokr"},
        {"lokr_w1": (1, 1), "lokr_w2": (3, MANY >> 1), "lora_scale": ()},
        [3, MANY >> 1],
    ),
    "rows": native(
        {"kind": "rows", "rows": [0]},
        {"lora_ids": (1,), "lora_rows": (1, MANY)},
        [3, MANY],
        kind="embedding",
    ),
    "numbers of rows": native(
        {"kind": "rows", "rows": [0]}, {"lora_ids": (MANY >> 1,), "lora_rows": (1, 4)}, [3, 4]
    ),
    "difference": native({"kind": "difference"}, {"lora_diff": (3, MANY >> 1)}, [3, MANY >> 1]),
    "kohya": (pair("lora_unet_a", KOHYA) | ALPHA, None),
    "loha of kohya": (LOHA | ALPHA, None),
    "diffusers": (pair("unet.a", PEFT), None),
    "another type": (
        {"a.lora_A.weight": ("I64", (1, MANY >> 1)), "a.lora_B.weight": ("F32", (3, 1))},
        None,
    ),
    "loralib": (pair("a", (".lora_A", ".lora_B")), None),
    "original": (pair("a", (".lora_layer.down.weight", ".lora_layer.up.weight")), None),
    "one of two": ({"a.lora_A.weight": ("F32", (1, MANY))}, None),
    "strangers": (pair("a", PEFT, (1, 4)) | {"x": ("F32", (MANY,))}, None),
    "inside": (inside(a=(1, MANY), b=(3, 1)), None),
    "rows inside": (inside(ids=(MANY >> 1,), rows=(MANY >> 1, 4)), None),
    "no adapter": ({"a.weight": ("F32", (3, MANY >> 1))}, None),
}


def fill(place):
    """All of them; a folder of PEFT's, and two of torch.save's kinds too."""
    for name, (tensors, metadata) in SAFE.items():
        sparse(place / f"{name}.safetensors", tensors, metadata)
    hostile_files.folder(place / "peft", hostile_files.peft(), {})
    sparse(place / "peft" / "adapter_model.safetensors", pair("base_model.model.a", PEFT))
    for name, ends in {"zip": PEFT, "zip of loralib": (".lora_A", ".lora_B")}.items():
        pickled(place / f"{name}.pt", *(f"a{end}" for end in ends))


def pickled(path, first, second):
    """A file of torch.save, the last of whose records, of the first factor, is holes."""
    large, small = hostile_files.Stored("0", MANY), hostile_files.Stored("1", 3)
    state = {
        first: hostile_files.tensor((1, MANY), large),
        second: hostile_files.tensor((3, 1), small),
    }
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", hostile_files.pickled(state))
        archive.writestr("archive/data/1", bytes(12))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/data/0", b"")
        start = archive.fp.tell()
    content, size = bytearray(path.read_bytes()), MANY * 4
    struct.pack_into("<II", content, content.index(b"archive/data/0") - 12, size, size)
    struct.pack_into("<II", content, content.rindex(b"archive/data/0") - 26, size, size)
    struct.pack_into("<I", content, content.rindex(b"PK\5\6") + 16, start + size)
    with open(path, "wb") as file:
        file.write(content[:start])
        file.seek(start + size)
        file.write(content[start:])


def net():
    return nn.ModuleDict({"a": nn.Linear(4, 3)})


def actions(place):
    base = files.base_of(net())
    safe_base = place / "base"
    safe_base.write_bytes(hostile_files.safe({"a.weight": (3, 4)}))
    out = place / "out.safetensors"
    attached = paramlora.attach(net(), {"a": {"r": 1}}, "here")
    return {
        "load": lambda path: paramlora.load_adapter(net(), path, alpha=ALPHAS.get(path.stem)),
        "into": lambda path: paramlora.load_adapter(attached, path, into="here"),
        "merge": lambda path: files.merge(safe_base, [path], out, force=True),
        "embed": lambda path: files.embed(safe_base, path, out, force=True),
        "convert": lambda path: files.convert(path, out, "native", base, force=True),
        "combine": lambda path: files.combine([path], base=base),
        "resize": lambda path: files.resize(path, 1, base=base),
        "inspect": lambda path: inspect(path, base=base),
        "extract": lambda path: files.extract(path, out, force=True),
        "merge of": lambda path: files.merge(path, [], out, force=True),
    }


ALPHAS = {"loralib": 1.0, "zip of loralib": 1.0}
# no model is asked for how many ranks a sum has, and what belongs to nothing is shown
ACCEPTED = dict.fromkeys(("a rank", "another rank"), ("load", "into"))
ACCEPTED |= dict.fromkeys(("inside", "rows inside"), ("extract", "merge of", "inspect"))
ACCEPTED["strangers"] = ("load", "into", "merge", "embed", "convert", "combine", "resize")


def warm(place):
    """Import what a refusal needs, which takes memory once, by one refusal that is not measured."""
    with contextlib.suppress(paramlora.ParamloraError):
        actions(place)["into"](place / "files" / "another shape.safetensors")


def main(place, written):
    (place / "files").mkdir()
    fill(place / "files")
    warm(place)
    for path in sorted((place / "files").iterdir()):
        for verb, act in actions(place).items():
            if written and verb not in ACCEPTED.get(path.stem, verb):
                continue
            resident.restart()
            before = resident.peak()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    act(path)
                said = None
            except paramlora.ParamloraError as error:
                said = str(error)
            more = resident.peak() - before
            print(json.dumps([path.stem, verb, said, more]), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[2:]:
        safetensors.check_written = torch_save.check_written = lambda path, file: None
    main(Path(sys.argv[1]), bool(sys.argv[2:]))
