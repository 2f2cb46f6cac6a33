"""What a file says beside its tensors goes with it, where the new one has a place for it."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import paramlora
from paramlora import files
from paramlora.errors import ParamloraWarning
from paramlora.update.value import Adapter, Update

SAID = {"ss_tag_frequency": '{"cat": 3}', "modelspec.title": "Cats", "trigger": "a cat"}
STALE = {"sshs_model_hash": "00", "modelspec.hash_sha256": "00", "ss_network_dim": "7"}


@pytest.fixture
def kohya(tmp_path):
    one = {"a.q": Update(torch.randn(2, 6), torch.randn(4, 2), 0.5, (4, 6), kind="linear")}
    path = tmp_path / "k.safetensors"
    files.write_adapter(Adapter(one), path, "kohya")
    with safe_open(path, "pt") as file:
        had = file.metadata()
    save_file(load_file(path), path, {**had, **SAID, **STALE, "ss_network_dim": "2"})
    save_file({"a.q.weight": torch.zeros(4, 6)}, tmp_path / "base.safetensors")
    return path


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize(("to", "file"), [
    ("native", ""), ("kohya", ""), ("diffusers", ""), ("peft", "adapter_model.safetensors"),
])  # fmt: skip
def test_it_survives_every_format_with_a_header(kohya, tmp_path, to, file):
    out = tmp_path / ("out" if file else "out.safetensors")
    base = files.base_of_file(tmp_path / "base.safetensors")
    files.convert(kohya, out, to, base)
    found = metadata(out / file if file else out)
    assert SAID.items() <= found.items()
    assert "sshs_model_hash" not in found and "modelspec.hash_sha256" not in found
    assert found.get("ss_network_dim", "2") == "2"
    back = tmp_path / "back.safetensors"
    files.convert(out, back, "native", base)
    assert SAID.items() <= metadata(back).items()


def test_what_has_no_place_is_named(kohya, tmp_path):
    base = files.base_of_file(tmp_path / "base.safetensors")
    with pytest.warns(ParamloraWarning, match="no place for .*modelspec.title, ss_tag_frequency"):
        files.convert(kohya, tmp_path / "out.pt", "original", base)


def test_auto_peft_model_finds_the_base(tmp_path):
    peft, transformers = (pytest.importorskip(name) for name in ("peft", "transformers"))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=16,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    weight = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    update = Update(torch.randn(2, 8), torch.randn(8, 2), 0.5, (8, 8), kind="linear")
    path = "model.layers.0.self_attn.q_proj"
    files.write_adapter(Adapter({path: update}), tmp_path / "a.safetensors")
    said = {"task_type": "CAUSAL_LM", "base_model_name_or_path": str(tmp_path / "base")}
    files.convert(tmp_path / "a.safetensors", tmp_path / "p", "peft", metadata=said)
    files.convert(tmp_path / "p", tmp_path / "n.safetensors", "native")  # from the file read, too
    files.convert(tmp_path / "n.safetensors", tmp_path / "again", "peft")
    assert (
        said.items() <= json.loads((tmp_path / "again" / "adapter_config.json").read_text()).items()
    )
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "again").merge_and_unload()
    found = loaded.model.layers[0].self_attn.q_proj.weight
    assert torch.allclose(found, weight + update.delta(), atol=1e-6)


def test_what_peft_and_diffusers_say_goes_both_ways(tmp_path):
    update = Update(torch.randn(2, 6), torch.randn(4, 2), 0.5, (4, 6), kind="linear")
    files.write_adapter(Adapter({"a.q": update}), tmp_path / "p", "peft")
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    said = {"task_type": "CAUSAL_LM", "base_model_name_or_path": "a/b", "lora_dropout": 0.05}
    (tmp_path / "p" / "adapter_config.json").write_text(json.dumps({**config, **said}))
    files.convert(tmp_path / "p", tmp_path / "d.safetensors", "diffusers")
    files.convert(tmp_path / "d.safetensors", tmp_path / "back", "peft")
    back = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert said.items() <= back.items()
    told = json.dumps({f"unet.{key}": value for key, value in {**config, **said}.items()})
    state = {f"unet.a.q.lora_{n}.weight": t for n, t in zip("AB", (update.lora_A, update.lora_B))}
    save_file(state, tmp_path / "theirs.safetensors", {"lora_adapter_metadata": told})
    files.convert(tmp_path / "theirs.safetensors", tmp_path / "again", "peft")
    again = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert said.items() <= again.items()


@pytest.mark.parametrize("said", [{"alpha": "8"}, {"transformer.lora_alpha": "8"}])
def test_an_alpha_moves_from_the_header_to_the_formats_own_place(tmp_path, said):
    path = headed(tmp_path, "diffusers", said)
    files.convert(path, tmp_path / "d.safetensors", "diffusers", component="")
    assert not said.keys() & metadata(tmp_path / "d.safetensors").keys()
    (update,) = files.read_adapter(tmp_path / "d.safetensors").updates.values()
    assert update.scale == 4.0


PREFIXES = {
    "diffusers": ("transformer.q", "A", "B"),
    "kohya": ("lora_transformer_q", "down", "up"),
    "comfyui": ("q", "A", "B"),
    "peft": ("base_model.model.transformer.q", "A", "B"),
}


def headed(tmp_path, form, said, kernel=(), more=()):
    name, down, up = PREFIXES[form]
    state = {
        f"{name}.lora_{down}.weight": torch.randn(2, 6, *kernel),
        f"{name}.lora_{up}.weight": torch.randn(4, 2, *[1] * len(kernel)),
        **dict(more),
    }
    save_file(state, tmp_path / "a.safetensors", said)
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize("form", PREFIXES)
@pytest.mark.parametrize(("said", "scale"), [
    ({"alpha": "8", "rank": "2"}, 4.0), ({"lora_alpha": "3"}, 1.5),
    ({"transformer.lora_alpha": "8"}, 4.0), ({"ss_network_alpha": "1"}, 0.5),
    ({"ss_network_alpha": "0"}, 1.0),
])  # fmt: skip
def test_an_alpha_in_the_header_alone_is_the_scale(tmp_path, form, said, scale):
    (update,) = files.read_adapter(headed(tmp_path, form, said)).updates.values()
    assert update.scale == scale


@pytest.mark.parametrize("form", [form for form in PREFIXES if form not in ("comfyui", "peft")])
@pytest.mark.parametrize("said", [{"unet.lora_alpha": "8"}, {"ss_network_alpha": "Dynamic"}])
def test_an_alpha_of_no_layer_is_told(tmp_path, form, said):
    (text,) = (f"{key}={value}" for key, value in said.items())
    with pytest.warns(paramlora.ParamloraWarning, match=f"so the scale is 1: {text}. Give alpha"):
        (update,) = files.read_adapter(headed(tmp_path, form, said)).updates.values()
    assert update.scale == 1.0
    given = files.Options(alpha=6.0)
    (update,) = files.read_adapter(tmp_path / "a.safetensors", None, given).updates.values()
    assert update.scale == 3.0


def test_convolutions_have_the_alpha_that_kohya_gave_them(tmp_path):
    said = {
        "ss_network_alpha": "8",
        "ss_network_args": json.dumps({"conv_dim": 2, "conv_alpha": "3"}),
    }
    for kernel, scale in (((3, 3), 1.5), ((1, 1), 4.0), ((), 4.0)):
        path = headed(tmp_path, "kohya", said, kernel)
        (update,) = files.read_adapter(path).updates.values()
        assert update.scale == scale


def test_a_components_alpha_comes_before_that_of_all(tmp_path):
    said = {"alpha": "2", "transformer.alpha": "6"}
    (update,) = files.read_adapter(headed(tmp_path, "diffusers", said)).updates.values()
    assert update.scale == 3.0


def test_alphas_of_tensors_come_before_that_of_the_header(tmp_path):
    more = {"lora_transformer_q.alpha": torch.tensor(1.0)}
    path = headed(tmp_path, "kohya", {"ss_network_alpha": "8"}, more=more)
    (update,) = files.read_adapter(path).updates.values()
    assert update.scale == 0.5


def test_an_alpha_of_a_header_that_is_no_number_is_told(tmp_path):
    state = {"q.lora_A.weight": torch.randn(2, 6), "q.lora_B.weight": torch.randn(4, 2)}
    save_file(state, tmp_path / "a.safetensors", {"lora_alpha": "eight"})
    with pytest.raises(paramlora.FileError, match="lora_alpha: 'eight' is not a number"):
        files.read_adapter(tmp_path / "a.safetensors")
