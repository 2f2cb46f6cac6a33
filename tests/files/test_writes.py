"""What is written: looked at before it replaces anything, and read back as it was."""

import json
import os
import socket
import stat
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import paramlora
from paramlora import Adapter, FileError, Update, files
from paramlora.files.adapters import convert
from paramlora.files.native import read_native, write_native

NAMES = [
    "weight", "bias", "trainable_model", "lora_A", "lora_B", "lora_scale", "lora_whole", "original",
    "original0", "0", "default", "module", "base_layer", "config", "é", "名", "a b", "re:x", "re:(",
    "*", "\\", '"', "x\ny", "paramlora", "__metadata__",
]  # fmt: skip
ENTRIES = {"hard": {"r": 2}, "soft": {"r": 2, "hard": 0}, "whole": {"whole": True}}


def trained(model, config, adapter="default"):
    """The model with an adapter whose tensors are all random."""
    torch.manual_seed(1)
    paramlora.attach(model, config, adapter)
    with torch.no_grad():
        for parameter in paramlora.trainable_parameters(model):
            parameter.add_(torch.randn_like(parameter))
    return model


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6))


@contextmanager
def untouched(folder):
    """Nothing below `folder` changes, appears or goes."""
    before = snapshot(folder)
    yield
    assert snapshot(folder) == before


def snapshot(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        if path.is_file()
        else stat.S_IFMT(path.lstat().st_mode)
        for path in folder.rglob("*")
    }


# names


def named(name, nested):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4)) if nested else nn.Linear(4, 3)
    model = nn.Module()
    model.add_module(name, layer)
    model.register_parameter(
        "weight" if name != "weight" else "other", nn.Parameter(torch.randn(3, 4))
    )
    return model


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ENTRIES)
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_of_any_name_reads_back(name, kind, nested, tmp_path):
    model, again = named(name, nested), named(name, nested)
    pattern = r"re:(?s:.+)\.weight"
    config = {pattern: ENTRIES[kind]}
    if name != "weight" and kind != "soft":
        config["re:weight"] = ENTRIES[kind]  # the model's own parameter
    trained(model, config)
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    paramlora.load_adapter(again, tmp_path / "a.safetensors")
    want, got = model.state_dict(), again.state_dict()
    assert list(want) == list(got) and all(torch.equal(want[key], got[key]) for key in want)
    told = read_native(tmp_path / "a.safetensors")
    assert {**told.updates, **told.whole}.keys() == paths(model)


def paths(model):
    return {path for path, *_ in paramlora.attach.__globals__["updates"](model)}


@pytest.mark.parametrize("name", ["parametrizations", "lora_branches"])
def test_a_layer_under_a_name_of_parametrizations_own_is_refused_by_name(name):
    model = nn.Module()
    model.add_module(name, nn.Linear(4, 3))
    with pytest.raises(paramlora.TargetError, match=rf'"{name}".*Rename'):
        paramlora.attach(model, {name: {"r": 2}})


def test_a_name_that_is_no_text_is_refused_before_anything_is_written(tmp_path):
    model = nn.Module()
    model.add_module("a\udc80", nn.Linear(4, 3))
    trained(model, {r"re:.*weight": {"r": 2}})
    (tmp_path / "a.safetensors").write_bytes(b"old")
    with untouched(tmp_path), pytest.raises(FileError, match=r"a\\udc80.*no text"):
        paramlora.save_adapter(model, tmp_path / "a.safetensors")


def older(adapter, path):
    """The file as 0.1.0 wrote it: paths as they are, also where they mean something else."""
    write_native(adapter, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    about = json.loads(metadata["paramlora"])
    del about["holders"]
    about["config"] = {"trainable_model": False}
    about["config"] |= {p or "weight": u.entry(p).to_dict() for p, u in adapter.updates.items()}
    save_file(load_file(path), path, {**metadata, "paramlora": json.dumps(about)})


@pytest.mark.parametrize("name", ["weight", "trainable_model", "", "re:x", "*", "a.b"])
def test_files_of_the_first_release_are_read(name, tmp_path):
    update = Update(torch.randn(2, 4), torch.randn(3, 2), 0.3, (3, 4), kind="linear")
    older(Adapter({name: update}), tmp_path / "a.safetensors")
    again = read_native(tmp_path / "a.safetensors")
    assert again.updates.keys() == {name} and again.updates[name].scale == 0.3
    assert torch.equal(again.updates[name].lora_A, update.lora_A)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_an_adapter_loads_into_a_wrapped_model(wrap, tmp_path):
    model = trained(net(), {"*": {"r": 2}})
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    inner = net()
    paramlora.load_adapter(wrap(inner), tmp_path / "a.safetensors")
    x = torch.randn(3, 6)
    assert torch.equal(inner(x), model(x))


# numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("entry", "tensor"), [
    ({"r": 2}, "lora_A"), ({"r": 2}, "lora_B"), ({"r": 2, "trainable_scale": True}, "lora_scale"),
    ({"r": 2, "hard": 0}, "lora_B"), ({"whole": True}, "lora_whole"),
])  # fmt: skip
def test_numbers_that_are_not_finite_are_refused_and_the_old_file_stays(
    entry, tensor, value, tmp_path
):
    path = tmp_path / "a.safetensors"
    model = trained(net(), {"1": entry})
    paramlora.save_adapter(model, path)
    broken = next(p for name, p in model.named_parameters() if name.endswith(tensor))
    with torch.no_grad():
        broken.view(-1)[-1] = value
    with (
        untouched(tmp_path),
        pytest.raises(FileError, match=rf"1\.(bias\.)?{tensor} is not finite.*{value}"),
    ):
        paramlora.save_adapter(model, path)


