"""`save_pretrained` of attached models, and what else transformers does with a model's tensors:
tying, resizing, replacing."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations

pytest.importorskip("peft")


import paramlora
from paramlora.model.attach import updates

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch")

SMALL = dict(
    vocab_size=20,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)


def gpt2(**options):
    size = dict(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=8)
    config = transformers.GPT2Config(bos_token_id=0, eos_token_id=0, **size, **options)
    return transformers.GPT2LMHeadModel(config)


def llama(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **options))


def gemma():
    return transformers.GemmaForCausalLM(
        transformers.GemmaConfig(**SMALL, num_key_value_heads=2, head_dim=8)
    )


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL))


def mixtral():
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2)
    return transformers.MixtralForCausalLM(config)


def t5():
    size = dict(vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    config = transformers.T5Config(**size, pad_token_id=0, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config)


def vit():
    size = {key: value for key, value in SMALL.items() if "token" not in key and "vocab" not in key}
    config = transformers.ViTConfig(**size, image_size=8, patch_size=4)
    return transformers.ViTForImageClassification(config)


def wav2vec():
    size = {key: value for key, value in SMALL.items()}
    config = transformers.Wav2Vec2Config(
        **size,
        conv_dim=(8, 8),
        conv_kernel=(4, 4),
        conv_stride=(2, 2),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        num_feat_extract_layers=2,
    )
    return transformers.Wav2Vec2Model(config)


def outputs(model):
    model.eval()
    ids = torch.arange(6)[None] + 2
    with torch.no_grad():
        if isinstance(model, transformers.T5ForConditionalGeneration):
            return model(input_ids=ids, decoder_input_ids=ids).logits
        if isinstance(model, transformers.ViTForImageClassification):
            return model(torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)).logits
        if isinstance(model, transformers.Wav2Vec2Model):
            return model(torch.linspace(-1, 1, 200).sin()[None]).last_hidden_state
        return model(input_ids=ids).logits


def fill(model):
    """Values as after a training that went far."""
    generator = torch.Generator().manual_seed(3)
    for _, _, update in updates(model):
        for name, value in update.named_parameters():
            if name in ("lora_B", "lora_whole", "lora_magnitude", "lora_rows") or "w2" in name:
                value.data += 0.3 * torch.randn(value.shape, generator=generator).to(value.dtype)
    return model


def attached(make, config, adapter="default", **options):
    torch.manual_seed(0)
    return fill(paramlora.attach(make(**options), config, adapter))


def saved(model, folder, **options):
    """The warnings of paramlora, which name the calls, and the names of the files."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(folder, **options)
    ours = [str(w.message) for w in caught if w.category is paramlora.ParamloraWarning]
    return ours, {path.name for path in folder.iterdir()}


