"""peft's trainable tokens: read from its files, and read by it."""

import copy

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

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


LAYERS = {
    "a transformers Conv1D": lambda: Conv1D(6, 4),
    "a convolution": lambda: torch.nn.Conv2d(4, 6, 3),
    "an EmbeddingBag": lambda: torch.nn.EmbeddingBag(6, 4),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_of_what_peft_has_none_of_are_refused(name, tmp_path):
    model = torch.nn.ModuleDict({"a": LAYERS[name](), "b": torch.nn.Linear(4, 3)})
    for config in ({"a": {"rows": [1]}}, {"a": {"rows": [1]}, "b": {"r": 2}}):
        paramlora.attach(model, config)
        paramlora.save_adapter(model, tmp_path / "a.safetensors")
        paramlora.detach(model)
        for base in (None, base_of(model)):
            with pytest.raises(paramlora.FileError, match=f"a: rows of {name}, which PEFT trains"):
                convert(tmp_path / "a.safetensors", tmp_path / "p", "peft", base)
