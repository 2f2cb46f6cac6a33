"""A sweep of what people merge onto: all-in-one files, whole pipelines, 8 bits."""

import json
import os

import pytest
import safetensors.torch
import torch
from torch import nn

import paramlora
from paramlora import files
from paramlora.errors import AdapterError, FileError
from paramlora.formats.names.stable_diffusion import pairs
from paramlora.update.value import Adapter, Update

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(4, 8), layers_per_block=1, cross_attention_dim=6,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=2,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=2,
    )  # fmt: skip


def clip():
    torch.manual_seed(1)
    config = transformers.CLIPTextConfig(
        hidden_size=6, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=20, max_position_embeddings=8, projection_dim=6,
    )  # fmt: skip
    return transformers.CLIPTextModel(config)


def state_of(model):
    return {key: value.contiguous().clone() for key, value in model.state_dict().items()}


def updates(state, names, seed):
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for key, weight in state.items():
        path = key.removesuffix(".weight")
        if any(path.endswith(name) for name in names) and weight.dim() >= 2:
            fan_in = weight[0].numel()
            a = torch.randn(2, fan_in, generator=generator)
            b = torch.randn(weight.shape[0], 2, generator=generator)
            kind = "linear" if weight.dim() == 2 else "convolution"
            out[path] = Update(a, b, 0.7, tuple(weight.shape), kind=kind)
    return out


@pytest.fixture
def parts(tmp_path):
    """The states of a U-Net and a text encoder, and an adapter of both in several tools' files."""
    states = {"unet": state_of(unet()), "text_encoder": state_of(clip())}
    chosen = {
        f"{name}.{path}": update
        for seed, (name, ends) in enumerate(
            {"unet": ("to_q", "to_out.0", "conv1"), "text_encoder": ("q_proj", "fc1")}.items()
        )
        for path, update in updates(states[name], ends, seed).items()
    }
    adapter = Adapter(chosen)
    assert len(chosen) > 10
    for to in ("diffusers", "kohya", "native"):
        files.write_adapter(adapter, tmp_path / f"{to}.safetensors", to)
    return states, adapter


def wanted(states, adapter, weight=1.0):
    """By component and key, ``W + weight · s · B · A`` in float64."""
    out = {name: {k: t.double() for k, t in state.items()} for name, state in states.items()}
    for path, update in adapter.updates.items():
        name, _, rest = path.partition(".")
        delta = weight * update.scale * update.lora_B.double() @ update.lora_A.double()
        out[name][f"{rest}.weight"] += delta.reshape(update.shape)
    return out


def original(state):
    """The U-Net under the names of the original checkpoints."""
    paths = [key.rpartition(".")[0] for key in state]
    names = pairs(paths)
    return {
        f"{names.get(key.rpartition('.')[0], key.rpartition('.')[0])}.{key.rpartition('.')[2]}": v
        for key, v in state.items()
    }


def equal(found, expected):
    assert all((found[key].double() - value).abs().max() < 1e-5 for key, value in expected.items())


def all_in_one(states, text="cond_stage_model.transformer."):
    whole = {f"model.diffusion_model.{k}": v for k, v in original(states["unet"]).items()}
    inside = (
        ""
        if any(key.startswith("text_model.") for key in states["text_encoder"])
        else ("text_model.")
    )
    whole |= {f"{text}{inside}{k}": v for k, v in states["text_encoder"].items()}
    return whole


@pytest.mark.parametrize("text", [
    "cond_stage_model.transformer.", "conditioner.embedders.0.transformer.",
])  # fmt: skip
@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_a_file_of_several_parts_onto_an_all_in_one_checkpoint(parts, tmp_path, to, text):
    states, adapter = parts
    whole = all_in_one(states, text) | {"first_stage_model.q.weight": torch.randn(4, 4)}
    safetensors.torch.save_file(whole, tmp_path / "base.safetensors")
    done = files.merge(
        tmp_path / "base.safetensors",
        [(tmp_path / f"{to}.safetensors", 0.5)],
        tmp_path / "m.safetensors",
    )
    assert done.changed == len(adapter.updates)
    found = safetensors.torch.load_file(tmp_path / "m.safetensors")
    after = wanted(states, adapter, 0.5)
    equal(found, all_in_one(after, text))
    assert torch.equal(found["first_stage_model.q.weight"], whole["first_stage_model.q.weight"])