CASES = {
    "gpt2": (gpt2, {"c_attn": {"r": 2, "scale": 0.3}, "mlp.c_proj": {"r": 3, "alpha": 5}}),
    "gpt2 tied": (gpt2, {"re:.*(wte|lm_head)": {"r": 2}, "c_attn": {"r": 2}}),
    "gpt2 embedding": (gpt2, {"wte": {"r": 2}, "wpe": {"r": 2}}),
    "gpt2 head": (gpt2, {"lm_head": {"r": 2}}),
    "llama": (llama, {"q_proj": {"r": 2}, "v_proj": {"r": 2, "hard": 0}, "lm_head": {"r": 2}}),
    "llama pissa": (llama, {"q_proj": {"r": 2, "init": "pissa"}}),
    "llama scale": (llama, {"q_proj": {"r": 2, "trainable_scale": 1, "scale": 1.7}}),
    "gemma tied": (gemma, {"re:.*(embed_tokens|lm_head)": {"r": 2}, "q_proj": {"r": 2}}),
    "bert tied": (bert, {"re:.*(word_embeddings|decoder)": {"r": 2}, "query": {"r": 2}}),
    "t5 tied": (t5, {"re:.*(shared|embed_tokens|lm_head)": {"r": 2}, "q": {"r": 2}}),
    "mixtral": (mixtral, {"q_proj": {"r": 2}, "gate": {"r": 2}}),
    "mixtral experts": (
        mixtral,
        {"q_proj": {"r": 2}, "re:.*experts.(gate_up|down)_proj": {"r": 2}},
    ),
    "vit": (vit, {"re:.*patch_embeddings.projection": {"r": 2}, "q_proj": {"r": 2}}),
    "llama dora": (llama, {name: {"r": 2, "kind": "dora"} for name in ("q_proj", "lm_head")}),
    "gpt2 dora": (gpt2, {name: {"r": 2, "kind": "dora"} for name in ("c_attn", "c_proj", "wpe")}),
    "vit dora": (vit, {"re:.*patch_embeddings.projection|.*q_proj": {"r": 2, "kind": "dora"}}),
    "llama loha": (llama, {"q_proj": {"r": 2, "kind": "loha"}}),
    "llama lokr": (llama, {"q_proj": {"r": 1, "kind": "lokr"}, "v_proj": {"r": 1, "kind": "lokr"}}),
    "llama rows": (llama, {"embed_tokens": {"rows": [2, 5]}}),
    "gpt2 rows": (gpt2, {"wte": {"rows": [2, 5]}, "c_attn": {"r": 2}}),
    "backbone": (gpt2, {"trainable_model": 1, "c_attn": {"r": 2}}),
}


