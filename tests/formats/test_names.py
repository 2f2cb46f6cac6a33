"""What tools call the weights of each architecture, against diffusers' own converters."""

import warnings
from dataclasses import replace

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as converters
from diffusers.loaders import single_file_utils as single
from safetensors.torch import save_file

from paramlora import formats
from paramlora.errors import FileError
from paramlora.files import adapters
from paramlora.formats import Content, Slot
from paramlora.formats.names import TABLES
from paramlora.formats.parts import WITH, has_ratio, instance, parts_of
from tests.formats.architectures import (
    ARCHITECTURES,
    clip,
    delta,
    file_of,
    originals_of,
    pairs_of,
    same,
    slots_of,
    through,
)

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


STYLES = ["kohya", "half mangled", "diffusion_model.", "", "transformer.", "_orig_mod.module."]
STYLES += ["base_model.model.", "lycoris_", "lora_transformer_", "lora_unet__"]
CASES = [(name, style) for name in ARCHITECTURES for style in ("kohya", "diffusion_model.")]
CASES += [
    (name, style) for name in ("flux", "wan") for style in STYLES if (name, style) not in CASES
]


@pytest.mark.parametrize("name, style", CASES)
def test_a_file_of_the_original_names_onto_diffusers_model(name, style):
    """Dense, in float64, through diffusers' own converter of the original weights."""
    case = ARCHITECTURES[name]
    slots = slots_of(case)
    factors = pairs_of(originals_of(case, slots))
    want = through(case, {n: delta(f, 2.0) for n, f in factors.items()})
    assert want.keys() == slots.keys()
    found = formats.read(file_of(factors, style), slots).updates
    same(found, want)


@pytest.mark.parametrize("name, style", CASES)
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


def test_what_xlabs_writes_is_what_diffusers_reads_of_it():
    """Its single blocks have no feed-forward: onto the original it is some rows of linear1."""
    case, hidden = ARCHITECTURES["flux"], 12
    slots = slots_of(replace(case, rows={}))
    state, stems = {}, {}
    torch.manual_seed(1)
    for block, names in (("double", ("qkv_lora1", "qkv_lora2", "proj_lora1", "proj_lora2")),
                         ("single", ("qkv_lora", "proj_lora"))):  # fmt: skip
        for name in names:
            stem = f"{block}_blocks.1.processor.{name}"
            rows = 3 * hidden if "qkv" in name else hidden
            state[f"{stem}.down.weight"] = torch.randn(3, 6).double()
            state[f"{stem}.up.weight"] = torch.randn(rows, 3).double()
            stems[stem] = rows
    theirs = converters._convert_xlabs_flux_lora_to_diffusers(dict(state))
    want = products(theirs, "transformer.")
    assert formats.detect(Content(state)) == "diffusers"
    same(formats.read(Content(state), slots).updates, want)
    rows = originals_of(case, slots) | {"single_blocks.1.linear1": 3 * hidden + 30}
    base = formats.base_of_shapes({f"{n}.weight": (r, 6) for n, r in rows.items()})
    found = formats.read(Content(state), base).updates
    a, b = (state[f"single_blocks.1.processor.qkv_lora.{n}.weight"] for n in ("down", "up"))
    linear1 = found["single_blocks.1.linear1"]
    assert linear1.r == 3  # no more than the file has
    assert torch.equal(linear1.delta(), torch.cat([b @ a, torch.zeros(30, 6).double()]))
    assert len(found) == len(stems)


def products(state, start):
    """The dense update of each layer of a file without alphas, by diffusers' names."""
    found = {}
    for key, a in state.items():
        if ".lora_A." in key:
            path = key.removeprefix(start).partition(".lora_A.")[0]
            found[path] = state[key.replace(".lora_A.", ".lora_B.")] @ a
    return found


def layers_of(model):
    """The Linear layers, of as many rows as columns."""
    base = formats.base_of(model)
    return {path: slot for path, slot in base.items() if slot.kind == "linear"}


@pytest.mark.parametrize(
    "style",
    [
        "lora_te_text_model_",
        "lora_te1_text_model_",
        "text_encoder.text_model.",
        "text_encoders.clip_l.transformer.text_model.",
        "cond_stage_model.transformer.text_model.",
    ],
)
def test_clip_under_every_tools_names(style):
    slots = layers_of(clip())
    factors = pairs_of({path: 6 for path in slots})
    mangled = {
        f"{style}{p.removeprefix('text_model.')}"
        if style.endswith(".")
        else f"{style}{p.removeprefix('text_model.').replace('.', '_')}": f
        for p, f in factors.items()
    }
    found = formats.read(file_of(mangled, ""), slots).updates
    same(found, {path: delta(f, 2.0) for path, f in factors.items()})


