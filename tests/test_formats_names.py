"""What tools call the weights of each architecture, against diffusers' own converters."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from paramlora import formats
from paramlora.formats import Content, Slot
from paramlora.formats.places import Places

diffusers = pytest.importorskip("diffusers")
from diffusers.loaders import single_file_utils as single  # noqa: E402


@dataclass(frozen=True)
class Architecture:
    """A tiny model of diffusers, and diffusers' reader of its original checkpoint.

    Args:
        make: the model; of its weights the names count.
        convert: of a whole original checkpoint.
        rows: how many rows a weight of such a name has, where the converter wants a number.
        skip: other tools' names, which the converter does not know.
        alike: weights that have no other name.
    """

    make: Callable
    convert: Callable
    rows: dict[str, int]
    skip: str = "-"
    alike: str = "-"


def flux():
    return diffusers.FluxTransformer2DModel(
        num_layers=2, num_single_layers=2, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(1, 1, 2), in_channels=4,
        guidance_embeds=True,
    )  # fmt: skip


def chroma():
    return diffusers.ChromaTransformer2DModel(
        num_layers=2, num_single_layers=2, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(1, 1, 2), in_channels=4, approximator_layers=2,
        approximator_hidden_dim=8, approximator_num_channels=4,
    )  # fmt: skip


INNER = {r"single.*\.to_[qkv]": 3072, r".*proj_mlp": 12288}
XLABS = r".*(processor|linear1_qkv).*"
ARCHITECTURES = {
    "flux": Architecture(
        flux, single.convert_flux_transformer_checkpoint_to_diffusers, INNER, XLABS
    ),
    "chroma": Architecture(
        chroma,
        single.convert_chroma_transformer_checkpoint_to_diffusers,
        INNER,
        XLABS,
        r"distilled_guidance_layer\.(in|out)_proj",
    ),
}


def slots_of(case):
    """The weights of the model, in float64, each with rows of its own and few columns."""
    with torch.device("meta"):
        names = [n for n, p in case.make().named_parameters() if n.endswith(".weight")]
    paths = [name.removesuffix(".weight") for name in names]
    found = {}
    for path in paths:
        rows = next((n for pattern, n in case.rows.items() if re.fullmatch(pattern, path)), 12)
        found[path] = Slot((rows, 6), "matrix", "linear")
    return found


def originals_of(case, slots):
    """``{original name: rows}`` that the model's weights come from."""
    places = Places({path: slot.shape for path, slot in slots.items()})
    size = {path: slot.shape[0] for path, slot in slots.items()}
    found = {}
    for name, there in places.others.items():
        rows = 0
        for part in (p for block in there.rows for p in block):
            pieces = len([n for n in there.held if n.startswith(f"{part.name.split('[')[0]}[")])
            rows += size[there.held[part.name][0]] // max(pieces, 1)
        if not re.fullmatch(case.skip, name):
            found[name] = rows
    return found | {path: size[path] for path in slots if re.fullmatch(case.alike, path)}


def pairs_of(rows, seed=0):
    torch.manual_seed(seed)
    return {
        name: (torch.randn(3, 6).double(), torch.randn(n, 3).double()) for name, n in rows.items()
    }


def through(case, deltas):
    """What diffusers makes of an original checkpoint of these weights."""
    biases = {f"{n}.bias": d.new_zeros(len(d)) for n, d in deltas.items()}
    weights = {n if n.endswith(".scale") else f"{n}.weight": d for n, d in deltas.items()}
    converted = case.convert(Checkpoint(biases | weights))
    return {n.removesuffix(".weight"): d for n, d in converted.items() if d.any()}


class Checkpoint(dict):
    """Tensors by name, whose norms may be missing."""

    def pop(self, key, *default):
        if key not in self and ("norm" in key or "ln_" in key):
            return torch.zeros(1)
        return super().pop(key, *default)


def delta(factors, scale):
    return scale * factors[1] @ factors[0]


def spelled(name, style):
    if style == "kohya":
        return f"lora_unet_{name.replace('.', '_')}", ("lora_down", "lora_up")
    if style == "half mangled":
        first, _, rest = name.partition(".")
        return f"lora_unet_{first}_{rest}" if rest else f"lora_unet_{first}", (
            "lora_down",
            "lora_up",
        )
    return f"{style}{name}", ("lora_A", "lora_B")


def file_of(factors, style, alpha=6.0):
    state = {}
    for name, (a, b) in factors.items():
        stem, (down, up) = spelled(name, style)
        state |= {f"{stem}.{down}.weight": a, f"{stem}.{up}.weight": b}
        state[f"{stem}.alpha"] = torch.tensor(alpha)
    return Content(state)


def same(found, want):
    assert found.keys() == want.keys()
    for path, update in found.items():
        torch.testing.assert_close(update.delta(), want[path], rtol=1e-12, atol=1e-12)


STYLES = ["kohya", "half mangled", "diffusion_model.", "", "transformer.", "_orig_mod.module."]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_file_of_the_original_names_onto_diffusers_model(name, style):
    """Dense, in float64, through diffusers' own converter of the original weights."""
    case = ARCHITECTURES[name]
    slots = slots_of(case)
    factors = pairs_of(originals_of(case, slots))
    want = through(case, {n: delta(f, 2.0) for n, f in factors.items()})
    assert want.keys() == slots.keys()
    found = formats.read(file_of(factors, style), slots).updates
    same(found, want)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_file_of_diffusers_names_onto_the_original_model(name, style):
    """What it does to the original weights, diffusers' converter makes into the file's own."""
    case = ARCHITECTURES[name]
    slots = slots_of(case)
    rows = originals_of(case, slots)
    factors = pairs_of({path: slot.shape[0] for path, slot in slots.items()})
    base = formats.base_of_shapes({f"model.diffusion_model.{n}": (r, 6) for n, r in rows.items()})
    found = formats.read(file_of(factors, style), base).updates
    assert found.keys() == base.keys()
    deltas = {n.removeprefix("model.diffusion_model."): u.delta() for n, u in found.items()}
    want = {path: delta(f, 2.0) for path, f in factors.items()}
    converted = through(case, deltas)
    assert converted.keys() == want.keys()
    for path, dense in converted.items():
        torch.testing.assert_close(dense, want[path], rtol=1e-12, atol=1e-12)