def test_a_file_of_comfyui_onto_an_all_in_one_checkpoint(parts, tmp_path):
    states, adapter = parts
    whole, names = all_in_one(states), pairs(key.rpartition(".")[0] for key in states["unet"])
    safetensors.torch.save_file(whole, tmp_path / "base.safetensors")
    comfy = {}
    for path, update in adapter.updates.items():
        name, _, rest = path.partition(".")
        clip_l = rest if rest.startswith("text_model.") else f"text_model.{rest}"
        stem = (
            f"diffusion_model.{names.get(rest, rest)}"
            if name == "unet"
            else (f"text_encoders.clip_l.transformer.{clip_l}")
        )
        down = update.lora_A.reshape(2, *update.shape[1:])
        comfy[f"{stem}.lora_A.weight"] = down
        comfy[f"{stem}.lora_B.weight"] = update.lora_B.reshape(-1, 2, *[1] * (down.dim() - 2))
        comfy[f"{stem}.alpha"] = torch.tensor(update.scale * 2)
    safetensors.torch.save_file(
        {k: v.contiguous() for k, v in comfy.items()}, tmp_path / "comfy.safetensors"
    )
    files.merge(tmp_path / "base.safetensors", [tmp_path / "comfy.safetensors"], tmp_path / "m.pt")
    equal(torch.load(tmp_path / "m.pt", weights_only=True), all_in_one(wanted(states, adapter)))


@pytest.mark.parametrize("kind", ["diffusers", "transformers"])
def test_a_folder_of_one_file(parts, tmp_path, kind):
    states, adapter = parts
    name, model = {"diffusers": ("unet", unet()), "transformers": ("text_encoder", clip())}[kind]
    model.save_pretrained(tmp_path / "base")
    own = {p[len(name) + 1 :]: u for p, u in adapter.updates.items() if p.startswith(f"{name}.")}
    done = files.merge(tmp_path / "base", [Adapter(own)], tmp_path / "out")
    assert done.changed == len(own)
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "base"))
    again = type(model).from_pretrained(tmp_path / "out").state_dict()
    equal(again, wanted(states, adapter)[name])
    files.merge(tmp_path / "base", [Adapter(own)], tmp_path / "out.safetensors")


