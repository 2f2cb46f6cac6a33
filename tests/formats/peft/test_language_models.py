"""A sweep of transformers' own language models in PEFT's files, onto them and back into peft."""

import copy
import warnings

import pytest
import torch

import paramlora
from paramlora import formats
from paramlora.files import adapters as interchange

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
IDS = torch.arange(12).reshape(2, 6)
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def gpt2():
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 16}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)
    return transformers.GPT2LMHeadModel(config)


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def mixtral():
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
CASES = {
    "all linear": (gpt2, {"target_modules": "all-linear"}),
    "embedding": (gpt2, {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
    "some layers": (
        llama,
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "layers_to_transform": [1]},
    ),
    "pattern": (llama, {"target_modules": r".*\.(q|o)_proj", "alpha_pattern": {"q_proj": 3}}),
    "experts": (mixtral, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "head": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("name", CASES)
def test_language_models(tmp_path, name):
    make, how = CASES[name]
    torch.manual_seed(0)
    single = make is mixtral  # whose grouped products know no double precision
    base = make().to(torch.float32 if single else torch.float64).eval()
    near = {"rtol": 1e-5 if single else 1e-6, "atol": 1e-6 if single else 1e-7}
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **how)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's advice on ties and patterns
        theirs = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        theirs.eval().save_pretrained(tmp_path / "theirs")
        want = theirs(input_ids=IDS).logits
        assert (want - base(input_ids=IDS).logits).abs().max() > 0.01
        # an adapter on the table of a tied embedding alone, as peft trains it
        warnings.filterwarnings("ignore", ".*one tensor is held as transformer.wte.weight")
        ours = paramlora.load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(ours(input_ids=IDS).logits, want, **near)
    if name == "head":
        return  # a whole tensor, which is not written for peft
    interchange.convert(tmp_path / "theirs", tmp_path / "ours", "peft", formats.base_of(base))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = peft.PeftModel.from_pretrained(
            copy.deepcopy(base), tmp_path / "ours", autocast_adapter_dtype=False
        )
        torch.testing.assert_close(back.eval()(input_ids=IDS).logits, want, **near)


WHOLE = {
    "tied": (gpt2, ["re:.*(wte|lm_head)", "c_attn", "c_proj"]),
    "embeddings": (gpt2, ["wte", "wpe"]),
    "untied": (llama, ["embed_tokens", "lm_head", "q_proj"]),
}


@pytest.mark.filterwarnings("ignore:.*one tensor is held as")
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("case", WHOLE)
def test_changes_of_whole_tensors_act_in_peft_as_two_factors(case, known, tmp_path):
    make, names = WHOLE[case]
    torch.manual_seed(0)
    base = make().eval()
    model = paramlora.attach(copy.deepcopy(base), {name: {"kind": "difference"} for name in names})
    for parameter in paramlora.trainable_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    want = model(IDS).logits
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    shapes = formats.base_of(base) if known else None
    interchange.convert(tmp_path / "a.safetensors", tmp_path / "p", "peft", shapes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "p").eval()
    torch.testing.assert_close(theirs(IDS).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr"])
def test_a_tied_tensor_that_peft_cannot_hold_says_so(kind, tmp_path):
    base = gpt2()
    entry = {"re:.*(wte|lm_head)": {"r": 1, "kind": kind}}
    paramlora.save_adapter(paramlora.attach(copy.deepcopy(base), entry), tmp_path / "a.safetensors")
    told = "lm_head: one of several layers that hold a tensor.*Keep the native format"
    with pytest.raises(paramlora.FileError, match=told):
        interchange.convert(
            tmp_path / "a.safetensors", tmp_path / "p", "peft", formats.base_of(base)
        )
    assert not (tmp_path / "p").exists()
