"""A sweep of names, scales and indices made to harm: read or refused, soon, and nothing written
elsewhere."""

import json
import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from paramlora import Adapter, FileError, Update, files, formats
from paramlora.formats.names import TABLES
from paramlora.formats.names.levels import LEVELS, MANGLED
from tests.files import hostile_files
from tests.files.fuzzed import FUZZ, json_values, tried

FUZZ = settings(FUZZ, max_examples=60)
ONE = Adapter({"unet.a": Update(torch.ones(1, 4), torch.ones(3, 1), 1.0, (3, 4), kind="linear")})

# names: levels, names of every table, numbers of any size, and letters that are none
spellings = [n.partition("@")[0] for table in TABLES.values() for n in table.spellings]
numbers = st.sampled_from(["0", "1", "00", "999999999", "9" * 40, "-1", "²", "a"])
levels = st.sampled_from([*LEVELS, "", ".", "..", "_", "text_model", "_orig_mod"])
inner = st.builds(
    lambda name, number: name.removeprefix("**.").replace("*", number),
    st.sampled_from(sorted({*spellings, "layers.*.attn.to_q", "up_blocks.*.resnets.*.conv1"})),
    numbers,
)
dotted = st.builds(
    lambda before, name: ".".join([*before, name]), st.lists(levels, max_size=3), inner
)
flat = st.builds(
    lambda level, name: f"{level}_{name.replace('.', '_')}", st.sampled_from(list(MANGLED)), inner
)
stems = dotted | flat
rows = st.sampled_from([0, 1, 3, 12, 18])


@given(
    file=st.dictionaries(stems, rows, min_size=1, max_size=5),
    base=st.dictionaries(dotted, st.tuples(rows) | st.tuples(rows, rows, st.just(6)), max_size=5),
    kind=st.sampled_from(["lora_down lora_up", "lora_A lora_B"]),
    alpha=st.none() | st.sampled_from([0.0, 3.0, float("inf"), float("nan")]),
    strict=st.booleans(),
)
@FUZZ
def test_any_names_on_any_base_are_found_or_refused(file, base, kind, alpha, strict):
    down, up = kind.split()
    state = {}
    for stem, count in file.items():
        state |= {
            f"{stem}.{down}.weight": torch.ones(1, 6),
            f"{stem}.{up}.weight": torch.ones(count, 1),
        }
        if alpha is not None:
            state[f"{stem}.alpha"] = torch.tensor(alpha)
    shapes = {path: (*shape, 6) if len(shape) == 1 else shape for path, shape in base.items()}
    known = formats.base_of_shapes(shapes)
    options = formats.Options(strict)
    for names in (None, known):
        found = tried(lambda: formats.read(formats.Content(state), names, options))  # noqa: B023
        if found is not None and found.values():
            assert names is None or found.values().keys() <= known.keys()
            for to in ("comfyui", "vllm", "kohya", "diffusers"):
                tried(lambda: formats.write(found, to, names))  # noqa: B023


texts = st.sampled_from(
    ["8", "Dynamic", "", "nan", "1e400", "9" * 5_000, "²", "0x8", "\x1b[2J", "-0"]
)


@given(
    header=st.dictionaries(
        st.sampled_from(
            ["alpha", "rank", "lora_alpha", "ss_network_alpha", "ss_network_dim", "a.lora_alpha",
             "transformer.lora_alpha", "..lora_alpha", "lora_adapter_metadata", "paramlora_scales"]
        ),
        texts | json_values.map(json.dumps),
        max_size=4,
    ),
    stem=st.sampled_from(["a", "transformer.a", "lora_unet_a", "a.b"]),
)  # fmt: skip
@FUZZ
def test_any_alpha_of_a_header_is_read_or_refused(header, stem, tmp_path):
    for ends in ((".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")):
        path = tmp_path / "a.safetensors"
        path.write_bytes(hostile_files.safe(hostile_files.pairs([stem], *ends), header))
        found = tried(lambda: files.read_adapter(path))  # noqa: B023
        for update in found.updates.values() if found else ():
            assert torch.isfinite(torch.tensor(update.scale))


