"""Small language models, tied ones and some with experts, adapted here and loaded in peft."""

import copy
import warnings

import pytest
import torch

import paramlora

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


def as_peft(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its advice on ties and patterns
        return peft.PeftModel.from_pretrained(
            copy.deepcopy(base), folder, autocast_adapter_dtype=False
        ).eval()


TIES = {
    "embedding first": (gpt2, {"re:.*(wte|lm_head)": {"r": 2}}),
    "with layers": (gpt2, {"re:.*(wte|lm_head|c_attn)": {"r": 3, "scale": 0.7}}),
    "llama": (llama, {"re:.*(embed_tokens|lm_head|q_proj)": {"r": 2}}),
}
