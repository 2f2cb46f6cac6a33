"""A sweep of formats and types: no conversion loses an update in a narrower type."""

from dataclasses import replace

import pytest
import torch

import paramlora
from paramlora import Adapter, FileError, Update, formats
from paramlora.files.adapters import convert, read_adapter
from paramlora.files.native import write_native
from paramlora.formats.format import FORMATS
from tests.formats.kept import DTYPES, close, halves, product

SCALES = [1e-8, 1e-4, 1 / 16, 0.3, 1 / 3, 1.0, 7.0, 1e3, 1e5]


def adapter(dtype, scale, size=1.0, path="blocks.0.q"):
    torch.manual_seed(0)
    a, b = torch.randn(3, 6, dtype=torch.float64), size * torch.randn(5, 3, dtype=torch.float64)
    update = Update(a.to(dtype), b.to(dtype), scale, (5, 6), kind="linear")
    return Adapter({path: update})


def written(to, value, folder, **how):
    """The update that comes back from a file in another tool's format."""
    path = "transformer.h.0.attn.proj" if to == "litgpt" else "blocks.0.q"
    value = replace(value, updates={path: next(iter(value.updates.values()))})
    base = {path: formats.Slot((5, 6), "matrix", "linear", 1)}
    convert_from = folder / "in.safetensors"
    write_native(value, convert_from)
    form = FORMATS[to]  # one with a configuration is a folder of two files
    suffix = "" if form.config else ".pt" if form.pickled else ".safetensors"
    out = folder / f"out{suffix}"
    convert(convert_from, out, to, base, **how)
    options = formats.Options(alpha=3.0 if to == "loralib" else None)  # which it has nowhere
    return next(iter(read_adapter(out, base, options).updates.values()))


@pytest.mark.parametrize("place, size", enumerate([4e-7, 1e-3, 1.0, 3e3]))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("to", sorted(formats.WRITERS))
def test_every_writer_keeps_the_product(to, dtype, place, size, tmp_path):
    for number, scale in enumerate(SCALES):
        fold = (number + place) % 2 == 0  # each scale at two of the sizes
        if to == "loralib" and not fold and scale != 1:
            continue  # which has no place for a scale, and says so
        value = adapter(dtype, scale, size)
        folder = tmp_path / str(number)
        folder.mkdir()
        again = written(to, value, folder, fold_scale=fold)
        close(product(again), product(value.updates["blocks.0.q"]))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_scale_that_16_bits_hold_costs_no_wider_file(dtype, tmp_path):
    assert written("loralib", adapter(dtype, 0.25), tmp_path, fold_scale=True).lora_B.dtype == dtype


def test_the_row_that_was_found(tmp_path):
    value = adapter(torch.float16, 1 / 16, 4e-7)
    again = written("loralib", value, tmp_path, fold_scale=True)
    assert again.lora_A.dtype == again.lora_B.dtype == torch.float32
    close(product(again), product(value.updates["blocks.0.q"]))


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_scales_beyond_float32_are_kept_too(scale, tmp_path):
    value = adapter(torch.float32, scale)
    close(product(formats.factors.with_scale_in_B(value.updates["blocks.0.q"])) / scale,
          product(value.updates["blocks.0.q"]) / scale)  # fmt: skip


@pytest.mark.parametrize("to", sorted(formats.WRITERS))
@pytest.mark.parametrize("bad", ["lora_A", "lora_B"])
def test_numbers_that_are_not_finite_are_written_by_none(to, bad):
    value = adapter(torch.float32, 1.0)
    getattr(value.updates["blocks.0.q"], bad)[0, 0] = torch.nan
    with pytest.raises(FileError, match=rf"not finite: blocks\.0\.q\.{bad}"):
        formats.write(value, to)


def test_an_alpha_beyond_any_number_is_refused():
    with pytest.raises(FileError, match=r"blocks\.0\.q: its alpha, scale · r = 1e\+308 · 3"):
        formats.write(adapter(torch.float64, 1e308), "peft")


@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
@pytest.mark.parametrize("form", ["loha", "lokr", "tucker"])
def test_products_of_16_bit_files_are_formed_in_32(form, size):
    torch.manual_seed(0)
    name, alpha = "lora_unet_q", torch.tensor(2.0).half()
    if form == "loha":
        parts = {f"hada_w{i}_{x}": halves(*shape, size=size)
                 for i in (1, 2) for x, shape in (("a", (5, 2)), ("b", (2, 6)))}  # fmt: skip
        a, b, c, d = (parts[f"hada_{leaf}"].double() for leaf in ("w1_a", "w1_b", "w2_a", "w2_b"))
        want = (a @ b) * (c @ d)
    elif form == "lokr":
        parts = {"lokr_w1": halves(5, 2, size=size), "lokr_w2_a": halves(1, 2, size=size)}
        parts["lokr_w2_b"] = halves(2, 3, size=size)
        double = {key: value.double() for key, value in parts.items()}
        want = torch.kron(double["lokr_w1"], double["lokr_w2_a"] @ double["lokr_w2_b"])
    else:
        parts = {
            "lora_down.weight": halves(2, 6, 1, 1, size=size),
            "lora_mid.weight": halves(2, 2, 3, 3, size=size),
        }
        parts["lora_up.weight"] = halves(5, 2, 1, 1, size=size)
        down, mid, up = (parts[f"lora_{leaf}.weight"].double() for leaf in ("down", "mid", "up"))
        want = torch.einsum("om,mnkl,ni->oikl", up[:, :, 0, 0], mid, down[:, :, 0, 0]).flatten(1)
    state = {f"{name}.{leaf}": value for leaf, value in parts.items()} | {f"{name}.alpha": alpha}
    found = formats.read(formats.Content(state))
    if form != "tucker":  # kept as what they are: formed where they are merged
        base = {f"{name}.weight": torch.zeros(want.shape)}
        merged = paramlora.checkpoint.merge(base, found)[f"{name}.weight"]
        close(merged.double(), want)  # alpha / r is 1
        return
    (update,) = found.updates.values()
    close(product(update), want)