@pytest.mark.filterwarnings("ignore::paramlora.ParamloraWarning")
@pytest.mark.parametrize("shards", ({}, {"max_shard_size": "4KB"}))
@pytest.mark.parametrize("case", CASES)
def test_it_loads_to_the_same_outputs(case, shards, tmp_path):
    model = attached(*CASES[case])
    want, before = outputs(model), copy.deepcopy(model.state_dict())
    plain = outputs(paramlora.detach(copy.deepcopy(model)))
    assert not torch.allclose(want, plain, rtol=1e-4, atol=1e-4)
    warned, names = saved(model, tmp_path, **shards)
    assert warned == [] and {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert ("model.safetensors.index.json" in names) == bool(shards)
    state = model.state_dict()
    assert state.keys() == before.keys() and all(
        torch.equal(before[k], v) for k, v in state.items()
    )
    found = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(outputs(found), want, rtol=1e-5, atol=1e-5)
    # the base, bit for bit, and our adapter onto it
    found = plain_of(type(model), tmp_path)
    torch.testing.assert_close(outputs(found), plain, rtol=0, atol=0)
    paramlora.load_adapter(found, tmp_path)
    torch.testing.assert_close(outputs(found), want, rtol=1e-5, atol=1e-5)
    assert (
        type(model).__name__ in json.loads((tmp_path / "config.json").read_text())["architectures"]
    )


def plain_of(kind, folder):
    """The base in a folder, as `from_pretrained` gives it where peft is not installed."""
    from transformers.utils import import_utils

    with pytest.MonkeyPatch.context() as patch:
        for module in ("integrations.peft", "modeling_utils"):
            owner = __import__(f"transformers.{module}", fromlist=["x"])
            if hasattr(owner, "is_peft_available"):
                patch.setattr(owner, "is_peft_available", lambda: False)
        assert import_utils.is_peft_available()
        return kind.from_pretrained(folder)


def test_a_module_trained_whole_is_loaded_by_from_pretrained(tmp_path):
    model = attached(gpt2, {"c_attn": {"r": 2}, "ln_f": {"whole": True}})
    want = outputs(model)
    warned, names = saved(model, tmp_path)
    assert warned == [] and "adapter_config.json" in names
    found = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    torch.testing.assert_close(outputs(found), want, rtol=1e-5, atol=1e-6)


def test_what_peft_cannot_hold_stands_beside_as_native_files(tmp_path):
    model = attached(gpt2, {"c_attn": {"r": 2}, "ln_f.weight": {"whole": True}})
    want = outputs(model)
    (warned,), names = saved(model, tmp_path)
    call = f'paramlora.load_adapter(model, "{tmp_path / "adapter.safetensors"}")'
    assert warned == f"{tmp_path}: from_pretrained loads the base alone; then call {call}."
    assert not any(name.startswith("adapter_") for name in names)
    found = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert outputs(found).ne(want).any()
    exec(call, {"paramlora": paramlora, "model": found})
    torch.testing.assert_close(outputs(found), want, rtol=0, atol=0)


def test_a_model_with_another_method_of_that_name_gets_the_native_file(tmp_path):
    """transformers gives up in the middle of `from_pretrained` where PEFT's files are beside it."""
    model = attached(wav2vec, {"q_proj": {"r": 2}})
    (warned,), names = saved(model, tmp_path)
    assert "adapter_config.json" not in names and "adapter.safetensors" in warned
    found = transformers.Wav2Vec2Model.from_pretrained(tmp_path)
    paramlora.load_adapter(found, tmp_path / "adapter.safetensors")
    torch.testing.assert_close(outputs(found), outputs(model), rtol=0, atol=0)


@pytest.mark.parametrize("style", (1, -2))
def test_several_adapters_stand_beside_each_in_its_file(style, tmp_path):
    model = attached(gpt2, {"c_attn": {"r": 2}})
    fill(paramlora.attach(model, {"c_attn": {"r": 3}, "wpe": {"r": 2}}, "style/2"))
    paramlora.set_adapters(model, {"default": 1, "style/2": style})
    want = outputs(model)
    (warned,), names = saved(model, tmp_path)
    assert len(names & {"adapter.safetensors", "adapter-0.safetensors"}) == 2
    found = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    calls = warned.partition("then call ")[2].removesuffix(".").split(", paramlora.")
    for call in calls:
        exec(
            f"paramlora.{call.removeprefix('paramlora.')}", {"paramlora": paramlora, "model": found}
        )
    torch.testing.assert_close(outputs(found), want, rtol=1e-6, atol=1e-6)


def test_one_adapter_weaker_than_trained_names_its_strength(tmp_path):
    model = attached(gpt2, {"c_attn": {"r": 2}}, "style")
    paramlora.set_adapters(model, {"style": 0.5})
    (warned,), names = saved(model, tmp_path)
    assert 'adapter-style.safetensors"), paramlora.set_adapters(model, {"style": 0.5}).' in warned


def test_without_peft_the_warning_names_the_call(tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "peft" else find(n, *a)
    )
    model = attached(gpt2, {"c_attn": {"r": 2}})
    (warned,), _ = saved(model, tmp_path)
    assert f'load_adapter(model, "{tmp_path / "adapter_model.safetensors"}")' in warned
    found = paramlora.load_adapter(plain_of(type(model), tmp_path), tmp_path)
    torch.testing.assert_close(outputs(found), outputs(model), rtol=1e-5, atol=1e-5)


def test_an_earlier_adapter_of_ours_is_replaced_and_anothers_is_not(tmp_path):
    model = attached(gpt2, {"c_attn": {"r": 2}})
    saved(model, tmp_path)
    fill(paramlora.attach(model, {"c_attn": {"r": 3}}, "second"))
    _, names = saved(model, tmp_path)
    assert "adapter_config.json" not in names and "adapter-second.safetensors" in names
    paramlora.detach(model, "second")
    _, names = saved(model, tmp_path)
    assert "adapter_config.json" in names and "adapter-second.safetensors" not in names
    torch.testing.assert_close(
        outputs(type(model).from_pretrained(tmp_path)), outputs(model), rtol=1e-5, atol=1e-5
    )
    other = tmp_path / "other"
    other.mkdir()
    save_file({"x": torch.ones(1)}, other / "adapter_model.safetensors")
    with pytest.raises(paramlora.FileError, match="not saved with this model, and would be loaded"):
        model.save_pretrained(other)
    assert [path.name for path in other.iterdir()] == ["adapter_model.safetensors"]


@pytest.mark.parametrize("name", ("push_to_hub", "distributed_checkpoint"))
def test_what_would_leave_the_adapter_out_is_refused(name, tmp_path):
    model = attached(gpt2, {"c_attn": {"r": 2}})
    with pytest.raises(paramlora.AdapterError, match=rf"save_pretrained\({name}=True\) does not"):
        model.save_pretrained(tmp_path / "new", **{name: True})
    assert not (tmp_path / "new").exists()


def test_pushing_a_model_uploads_base_and_adapter(monkeypatch):
    seen = {}
    model = attached(gpt2, {"c_attn": {"r": 2}})
    kind = transformers.utils.hub.PushToHubMixin
    api = type("Api", (), {"create_repo": lambda *a, **k: type("Repo", (), {"repo_id": "me/it"})})

    def upload(self, working_dir, *args, **kwargs):
        seen.update({path.name: path.stat().st_size for path in Path(working_dir).iterdir()})

    card = type("Card", (), {"save": lambda self, path: None})()
    monkeypatch.setattr(kind, "_upload_modified_files", upload)
    monkeypatch.setattr(transformers.utils.hub, "hf_api", api)
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *a, **k: card)
    model.push_to_hub("me/it")
    assert {"adapter_config.json", "adapter_model.safetensors", "model.safetensors"} <= seen.keys()