@pytest.mark.parametrize("start", ["cond_stage_model.model.", "conditioner.embedders.1.model."])
def test_clip_onto_a_checkpoint_of_open_clip(start):
    """q, k and v of one in_proj_weight, through diffusers' own converter of the sum."""
    model = clip()
    own = layers_of(model)
    shapes = {f"{start}text_projection": (6, 6)}
    for i in range(2):
        stem = f"{start}transformer.resblocks.{i}"
        shapes |= {f"{stem}.attn.in_proj_weight": (18, 6), f"{stem}.attn.out_proj.weight": (6, 6)}
        shapes |= {f"{stem}.mlp.c_fc.weight": (6, 6), f"{stem}.mlp.c_proj.weight": (6, 6)}
    factors = pairs_of({path: 6 for path in own})
    component = "te" if "cond" in start[:5] and "stage" in start else "te2"
    keys = {path: path.removeprefix("text_model.").replace(".", "_") for path in own}
    state = file_of({f"lora_{component}_text_model_{keys[p]}": f for p, f in factors.items()}, "")
    found = formats.read(state, formats.base_of_shapes(shapes)).updates
    whole = {k: torch.zeros(s).double() for k, s in shapes.items()}
    for path, update in found.items():
        key = f"{path}.weight" if f"{path}.weight" in whole else path
        whole[key] = update.delta()
    theirs = single.convert_open_clip_checkpoint(model, whole, prefix=start)
    for path, f in factors.items():
        stem = f"text_model.{path.removeprefix('text_model.')}.weight"
        torch.testing.assert_close(theirs[stem], delta(f, 2.0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "style", ["lora_te3_", "text_encoders.t5xxl.transformer.", "text_encoder_3.", "text_encoder_2."]
)
def test_t5_under_every_tools_names(style):
    sizes = {"d_model": 6, "d_kv": 3, "d_ff": 6, "num_layers": 2, "num_heads": 2, "vocab_size": 9}
    slots = layers_of(
        transformers.T5EncoderModel(transformers.T5Config(feed_forward_proj="gated-gelu", **sizes))
    )
    factors = pairs_of({path: 6 for path in slots})
    name = (lambda p: p) if style.endswith(".") else (lambda p: p.replace(".", "_"))
    found = formats.read(file_of({f"{style}{name(p)}": f for p, f in factors.items()}, ""), slots)
    same(found.updates, {path: delta(f, 2.0) for path, f in factors.items()})


PREFIXES = [
    "_orig_mod.",
    "module.",
    "base_model.model.",
    "_orig_mod.base_model.model.",
    "base_model.model._orig_mod.",
    "module.base_model.model.model.",
    "base_model.",
    "model.",
    "state_dict.module.",
    "model.diffusion_model.",
]


@pytest.mark.parametrize("start", PREFIXES)
@pytest.mark.parametrize("leaf", ["lora_{}.weight", "lora_{}.default.weight"])
def test_prefixes_that_are_no_part_of_a_path(start, leaf):
    """Alone and in stacks, an adapter's name in the keys or not, and one that the model has."""
    for inside in ("blocks.0.to_q", "model.blocks.0.to_q"):
        slots = {inside: Slot((4, 6), "matrix", "linear"), "blocks_0.to": Slot((4, 6))}
        a, b = torch.randn(2, 6), torch.randn(4, 2)
        for name in (inside, "blocks.0.to_q"):
            state = {f"{start}{name}.{leaf.format(n)}": t for n, t in zip("AB", (a, b))}
            found = formats.read(Content(state, config={"r": 2, "lora_alpha": 4}), slots).updates
            assert found.keys() == {inside}
            assert torch.equal(found[inside].lora_B, b) and found[inside].scale == 2.0


def test_a_wrapper_inside_of_a_path():
    slots = {"blocks.0.to_q": Slot((4, 6), "matrix", "linear")}
    for name in ("blocks.0._orig_mod.to_q", "lora_unet__orig_mod_blocks_0_to_q"):
        state = file_of({name: (torch.randn(2, 6), torch.randn(4, 2))}, "")
        assert formats.read(state, slots).updates.keys() == slots.keys()


@pytest.mark.parametrize("safe", [True, False])
def test_a_module_called_model_keeps_its_level(tmp_path, safe):
    """With no model to ask, and with one; only what torch.save put in a dictionary is inside."""
    stem = "model.layers.0.q_proj"
    state = {f"{stem}.lora_A.weight": torch.ones(2, 6), f"{stem}.lora_B.weight": torch.ones(4, 2)}
    path = tmp_path / ("a.safetensors" if safe else "a.pt")
    save_file(state, path) if safe else torch.save(state, path)
    with warnings.catch_warnings():
        assert adapters.read_adapter(path).updates.keys() == {stem}
        for inside in (stem, "layers.0.q_proj", f"vision_{stem}"):
            slots = {inside: Slot((4, 6), "matrix", "linear")}
            if inside.startswith("vision"):
                with pytest.raises(FileError, match="updates of what the model does not have"):
                    adapters.read_adapter(path, slots)
            else:
                assert adapters.read_adapter(path, slots).updates.keys() == {inside}


def test_a_dictionary_around_the_tensors_is_no_module(tmp_path):
    state = {
        "q.lora_A": torch.ones(2, 6),
        "q.lora_B": torch.ones(4, 2),
        "q.lora_scale": torch.ones(()),
    }
    for outer in ("model", "state_dict"):
        torch.save({outer: state, "epoch": 3}, tmp_path / "a.pt")
        assert adapters.read_adapter(tmp_path / "a.pt").updates.keys() == {"q"}


@pytest.mark.parametrize("name", TABLES)
def test_the_names_of_a_table_are_apart(name):
    """No two of its names for a module are those of different modules of a model."""
    told = {}
    for row in TABLES[name].rows():
        told.setdefault((".".join(row.name.parts), row.ratio), set()).add(row.parts)
    assert all(len(parts) == 1 for parts in told.values())


@pytest.mark.parametrize("start", ["lora_unet_q", "q"])
@pytest.mark.parametrize("other", ["lora_down.style.weight", "lora_A.style.weight", "lora_down"])
def test_one_factor_in_two_spellings_is_refused(start, other):
    content = Content({
        f"{start}.lora_down.weight": torch.ones(2, 6), f"{start}.lora_up.weight": torch.ones(4, 2),
        f"{start}.{other}": torch.ones(2, 6),
    })  # fmt: skip
    with pytest.raises(FileError, match=f"{start}.{other} is a second tensor for one factor"):
        formats.read(content)


def test_a_bias_is_no_factor():
    content = file_of({"lora_unet_q": (torch.ones(2, 6), torch.ones(4, 2))}, "")
    state = {**content.state, "lora_unet_q.lora_up.bias": torch.ones(4)}
    with pytest.raises(FileError, match="no update of one weight: lora_unet_q.lora_up.bias"):
        formats.read(Content(state))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_two_tables_disagree_on_a_model(name):
    """Nor does one table: what a name stands for there is one thing, in both namings."""
    slots = slots_of(ARCHITECTURES[name])
    for base in (slots, formats.original_of(slots)):
        shapes = {path: slot.shape for path, slot in base.items()}
        known, told = parts_of(shapes), {}
        for held in known.values():
            for row in WITH[held.template.name, held.template.piece]:
                rows = instance(row, held.before, held.numbers, known)
                if rows is not None and has_ratio(row, shapes[held.path]):
                    other = row.name.filled(held.before, held.numbers)
                    told.setdefault(other, set()).add(
                        tuple((known[part.name].path, part.name) for part in rows[0])
                    )
        for other, meanings in told.items():
            weights = {tuple(path for path, _ in meaning) for meaning in meanings}
            assert len({tuple(dict.fromkeys(paths)) for paths in weights}) == 1, (other, weights)


@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_what_a_checkpoint_stands_for_is_no_part_of_kohyas_names(name):
    """Converted with a checkpoint of several models, and read onto a model of one."""
    case = ARCHITECTURES[name]
    slots = slots_of(case)
    original = {f"model.diffusion_model.{p}": s for p, s in formats.original_of(slots).items()}
    factors = pairs_of({path: slot.shape[0] for path, slot in slots.items()})
    spelled = formats.read(file_of(factors, ""), original)
    content = formats.write(spelled, "kohya", original)
    stems = {f"lora_unet_{p[22:].replace('.', '_')}" for p in original}
    assert {key.partition(".")[0] for key in content.state} == stems
    same(formats.read(content, slots).updates, {p: delta(f, 2.0) for p, f in factors.items()})