def test_values_on_the_meta_device_are_refused(tmp_path):
    model = paramlora.attach(nn.Sequential(nn.Linear(4, 3, device="meta")), {"0": {"r": 2}})
    with untouched(tmp_path), pytest.raises(FileError, match="0.lora_A lies on the meta device"):
        paramlora.save_adapter(model, tmp_path / "a.safetensors")


def test_a_scale_beyond_the_type_written_is_refused(tmp_path):
    update = Update(torch.ones(2, 4), torch.ones(3, 2), 1e39, (3, 4), kind="linear")
    with untouched(tmp_path), pytest.raises(FileError, match="the scale of 0, 1e.39, is beyond"):
        write_native(Adapter({"0": update}), tmp_path / "a.safetensors")
    wide = replace(update, lora_A=update.lora_A.double(), lora_B=update.lora_B.double())
    write_native(Adapter({"0": wide}), tmp_path / "a.safetensors")
    assert read_native(tmp_path / "a.safetensors").updates["0"].scale == 1e39


# places


def saved(path):
    paramlora.save_adapter(trained(net(), {"0": {"r": 2}}), path)


def converted(path):
    source = path.parent / "source.safetensors"
    saved(source)
    convert(source, path, "kohya", force=True)


def extracted(path):
    source = path.parent / "source.safetensors"
    save_file(trained(net(), {"0": {"r": 2}}).state_dict(), source)
    files.extract(source, path, force=True)


def merged(path):
    source = path.parent / "source.safetensors"
    save_file(trained(net(), {"0": {"r": 2}}).state_dict(), source)
    files.merge(source, [], path, force=True)


WRITERS = {"save": saved, "convert": converted, "extract": extracted, "merge": merged}


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o660, 0o444, 0o755])
@pytest.mark.parametrize("writer", WRITERS)
def test_the_mode_of_a_file_that_is_replaced_stays(writer, mode, tmp_path):
    path = tmp_path / "out.safetensors"
    path.write_bytes(b"old")
    path.chmod(mode)
    WRITERS[writer](path)
    assert path.read_bytes() != b"old" and stat.S_IMODE(path.stat().st_mode) == mode


def test_a_new_file_has_the_mode_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    saved(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives away")
def test_the_owner_of_a_file_that_is_replaced_stays(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    os.chown(path, 1234, 2345)
    path.chmod(0o640)
    saved(path)
    told = path.stat()
    assert (told.st_uid, told.st_gid, stat.S_IMODE(told.st_mode)) == (1234, 2345, 0o640)


def test_nobody_else_can_read_a_private_file_while_it_is_written(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    path.chmod(0o600)
    with paramlora.files.native.new_file(path) as file:
        (temporary,) = set(tmp_path.iterdir()) - {path}
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
        file.write(b"new")


def test_a_folder_that_is_replaced_keeps_its_modes(tmp_path):
    saved(tmp_path / "a.safetensors")
    out = tmp_path / "peft"
    convert(tmp_path / "a.safetensors", out, "peft")
    out.chmod(0o700)
    (out / "adapter_config.json").chmod(0o600)
    convert(tmp_path / "a.safetensors", out, "peft", force=True)
    modes = [stat.S_IMODE(p.stat().st_mode) for p in (out, out / "adapter_config.json")]
    assert modes == [0o700, 0o600]


def pipe(path):
    os.mkfifo(path)


def unix_socket(path):
    socket.socket(socket.AF_UNIX).bind(str(path))


def device(path):
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices")


SPECIAL = {"a pipe": pipe, "a socket": unix_socket, "a device": device, "a folder": os.mkdir}


@pytest.mark.skipif(os.name != "posix", reason="no such files")
@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_no_file_is_refused_and_stays(writer, kind, linked, tmp_path):
    place = tmp_path / ("there" if linked else "out.safetensors")
    SPECIAL[kind](place)
    if linked:
        (tmp_path / "out.safetensors").symlink_to(place)
    before = place.lstat()
    with pytest.raises(FileError, match=f"is {kind}, which no file replaces"):
        WRITERS[writer](tmp_path / "out.safetensors")
    after = place.lstat()
    assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "a.safetensors").symlink_to("real")
    saved(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").is_symlink() and read_native(tmp_path / "real").updates


@pytest.mark.parametrize("ending", ["pt", "pth", "bin", "ckpt"])
def test_a_name_of_another_kind_of_file_is_refused(ending, tmp_path):
    with untouched(tmp_path), pytest.raises(FileError, match=r"ends in \.safetensors"):
        saved(tmp_path / f"a.{ending}")


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
