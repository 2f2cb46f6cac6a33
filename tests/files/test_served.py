"""An adapter as the loaders of vLLM and SGLang take it, by what their sources ask for."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import paramlora
from paramlora.cli import main
from paramlora.formats.vllm import MOST_RANK


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 4))
        self.down_proj = nn.Parameter(torch.randn(3, 4, 4))


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 4)
        self.q_proj, self.o_proj = nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False)
        self.experts = Experts()
        self.conv = nn.Conv1d(4, 4, 3)
        self.lm_head = nn.Linear(4, 11)


def attached(config, dtype=torch.float32):
    torch.manual_seed(0)
    model = paramlora.attach(Language().to(dtype), config)
    for p in paramlora.trainable_parameters(model):
        p.data.uniform_(-1, 1)
    return model


def loaded(tensors, config):
    """As vLLM's from_lora_tensors and optimize, and SGLang's load_lora_weight_tensor: one scaling
    for all, no patterns; every factor of one rank."""
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    assert not config["use_dora"] and not config["modules_to_save"] and config["bias"] == "none"
    assert isinstance(config["target_modules"], list) and config["r"] <= MOST_RANK
    scaling, found = config["lora_alpha"] / config["r"], {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        assert parts[:2] == ["base_model", "model"]
        if parts[-1].startswith("lora_embedding_"):
            name, side = ".".join(parts[2:-1]), parts[-1][-1]
        else:
            assert parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B")
            name, side = ".".join(parts[2:-2]), parts[-2][-1]
        found.setdefault(name, {})[side] = tensor
    for name, sides in found.items():
        rank = sides["A"].shape[0] // (3 if "experts" in name else 1)
        assert rank == config["r"] and sides["B"].shape[1] == sides["A"].shape[0]
        sides["B"] = sides["B"] * scaling
    return found


CONFIG = {
    "embed_tokens": {"r": 1, "scale": 0.5},
    "q_proj": {"r": 2, "scale": 2.0},
    "o_proj": {"r": 3},
    "experts.gate_up_proj": {"r": 2, "scale": 3.0},
    "experts.down_proj": {"r": 1},
}


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_what_is_handed_over_computes_the_same(server):
    model = attached(CONFIG)
    found = loaded(*paramlora.tensors_for(model, server))
    merged = paramlora.merge(attached(CONFIG))
    torch.manual_seed(0)
    base = Language()
    for name in ("q_proj", "o_proj"):
        delta = found[name]["B"] @ found[name]["A"]
        own = getattr(merged, name).weight - getattr(base, name).weight
        torch.testing.assert_close(delta, own, rtol=1e-4, atol=1e-5)
    delta = (found["embed_tokens"]["B"] @ found["embed_tokens"]["A"]).t()
    own = merged.embed_tokens.weight - base.embed_tokens.weight
    torch.testing.assert_close(delta, own, rtol=1e-4, atol=1e-5)
    for name, parameter in (("experts.base_layer", "gate_up_proj"), ("experts", "down_proj")):
        # as model_manager's _stack_moe_lora_weights splits them
        a, b = found[name]["A"], found[name]["B"]
        a = a.reshape(3, -1, a.shape[-1])
        b = b.reshape(b.shape[0], -1, 3).permute(2, 0, 1)
        own = getattr(merged.experts, parameter) - getattr(base.experts, parameter)
        torch.testing.assert_close(b @ a, own, rtol=1e-4, atol=1e-5)


def test_one_scale_stays_an_alpha_and_factors_have_the_bases_type():
    model = attached({"q_proj": {"r": 2, "alpha": 6}, "o_proj": {"r": 2, "alpha": 6}})
    tensors, config = paramlora.tensors_for(model, "vllm")
    assert (config["r"], config["lora_alpha"]) == (2, 6)
    own = model.q_proj.parametrizations.weight[0].lora_B
    key = "base_model.model.q_proj.lora_B.weight"
    assert torch.equal(tensors[key], own) and tensors[key].data_ptr() != own.data_ptr()
    narrow = attached({"q_proj": {"r": 2}}, torch.bfloat16)
    tensors, _ = paramlora.tensors_for(narrow, "sglang")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    tensors, _ = paramlora.tensors_for(narrow, "vllm", dtype=torch.float32)
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_pefts_form_keeps_its_patterns_and_types(tmp_path):
    model = attached(CONFIG, torch.bfloat16)
    tensors, config = paramlora.tensors_for(model, "peft")
    assert config["rank_pattern"] and {t.dtype for t in tensors.values()} == {torch.float32}
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    other = paramlora.load_adapter(Language().to(torch.bfloat16), tmp_path, "default")
    for key, tensor in paramlora.adapter_state_dict(model).items():
        torch.testing.assert_close(paramlora.adapter_state_dict(other)[key], tensor)


def test_an_adapter_of_its_own_name_and_no_such_server():
    model = attached({"q_proj": {"r": 2}})
    with pytest.raises(paramlora.AdapterError, match='no server "tgi" is known. Known: peft, sgl'):
        paramlora.tensors_for(model, "tgi")
    with pytest.raises(paramlora.AdapterError, match='no adapter "x" is attached'):
        paramlora.tensors_for(model, "vllm", "x")


LOST = {
    "lm_head.bias: trained whole, which vLLM does not load": {"re:lm_head.bias": {"whole": True}},
    "lm_head: a head, which vLLM adapts only in models that say so": {"lm_head": {"r": 2}},
    "conv: neither a linear layer, an embedding nor experts": {"conv": {"r": 2}},
    "experts.down_proj: of experts vLLM loads gate_up_proj and down_proj together": {
        "experts.down_proj": {"r": 1}
    },
}


@pytest.mark.parametrize("text", LOST)
def test_what_no_server_loads_is_told_before_training(text):
    torch.manual_seed(0)
    model = paramlora.attach(Language(), {"q_proj": {"r": 2}, **LOST[text]})
    with pytest.raises(paramlora.AdapterError) as told:
        paramlora.tensors_for(model, "vllm")
    assert str(told.value).startswith(f'adapter "default" for vLLM: {text}')


def test_a_rank_above_the_limit_is_told():
    model = nn.Sequential(nn.Linear(600, 600))
    paramlora.attach(model, {"0": {"r": 513}})
    with pytest.raises(paramlora.AdapterError, match="rank 513 is above the 512 that vLLM"):
        paramlora.tensors_for(model, "vllm")
    assert paramlora.tensors_for(model, "sglang").config["r"] == 513


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(one) for one in arguments])
    return stop.value.code


def test_the_command_line_says_so_of_a_file(tmp_path, capsys):
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    paramlora.save_adapter(attached({"q_proj": {"r": 2}}), good)
    paramlora.save_adapter(
        attached({"q_proj": {"r": 2}, "lm_head": {"r": 2}, "re:lm_head.bias": {"whole": True}}), bad
    )
    assert run("inspect", good, "--for", "vllm") == 0
    assert capsys.readouterr().out.endswith("vLLM: loads all of it\n")
    assert run("inspect", bad, "--for", "sglang") == 0
    assert "SGLang: lm_head.bias: trained whole, which" in capsys.readouterr().out
    assert run("inspect", bad, "--for", "vllm", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["server"] == "vllm" and len(told["unserved"]) == 2
    assert run("inspect", bad, "--for", "tgi") != 0
    assert 'no server "tgi" is known. Known: sglang, vllm.' in capsys.readouterr().err


def test_magnitudes_are_told(tmp_path, capsys):
    from safetensors.torch import save_file

    stem = "base_model.model.q_proj."
    save_file(
        {
            f"{stem}lora_A.weight": torch.ones(2, 4),
            f"{stem}lora_B.weight": torch.ones(6, 2),
            f"{stem}lora_magnitude_vector": torch.ones(6),
        },
        tmp_path / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    assert run("inspect", tmp_path, "--for", "vllm") == 0
    assert "vLLM: q_proj: of kind dora, and vLLM loads low ranks alone" in capsys.readouterr().out


def test_padded_ranks_change_no_product():
    model = attached({"q_proj": {"r": 2}, "o_proj": {"r": 3}})
    found = loaded(*paramlora.tensors_for(model, "vllm"))
    x = torch.randn(5, 4)
    y = F.linear(F.linear(x, found["q_proj"]["A"]), found["q_proj"]["B"])
    torch.testing.assert_close(F.linear(x, model.q_proj.parametrizations.weight.original) + y,
                               model.q_proj(x))  # fmt: skip
