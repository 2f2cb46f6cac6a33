"""Layers that another tool's file tells apart by their kind or name: tied, and beside experts."""

import copy
import json
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import paramlora
from paramlora import FileError, formats
from paramlora.files import adapters as interchange

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
IDS = torch.arange(10)[None]
SMALL = {"vocab_size": 32, "max_position_embeddings": 32}


def gpt2():
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, vocab_size=32)
    return transformers.GPT2LMHeadModel(config)


def llama():
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True, **SMALL,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


SPARSE = {
    "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2, **SMALL,
}  # fmt: skip


def deepseek():
    config = transformers.DeepseekV3Config(
        n_shared_experts=1, n_routed_experts=4, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4,
        v_head_dim=8, qk_nope_head_dim=8, n_group=1, topk_group=1, first_k_dense_replace=1,
        **SPARSE,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


def glm():
    config = transformers.Glm4MoeConfig(
        n_shared_experts=1, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1,
        head_dim=8, **SPARSE,
    )  # fmt: skip
    return transformers.Glm4MoeForCausalLM(config)


def qwen():
    config = transformers.Qwen2MoeConfig(
        shared_expert_intermediate_size=12, num_experts=4, decoder_sparse_step=1,
        mlp_only_layers=[0], **SPARSE,
    )  # fmt: skip
    return transformers.Qwen2MoeForCausalLM(config)


def mixtral():
    sizes = {k: v for k, v in SPARSE.items() if k != "moe_intermediate_size"}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(num_local_experts=4, **sizes))