def test_a_state_dict_that_is_given_is_written_under_the_bases_names(tmp_path):
    model = attached(gpt2, {"c_attn": {"r": 2}, "re:.*(wte|lm_head)": {"r": 2}})
    given = {key: value.clone() + 1 for key, value in model.state_dict().items()}
    saved(model, tmp_path, state_dict=given, is_main_process=True)
    state = load_file(tmp_path / "model.safetensors")
    bare = paramlora.detach(copy.deepcopy(model)).state_dict()
    assert state.keys() <= bare.keys()
    assert all(torch.equal(value, bare[key] + 1) for key, value in state.items())


def test_a_state_dict_that_is_given_by_position(tmp_path):
    model = attached(gpt2, {"c_attn": {"r": 2}})
    model.save_pretrained(tmp_path, True, model.state_dict())
    torch.testing.assert_close(
        outputs(type(model).from_pretrained(tmp_path)), outputs(model), rtol=1e-5, atol=1e-5
    )


def test_beside_an_adapter_of_pefts_it_is_refused(tmp_path):
    from peft import LoraConfig

    model = gpt2()
    model.add_adapter(LoraConfig(target_modules=["c_proj"], r=2, fan_in_fan_out=True))
    fill(paramlora.attach(model, {"c_attn": {"r": 2}}))
    with pytest.raises(paramlora.AdapterError, match="holds an adapter of peft's beside ours"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    paramlora.detach(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_a_tensor_of_the_model_itself(tmp_path):
    size = {key: value for key, value in SMALL.items() if "layers" in key or "size" in key}
    vision = transformers.CLIPVisionConfig(
        **{k: v for k, v in size.items() if k != "vocab_size"},
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    text = transformers.CLIPTextConfig(
        **size, num_attention_heads=2, bos_token_id=0, eos_token_id=1
    )
    config = transformers.CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config)
    before = float(model.logit_scale)
    paramlora.attach(model, {"logit_scale": {"whole": True}, "q_proj": {"r": 2}})
    fill(model)
    for one in (model, copy.deepcopy(model)):
        (warned,), _ = saved(one, tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["architectures"] == ["CLIPModel"]
        found = transformers.CLIPModel.from_pretrained(tmp_path)
        assert float(found.logit_scale) == before
        paramlora.load_adapter(found, tmp_path / "adapter.safetensors")
        assert float(found.logit_scale) == float(model.logit_scale) != before


RESIZED = ("gpt2 tied", "gpt2 head", "llama", "gemma tied", "bert tied", "t5 tied", "mixtral")
APART = {
    f"re:{name}": {"r": r} for r, name in enumerate(("shared", ".*embed_tokens", "lm_head"), 1)
}


@pytest.mark.filterwarnings("ignore::paramlora.ParamloraWarning")
@pytest.mark.parametrize("case", RESIZED)
def test_a_larger_vocabulary_leaves_old_tokens_alone_and_saves(case, tmp_path):
    model = attached(*CASES[case])
    want = outputs(model)
    model.resize_token_embeddings(23)
    assert model.config.vocab_size == 23
    got = outputs(model)
    assert got.shape[-1] == 23
    torch.testing.assert_close(got[..., :20], want, rtol=1e-5, atol=1e-6)
    warned, _ = saved(model, tmp_path)
    assert warned == []
    found = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(outputs(found), got, rtol=1e-5, atol=1e-5)
    keys = model.state_dict().keys()
    model.tie_weights()
    assert model.state_dict().keys() == keys
    torch.testing.assert_close(outputs(model), got, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::paramlora.ParamloraWarning")
def test_embeddings_that_are_resized_together_keep_each_its_update():
    model = attached(t5, APART)
    want, paths = outputs(model), [path for path, _, _ in updates(model)]
    model.resize_token_embeddings(23)
    torch.testing.assert_close(outputs(model)[..., :20], want, rtol=1e-5, atol=1e-6)
    assert [path for path, _, _ in updates(model)] == paths
    assert model.encoder.embed_tokens.num_embeddings == model.shared.num_embeddings == 23
    paramlora.detach(model)
    assert (
        len({id(m.weight) for m in (model.shared, model.encoder.embed_tokens, model.lm_head)}) == 1
    )
    assert outputs(model).shape[-1] == 23


class Hubbed(nn.Module, PyTorchModelHubMixin):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)


def test_a_model_of_the_hubs_mixin(tmp_path):
    model = fill(paramlora.attach(Hubbed(), {"layer": {"r": 2}}))
    (warned,), names = saved(model, tmp_path)
    found = Hubbed.from_pretrained(tmp_path)
    assert not torch.equal(found.layer.weight, model.layer.weight)
    exec(
        warned.partition("then call ")[2].removesuffix("."),
        {"paramlora": paramlora, "model": found},
    )
    assert torch.equal(found.layer.weight, model.layer.weight)


def test_a_process_that_is_not_the_main_one_writes_nothing(tmp_path):
    attached(gpt2, {"c_attn": {"r": 2}}).save_pretrained(tmp_path, is_main_process=False)
    attached(gpt2, {"c_attn": {"r": 2}}).save_pretrained(tmp_path, False)
    assert list(tmp_path.iterdir()) == []


def test_the_class_is_untouched_and_the_last_detach_takes_everything_off(tmp_path):
    model, own = gpt2(), transformers.GPT2LMHeadModel.save_pretrained
    before = set(model.__dict__), set(model.transformer.__dict__)
    for undo in (paramlora.detach, paramlora.merge):
        paramlora.attach(model, {"c_attn": {"r": 2}})
        paramlora.attach(model, {"c_attn": {"r": 2}}, "second")
        assert type(model) is transformers.GPT2LMHeadModel
        assert transformers.GPT2LMHeadModel.save_pretrained is own
        undo(model, "second")
        assert "save_pretrained" in model.__dict__
        undo(model)
        assert (set(model.__dict__), set(model.transformer.__dict__)) == before
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("adapter*"))


def test_a_deep_copy_saves_itself(tmp_path):
    model = attached(gpt2, {"c_attn": {"r": 2}})
    other = copy.deepcopy(model)
    for _, _, update in updates(other):
        update.lora_B.data.mul_(2)
    saved(other, tmp_path)
    found = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(outputs(found), outputs(other), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(outputs(other), outputs(model), rtol=1e-3)


def test_an_inner_model_saves_its_own_part(tmp_path):
    model = attached(llama, {"q_proj": {"r": 2}})
    saved(model.model, tmp_path)
    found = transformers.LlamaModel.from_pretrained(tmp_path)
    ids = torch.arange(6)[None]
    want = model.model.eval()(ids).last_hidden_state
    torch.testing.assert_close(found(ids).last_hidden_state, want, rtol=1e-5, atol=1e-5)


def test_a_compiled_model_saves_the_same(tmp_path):
    model = attached(gpt2, {"c_attn": {"r": 2}})
    torch.compile(model, backend="eager").save_pretrained(tmp_path)
    found = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(outputs(found), outputs(model), rtol=1e-5, atol=1e-5)


def test_beside_somebodys_parametrization_the_base_keeps_its_keys(tmp_path):
    model = gpt2(tie_word_embeddings=False)
    parametrizations.orthogonal(model.transformer.h[0].attn.c_proj)
    plain = model.state_dict().keys()
    model = paramlora.attach(model, {"c_attn": {"r": 2}, "0.attn.c_proj": {"r": 2}})
    from paramlora.integrations.pretrained import _base_state

    assert set(_base_state(model, model.state_dict(), False)) == set(plain)


def test_a_float16_base_keeps_its_type_and_the_factors_theirs(tmp_path):
    torch.manual_seed(0)
    model = fill(paramlora.attach(llama().to(torch.bfloat16), {"q_proj": {"r": 2}}))
    saved(model, tmp_path)
    assert {v.dtype for v in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    factors = load_file(tmp_path / "adapter_model.safetensors").values()
    assert {v.dtype for v in factors} == {torch.float32}
    found = paramlora.load_adapter(plain_of(type(model), tmp_path).to(torch.bfloat16), tmp_path)
    torch.testing.assert_close(outputs(found), outputs(model), rtol=0, atol=0)


TIED = {"re:.*(wte|lm_head)": {"r": 2}}


def base(tied=True):
    torch.manual_seed(0)
    size = dict(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    ends = dict(bos_token_id=0, eos_token_id=0)
    config = transformers.GPT2Config(tie_word_embeddings=tied, **size, **ends)
    return transformers.GPT2LMHeadModel(config).double().eval()


def sums(model):
    """By path, the update of each weight in the weight's shape."""
    return {
        path: (
            update.delta(module.weight.shape)
            if hasattr(update, "lora_A")
            else update.lora_whole - module.parametrizations.weight.original
        ).detach()
        for path, module, update in updates(model)
    }


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


ENDS = {
    "tied": (True, TIED),
    "embedding": (False, {"wte": {"r": 2}}),
    "head": (False, {"lm_head": {"r": 2}}),
    "soft head": (False, {"lm_head": {"r": 2, "hard": 0}, "wte": {"r": 3}}),
    "both": (False, {"wte": {"r": 2}, "lm_head": {"r": 3}}),
    "pissa": (False, {"wte": {"r": 2, "init": "pissa"}, "lm_head": {"r": 3, "init": "olora"}}),
    "whole": (False, {"wte": {"whole": True}, "c_attn": {"r": 2}}),
    "none of them": (True, {"c_attn": {"r": 2}}),
}


@pytest.mark.parametrize("how", ((23, None), (23, 8), (None, 16), (12, None), (20, None)))
@pytest.mark.parametrize("case", ENDS)
def test_a_vocabulary_of_another_size_keeps_the_updates_on_the_old_rows(case, how):
    tied, config = ENDS[case]
    model = fill(paramlora.attach(base(tied), config))
    old = sums(model)
    ids = {id(p) for _, _, update in updates(model) for p in update.parameters()}
    plain = base(tied)
    for one in (plain, model):
        torch.manual_seed(5)
        got = one.resize_token_embeddings(how[0], pad_to_multiple_of=how[1])
    size = plain.config.vocab_size
    assert size == model.config.vocab_size == got.num_embeddings == model.vocab_size
    assert got is model.get_input_embeddings() and model.lm_head.out_features == size
    assert {id(p) for _, _, update in updates(model) for p in update.parameters()} == ids
    kept = min(20, size)
    with torch.no_grad():
        for path, delta in sums(model).items():
            layer = plain.get_submodule(path)
            rows = slice(None) if "attn" in path else slice(kept)
            torch.testing.assert_close(delta[rows], old[path][rows], rtol=1e-12, atol=1e-12)
            layer.weight[rows] += old[path][rows]
            for name in (path, "lm_head") if tied and path == "transformer.wte" else (path,):
                there = model.get_submodule(name)
                shown = there.weight
                if "lora_branches" in there._modules:
                    shown = shown + there.lora_branches[0].delta(shown.shape)
                torch.testing.assert_close(shown, layer.weight, rtol=1e-12, atol=1e-12)
    tokens = torch.arange(min(size, 23))[None, -8:]
    torch.testing.assert_close(logits(model, tokens), logits(plain, tokens), rtol=1e-9, atol=1e-9)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora" not in n)
    paramlora.merge(model)
    torch.testing.assert_close(logits(model, tokens), logits(plain, tokens), rtol=1e-9, atol=1e-9)
    assert type(model.lm_head) is torch.nn.Linear
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied


KINDS = {
    "dora": {"r": 2, "kind": "dora"},
    "dora pissa": {"r": 2, "kind": "dora", "init": "pissa"},
    "loha": {"r": 2, "kind": "loha"},
    "difference": {"kind": "difference"},
    "rows": {"rows": [2, 5]},
    "whole": {"whole": True},
}
PLACES = {
    "tied": (True, "re:.*(wte|lm_head)"),
    "embedding": (False, "wte"),
    "head": (False, "lm_head"),
}


@pytest.mark.parametrize("size", [23, 12])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_the_rows_that_stay(kind, place, size, tmp_path):
    tied, name = PLACES[place]
    name = f"{name}.*" if kind == "whole" and tied else name
    model = fill(paramlora.attach(base(tied), {name: KINDS[kind]}))
    for _, _, update in updates(model):
        if kind == "difference":
            torch.nn.init.normal_(update.lora_diff)
    paths = {path for path, _, _ in updates(model)}
    layers = {path: model.get_submodule(path) for path in paths}
    before = {path: layer.weight.detach() for path, layer in layers.items()}
    model.resize_token_embeddings(size, mean_resizing=False)
    kept, tokens = min(20, size), torch.arange(size)[None, -8:]
    for path, want in before.items():
        layer = model.get_submodule(path)
        torch.testing.assert_close(layer.weight[:kept], want[:kept], rtol=1e-9, atol=1e-9)
        held = layer.parametrizations.weight
        # an embedding's DoRA is one length for all rows: new ones are as long as old ones became
        if size > kept and (not kind.startswith("dora") or place == "head"):
            torch.testing.assert_close(layer.weight[kept:], held.original[kept:])
    model(input_ids=tokens, labels=tokens).loss.backward()
    if size > kept and kind in ("loha", "dora"):
        ((_, _, update), *_) = updates(model)
        grown = [p.grad for p in update.parameters() if size in p.shape]
        assert any(grad.narrow(grad.shape.index(size), kept, 3).any() for grad in grown)
    want = logits(model, tokens)
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    other = base(tied)
    other.resize_token_embeddings(size)
    other.load_state_dict(paramlora.detach(copy.deepcopy(model)).state_dict())
    paramlora.load_adapter(other, tmp_path / "a.safetensors")
    torch.testing.assert_close(logits(other, tokens), want)
    torch.testing.assert_close(logits(paramlora.merge(model), tokens), want)


@pytest.mark.parametrize("place", PLACES)
def test_a_kind_that_cannot_grow_is_refused_and_nothing_changes(place):
    tied, name = PLACES[place]
    model = fill(paramlora.attach(base(tied), {name: {"r": 1, "kind": "lokr"}}))
    tokens = torch.arange(8)[None]
    want, state = logits(model, tokens), copy.deepcopy(model.state_dict())
    with pytest.raises(paramlora.AdapterError, match="Lokr does not say what lokr_w1 is on new"):
        model.resize_token_embeddings(23)
    assert model.config.vocab_size == 20 and torch.equal(logits(model, tokens), want)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_a_resized_model_trains_saves_and_loads(tmp_path):
    model = fill(paramlora.attach(base(), TIED))
    model.resize_token_embeddings(23)
    tokens = torch.arange(15, 23)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    ((_, _, update),) = updates(model)
    assert update.lora_A.shape == update.lora_A.grad.shape == (2, 23)
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    other = base()
    other.resize_token_embeddings(23)
    other.load_state_dict(paramlora.detach(copy.deepcopy(model)).state_dict())
    paramlora.load_adapter(other, tmp_path / "a.safetensors")
    torch.testing.assert_close(logits(other, tokens), logits(model, tokens), rtol=0, atol=0)


def test_a_square_one_still_tells_its_sides():
    from paramlora import checkpoint

    model = fill(paramlora.attach(base(False), {"wte": {"r": 2}}))
    model.resize_token_embeddings(16)
    layer = model.transformer.wte
    want = layer.weight.detach()
    state = checkpoint.merge(model.state_dict())
    torch.testing.assert_close(state["transformer.wte.weight"], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", (TIED, {"lm_head": {"r": 2}}, {"wte": {"r": 2}}))
@pytest.mark.filterwarnings("ignore:.*one tensor is held as")
def test_tying_again_ties_the_base_as_before(config):
    model = fill(paramlora.attach(base(), config))
    tokens = torch.arange(8)[None]
    want, keys = logits(model, tokens), list(model.state_dict())
    model.tie_weights()
    assert torch.equal(logits(model, tokens), want) and list(model.state_dict()) == keys
    tensors = [
        m.parametrizations.weight.original if hasattr(m, "parametrizations") else m.weight
        for m in (model.transformer.wte, model.lm_head)
    ]
    assert tensors[0] is tensors[1]


def test_tying_ties_what_was_apart():
    model = base(False)
    model.config.tie_word_embeddings = True
    fill(paramlora.attach(model, {"wte": {"r": 2}, "lm_head": {"r": 2}}))
    model.tie_weights()
    head, embedding = model.lm_head.parametrizations.weight, model.transformer.wte.parametrizations
    assert head.original is embedding.weight.original and head[0] is not embedding.weight[0]


@pytest.mark.parametrize("which", ("input", "output"))
def test_replacing_an_adapted_end_is_refused(which):
    model = fill(paramlora.attach(base(False), {"wte": {"r": 2}, "lm_head": {"r": 2}}))
    ask, put = (getattr(model, f"{verb}_{which}_embeddings") for verb in ("get", "set"))
    old = ask()
    put(old)
    with pytest.raises(paramlora.AdapterError, match=f"set_{which}_embeddings would lose"):
        put(torch.nn.Embedding(23, 16))
    assert ask() is old
    paramlora.detach(model)
    put(torch.nn.Embedding(23, 16))
    assert ask() is not old


def test_replacing_an_end_without_updates_works():
    model = paramlora.attach(base(False), {"c_attn": {"r": 2}})
    new = torch.nn.Embedding(23, 16)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new


def test_under_somebodys_parametrization_resizing_is_refused():
    model = base(False)
    parametrizations.weight_norm(model.lm_head)
    paramlora.attach(model, {"lm_head": {"r": 2}})
    with pytest.raises(paramlora.AdapterError, match="weight of Linear is under WeightNorm beside"):
        model.resize_token_embeddings(23)
    assert model.config.vocab_size == 20 and model.get_input_embeddings().num_embeddings == 20


def test_an_error_in_the_middle_leaves_the_updates_where_they_were():
    model = fill(paramlora.attach(base(), TIED))
    tokens = torch.arange(8)[None]
    want = logits(model, tokens)
    with pytest.raises(ValueError, match="which is not and integer"):
        model.resize_token_embeddings(23, pad_to_multiple_of=1.5)
    assert torch.equal(logits(model, tokens), want)