@pytest.fixture
def pipeline(parts, tmp_path):
    base = tmp_path / "base"
    unet().save_pretrained(base / "unet")
    clip().save_pretrained(base / "text_encoder")
    (base / "tokenizer").mkdir()
    (base / "tokenizer" / "vocab.json").write_text("{}")
    (base / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return base


@pytest.mark.parametrize("to", ["kohya", "diffusers", "native"])
def test_a_whole_pipeline_in_one_pass(parts, pipeline, tmp_path, to):
    states, adapter = parts
    done = files.merge(pipeline, [tmp_path / f"{to}.safetensors"], tmp_path / "out")
    assert done.changed == len(adapter.updates)
    names = [
        sorted(str(p.relative_to(top)) for p in top.rglob("*"))
        for top in (pipeline, tmp_path / "out")
    ]
    assert names[0] == names[1]
    after = wanted(states, adapter)
    for name, model in {"unet": unet(), "text_encoder": clip()}.items():
        equal(type(model).from_pretrained(tmp_path / "out" / name).state_dict(), after[name])


@pytest.mark.parametrize("to", ["kohya", "diffusers", "native"])
def test_an_adapter_is_put_into_a_whole_pipeline_and_taken_out(parts, pipeline, tmp_path, to):
    states, adapter = parts
    inside, out = tmp_path / "inside", tmp_path / "out.safetensors"
    done = files.embed(pipeline, tmp_path / f"{to}.safetensors", inside)
    assert done.updates == len(adapter.updates) and (inside / "tokenizer" / "vocab.json").exists()
    after = wanted(states, adapter)
    for name, model in {"unet": unet(), "text_encoder": clip()}.items():
        own = {
            p.split(".", 1)[1]: u for p, u in adapter.updates.items() if p.startswith(f"{name}.")
        }
        paramlora.attach(model, {path: {"r": 2, "scale": 0.7} for path in own})
        (weights,) = (inside / name).glob("*.safetensors")
        model.load_state_dict(safetensors.torch.load_file(weights))
        equal(paramlora.merge(model).state_dict(), after[name])
    files.merge(inside, [], tmp_path / "merged")
    for name, model in {"unet": unet(), "text_encoder": clip()}.items():
        equal(type(model).from_pretrained(tmp_path / "merged" / name).state_dict(), after[name])
    assert files.extract(inside, out, to).updates == len(adapter.updates)
    files.merge(pipeline, [out], tmp_path / "again")
    found = files.base_of_file(tmp_path / "again" / "unet")
    assert found.keys() == files.base_of_file(pipeline / "unet").keys()
    alone = files.extract(inside, tmp_path / "alone", "peft", component="text_encoder")
    assert alone.updates == sum(path.startswith("text_encoder.") for path in adapter.updates)


def test_parts_whose_names_the_pipeline_tells_become_one_file_of_comfyui(
    parts, pipeline, tmp_path, capsys
):
    """Onto the all-in-one checkpoint, where ComfyUI's names are the published ones."""
    from paramlora.cli import main

    states, adapter = parts
    order = []
    for name, prefix in (("unet", "lora_unet"), ("text_encoder", "lora_te")):
        own = {p: u for p, u in adapter.updates.items() if p.startswith(f"{name}.")}
        files.write_adapter(Adapter(own), tmp_path / f"{name}.safetensors", "kohya", prefix=prefix)
        order += ["--component", f"{name}={tmp_path}/{name}.safetensors"]
    out = tmp_path / "comfy.safetensors"
    order = ["convert", *order, "--to", "comfyui", "-o", str(out)]
    with pytest.raises(SystemExit) as stop:
        main([*order, "--base", str(pipeline / "unet")])
    assert stop.value.code == 2
    assert "unet: a part of which the base has no weight; its names be" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([*order, "--base", str(pipeline)])
    assert stop.value.code == 0, capsys.readouterr().err
    names = {key.split(".")[0] for key in safetensors.torch.load_file(out)}
    assert names == {"diffusion_model", "text_encoders"}
    whole = all_in_one(states)
    safetensors.torch.save_file(whole, tmp_path / "base.safetensors")
    files.merge(tmp_path / "base.safetensors", [out], tmp_path / "merged.safetensors")
    after = wanted(states, adapter)
    found = safetensors.torch.load_file(tmp_path / "merged.safetensors")
    equal(found, all_in_one({name: dict(own) for name, own in after.items()}))
    files.merge(pipeline, [out], tmp_path / "again")
    for key, model in {"unet": unet(), "text_encoder": clip()}.items():
        equal(type(model).from_pretrained(tmp_path / "again" / key).state_dict(), after[key])


def test_a_pipeline_with_nothing_inside_and_a_part_that_it_lacks(pipeline, parts, tmp_path):
    _, adapter = parts
    with pytest.raises(AdapterError, match="no update is inside|nothing"):
        files.extract(pipeline, tmp_path / "out.safetensors")
    files.embed(pipeline, adapter, tmp_path / "inside")
    with pytest.raises(FileError, match="it has no part prior. Its names begin with text_enc"):
        files.extract(tmp_path / "inside", tmp_path / "out.safetensors", component="prior")
    with pytest.raises(FileError, match="a pipeline is a folder of models. Give a name of a"):
        files.embed(pipeline, adapter, tmp_path / "one.safetensors")
    assert not (tmp_path / "one.safetensors").exists()


def test_a_pipeline_is_replaced_by_force_and_loses_nothing(parts, pipeline, tmp_path):
    _, adapter = parts
    with pytest.raises(FileError, match="exists"):
        files.merge(pipeline, [adapter], pipeline)
    (pipeline / "unet" / "notes.bin").write_text("mine")
    with pytest.raises(FileError, match="replacing it would lose notes.bin"):
        files.merge(pipeline, [adapter], pipeline, force=True)
    (pipeline / "unet" / "notes.bin").unlink()
    before = sorted(str(p) for p in pipeline.rglob("*"))
    files.merge(pipeline, [adapter], pipeline, force=True)
    assert before == sorted(str(p) for p in pipeline.rglob("*"))
    with pytest.raises(FileError, match="a pipeline is a folder of models"):
        files.merge(pipeline, [adapter], tmp_path / "x.safetensors")


FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def eight(dtype, name, per_row):
    """A weight of 8 bits with its scale, and what the two stand for."""
    torch.manual_seed(2)
    weight = torch.randn(32, 48) * 0.02
    most = weight.abs().amax(1, keepdim=True) if per_row else weight.abs().max()
    scale = (most / torch.finfo(dtype).max).float() if name else torch.ones(())
    held = (weight / scale).to(dtype)
    state = {"l.weight": held, "l.bias": torch.zeros(32)}
    state |= {f"l.{name}": scale, "scaled_fp8": torch.ones(2).to(dtype)} if name else {}
    return state, held.double() * scale.double()


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize(("name", "per_row"), [
    ("", False), ("scale_weight", False), ("weight_scale", False), ("weight_scale", True),
])  # fmt: skip
def test_eight_bits_are_summed_in_float32_and_rounded_once(tmp_path, dtype, name, per_row):
    state, base = eight(dtype, name, per_row)
    safetensors.torch.save_file(state, tmp_path / "base.safetensors")
    update = Update(torch.randn(2, 48) * 0.05, torch.randn(32, 2) * 0.05, 1.0, (32, 48))
    done = files.merge(
        tmp_path / "base.safetensors", [Adapter({"l": update})], tmp_path / "m.safetensors"
    )
    found = safetensors.torch.load_file(tmp_path / "m.safetensors")
    assert found["l.weight"].dtype == dtype
    for key in state.keys() - {"l.weight"}:  # kept, to the last bit
        assert torch.equal(found[key].float(), state[key].float())
    scale = state[f"l.{name}"].double() if name else torch.ones(())
    delta = update.lora_B.double() @ update.lora_A.double()
    exact = (base + delta) / scale
    want = exact.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).float().to(dtype)
    differ = want.view(torch.uint8) != found["l.weight"].view(torch.uint8)
    assert differ.double().mean() < 0.002  # where float32's sum lies on a middle
    added = found["l.weight"].double() * scale - base
    share = float((added * delta).sum() / delta.square().sum())
    assert done.kept == pytest.approx(share, abs=0.05 if per_row else 1e-3)


def test_scales_of_blocks_are_refused_and_embedding_too(tmp_path):
    state, _ = eight(torch.float8_e4m3fn, "weight_scale_inv", False)
    state["l.weight_scale_inv"] = torch.ones(2, 3)
    adapter = Adapter({"l": Update(torch.randn(1, 48), torch.randn(32, 1), 1.0, (32, 48))})
    with pytest.raises(
        AdapterError, match=r"l.weight_scale_inv: \[2, 3\] are no scales of the rows"
    ):
        paramlora.checkpoint.merge(state, adapter)
    with pytest.raises(AdapterError, match="no update can be stored"):
        paramlora.checkpoint.embed(state, adapter)


def test_no_more_is_asked_of_a_folder_than_one_meaning(tmp_path):
    (tmp_path / "base").mkdir()
    for name in ("a", "b"):
        safetensors.torch.save_file(
            state_of(nn.Linear(2, 2)), tmp_path / "base" / f"{name}.safetensors"
        )
    with pytest.raises(FileError, match="several files of weights, a.safetensors, b"):
        files.merge(tmp_path / "base", [Adapter({})], tmp_path / "out")
