"""peft's trainable tokens: read from its files, and read by it."""

import copy

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import paramlora
from paramlora.files.adapters import convert
from paramlora.formats import base_of
from paramlora.model.attach import updates

IDS = [5, 1, 11]
TOKENS = torch.arange(20)[None]


def llama(tied):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


CONFIGS = {
    "beside lora": lambda: peft.LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices=IDS, init_lora_weights=False
    ),
    "by name": lambda: peft.LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": IDS}
    ),
    "dora": lambda: peft.LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices=IDS, use_dora=True
    ),
    "alone": lambda: peft.TrainableTokensConfig(token_indices=IDS, target_modules=["embed_tokens"]),
}


@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("name", CONFIGS)
def test_pefts_are_read_and_written_back(name, tied, tmp_path, recwarn):
    base = llama(tied)
    theirs = peft.get_peft_model(copy.deepcopy(base), CONFIGS[name]()).eval()
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if "tokens_delta" in key:
                p.normal_()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = paramlora.load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    with torch.no_grad():
        want = theirs(TOKENS).logits
        torch.testing.assert_close(ours(TOKENS).logits, want, rtol=1e-5, atol=1e-5)
        assert (want - base(TOKENS).logits).abs().max() > 0.1
    rows = [u for _, _, u in updates(ours) if u.method == "rows"]
    assert len(rows) == 1 and rows[0].lora_ids.tolist() == sorted(IDS)

    paramlora.save_adapter(ours, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "again", "peft", base_of(base))
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS).logits, want, rtol=1e-5, atol=1e-5)
        merged = paramlora.merge(ours)(TOKENS).logits
        torch.testing.assert_close(merged, want, rtol=1e-5, atol=1e-5)


def test_what_peft_does_not_hold_is_refused(tmp_path):
    model = torch.nn.ModuleDict({"a": torch.nn.Embedding(4, 2), "b": torch.nn.Embedding(4, 2)})
    paramlora.attach(model, {"a": {"rows": [1]}, "b": {"rows": [2]}})
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    with pytest.raises(paramlora.FileError, match="a, b: rows of different numbers"):
        convert(tmp_path / "a.safetensors", tmp_path / "p", "peft", base_of(model))
    with pytest.raises(paramlora.FileError, match='"rows", which no file of kohya holds'):
        convert(tmp_path / "a.safetensors", tmp_path / "k", "kohya", base_of(model))


def extended(tied, seed):
    """A model with four more rows, which each run fills at random."""
    base = llama(tied)
    torch.manual_seed(seed)
    base.resize_token_embeddings(24, mean_resizing=False)
    return base.requires_grad_(False)


ADAPTED = {
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "both": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "neither": {"target_modules": ["q_proj"]},
}
MORE = torch.arange(24)[None]


@pytest.mark.parametrize("same", (True, False))
@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("name", ADAPTED)
def test_an_extended_vocabulary_comes_with_its_rows(name, tied, same, tmp_path, recwarn):
    """peft's ``save_embedding_layers``: other new rows than those that it saved are replaced."""
    config = peft.LoraConfig(r=2, init_lora_weights=False, **ADAPTED[name])
    theirs = peft.get_peft_model(extended(tied, 1), config).eval()
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    other = extended(tied, 1 if same else 2)
    reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(other), tmp_path / "theirs").eval()
    ours = paramlora.load_adapter(copy.deepcopy(other), tmp_path / "theirs")
    want = reloaded(input_ids=MORE).logits
    assert (want - other(MORE).logits).abs().max() > (1e-4 if name == "neither" else 0.01)
    torch.testing.assert_close(ours(MORE).logits, want, rtol=1e-5, atol=1e-5)
    adapter = paramlora.adapter_of(ours)
    assert bool(adapter.whole) != same  # a copy of what the model has says nothing
    torch.testing.assert_close(paramlora.merge(ours)(MORE).logits, want, rtol=1e-5, atol=1e-5)


def test_without_the_model_the_saved_rows_are_kept(tmp_path, recwarn):
    config = peft.LoraConfig(r=2, init_lora_weights=False, **ADAPTED["embedding"])
    theirs = peft.get_peft_model(extended(False, 1), config).eval()
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    convert(tmp_path / "theirs", tmp_path / "a.safetensors", "native")
    ours = paramlora.load_adapter(extended(False, 2), tmp_path / "a.safetensors")
    reloaded = peft.PeftModel.from_pretrained(extended(False, 2), tmp_path / "theirs").eval()
    want = reloaded(input_ids=MORE).logits
    torch.testing.assert_close(ours(MORE).logits, want, rtol=1e-5, atol=1e-5)
