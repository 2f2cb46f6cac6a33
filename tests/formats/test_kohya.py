"""kohya's and LyCORIS' files, against LyCORIS itself, diffusers' own reader, and the formula."""

import copy
import itertools
import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

import paramlora
from paramlora import formats
from paramlora.errors import FileError
from paramlora.formats.names import stable_diffusion
from paramlora.update.kinds import KINDS as UPDATES
from paramlora.update.value import Adapter, KindUpdate, Update
from tests.formats.test_diffusers import adapter, answer, close, dense, unet

diffusers = pytest.importorskip("diffusers")


def layers(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(8, 24, (3, 2)), nn.Conv2d(24, 16, 1), nn.Flatten(), nn.Linear(64, 40)
    )
    return net.double().requires_grad_(False)


IMAGE = torch.randn(2, 8, 4, 3, generator=torch.Generator().manual_seed(5)).double()
ALGORITHMS = {
    "locon": {"algo": "lora"},
    "tucker": {"algo": "lora", "use_tucker": True},
    "loha": {"algo": "loha"},
    "loha tucker": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr", "factor": 4, "decompose_both": True},
    "lokr whole": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "lokr tucker": {"algo": "lokr", "factor": 2, "use_tucker": True},
}


KINDS = {"loha": "loha", "lokr": "lokr"}


def lycoris_of(net, name):
    lycoris = pytest.importorskip("lycoris")
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    lycoris.LycorisNetwork.apply_preset({"target_name": [".*"], "enable_conv": True})
    how = {"linear_dim": 3, "linear_alpha": 2, "conv_dim": 2, "conv_alpha": 5}
    made = lycoris.create_lycoris(net, 1.0, **how, **ALGORITHMS[name])
    made.apply_to()
    torch.manual_seed(6)
    for parameter in made.parameters():
        parameter.data.normal_(std=0.3)
    return made.double()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_lycoris_writes_acts_here(name):
    theirs = layers()
    made = lycoris_of(theirs, name)
    content = formats.Content({k: v.clone() for k, v in made.state_dict().items()})
    assert formats.detect(content) == "kohya"
    found = formats.read(content, formats.base_of(layers()))
    kinds = {value.method for value in found.values().values()}
    assert len(found.values()) == 3 and kinds == {KINDS.get(name.split()[0], "lora")}
    assert (theirs(IMAGE) - layers()(IMAGE)).abs().max() > 0.05
    # LyCORIS computes its scale in float32
    ours = paramlora.attach_adapter(layers(), found)
    torch.testing.assert_close(ours(IMAGE), theirs(IMAGE), rtol=1e-6, atol=1e-6)
    merged = paramlora.merge(ours)
    torch.testing.assert_close(merged(IMAGE), theirs(IMAGE), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name.split()[0] in KINDS])
def test_what_was_read_is_trained_on_and_written_back(name, tmp_path):
    lycoris = pytest.importorskip("lycoris")
    made = lycoris_of(layers(), name)
    content = formats.Content({k: v.clone() for k, v in made.state_dict().items()})
    ours = paramlora.attach_adapter(layers(), formats.read(content, formats.base_of(layers())))
    ours(IMAGE).square().mean().backward()
    with torch.no_grad():
        for p in paramlora.trainable_parameters(ours):
            p -= 0.1 * p.grad
    paramlora.save_adapter(ours, tmp_path / "a.safetensors")
    again = paramlora.load_adapter(layers(), tmp_path / "a.safetensors")
    assert torch.equal(again(IMAGE), ours(IMAGE))
    adapter = paramlora.adapter_of(again)
    state = formats.write(adapter, "kohya", formats.base_of(layers()), prefix="lycoris").state
    back = formats.read(formats.Content(state), formats.base_of(layers()))
    for path, value in adapter.others.items():
        if name == "lokr tucker":  # LyCORIS 4.1 reads not even its own file, see below
            continue
        assert back.others[path].held.keys() == value.held.keys()
        assert all(torch.equal(back.others[path].held[n], t) for n, t in value.held.items())
    theirs = layers()
    read, _ = lycoris.create_lycoris_from_weights(1.0, "", theirs, dict(state))
    read.apply_to()
    read.double()
    torch.testing.assert_close(theirs(IMAGE), ours(IMAGE), rtol=1e-5, atol=1e-5)


SHAPES = {
    "linear": lambda: nn.Linear(24, 40), "prime": lambda: nn.Linear(13, 30),
    "wide": lambda: nn.Linear(8, 16), "conv1d": lambda: nn.Conv1d(8, 16, 3),
    "conv2d": lambda: nn.Conv2d(4, 320, 3), "1x1": lambda: nn.Conv2d(24, 16, 1),
    "conv3d": lambda: nn.Conv3d(4, 8, 2), "grouped": lambda: nn.Conv2d(8, 16, 3, groups=2),
}  # fmt: skip
FLAGS = ("full_matrix", "decompose_both", "tucker")


