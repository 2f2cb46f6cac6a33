"""What a file says beside its tensors goes with it, where the new one has a place for it."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

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