def adapted(make, config):
    """(plain model, the same with a random adapter)."""
    torch.manual_seed(0)
    base = make().eval()
    model = copy.deepcopy(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one holder of two
        paramlora.attach(model, config)
    for parameter in paramlora.trainable_parameters(model):
        torch.nn.init.normal_(parameter.data, std=0.3)
    return base, model


def dense(base, model):
    """`base` with W + s·B·A written out in float64, by the shapes of the factors."""
    out = copy.deepcopy(base)
    weights = dict(out.named_parameters(remove_duplicate=False))
    done = set()
    for path, update in paramlora.adapter_of(model).updates.items():
        weight = weights.get(f"{path}.weight", weights.get(path))
        if id(weight) not in done:
            done.add(id(weight))
            delta = update.scale * update.lora_B.double() @ update.lora_A.double()
            delta = delta.mT if update.layout == "transposed" else delta
            weight.data += delta.to(weight.dtype)
    return out


def in_peft(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its advice on ties and patterns
        return peft.PeftModel.from_pretrained(
            copy.deepcopy(base), folder, autocast_adapter_dtype=False
        ).eval()


def untold(path):
    """The file as the first release wrote it, without the kinds of the layers."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    about = json.loads(metadata["paramlora"])
    del about["holders"]
    save_file(load_file(path), path, {**metadata, "paramlora": json.dumps(about)})


TIES = {
    "embedding first": (gpt2, {"re:.*(wte|lm_head)": {"r": 2}}),
    "with layers": (gpt2, {"re:.*(wte|lm_head|c_attn)": {"r": 3, "scale": 0.7}}),
    "llama": (llama, {"re:.*(embed_tokens|lm_head|q_proj)": {"r": 2}}),
}


@pytest.mark.parametrize("known", ["nothing", "model", "checkpoint"])
@pytest.mark.parametrize("case", TIES)
def test_tied_and_adapted_layers_act_in_peft(case, known, tmp_path):
    base, model = adapted(*TIES[case])
    want = dense(base, model)(IDS).logits
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-5, atol=1e-5)
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    shapes = {name: p.shape for name, p in base.named_parameters(remove_duplicate=False)}
    given = {"nothing": None, "model": formats.base_of(base)}
    if known == "checkpoint":
        given["checkpoint"] = formats.base_of_shapes(shapes)
    interchange.convert(tmp_path / "a.safetensors", tmp_path / "peft", "peft", given[known])
    theirs = in_peft(base, tmp_path / "peft")
    torch.testing.assert_close(theirs(input_ids=IDS).logits, want, rtol=1e-5, atol=1e-5)
    assert (want - base(IDS).logits).abs().max() > 0.1
    again = paramlora.load_adapter(copy.deepcopy(base), tmp_path / "a.safetensors")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("to", sorted(formats.WRITERS))
def test_an_older_file_of_tied_layers_asks_for_the_model(to, checkpoint, tmp_path):
    base, model = adapted(*TIES["embedding first"])
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    untold(tmp_path / "a.safetensors")
    shapes = {name: p.shape for name, p in base.named_parameters(remove_duplicate=False)}
    known = formats.base_of_shapes(shapes) if checkpoint else None  # which tells no kinds
    told = r"transformer.wte, lm_head: one tied tensor.*Give the model \(--model\)"
    with pytest.raises(FileError, match=told):
        interchange.convert(tmp_path / "a.safetensors", tmp_path / "out", to, known)
    assert not (tmp_path / "out").exists()
    interchange.convert(tmp_path / "a.safetensors", tmp_path / "p", "peft", formats.base_of(base))
    want = dense(base, model)(IDS).logits
    torch.testing.assert_close(in_peft(base, tmp_path / "p")(input_ids=IDS).logits, want)


def test_damaged_holders_are_refused(tmp_path):
    _, model = adapted(*TIES["embedding first"])
    path = tmp_path / "a.safetensors"
    paramlora.save_adapter(model, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    good = {"kind": "linear", "layout": "matrix", "groups": 1}
    for bad in ({"layout": "round"}, {"groups": 0}, {"groups": True}, {"kind": 3}, None):
        about = json.loads(metadata["paramlora"])
        about["holders"]["lm_head"] = None if bad is None else good | bad
        broken = tmp_path / "b.safetensors"
        save_file(load_file(path), broken, {"paramlora": json.dumps(about)})
        with pytest.raises(FileError, match='the "holders" in its metadata are damaged'):
            interchange.read_adapter(broken)


EXPERTS = {
    "shared and dense": {"gate_proj": {"r": 2}, "q_proj": {"r": 3}},
    "ranks and scales": {
        "re:.*(shared_experts?|mlp).down_proj": {"r": 3, "scale": 0.5},
        "re:.*shared_experts?.up_proj": {"r": 2},
        "o_proj": {"r": 4, "alpha": 3},
    },
    "fused too": {
        "re:.*shared_expert.*_proj": {"r": 2},
        "re:.*mlp.experts.(gate_up|down)_proj": {"r": 2, "scale": 0.6},
    },
    "the router": {"mlp.gate": {"r": 2}, "re:.*shared_experts?.up_proj": {"r": 1}},
}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("case", EXPERTS)
@pytest.mark.parametrize("make", [deepseek, glm, qwen])
def test_layers_beside_fused_experts_act_in_peft(make, case, known, tmp_path):
    config = dict(EXPERTS[case])
    if make is deepseek:
        config = {"q_b_proj" if name == "q_proj" else name: v for name, v in config.items()}
    base, model = adapted(make, config)
    want = dense(base, model)(IDS).logits
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-5, atol=1e-5)
    assert (want - base(IDS).logits).abs().max() > 1e-3
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    known_base = formats.base_of(base) if known or case == "fused too" else None
    interchange.convert(tmp_path / "a.safetensors", tmp_path / "peft", "peft", known_base)
    theirs = in_peft(base, tmp_path / "peft")
    torch.testing.assert_close(theirs(input_ids=IDS).logits, want, rtol=1e-5, atol=1e-5)
    again = paramlora.load_adapter(copy.deepcopy(base), tmp_path / "peft")
    torch.testing.assert_close(again(IDS).logits, want, rtol=1e-5, atol=1e-5)
    if case != "fused too":
        interchange.convert(tmp_path / "peft", tmp_path / "b.safetensors", "native")
        back = paramlora.load_adapter(copy.deepcopy(base), tmp_path / "b.safetensors")
        torch.testing.assert_close(back(IDS).logits, want, rtol=1e-5, atol=1e-5)


def test_the_experts_of_mixtral_act_in_peft(tmp_path):
    names = ("q_proj", "re:.*gate_up_proj", "mlp.gate")
    base, model = adapted(mixtral, dict.fromkeys(names, {"r": 2}))
    want = dense(base, model)(IDS).logits
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    interchange.convert(tmp_path / "a.safetensors", tmp_path / "p", "peft", formats.base_of(base))
    torch.testing.assert_close(in_peft(base, tmp_path / "p")(input_ids=IDS).logits, want)


def test_without_experts_layers_of_these_names_stay_modules():
    _, model = adapted(llama, {"re:.*(gate|up|down)_proj": {"r": 2}})
    content = formats.write(paramlora.adapter_of(model), "peft", formats.base_of(llama()))
    assert "target_parameters" not in content.config
    assert len(content.config["target_modules"]) == 3