@pytest.mark.parametrize("factor", (-1, 4, 16))
@pytest.mark.parametrize("shape", SHAPES)
def test_lycoris_reads_a_lokr_of_every_form(shape, factor):
    """Its loader derives the sizes of both matrices, and fails at others (modules/lokr.py)."""
    lycoris = pytest.importorskip("lycoris")
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    kinds = set()
    for number, r in itertools.product(range(8), (1, 3)):
        flags = {flag: bool(number >> bit & 1) for bit, flag in enumerate(FLAGS)}
        torch.manual_seed(number)
        layer = SHAPES[shape]().double()
        ours, theirs = (nn.Sequential(copy.deepcopy(layer)) for _ in range(2))
        told = {"r": r, "kind": "lokr", "factor": factor, "scale": 0.7, **flags}
        paramlora.attach(ours, {"0": told})
        with torch.no_grad():
            for parameter in paramlora.trainable_parameters(ours):
                parameter.normal_()
        base = formats.base_of(theirs)
        state = formats.write(paramlora.adapter_of(ours), "kohya", base, prefix="lycoris").state
        read = formats.read(formats.Content(state), base)
        kinds |= {value.method for value in read.values().values()}
        made, _ = lycoris.create_lycoris_from_weights(1.0, "", theirs, dict(state))
        made.double().apply_to()
        sides = [layer.weight.shape[1] * getattr(layer, "groups", 1)]
        x = torch.randn(2, *sides, *[5] * (layer.weight.dim() - 2)).double()
        want = ours(x)
        close = {"rtol": 1e-6, "atol": 1e-6 * float(want.detach().abs().max())}
        torch.testing.assert_close(theirs(x), want, **close)
        again = paramlora.attach_adapter(nn.Sequential(copy.deepcopy(layer)), read)
        torch.testing.assert_close(again(x), want, **close)
    # another kind only where a factor of most of a side gives sizes that the loader never derives
    assert kinds == {"lokr"} or factor == 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [-1.7, 0.6, 4.0])
def test_the_scale_of_two_whole_factors_acts_in_lycoris(scale, dtype):
    """LyCORIS reads none of them (modules/lokr.py: "use scale = 1")."""
    lycoris = pytest.importorskip("lycoris")
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    torch.manual_seed(1)
    held = {"lokr_w1": torch.randn(4, 4).to(dtype), "lokr_w2": torch.randn(10, 16).to(dtype)}
    value = KindUpdate("lokr", held, scale, (40, 64), kind="linear")
    content = formats.write(Adapter({}, others={"3": value}), "kohya", prefix="lycoris")
    want = layers()
    change = torch.kron(held["lokr_w1"].double(), held["lokr_w2"].double())
    want[3].weight.data += scale * change
    theirs, state = layers(), {key: one.clone() for key, one in content.state.items()}
    made, _ = lycoris.create_lycoris_from_weights(1.0, "", theirs, state)
    made.apply_to()
    made.double()
    tight = {"rtol": 1e-6, "atol": 1e-6 * abs(scale) * float(change.abs().max())}
    torch.testing.assert_close(theirs(IMAGE), want(IMAGE), **tight)
    back = formats.read(content, formats.base_of(layers()))
    torch.testing.assert_close(
        paramlora.attach_adapter(layers(), back)(IMAGE), want(IMAGE), **tight
    )


OWN_KINDS = {
    "lora": {"r": 2}, "dora": {"r": 2, "kind": "dora"}, "loha": {"r": 2, "kind": "loha"},
    "lokr": {"r": 1, "kind": "lokr"}, "lokr both": {"r": 1, "kind": "lokr", "decompose_both": True},
    "lokr whole": {"r": 1, "kind": "lokr", "full_matrix": True},
}  # fmt: skip


@pytest.mark.parametrize("kind", OWN_KINDS)
@pytest.mark.parametrize("scale", (0.0, -0.0, 1e-30, -0.5, 1.0, 3.7))
def test_every_scale_acts_in_lycoris(scale, kind):
    """To LyCORIS and sd-scripts an alpha of zero is none, and means the rank: a scale of one."""
    lycoris = pytest.importorskip("lycoris")
    ours, theirs = layers(), layers()
    paramlora.attach(ours, {"3": {**OWN_KINDS[kind], "scale": scale}})
    with torch.no_grad():
        for parameter in paramlora.trainable_parameters(ours):
            parameter.add_(torch.randn_like(parameter))
    state = formats.write(paramlora.adapter_of(ours), "kohya", prefix="lycoris").state
    made, _ = lycoris.create_lycoris_from_weights(1.0, "", theirs, dict(state))
    made.double().apply_to()
    close(theirs(IMAGE), ours(IMAGE))
    read = formats.read(formats.Content(state), formats.base_of(layers()))
    close(paramlora.attach_adapter(layers(), read)(IMAGE), ours(IMAGE))