@given(
    name=st.sampled_from(["scale_weight", "weight_scale", "weight_scale_inv", "scale_input"]),
    shape=st.lists(st.sampled_from([0, 1, 3, 4, 12]), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.float8_e4m3fn, torch.int64]),
    value=st.sampled_from([0.0, 1.0, -2.0, 0.5, float("inf"), float("nan"), 1e-40]),
)
@FUZZ
def test_any_scale_of_eight_bits_is_followed_or_refused(name, shape, dtype, value, tmp_path):
    """What is written stays finite, and what stands beside it is as it was, to the bit."""
    weight = torch.ones(3, 4).to(torch.float8_e4m3fn)
    scale = torch.full(shape, value).nan_to_num(0).to(dtype) if dtype == torch.int64 else (
        torch.full(shape, value).to(dtype)
    )  # fmt: skip
    save_file({"a.weight": weight, f"a.{name}": scale}, tmp_path / "base.safetensors")
    out = tmp_path / "out.safetensors"
    one = Adapter({"a": ONE.updates["unet.a"]})
    done = tried(lambda: files.merge(tmp_path / "base.safetensors", [one], out, force=True))
    if done is not None:
        found = load_file(out)
        assert torch.isfinite(found["a.weight"].float()).all()
        same = (found[f"a.{name}"].flatten().view(torch.uint8), scale.flatten().view(torch.uint8))
        assert torch.equal(*same) and done.kept is not None
        out.unlink()


# a pipeline's folders and indices


def everything(top):
    """What is at every path below a folder, links as links."""
    return {
        os.path.join(place, name): (
            os.readlink(path) if os.path.islink(path := os.path.join(place, name))
            else open(path, "rb").read() if os.path.isfile(path) else None
        )
        for place, folders, names in os.walk(top) for name in (*folders, *names)
    }  # fmt: skip


def pipeline(top, index, name="model.safetensors"):
    shutil.rmtree(top, ignore_errors=True)
    (top / "unet").mkdir(parents=True)
    save_file({"a.weight": torch.zeros(3, 4)}, top / "unet" / name)
    (top / "unet" / "model.safetensors.index.json").write_text(json.dumps(index))
    (top / "model_index.json").write_text("{}")
    return top


places = st.sampled_from(
    ["model.safetensors", "../model.safetensors", "/etc/passwd", "..", "", ".", "\\x", "a/b", "x:y",
     "model.safetensors\0", "../../secret.safetensors"]
)  # fmt: skip
indices = st.fixed_dictionaries(
    {
        "weight_map": st.dictionaries(
            st.sampled_from(["a.weight", "../a.weight", "unet.a.weight", "/a"]),
            places | json_values,
            max_size=3,
        )
        | json_values,
        "metadata": json_values,
    }
)  # fmt: skip


@given(index=indices)
@FUZZ
def test_any_index_in_a_pipeline_is_followed_inside_or_refused(index, tmp_path):
    save_file({"a.weight": torch.ones(3, 4)}, tmp_path / "secret.safetensors")
    base = pipeline(tmp_path / "deep" / "base", index)
    before = everything(tmp_path)
    for verb in (files.embed, lambda b, a, out: files.merge(b, [a], out)):
        out = tmp_path / "out"
        done = tried(lambda: verb(base, ONE, out))  # noqa: B023
        if done is not None:
            assert load_file(out / "unet" / "model.safetensors")
            tried(lambda: files.extract(out, tmp_path / "x.safetensors", force=True))  # noqa: B023
        shutil.rmtree(out, ignore_errors=True)
        (tmp_path / "x.safetensors").unlink(missing_ok=True)
        assert everything(tmp_path) == before


@pytest.mark.parametrize("kind", ["file", "folder", "tokenizer"])
def test_links_out_of_a_pipeline_are_neither_copied_nor_written_through(kind, tmp_path):
    """A link in the base to elsewhere, and one that stands where the output goes."""
    away = tmp_path / "away"
    away.mkdir()
    (away / "secret.txt").write_text("mine")
    save_file({"a.weight": torch.zeros(3, 4)}, away / "model.safetensors")
    index = {"weight_map": {"a.weight": "model.safetensors"}, "metadata": {}}
    base = pipeline(tmp_path / "base", index)
    if kind == "file":
        (base / "notes.txt").symlink_to(away / "secret.txt")
    else:
        (base / kind).symlink_to(away if kind == "folder" else away / "secret.txt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "unet").symlink_to(away)
    before = everything(away)
    with pytest.raises(FileError, match="exists"):
        files.merge(base, [ONE], tmp_path / "out")
    with pytest.warns(Warning, match="not copied, since they are links to elsewhere"):
        tried_to = tmp_path / "fresh"
        files.merge(base, [ONE], tried_to)
    assert everything(away) == before
    copied = [path for path, content in everything(tried_to).items() if content == b"mine"]
    assert copied == [] and not any(path.is_symlink() for path in tried_to.rglob("*"))
    assert load_file(tried_to / "unet" / "model.safetensors")["a.weight"].eq(1).all()