@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_dense_forms_at_a_rank_are_the_nearest(name):
    content = formats.Content(lycoris_of(layers(), name).state_dict())
    base = formats.base_of(layers())
    kept = formats.read(content, base).others["3"]
    whole = kept.scale * UPDATES[name].change(kept.held)
    for r in (1, 4, 40):
        update = formats.read(content, base, formats.Options(rank=r)).updates["3"]
        values = torch.linalg.svdvals(whole)
        error = (update.delta() - whole).norm()
        assert update.r == r or r == 40
        torch.testing.assert_close(error, values[r:].norm(), rtol=1e-6, atol=1e-9)


def test_what_is_written_here_acts_in_lycoris():
    lycoris = pytest.importorskip("lycoris")
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    torch.manual_seed(1)
    updates = {}
    for path, slot in formats.base_of(layers()).items():
        fan_in = torch.Size(slot.shape[1:]).numel()
        a, b = torch.randn(3, fan_in).double(), torch.randn(slot.shape[0], 3).double()
        updates[path] = Update(a, b, 0.7, slot.shape)
    content = formats.write(Adapter(updates), "kohya", prefix="lycoris")
    theirs = layers()
    state = {k: v.clone() for k, v in content.state.items()}
    made, _ = lycoris.create_lycoris_from_weights(1.0, "", theirs, state)
    made.apply_to()
    made.double()
    want = dense(layers(), Adapter(updates))(IMAGE)
    torch.testing.assert_close(theirs(IMAGE), want, rtol=1e-6, atol=1e-6)


def test_what_is_written_here_acts_in_diffusers_by_the_names_of_sd():
    """diffusers 0.42 gives attention the commonest alpha whatever its own, so here it has that."""
    net = unet()
    ours = adapter(net)
    ours = Adapter(
        {
            path: replace(update, scale=1.5 / update.r) if ".attn" in path else update
            for path, update in ours.updates.items()
        }
    )
    content = formats.write(ours, "kohya", formats.base_of(net))
    assert "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight" in content.state
    pipeline = diffusers.StableDiffusionPipeline
    found, alphas = pipeline.lora_state_dict(dict(content.state), unet_config=net.config)
    pipeline.load_lora_into_unet(found, network_alphas=alphas, unet=net)
    close(answer(net.double()), answer(dense(unet(), ours)))
    back = formats.read(content, formats.base_of(unet()))
    for path, update in ours.updates.items():
        assert torch.equal(back.updates[path].lora_A, update.lora_A)
        assert back.updates[path].scale == update.scale


def xl():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8, 8),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=18,
        cross_attention_dim=6,
        attention_head_dim=2,
        norm_num_groups=2,
    )


def test_the_original_names_of_sdxl_are_those_of_diffusers():
    """Every layer of the U-Net by its original name, through diffusers' own translation."""
    base = formats.base_of(xl())
    originals = {path: name for name, path in stable_diffusion.pairs(base).items()}
    state = {}
    for path, name in originals.items():
        stem = f"lora_unet_{name.replace('.', '_')}"
        out, kernel = base[path].shape[0], base[path].shape[2:]
        down = torch.randn(2, base[path].shape[1], *kernel)
        state[f"{stem}.lora_down.weight"] = down
        state[f"{stem}.lora_up.weight"] = torch.randn(out, 2, *[1] * len(kernel))
        state[f"{stem}.alpha"] = torch.tensor(1.0)
    found = formats.read(formats.Content(state), base)
    assert set(found.updates) == set(originals)
    # theirs translates what stands in blocks, not the single layers around them
    inside = {k: v for k, v in state.items() if "_blocks_" in k or "_middle_" in k}
    theirs, _ = diffusers.StableDiffusionXLPipeline.lora_state_dict(
        dict(inside), unet_config=xl().config
    )
    downs = {k for k in theirs if ".lora.down." in k or "lora_A" in k or ".down.weight" in k}
    assert len(downs) == len(inside) // 3 and len(downs) > 80
    for key in downs:
        path = key.removeprefix("unet.").split(".lora")[0].replace(".processor", "")
        path = path.removesuffix(".down.weight").removesuffix("_lora")
        path = f"{path}.0" if path.endswith(".to_out") else path
        update = found.updates[path]
        assert torch.equal(theirs[key].flatten(1), update.lora_A), (key, path)
    missing = {p for p in base if p not in originals}
    assert missing == set(), missing


def test_a_fused_projection_is_scaled_by_the_whole_rank_unless_told():
    down, up = torch.randn(6, 8), torch.block_diag(*[torch.randn(4, 2)] * 3)
    state = {"lora_unet_qkv.lora_down.weight": down, "lora_unet_qkv.lora_up.weight": up}
    state["lora_unet_qkv.alpha"] = torch.tensor(1.0)
    base = {"qkv": formats.Slot((12, 8), "matrix", "linear")}
    assert formats.read(formats.Content(state), base).updates["qkv"].scale == 1 / 6
    parts = formats.Options(split=3)
    assert formats.read(formats.Content(state), base, parts).updates["qkv"].scale == 1 / 2


def pair(name, r=2, out=4, fan_in=6):
    return {
        f"{name}.lora_down.weight": torch.randn(r, fan_in),
        f"{name}.lora_up.weight": torch.randn(out, r),
    }


def test_components_of_a_pipeline():
    base = {"text_model.q_proj": formats.Slot((4, 6), "matrix", "linear")}
    state = pair("lora_te1_text_model_q_proj") | pair("lora_te2_text_model_q_proj")
    content = formats.Content(state)
    with pytest.raises(FileError, match="a second update of text_model.q_proj. Choose one part"):
        formats.read(content, base)
    for component, name in (("text_encoder", "lora_te1"), ("text_encoder_2", "lora_te2")):
        found = formats.read(content, base, formats.Options(component=component))
        (update,) = found.updates.values()
        assert torch.equal(update.lora_A, state[f"{name}_text_model_q_proj.lora_down.weight"])
    whole = {f"{c}.{p}": s for c in ("text_encoder", "text_encoder_2") for p, s in base.items()}
    found = formats.read(content, whole)
    assert set(found.updates) == set(whole)
    assert set(formats.write(found, "kohya").state) == {
        *state,
        "lora_te1_text_model_q_proj.alpha",
        "lora_te2_text_model_q_proj.alpha",
    }


def test_a_text_encoder_without_its_outer_level():
    """transformers 5 has no ``text_model`` in CLIPTextModel, and all the files do."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    config = transformers.CLIPTextConfig(num_hidden_layers=1, vocab_size=9, **sizes)
    base = formats.base_of(transformers.CLIPTextModel(config))
    (path,) = [p for p in base if p.endswith("q_proj")]
    inside = "text_model.encoder.layers.0.self_attn.q_proj"
    content = pair(f"lora_te_{inside.replace('.', '_')}", out=8, fan_in=8)
    assert set(formats.read(formats.Content(content), base).updates) == {path}
    state = {f"text_encoder.{inside}.lora_{n}.weight": torch.randn(8, 8) for n in "AB"}
    assert set(formats.read(formats.Content(state), base).updates) == {path}


def test_names_that_cannot_be_told_apart():
    slot = formats.Slot((4, 6), "matrix", "linear")
    base = {"a.b_c": slot, "a_b.c": slot, "other": slot}
    with pytest.raises(FileError, match="lora_unet_a_b_c: means a.b_c or a_b.c"):
        formats.read(formats.Content(pair("lora_unet_a_b_c")), base)
    assert set(formats.read(formats.Content(pair("lora_unet_other")), base).updates) == {"other"}
    update = Update(torch.randn(2, 6), torch.randn(4, 2), 1.0, (4, 6))
    with pytest.raises(FileError, match="a_b.c: a second layer of the name lora_unet_a_b_c"):
        formats.write(Adapter({"a.b.c": update, "a_b.c": update}), "kohya")


def test_dotted_paths_and_a_flat_1x1():
    """As OneTrainer and ComfyUI write them, and a 1×1 convolution saved as a Linear."""
    base = {"net.proj": formats.Slot((4, 6, 1, 1), "matrix", "convolution", 1)}
    for start in ("", "diffusion_model."):
        content = formats.Content(pair(f"{start}net.proj"))
        (update,) = formats.read(content, base).updates.values()
        assert update.shape == (4, 6, 1, 1) and update.scale == 1.0


@pytest.mark.parametrize(
    "extra, text",
    [
        (
            {"lora_unet_x.dora_scale": torch.ones(5, 1)},
            r"x: a magnitude of \[5, 1\] does",
        ),
        ({"lora_unet_x.oft_blocks": torch.ones(4, 1)}, "no update of one weight: .*oft_blocks"),
        ({"lora_unet_x.w_norm": torch.ones(4)}, r"no form that can be read"),
        ({"lora_unet_y.alpha": torch.tensor(1.0)}, "lora_unet_y: alpha: no form that can be read"),
        ({"lora_unet_x.alpha": torch.tensor(float("nan"))}, "lora_unet_x.alpha: nan is not finite"),
    ],
)
def test_what_is_refused(extra, text):
    base = {"x": formats.Slot((4, 6), "matrix", "linear")}
    with pytest.raises(FileError, match=text):
        formats.read(formats.Content(pair("lora_unet_x") | extra), base)
